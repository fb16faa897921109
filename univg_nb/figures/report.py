"""One HTML page on how models did: scores, kinds of failure, cases with pictures.

The page is a single file: pictures are embedded, nothing is loaded from elsewhere (the
page itself forbids it), and whatever a model or a records file says is escaped. The
tables are written as Markdown too.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from matplotlib.figure import Figure

from univg_nb.config import make_parser, output_file, within
from univg_nb.evaluate import score, scoring
from univg_nb.evaluate.predictions import Reply, parse_named_files, read_predictions
from univg_nb.evaluate.scoring import ItemScore, ScoringOptions
from univg_nb.figures import drawing, plots, tables
from univg_nb.figures.tables import Scored
from univg_nb.io import ASSETS, write_text

_DPI = 62  # 230 px an image


def write_report(
    bench: score.Benchmark,
    files: Mapping[str, Path],
    out: str | Path,
    options: ScoringOptions = scoring.DEFAULT_OPTIONS,
    *,
    cases: int = 6,
) -> tuple[Path, Path]:
    """Write a page and, beside it, its tables as Markdown; return both files.

    Cases are chosen for the last model, wins and losses are its over the first, gains
    are of each model over the one before.

    Args:
        bench: what was predicted, read with its image root.
        files: predictions by model, in the order of training.
        out: the page.
        options: how replies are read; `allow_missing` is for pictures too.
        cases: items shown of each kind.

    Raises:
        ValueError: as `scoring.score_items`, or a picture cannot be opened.
    """
    replies = {name: read_predictions(path) for name, path in files.items()}
    indices = None
    if options.allow_missing:
        indices = sorted(set.intersection(*map(set, replies.values())))
        if not indices:
            raise ValueError("nothing to report: no item has a reply of every model")
    scores = {
        name: score.score(bench, path, options, indices) for name, path in files.items()
    }
    scored = {
        name: [ItemScore(**row) for row in result["items"]]
        for name, result in scores.items()
    }
    shown = {"Scores": tables.build_score_table(scores)}
    for name, items in scored.items():
        shown[f"Kinds of result: {name}"] = tables.count_kinds(items)
    shown["Replies as they were read"] = tables.count_statuses(scored)
    if len(scored) > 1:
        shown["Gains on the same items"] = tables.compute_paired_gains(scored)
    ious = {name: [item.iou for item in items] for name, items in scored.items()}
    picked = {
        title: [
            _describe_case(
                bench,
                {name: items[place] for name, items in scored.items()},
                replies,
                options.allow_missing,
            )
            for place in places
        ]
        for title, places in pick_cases(scored, cases).items()
    }
    facts = _collect_facts(scores)
    template = jinja2.Template(
        (ASSETS / "report.html.jinja").read_text(encoding="utf-8"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    page = template.render(
        facts=facts,
        tables={name: frame.reset_index() for name, frame in shown.items()},
        format_cells=tables.format_cells,
        curve=_encode_figure(plots.plot_iou_curve(ious)),
        picked=picked,
    )
    out = Path(out)
    write_text(out, page)
    text = [f"# {facts[0]}\n", *(f"- {line}\n" for line in facts[1:])]
    for name, table in shown.items():
        text.append(f"\n## {name}\n\n{tables.format_markdown(table)}")
    write_text(out.with_suffix(".md"), "".join(text))
    return out, out.with_suffix(".md")


def _collect_facts(scores: Mapping[str, dict[str, Any]]) -> list[str]:
    """Return the title, and what a reader must know to compare these numbers."""
    one = next(iter(scores.values()))
    lines = [
        f"{one['benchmark']['name']}: {one['records']}",
        f"{one['pooled']['n']} of {one['items_in_records']} items in the records, "
        f"SHA-256 {one['records_sha256']}",
        f"parser {one['parser']}, rule {one['rule']}; accuracy at IoU 0.5 in percent, "
        "with 95 % intervals",
    ]
    if one["benchmark"]["name"] != "MIG-Bench revised":
        lines.append(
            "published rows were not measured on this file: compare the order of rows "
            "and columns, not the values"
        )
    for name, result in scores.items():
        made = result["generation"] or {}
        keys = ("model", "style", "max_new_tokens", "temperature", "attention")
        known = ", ".join(f"{key} {made[key]}" for key in keys if key in made)
        lines.append(f"{name}: {known or 'how its replies were made is not recorded'}")
    return lines


def pick_cases(scored: Scored, count: int) -> dict[str, list[int]]:
    """Choose items: the last model's worst and best, its wins and losses.

    Returns {title: places in the lists of `scored`}, `count` of each kind at most, one
    of each task before a second of any.
    """
    names = list(scored)
    first, last = (pd.DataFrame(scored[name]) for name in (names[0], names[-1]))
    # where there is a box, there is something to see
    worst = last.assign(no_box=last["box"].isna()).sort_values(["no_box", "iou"])
    best = last.sort_values("iou", ascending=False, kind="stable")
    ranked = {
        f"Worst of {names[-1]}": worst[worst["iou"] < 0.5],
        f"Best of {names[-1]}": best[best["iou"] >= 0.5],
    }
    if len(names) > 1:
        last["gain"] = last["iou"] - first["iou"]
        won = last.sort_values("gain", ascending=False, kind="stable")
        ranked[f"Won: {names[-1]} over {names[0]}"] = won[won["gain"] > 0]
        ranked[f"Lost: {names[-1]} to {names[0]}"] = won[won["gain"] < 0][::-1]
    turns = {title: items.groupby("task").cumcount() for title, items in ranked.items()}
    return {
        title: turn.sort_values(kind="stable").index[:count].tolist()
        for title, turn in turns.items()
    }


def _describe_case(
    bench: score.Benchmark,
    found: Mapping[str, ItemScore],
    replies: Mapping[str, dict[int, Reply]],
    allow_missing: bool,
) -> dict[str, Any]:
    """Return what the page says of an item: its picture and every model's reply."""
    index = next(iter(found.values())).index
    sample = bench.items[index]
    case = {"index": index, "sample": sample, "task": score.format_task(sample.task)}
    case["replies"] = [
        (name, item, scoring.classify_result(item))
        + split_reply(replies[name][index].text)
        for name, item in found.items()
    ]
    boxes = {name: item.box for name, item in found.items()}
    try:
        picture = drawing.show_sample(sample, boxes, title=False)
    except ValueError as error:
        if not allow_missing:
            raise
        return case | {"picture": "", "problem": str(error)}
    return case | {"picture": _encode_figure(picture)}


