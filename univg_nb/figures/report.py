"""One HTML page on how models did: scores, kinds of failure, cases with pictures.

The page is a single file: pictures are embedded, nothing is loaded from elsewhere (the
page itself forbids it), and whatever a model or a records file says is escaped. The
tables are written as Markdown too.
"""

import argparse
import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from matplotlib.figure import Figure

from univg_nb import paper
from univg_nb.evaluate import scoring
from univg_nb.evaluate.predictions import Reply, parse_named_files, read_predictions
from univg_nb.evaluate.score import Benchmark, add_scoring_arguments, score
from univg_nb.evaluate.scoring import ItemScore, ScoringOptions
from univg_nb.figures import drawing, plots, tables
from univg_nb.figures.tables import Scored
from univg_nb.io import write_text

TEMPLATE = Path(__file__).with_name("report.html.jinja")
LONGEST_TEXT = 1500  # characters of a reply shown
_DPI = 62  # 230 px an image

Replies = Mapping[str, dict[int, list[Reply]]]


def write_report(
    bench: Benchmark,
    files: Mapping[str, Path],
    out: str | Path,
    options: ScoringOptions = scoring.DEFAULT_OPTIONS,
    *,
    column: str | None = None,
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
        column: the published column (of the paper's Table 2 or 3) beside one task.
        cases: items shown of each kind.

    Raises:
        ValueError: as `scoring.score_items`, or a picture cannot be opened.
    """
    replies = {name: read_predictions(path) for name, path in files.items()}
    indices = None
    if options.allow_missing:
        indices = sorted(set.intersection(*map(set, replies.values())))
    scores = {
        name: score(bench, path, options, indices) for name, path in files.items()
    }
    scored = {
        name: [ItemScore(**row) for row in result["items"]]
        for name, result in scores.items()
    }
    shown = {"Scores": tables.build_score_table(scores, column)}
    for name, items in scored.items():
        shown[f"Kinds of result: {name}"] = tables.count_kinds(items)
    shown["Replies as they were read"] = tables.count_statuses(scored)
    if len(scored) > 1:
        shown["Gains on the same items"] = tables.compute_paired_gains(scored)
    picked = {
        title: [
            _describe_case(bench, index, scored, replies, options.allow_missing)
            for index in chosen
        ]
        for title, chosen in _pick_cases(scored, cases).items()
    }
    facts = _collect_facts(scores)
    out = Path(out)
    write_text(out, _render_page(facts, shown, scored, picked))
    text = [f"# {facts[0]}\n", *(f"- {line}\n" for line in facts[1:])]
    for name, table in shown.items():
        text.append(f"\n## {name}\n\n{tables.format_markdown(table)}")
    write_text(out.with_suffix(".md"), "".join(text))
    return out, out.with_suffix(".md")


def _collect_facts(scores: Mapping[str, dict[str, Any]]) -> list[str]:
    """Return the title, and what a reader must know to compare these numbers."""
    one = next(iter(scores.values()))
    n, in_records = one["pooled"]["n"], one["items_in_records"]
    lines = [
        f"{one['benchmark']['name']}: {one['records']}",
        f"{n} of {in_records} items in the records, SHA-256 {one['records_sha256']}",
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


def _pick_cases(scored: Scored, count: int) -> dict[str, list[int]]:
    """Choose items by title: the last model's worst and best, its wins and losses."""
    names = list(scored)
    earlier, name = names[0], names[-1]
    first, last = scored[earlier], scored[name]
    # where there is a box, there is something to see
    worst = sorted(last, key=lambda item: (item.box is None, item.iou))
    best = sorted(last, key=lambda item: -item.iou)
    picked = {
        f"Worst of {name}": _spread([i for i in worst if i.iou < 0.5], count),
        f"Best of {name}": _spread([i for i in best if i.iou >= 0.5], count),
    }
    if len(scored) > 1:
        gap = {b.index: b.iou - a.iou for a, b in zip(first, last, strict=True)}
        won = sorted(last, key=lambda item: -gap[item.index])
        up = [item for item in won if gap[item.index] > 0]
        down = [item for item in reversed(won) if gap[item.index] < 0]
        picked[f"Won: {name} over {earlier}"] = _spread(up, count)
        picked[f"Lost: {name} to {earlier}"] = _spread(down, count)
    return picked


def _spread(ranked: Sequence[ItemScore], count: int) -> list[int]:
    """Return the first `count` indices, one of each task before a second of any."""
    seen: Counter[str] = Counter()
    turns = []
    for place, item in enumerate(ranked):
        turns.append((seen[item.task], place, item.index))
        seen[item.task] += 1
    return [index for _, _, index in sorted(turns)[:count]]


def _describe_case(
    bench: Benchmark, index: int, scored: Scored, replies: Replies, allow_missing: bool
) -> dict[str, Any]:
    """Return what the page says of an item: its picture and every model's reply."""
    sample = bench.items[index]
    found = {
        name: next(item for item in items if item.index == index)
        for name, items in scored.items()
    }
    picture, problem = "", ""
    try:
        drawn = {name: item.box for name, item in found.items()}
        picture = _encode_figure(drawing.show_sample(sample, drawn, title=False))
    except ValueError as error:
        if not allow_missing:
            raise
        problem = str(error)
    return {
        "task": paper.TASK_COLUMN.get(sample.task, sample.task),
        "index": index,
        "sample": sample,
        "picture": picture,
        "problem": problem,
        "replies": [
            (name, item, scoring.classify_result(item))
            + split_reply(replies[name][index][0].text)
            for name, item in found.items()
        ],
    }


def split_reply(text: str) -> tuple[str, str]:
    """Split a reply into its thinking, without tags, and the rest.

    Each is cut at LONGEST_TEXT characters. Thinking that is never closed has no rest.
    """
    head, _, tail = text.partition("<think>")
    think, _, rest = tail.partition("</think>")
    parts = (think.strip(), (head + rest).strip())
    cut = [p[:LONGEST_TEXT] + "…" if len(p) > LONGEST_TEXT else p for p in parts]
    return cut[0], cut[1]


def _encode_figure(figure: Figure) -> str:
    """Return a figure as the data URL of a small JPEG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="jpeg", dpi=_DPI, pil_kwargs={"quality": 82})
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _render_page(
    facts: Sequence[str],
    shown: Mapping[str, pd.DataFrame],
    scored: Scored,
    picked: Mapping[str, list[dict[str, Any]]],
) -> str:
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    frames = {name: frame.reset_index() for name, frame in shown.items()}
    ious = {name: [item.iou for item in items] for name, items in scored.items()}
    curve = Figure(figsize=(6.5, 4.2), layout="constrained")
    plots.plot_iou_curve(ious, curve.add_subplot())
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        facts=facts,
        tables={
            name: {"columns": list(frame.columns), "rows": tables.format_cells(frame)}
            for name, frame in frames.items()
        },
        curve=_encode_figure(curve),
        picked=picked,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a report from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m univg_nb report",
        description="Write one HTML page on how models did, and its tables as .md.",
        epilog="example: python -m univg_nb report sft=a.jsonl grpo=b.jsonl "
        "--records MIG_data.json --image-root images --out report.html",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("predictions", nargs="+", metavar="[NAME=]FILE", help="one for each model")
    add_scoring_arguments(parser)
    add("--out", required=True, help="page; the .md goes beside it")
    add("--column", help='published column of a one-task file, as "LISA test"')
    add("--cases", type=int, default=6, help="items shown of each kind (default: 6)")
    options = parser.parse_args(arguments)
    written = write_report(
        Benchmark.read(options.records, options.image_root),
        parse_named_files(options.predictions),
        options.out,
        ScoringOptions(
            options.parser, options.rule, allow_missing=options.allow_missing
        ),
        column=options.column,
        cases=options.cases,
    )
    print("written:", *written)
