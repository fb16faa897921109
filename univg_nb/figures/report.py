"""One page on how models did: scores with intervals beside published ones, kinds of
failure by task, and the best and worst cases with their pictures and thinking.

The page is a single file: pictures are embedded, nothing is loaded from elsewhere (the
page itself forbids it), and whatever a model or a records file says is escaped. The
tables are written as Markdown too.
"""

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from univg_nb import io as io_module
from univg_nb import paper
from univg_nb.data.sample import GroundingSample
from univg_nb.evaluate import score, scoring
from univg_nb.evaluate.predictions import Reply, read_predictions
from univg_nb.evaluate.scoring import ItemScore
from univg_nb.figures import drawing, plots, tables
from univg_nb.figures.tables import Scored, kinds, paired_gains, score_table, statuses

LONGEST_TEXT = 1500  # characters of a reply shown
_DPI = 62  # 230 px an image
_STYLE = """
body {font: 15px/1.45 system-ui, sans-serif; max-width: 1100px; margin: 2em auto;
      padding: 0 1em; color: #222}
table {border-collapse: collapse; font-size: 13px; margin: 1em 0; display: block;
       overflow-x: auto}
th, td {padding: 3px 8px; text-align: right; border-bottom: 1px solid #ddd}
th:first-child, td:first-child {text-align: left; white-space: nowrap}
section.case {border-top: 1px solid #bbb; margin: 1.5em 0; padding-top: .5em}
blockquote {margin: .3em 0; padding: .2em 1em; background: #f5f5f5;
            white-space: pre-wrap; overflow-wrap: anywhere}
img {max-width: 100%} .note {color: #666}
"""
_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
"""


def write(
    records: str | Path,
    items: Sequence[GroundingSample],
    files: Mapping[str, Path],
    out: str | Path,
    *,
    parser: str = "answer",
    rule: str = "one",
    allow_missing: bool = False,
    column: str | None = None,
    cases: int = 6,
) -> tuple[Path, Path]:
    """Write the page `out` and its tables beside it as .md; returns both paths.

    items: those of `records`, read with the image root. files: {model: predictions}, in
    the order of training; cases are chosen for the last model, wins and losses are its
    over the first, gains are of each model over the one before. column: the published
    column beside a file of one task (a column of the paper's Table 2 or 3). cases:
    items shown of each kind.

    Raises ValueError as scoring.score_items does, and for a picture that cannot be
    opened. With `allow_missing` the items that all models answered are scored, the page
    says how many were not, and a missing picture is named in its place.
    """
    replies = {name: read_predictions(path) for name, path in files.items()}
    indices = None
    if allow_missing:
        indices = sorted(set.intersection(*(set(found) for found in replies.values())))
    options = {"parser": parser, "rule": rule, "indices": indices}
    scores = {
        name: score.scores_of(items, records, path, **options)
        for name, path in files.items()
    }
    scored = {
        name: scoring.score_items(items, found, **options)
        for name, found in replies.items()
    }
    shown = {"Scores": score_table(scores, column)}
    shown |= {f"Kinds of result: {name}": kinds(scored[name]) for name in scored}
    shown["Replies as they were read"] = statuses(scored)
    if len(scored) > 1:
        shown["Gains on the same items"] = paired_gains(scored)
    facts = _facts(scores, len(items))
    picked = _pick_cases(scored, cases)
    blocks = [
        f"<h2>{escape(title)}</h2>"
        + "".join(_case(items[i], i, scored, replies, allow_missing) for i in chosen)
        for title, chosen in picked.items()
    ]
    out = Path(out)
    markdown = out.with_suffix(".md")
    io_module.write_text(out, _page(facts, shown, scored, blocks))
    text = [f"# {facts[0]}\n", *(f"- {line}\n" for line in facts[1:])]
    text += [f"\n## {name}\n\n{tables.to_markdown(t)}" for name, t in shown.items()]
    io_module.write_text(markdown, "".join(text))
    return out, markdown


def _facts(scores: Mapping[str, dict], in_records: int) -> list[str]:
    """Title, and what one must know to compare these numbers with any other."""
    one = next(iter(scores.values()))
    n = one["pooled"]["n"]
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


# ---------------------------------------------------------------- cases


def _pick_cases(scored: Scored, count: int) -> dict[str, list[int]]:
    """{title: indices of items}: the worst and best of the last model and, against the
    first, its largest wins and losses; each list spread over the tasks."""
    first, last = next(iter(scored.values())), next(reversed(scored.values()))
    name, earlier = next(reversed(scored)), next(iter(scored))
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
    """The first `count` indices, one of each task before a second of any."""
    seen: Counter = Counter()
    turns = []
    for place, item in enumerate(ranked):
        turns.append((seen[item.task], place, item.index))
        seen[item.task] += 1
    return [index for _, _, index in sorted(turns)[:count]]


def _case(
    sample: GroundingSample,
    index: int,
    scored: Scored,
    replies: Mapping[str, dict[int, list[Reply]]],
    allow_missing: bool,
) -> str:
    """One item: question, picture with every model's box, every model's thinking."""
    found = {
        name: next(item for item in items if item.index == index)
        for name, items in scored.items()
    }
    task = paper.TASK_COLUMN.get(sample.task, sample.task)
    lines = [
        f"<section class='case'><h3>{escape(task)} · item {index} "
        f"({escape(sample.id)})</h3><p>{escape(sample.question)}</p>"
    ]
    try:
        drawn = {name: item.box for name, item in found.items()}
        figure = drawing.show_sample(sample, drawn, title=False)
        lines.append(f"<img alt='item {index}' src='{data_uri(figure)}'>")
    except ValueError as error:
        if not allow_missing:
            raise
        lines.append(f"<p class='note'>no picture: {escape(str(error))}</p>")
    for name, item in found.items():
        think, said = split_reply(replies[name][index][0].text)
        lines.append(
            f"<p><b>{escape(name)}</b>: {scoring.failure_kind(item)}, "
            f"IoU {item.iou:.2f}, {item.status}</p>"
            f"<blockquote>{escape(think) or '(no thinking)'}</blockquote>"
            f"<blockquote>{escape(said) or '(no answer)'}</blockquote>"
        )
    return "\n".join([*lines, "</section>"])


def split_reply(text: str) -> tuple[str, str]:
    """(thinking, the rest) of a reply, without the tags around the thinking, each cut
    at LONGEST_TEXT characters. Thinking that was never closed has no rest."""
    head, _, tail = text.partition("<think>")
    think, _, rest = tail.partition("</think>")
    parts = (think.strip(), (head + rest).strip())
    cut = [p[:LONGEST_TEXT] + "…" if len(p) > LONGEST_TEXT else p for p in parts]
    return cut[0], cut[1]


# ---------------------------------------------------------------- the page


def data_uri(figure: Figure) -> str:
    """The figure as a small JPEG inside a data URI."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="jpeg", dpi=_DPI, pil_kwargs={"quality": 82})
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _page(
    facts: Sequence[str],
    shown: Mapping[str, pd.DataFrame],
    scored: Scored,
    blocks: Sequence[str],
) -> str:
    curve = plots.iou_curve({n: [i.iou for i in items] for n, items in scored.items()})
    parts = [f"<title>{escape(facts[0])}</title><style>{_STYLE}</style></head><body>"]
    parts.append(f"<h1>{escape(facts[0])}</h1><ul class='note'>")
    parts += [f"<li>{escape(line)}</li>" for line in facts[1:]] + ["</ul>"]
    for name, frame in shown.items():
        # an interval may stand below its number, but is not broken itself
        whole = frame.map(
            lambda v: v.replace(", ", ",\u00a0") if isinstance(v, str) else v
        )
        table = whole.reset_index().to_html(
            index=False, border=0, na_rep="–", float_format="{:.1f}".format
        )
        parts.append(f"<h2>{escape(name)}</h2>{table}")
    parts.append("<h2>Accuracy at every threshold</h2>")
    parts.append(f"<img alt='accuracy over IoU' src='{data_uri(curve)}'>")
    return _HEAD + "\n".join([*parts, *blocks, "</body></html>"]) + "\n"
