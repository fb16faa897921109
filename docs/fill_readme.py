"""Fill the measured tables of README.md and docs/ from a run, and draw the pictures.

    python docs/fill_readme.py runs/tiny

`python -m univg_nb figures --check` compares them again with the run.

Everything between ``<!-- name -->`` and ``<!-- /name -->`` is replaced: ``results``
by the run's result table, ``minutes`` by the time of each notebook, ``findings`` by the
verdicts of one run on the paper's claims, ``other_seed`` by those recorded of another
seed, ``study`` and, shorter, ``verdicts`` by those of the recorded study, ``training``
by the records of the shipped stage 1, ``models`` by the evaluations of the shipped
models, ``bench`` by what `make bench` measured of an update, ``gpu`` by what was
measured on GPUs, ``gpu_line`` by their names and a picture of it. No number in them is
typed.
"""

import re
import sys
from pathlib import Path

import pandas as pd
import torch
from PIL import Image

from univg_nb.fast.packed_rows import block_mask
from univg_nb.figures import drawing, exhibits, findings, gpu
from univg_nb.figures.tables import format_markdown
from univg_nb.io import read_json, read_jsonl, write_text
from univg_nb.minimig import items
from univg_nb.models import ASSETS, STAGE1
from univg_nb.runs import format_speed

ROOT = Path(__file__).parents[1]
PAGES = {  # parts of each page
    "README.md": ("minutes", "results", "verdicts", "gpu_line"),
    "docs/results.md": ("study", "findings", "other_seed"),
    "docs/fast_step.md": ("bench", "gpu"),
    "docs/model_card.md": ("training", "models"),
}
LEARNED = {
    "00": "the paper in five sentences; what the model sees, answers and cannot do",
    "01": "boxes, formats and the ten tasks; how data is audited before training",
    "02": "how chains of reasoning are written, checked and chosen",
    "03": "where the loss of SFT is, what LoRA trains, whether chains help",
    "04": "what four bits save and cost",
    "05": "GRPO by hand, then trained: what eight tries of a question teach",
    "06": "which groups push, and whether weighting them by difficulty pays",
    "07": "scoring with intervals; how parsers change a number",
    "08": "what carries over to questions that training never showed",
    "09": "every table and figure of the paper beside ours, with verdicts",
    "10": "memory, hours and price of the real thing, and its recipe",
    "11": "why a shared prompt need not be computed eight times",
}
PICTURES = ROOT / "notebooks" / "images"
RECORDS = ROOT / "notebooks" / "reference_runs"
GPU_PICTURE = "gpu_speedups.png"
SHOWN = (("common_object", 4), ("reasoning", 4), ("correspondence", 4))


def fill(text, name, content):
    """Return `text` with the part called `name` replaced; ValueError without it."""
    part = re.compile(rf"(<!-- {name} -->).*?(<!-- /{name} -->)", re.DOTALL)
    if len(part.findall(text)) != 1:
        raise ValueError(f"one part <!-- {name} --> ... <!-- /{name} --> is needed")
    return part.sub(lambda found: f"{found[1]}\n{content.strip()}\n{found[2]}", text)


def format_minutes(run_dir):
    """Return a table of the notebooks: what one learns, minutes from the manifest."""
    manifest = read_json(run_dir / "manifest.json")
    ran = manifest["notebooks"]
    rows = {}
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        minutes = ran.get(path.stem, {}).get("seconds", float("nan")) / 60
        learned = LEARNED[path.name[:2]]
        rows[f"[{path.stem}](notebooks/{path.name})"] = learned, minutes
    frame = pd.DataFrame(rows, index=["what you learn", "minutes"]).T.infer_objects()
    frame.loc["all"] = "", frame["minutes"].sum()
    table = format_markdown(frame.rename_axis("notebook"))
    return f"{table.strip()}\n\n{format_speed(manifest['speed'])}"


def format_training():
    """Return how many chains the shipped stage 1 learned from, and its seconds."""
    mixture = read_json(STAGE1 / "mixture.json")
    chains = sum(row["chains"] for row in mixture["chains"])
    rows = read_jsonl(STAGE1 / "training_log.jsonl")
    clocks = [row["seconds"] for row in rows]  # from 0 again after an interruption
    pairs = zip(clocks, [*clocks[1:], 0], strict=True)
    minutes = sum(now for now, then in pairs if then < now) / 60
    return (
        f"{chains:,} chains (no candidate of {mixture['refused']:,} questions passed "
        f"the checks), {rows[-1]['step']:,} updates, {minutes:.0f} minutes on a CPU "
        "beside other work, data and features not counted."
    )