def split_reply(text: str) -> tuple[str, str]:
    """Split a reply into its thinking, without tags, and the rest ("" if unclosed)."""
    head, _, tail = text.partition("<think>")
    think, _, rest = tail.partition("</think>")
    return think.strip(), (head + rest).strip()


def _encode_figure(figure: Figure) -> str:
    """Return a figure as the data URL of a small JPEG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="jpeg", dpi=_DPI, pil_kwargs={"quality": 82})
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a report from the command line."""
    parser = make_parser(
        "report",
        "Write one HTML page on how models did, and its tables as .md.",
        "sft=a.jsonl grpo=b.jsonl --records MIG_data.json --image-root "
        "images --out report.html",
    )
    add = parser.add_argument
    add("predictions", nargs="+", metavar="[NAME=]FILE", help="one for each model")
    score.add_scoring_arguments(parser)
    add("--out", required=True, type=output_file, help="page; the .md goes beside it")
    add(
        "--cases",
        type=within(int, 0),
        default=6,
        help="items shown of each kind (default: 6)",
    )
    options = parser.parse_args(arguments)
    options.image_root = options.image_root or Path(options.records).parent
    bench, how = score.read_scoring_arguments(options)
    files = parse_named_files(options.predictions)
    print(
        "written:", *write_report(bench, files, options.out, how, cases=options.cases)
    )
