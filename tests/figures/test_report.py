"""The report: one safe, self-contained page and its tables."""

import base64
import io
import json
from html.parser import HTMLParser

import builders
import pytest
from PIL import Image

from univg_nb.data import files
from univg_nb.data.sample import GroundingSample
from univg_nb.evaluate import predictions, scoring
from univg_nb.evaluate.score import Benchmark
from univg_nb.evaluate.scoring import ItemScore, summarize_items
from univg_nb.figures import report, tables

RIGHT = "<think>It is the <b>cup</b>.</think><answer>(100,100),(200,200)</answer>"
WRONG = "<think>x</think><answer>(800,800),(900,900)</answer>"
EVIL = "<think></script><script>alert(1)</script><img src=http://x/y onerror=z></think>"


def write_predictions(path, texts):
    rows = [{"index": i, "response": text} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def bench(tmp_path):
    """Eight items of two tasks with images; two models' replies."""
    paths = builders.save_images(tmp_path)
    found = [
        GroundingSample(
            f"<i>{i}</i>",
            ("diff", "region")[i % 2],
            tuple(paths[: 1 + i % 3]),
            "Which & where <script>?",
            (100, 100, 200, 200),
        )
        for i in range(8)
    ]
    files.write(found, tmp_path / "bench.json", "mig_bench")
    a = write_predictions(tmp_path / "a.jsonl", [WRONG, RIGHT] + [EVIL] * 6)
    b = write_predictions(
        tmp_path / "b.jsonl", [RIGHT, EVIL] + [RIGHT] * 3 + [WRONG] * 3
    )
    return tmp_path, a, b


class Page(HTMLParser):
    """Tags and attributes of a page, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "data", "action")]
        assert not any(k.startswith("on") for k, _ in attrs)

    def handle_data(self, data):
        self.text += data


def test_page_is_self_contained_and_escapes_what_models_say(bench):
    folder, a, b = bench
    read = Benchmark.read(folder / "bench.json")
    page, markdown = report.write_report(
        read, {"base": a, "sft <1>": b}, folder / "out" / "r.html", cases=3
    )
    text = page.read_text()
    read = Page(text)
    assert {"script", "link", "iframe", "i"}.isdisjoint(read.tags)
    assert "default-src 'none'" in text
    assert "<script>alert(1)</script>" in read.text
    assert "It is the <b>cup</b>." in read.text
    assert read.links and all(
        link.startswith("data:image/jpeg;base64,") for link in read.links
    )
    for link in read.links:
        with Image.open(io.BytesIO(base64.b64decode(link.split(",")[1]))) as picture:
            assert max(picture.size) < 1200
    assert len(text) < 3_000_000
    for title in ("Worst of sft <1>", "Best of sft <1>", "Won: sft <1> over base"):
        assert title in read.text
    assert sorted(p.name for p in page.parent.iterdir()) == ["r.html", "r.md"]
    said = markdown.read_text()
    assert "| Qwen2-VL-7B (paper) | 29.92 |" in said
    assert "| UniVG-R1 (paper) | 71.97 |" in said
    assert "| base | 0.0 [0, 49] | 25.0 [5, 70] |" in said
    assert "not measured on this file" in said
    assert "8 of 8 items" in said


def test_tables_count_every_item(bench):
    folder, a, b = bench
    items = files.read(folder / "bench.json")
    scored = {
        name: scoring.score_items(items, predictions.read_predictions(path))
        for name, path in (("a", a), ("b", b))
    }
    table = tables.count_kinds(scored["b"])
    assert list(table.index) == ["all", "Static", "Region"]
    assert list(table.columns) == list(scoring.KINDS)
    assert table.loc["all"].tolist() == [4, 0, 0, 3, 1]
    assert table.loc["Static"].sum() == 4
    states = tables.count_statuses(scored)
    assert states.loc["a"].to_dict() == {
        "ok": 2,
        "no_answer": 6,
        "ran out of tokens": 0,
    }
    gains = tables.compute_paired_gains(scored)
    assert list(gains["task"]) == ["all", "Static", "Region"]
    assert gains["points"].iloc[0] == pytest.approx(100 * (4 - 1) / 8)
    assert (gains["only earlier"].iloc[0], gains["only later"].iloc[0]) == (1, 4)


def test_cases_are_spread_over_tasks_and_where_models_part(bench):
    folder, a, b = bench
    items = files.read(folder / "bench.json")
    scored = {
        name: scoring.score_items(items, predictions.read_predictions(path))
        for name, path in (("a", a), ("b", b))
    }
    picked = report.pick_cases(scored, 2)
    # boxes before replies without one, and a case of each task
    assert picked["Worst of b"] == [5, 6]
    assert picked["Best of b"] == [0, 3]
    assert picked["Won: b over a"] == [0, 3]
    assert picked["Lost: b to a"] == [1]


def test_published_rows_beside_a_file_of_refcoco():
    def scored(task):
        ious = [1.0, 0.0] * 5
        items = [
            ItemScore(i, "", task, x, "ok", None, False) for i, x in enumerate(ious)
        ]
        return {"mine": summarize_items(items)}

    scores = scored("lisa")
    table = tables.build_score_table(scores)
    assert list(table.index) == ["items", "mine"]
    refcoco = scored("refcocop_testB")
    assert "80.04" in tables.build_score_table(refcoco).loc["UniVG-R1 (paper)"].tolist()


def test_replies_are_split():
    assert report.split_reply(RIGHT) == (
        "It is the <b>cup</b>.",
        "<answer>(100,100),(200,200)</answer>",
    )
    assert report.split_reply("<think>endless") == ("endless", "")
    assert report.split_reply("(1,2),(3,4)") == ("", "(1,2),(3,4)")


def test_a_reply_without_end_is_cut(bench):
    folder, _, _ = bench
    endless = write_predictions(folder / "endless.jsonl", ["x" * 10**6] * 8)
    read = Benchmark.read(folder / "bench.json")
    page, _ = report.write_report(read, {"m": endless}, folder / "r.html", cases=1)
    text = page.read_text()
    assert "x" * 1500 + "…" in text
    assert "x" * 1501 not in text


def test_files_get_names(tmp_path):
    found = predictions.parse_named_files(
        ["new=x/p.jsonl", "eval/sft/mig/predictions.jsonl", "mine.jsonl"]
    )
    assert list(found) == ["new", "sft", "mine"]
    with pytest.raises(ValueError, match="two files are called 'p'"):
        predictions.parse_named_files(["x/p.jsonl", "y/p.jsonl"])


def test_command_line_with_missing_parts(bench, capsys):
    folder, a, b = bench
    b.write_text(b.read_text().splitlines(keepends=True)[0])
    (folder / "0.png").unlink()
    arguments = [str(a), f"new={b}", "--records", str(folder / "bench.json")]
    arguments += ["--out", str(folder / "r.html"), "--cases", "1"]
    with pytest.raises(ValueError, match="7 of 8 items have no prediction"):
        report.main(arguments)
    report.main([*arguments, "--allow-missing"])
    assert "r.md" in capsys.readouterr().out
    text = (folder / "r.html").read_text()
    assert "1 of 8 items" in text
    assert "no picture" in text and "does not exist" in text


def test_models_without_a_common_item_are_refused(bench):
    folder, a, b = bench
    first, *others = a.read_text().splitlines(keepends=True)
    a.write_text(first)
    b.write_text("".join(others))
    arguments = [str(a), str(b), "--records", str(folder / "bench.json")]
    with pytest.raises(ValueError, match="nothing to report"):
        report.main([*arguments, "--out", str(folder / "r.html"), "--allow-missing"])


def test_wins_and_losses_are_shown_as_pictures(bench):
    folder, a, b = bench
    arguments = [f"old={a}", str(b), "--records", str(folder / "bench.json")]
    report.main([*arguments, "--out", str(folder / "c.html"), "--cases", "1"])
    text = (folder / "c.html").read_text()
    assert "Won: b over old" in text and "Lost: b to old" in text
    assert text.count('<section class="case">') == 4
    assert text.count("<blockquote>") == 4 * 2 * 2