def format_models():
    """Return what the shipped models can do, from their committed evaluations."""
    made = {
        "base": read_json(ASSETS / "evaluation.json"),
        "stage 1": read_json(STAGE1 / "evaluation.json"),
        "on other scenes": read_json(RECORDS / "stage1_seed_1.json"),
        "thorough chains only": read_json(STAGE1 / "evaluation_thorough.json"),
    }
    rows = {}
    for name, first in made["base"]["tests"].items():
        rows[name] = {"items": first["n"]}
        for model, one in made.items():
            row = one["tests"][name]
            ends = format_interval(row["ci_05"], 100, ".0f")
            rows[name][model] = f"{100 * row['acc_05']:.1f} [{ends}]"
        for task in first.get("tasks", ()):
            rows[task] = {"items": first["n"] // len(first["tasks"])}
            for model, one in made.items():
                rows[task][model] = f"{100 * one['tests'][name]['tasks'][task]:.0f}"
    for key in ("expected_iou", "easy", "medium", "hard"):
        groups = {m: one["groups"] for m, one in made.items() if "groups" in one}
        label = (
            "groups of eight: mean IoU" if key == "expected_iou" else f"{key} groups"
        )
        counts = dict.fromkeys(str(found["n"]) for found in groups.values())
        rows[label] = {"items": ", ".join(counts)}
        rows[label] |= {m: f"{found[key]:.2f}" for m, found in groups.items()}
    frame = pd.DataFrame.from_dict(rows, orient="index").fillna("–")
    return format_markdown(frame.rename_axis("held-out scenes, `Acc@0.5` in %"))


def format_interval(ends, factor, form):
    """Return the two ends as text; None is the interval of a single seed."""
    return " to ".join(f"{factor * end:{form}}" for end in ends or ()) or "one seed"


def format_findings(run_dir):
    """Return the verdict on each claim, by one run."""
    frame = exhibits.build_findings(exhibits.Runs([run_dir]))
    frame = findings.format_published(frame.drop(columns="why"))
    return format_markdown(frame, digits=1)


def format_other_seed():
    """Return the recorded verdicts of a run on another seed, on the claims it ran."""
    frame = pd.read_csv(RECORDS / "findings_seed_1.csv", index_col="claim")
    frame = findings.format_published(frame[frame["verdict"] != "not run"])
    return format_markdown(frame.drop(columns="why"), digits=1)


def read_study():
    """Return the verdicts of the recorded study, and how large it was."""
    path = RECORDS / "study_tiny.json"
    if not path.is_file():
        empty = pd.DataFrame({name: [] for name in ("ours", "lo", "hi", "verdict")})
        return empty.assign(paper=[], why=[]), "No study is recorded yet."
    found = read_json(path)
    seeds = {name: len(ones) for name, ones in found["arms"].items()}
    trained = {n: k for n, k in seeds.items() if found["study"]["arms"][n]["train"]}
    size = (
        f"{sum(trained.values())} trainings, up to {max(trained.values())} seeds of an "
        f"arm, {sum(found['tasks'].values()):,} test items."
    )
    return pd.DataFrame(found["findings"]).set_index("claim"), size


def format_study():
    """Return the verdict on each claim over seeds, then on each other weight."""
    frame, size = read_study()
    frame = findings.format_published(frame.drop(columns="why"))
    if not len(frame):
        return size
    parts = [format_markdown(frame, digits=2), size]
    if weights := read_json(RECORDS / "study_tiny.json")["weights"]:
        shown = pd.DataFrame(weights).drop(columns="why").set_index("arms")
        parts += ["", format_markdown(shown, digits=2)]
    return "\n".join(parts)


def format_verdicts():
    """Return what the study says of each claim: the effect in points, the verdict."""
    frame, size = read_study()
    frame = frame[frame["verdict"] != "not run"]
    effects = [
        f"{row.ours:+.1f} [{row.lo:+.1f}, {row.hi:+.1f}]" for row in frame.itertuples()
    ]
    short = pd.DataFrame({"points": effects, "verdict": frame["verdict"]}, frame.index)
    return f"{format_markdown(short)}\n{size}" if len(short) else size


def format_bench():
    """Return one update, TRL's trainer and ours, from the committed measurement."""
    measured = read_json(RECORDS / "bench_grpo.json")
    rows = []
    pairs = zip(measured["rows"][::2], measured["rows"][1::2], strict=True)
    for stock, shared in pairs:
        assert (stock["way"], shared["way"]) == ("stock", "shared")
        case = {"images": stock["images"], "prompt": stock["prompt"]}
        case |= {"reply": stock["completion"], "G": stock["group"]}
        both = {"TRL": stock, "shared": shared}
        case |= {f"{name}, s": row["seconds"]["update"] for name, row in both.items()}
        memory = {n: row["peak_mb"] - row["base_mb"] for n, row in both.items()}
        rows.append(case | {f"{name}, MB": mb for name, mb in memory.items()})
    lines = [format_markdown(pd.DataFrame(rows).set_index("images"), digits=2)]
    lines += [f"{measured['device']}, commit {measured['commit']}. Aimed at:", ""]
    for bar in measured["bars"]:
        verdict = "met" if bar["met"] else "not met"
        lines.append(
            f"- {bar['bar']} {bar['needed']}: {bar['measured']:.2f}, {verdict}"
        )
    short = measured["growth_of_short_replies"]
    lines += ["", f"With replies of {short['completion']} tokens, in proportion to the"]
    lines += [f"prompt as at full scale, the third is {short['ratio']:.2f}."]
    return "\n".join(lines)


def format_gpu():
    """Return what was measured on GPUs, the plain way beside ours."""
    records = gpu.load_gpu_records(RECORDS)
    table = gpu.compare_ways(records)
    line = gpu.format_gpu_line(records)
    return line if table.empty else f"{format_markdown(table, digits=2)}\n{line}"


def format_gpu_line():
    """Return the picture of what was measured on GPUs, and their names."""
    records = gpu.load_gpu_records(RECORDS)
    line = gpu.format_gpu_line(records)
    picture = f"![speed on GPUs]({(PICTURES / GPU_PICTURE).relative_to(ROOT)})"
    return line if records.empty else f"{picture}\n\n{line}"


def draw_mask(prompt=8, replies=3, length=4):
    """Draw which token of a shared row (down) sees which (across): blue squares."""
    owner = [0] * prompt + [r + 1 for r in range(replies) for _ in range(length)]
    seen = block_mask(torch.tensor([owner]))[0]  # (T, T)
    side = 14
    sheet = Image.new("RGB", (len(owner) * side + 1,) * 2, "#d9d9d9")
    for row, column in torch.cartesian_prod(*(torch.arange(len(owner)),) * 2).tolist():
        color = drawing.BLUE if seen[row, column] else "white"
        corner = (column * side + 1, row * side + 1)
        sheet.paste(Image.new("RGB", (side - 1, side - 1), color), corner)
    return sheet


def draw_items():
    """Draw three MiniMIG items, a row each: their images, the true box in green."""
    side, gap = 256, 8
    rows = [items.make(task, 0, "val", index) for task, index in SHOWN]
    columns = max(len(item.images) for item in rows)
    size = (columns * (side + gap) - gap, len(rows) * (side + gap) - gap)
    sheet = Image.new("RGB", size, "white")
    for row, item in enumerate(rows):
        target = drawing.get_target_index(item.sample)
        for column, image in enumerate(item.images):
            marked = [(item.sample.answer, drawing.TARGET_COLOR, "")]
            image = drawing.draw_boxes(image, marked if column == target else [], side)
            sheet.paste(image, (column * (side + gap), row * (side + gap)))
    return sheet


def build_parts(run_dir):
    """Return the content of every part of `PAGES` by name."""
    results = run_dir / "tables" / "results.md"
    return {
        "results": results.read_text(encoding="utf-8"),
        "minutes": format_minutes(run_dir),
        "training": format_training(),
        "bench": format_bench(),
        "gpu": format_gpu(),
        "gpu_line": format_gpu_line(),
        "findings": format_findings(run_dir),
        "other_seed": format_other_seed(),
        "study": format_study(),
        "verdicts": format_verdicts(),
        "models": format_models(),
    }


def main(run_dir):
    """Write the tables into their pages and draw the pictures of README."""
    content = build_parts(run_dir)
    for page, names in PAGES.items():
        text = (ROOT / page).read_text(encoding="utf-8")
        for name in names:
            text = fill(text, name, content[name])
        write_text(ROOT / page, text)
    draw_mask().save(PICTURES / "shared_prefix.png", optimize=True)
    draw_items().save(PICTURES / "minimig.png", optimize=True)
    records = gpu.load_gpu_records(RECORDS)
    if not records.empty:
        figure = gpu.plot_gpu_speedups(records)
        figure.savefig(PICTURES / GPU_PICTURE, dpi=144)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
