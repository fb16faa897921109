"""Scores and comparisons of predictions files; defects E1 to E9 of released code."""

import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from univg_nb import io
from univg_nb.data import files, prompts
from univg_nb.data.boxes import MODES
from univg_nb.data.sample import GroundingSample
from univg_nb.evaluate import compare as comparison
from univg_nb.evaluate import score as score_module
from univg_nb.evaluate import scoring
from univg_nb.evaluate.predictions import Reply, get_settings_path, hash_items
from univg_nb.evaluate.score import Benchmark, score
from univg_nb.evaluate.scoring import ScoringOptions, score_items, summarize_items
from univg_nb.paper import MIG_TASKS

REAL = os.environ.get("UNIVG_MIG_BENCH")
needs_real = pytest.mark.skipif(not REAL, reason="UNIVG_MIG_BENCH is not set")
RIGHT, WRONG = "<answer>(100,100),(200,200)</answer>", "<answer>(0,0),(9,9)</answer>"
RELEASED, ANY = ScoringOptions(parser="released"), ScoringOptions(rule="any")
SOME = ScoringOptions(allow_missing=True)


def item(i=0, task="diff", box=(100, 100, 200, 200), boxes=()):
    return GroundingSample(f"{task}{i}", task, ("a.png",), "Where?", box, boxes=boxes)


def of(*texts):
    return {i: Reply(text) for i, text in enumerate(texts)}


def write_predictions(path, texts):
    rows = [{"index": i, "response": text} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def records(tmp_path):
    """A file of 12 items in two tasks, without images."""
    found = [item(i, ("diff", "region")[i % 2]) for i in range(12)]
    files.write(found, tmp_path / "bench.json", "mig_bench")
    return tmp_path / "bench.json"


def test_score_counts_rates_and_statuses(tmp_path, records):
    texts = [RIGHT, RIGHT, WRONG, "none", RIGHT, "<answer>none</answer>"]
    texts += ["<answer>(9,9),(1,1)</answer>", "<answer>(1,1),(5,2000)</answer>"]
    texts += [RIGHT] * 3 + ["(100,100),(200,150)"]
    predictions = write_predictions(tmp_path / "p.jsonl", texts)
    arguments = ["--records", str(records), "--predictions", str(predictions)]
    score_module.main([*arguments, "--out", str(tmp_path / "scores.json")])
    result = json.loads((tmp_path / "scores.json").read_text())
    diff, region = result["tasks"]["diff"], result["tasks"]["region"]
    assert (diff["n"], diff["hit_03"], diff["hit_05"], diff["hit_07"]) == (6, 4, 4, 4)
    assert (region["hit_05"], region["hit_07"]) == (3, 2)
    assert region["mean_iou"] == pytest.approx(2.5 / 6)
    assert diff["status"] == {"inverted": 1, "ok": 5}
    assert region["status"] == {
        "no_answer": 1,
        "no_box": 1,
        "ok": 3,
        "out_of_range": 1,
    }
    low, high = diff["ci_05"]
    assert 0 < low < diff["acc_05"] < high < 1
    assert result["pooled_acc_05"] == 7 / 12
    assert result["macro_acc_05"] == pytest.approx((4 / 6 + 3 / 6) / 2)
    assert result["benchmark"] == {"name": "unknown", "by": "none"}
    assert result["records_sha256"] == io.sha256_of(records)
    assert result["items"][11] == {
        **{"index": 11, "id": "region11", "task": "region", "iou": 0.5},
        **{"status": "ok", "box": [100, 100, 200, 150], "truncated": False},
    }
    assert [row["index"] for row in result["items"]] == list(range(12))
    assert result["items"][3]["box"] is None
    assert (result["parser"], result["generation"]) == ("answer", None)


def test_missing_predictions_are_an_error_unless_allowed(tmp_path, records):
    predictions = write_predictions(tmp_path / "p.jsonl", [RIGHT] * 11)
    with pytest.raises(ValueError, match=r"1 of 12 items .*index 11.*--allow-missing"):
        score(Benchmark.read(records), predictions)
    bench = Benchmark.read(records)
    result = score(bench, predictions, SOME)
    assert result["tasks"]["region"]["n"] == 5
    assert result["tasks"]["region"]["missing"] == 1
    assert result["pooled"]["n"] == 11
    assert score(bench, predictions, indices=[0])["pooled"]["n"] == 1


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"index": 12, "response": ""}\n', "belong to another file"),
        ('{"index": 0, "response": ""}\n' * 2, "line 2: index 0 is predicted twice"),
        ('{"index": -1, "response": ""}\n', "line 1: expected"),
        ('{"index": 1.0, "response": ""}\n', "line 1: expected"),
        ('{"index": 0}\n', "line 1: expected"),
        ('{"index"\n{"index": 0, "response": ""}\n', "line 1: malformed JSON"),
        ('"[]"\n', "no predictions, which are JSON lines"),
        ('{"0": ""}\n', "line 1: expected"),
        ('[{"index": 0, "response": ""}, 3]', "row 2: expected"),
        ('[{"index": 0, "response": ""}', "line 1: malformed JSON"),
        ("null", "begins with b'null': no predictions, which are JSON lines"),
        ("\0" * 80, "no predictions, which are JSON lines"),
        ('{"index": 0, "id": "diff1", "response": ""}', "is 'diff1', but 'diff0' in"),
    ],
)
def test_malformed_predictions_name_the_line(tmp_path, records, lines, message):
    path = tmp_path / "p.jsonl"
    path.write_text(lines)
    with pytest.raises(ValueError, match=message):
        score(Benchmark.read(records), path, SOME)


@pytest.mark.parametrize("layout", ["no last newline", "array", "indented array"])
def test_predictions_of_other_tools_are_read(tmp_path, records, layout):
    rows = [{"index": i, "response": RIGHT} for i in range(12)]
    texts = {
        "no last newline": "\n".join(map(json.dumps, rows)),
        "array": json.dumps(rows),
        "indented array": "\n" + json.dumps(rows, indent=2),
    }
    path = tmp_path / "p.jsonl"
    path.write_text(texts[layout])
    assert score(Benchmark.read(records), path)["pooled"]["hit_05"] == 12


def test_predictions_of_another_version_of_the_records_are_refused(tmp_path, records):
    """Same ids, but one box was corrected since."""
    bench = Benchmark.read(records)
    path = write_predictions(tmp_path / "p.jsonl", [RIGHT] * 12)
    settings = {"items_hash": hash_items(bench.items)}
    io.write_json(get_settings_path(path), settings)
    assert score(bench, path)["pooled"]["n"] == 12
    bench.items[3] = replace(bench.items[3], answer=(0, 0, 5, 5))
    other = tmp_path / "other.json"
    files.write(bench.items, other, "mig_bench")
    for main, words in (
        (score_module.main, ["--predictions", str(path)]),
        (comparison.main, [str(path), str(path)]),
    ):
        with pytest.raises(ValueError, match="generated for other questions or boxes"):
            main([*words, "--records", str(other)])


def test_benchmarks_are_told_apart():
    def name(counts, prefix=""):
        found = [
            GroundingSample(f"{prefix}{i}", task, ("a",), "?", (0, 0, 1, 1))
            for task, n in counts.items()
            for i in range(n)
        ]
        return Benchmark(Path("f.json"), found, "0" * 64).identify()["name"]

    assert name({t.name: t.original for t in MIG_TASKS}) == "MIG-Bench original"
    assert name({t.name: t.revised for t in MIG_TASKS}) == "MIG-Bench revised"
    assert name({t.name: 2 for t in MIG_TASKS}, "minimig-") == "MiniMIG"
    assert name({t.name: 2 for t in MIG_TASKS}) == "unknown"
    assert name({"diff": 528}) == "unknown"


def test_every_item_has_one_kind():
    texts = [RIGHT, "(100,100),(200,140)", "(100,100),(200,110)", WRONG, "none"]
    texts.append("<answer>(200,200),(100,100)</answer>")
    scored = score_items([item(i) for i in range(6)], of(*texts))
    best = [scoring.classify_result(one) for one in scored]
    assert best == [*scoring.KINDS, scoring.KINDS[-1]]


def test_migician_stretch_is_an_option_of_the_score(tmp_path, capsys):
    """y1 x 1.05, y2 x 1.10: the box (100,200),(200,400) becomes (100,210),(200,440)."""
    files.write([item(box=(100, 210, 200, 440))], tmp_path / "one.json", "mig_bench")
    predictions = write_predictions(tmp_path / "p.jsonl", ["(100,200),(200,400)"])
    bench = Benchmark.read(tmp_path / "one.json")
    assert score(bench, predictions)["pooled"]["mean_iou"] < 0.9
    result = score(bench, predictions, ScoringOptions(stretch=True))
    assert result["pooled"]["mean_iou"] == pytest.approx(1.0)
    assert result["stretch"] is True
    arguments = ["--records", str(tmp_path / "one.json"), "--migician-stretch"]
    score_module.main([*arguments, "--predictions", str(predictions)])
    assert " 1.000" in capsys.readouterr().out
    low = item(box=(0, 990, 100, 999))
    stretched = score_items(
        [low], of("(0,944),(100,999)"), ScoringOptions(stretch=True)
    )
    assert stretched[0].iou > 0.75


def test_pixel_boxes_are_scored_with_an_image_root(tmp_path, capsys):
    Image.new("RGB", (200, 100)).save(tmp_path / "lisa_cup.png")
    row = {
        "image_path": "lisa_cup.png",
        "instruction": "cup",
        "boxes": [[20, 10, 40, 20]],
    }
    (tmp_path / "lisa.json").write_text(json.dumps([row]))
    predictions = write_predictions(tmp_path / "p.jsonl", [RIGHT])
    arguments = ["--records", str(tmp_path / "lisa.json")]
    arguments += ["--predictions", str(predictions)]
    with pytest.raises(ValueError, match="its size is needed"):
        score_module.main(arguments)
    score_module.main([*arguments, "--image-root", str(tmp_path)])
    assert "100.0%" in capsys.readouterr().out


def test_refcoco_is_asked_in_single_image_mode_wherever_its_images_lie(tmp_path):
    Image.new("RGB", (200, 100)).save(tmp_path / "a.png")
    row = {"image": "a.png", "problem": "the left cup", "solution": [20, 10, 40, 20]}
    path = tmp_path / "refcocop_testA.json"
    path.write_text(json.dumps([row, row]))
    first, _ = files.read(path, image_root=tmp_path)
    assert (first.task, first.answer, first.cot) == (
        *("refcocop_testA", (100, 100, 200, 200), False),
    )
    asked = prompts.user_text(first)
    assert asked == prompts.SINGLE_IMAGE_PREFIX + "the left cup"
    predictions = write_predictions(tmp_path / "p.jsonl", ["(100,100),(200,200)"] * 2)
    result = score(Benchmark.read(path, tmp_path), predictions)
    assert result["tasks"]["refcocop_testA"]["hit_05"] == 2
    files.write([first], tmp_path / "again.json", "refcoco", tmp_path)
    assert files.read(tmp_path / "again.json", image_root=tmp_path) == [first]
    with pytest.raises(ValueError, match="asks for no chain"):
        files.write([item()], tmp_path / "no.json", "refcoco", tmp_path)


def test_compare_finds_the_items_only_one_model_got(tmp_path, records, capsys):
    a = write_predictions(tmp_path / "a.jsonl", [RIGHT] * 2 + [WRONG] * 10)
    b = write_predictions(tmp_path / "b.jsonl", [WRONG] + [RIGHT] * 10 + [WRONG])
    out = tmp_path / "c.json"

    def compare(*arguments):
        comparison.main([*map(str, arguments), "--records", str(records)])
        assert "McNemar p" in capsys.readouterr().out
        return json.loads(out.read_text())["overall"]

    overall = compare(a, b, "--out", out)
    assert (overall["mcnemar"]["b"], overall["mcnemar"]["c"]) == (1, 9)
    assert overall["acc_05"]["mean_diff"] == pytest.approx(8 / 12)
    assert overall["acc_05"]["lo"] > 0
    result = json.loads(out.read_text())
    assert result["tasks"]["diff"]["n"] == 6
    assert (result["a"], result["b"], result["rule"]) == (str(a), str(b), "one")
    same = compare(a, a, "--out", out)
    assert (same["mean_iou"]["mean_diff"], same["mcnemar"]["p"]) == (0.0, 1.0)
    part = write_predictions(tmp_path / "part.jsonl", [RIGHT] * 4)
    with pytest.raises(ValueError, match="have no prediction"):
        compare(a, part)
    assert compare(a, part, "--allow-missing", "--out", out)["n"] == 4


def test_E1_a_box_in_the_thinking_does_not_beat_the_answer():
    text = "<think>near (0,0),(50,50)</think><answer>(100,100),(200,200)</answer>"
    assert score_items([item()], of(text))[0].iou == 1.0
    assert score_items([item()], of(text), RELEASED)[0].iou == 0.0


def test_E2_floats_are_read():
    text = "(0.1,0.1),(0.2,0.2)"
    assert score_items([item()], of(text))[0].iou == 1.0
    assert score_items([item()], of(text), RELEASED)[0].iou == 0.0


def test_E5_one_table_holds_all_tasks(tmp_path, records, capsys):
    """A task of which nothing is predicted used to end the released script."""
    predictions = tmp_path / "q.jsonl"
    rows = [{"index": i, "response": RIGHT} for i in range(0, 12, 2)]
    predictions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = score(Benchmark.read(records), predictions, SOME)
    assert result["tasks"]["region"]["n"] == 0
    assert result["tasks"]["region"]["acc_05"] is None
    assert result["macro_acc_05"] == 1.0
    # the mean of one task has that task's interval
    assert result["macro_ci_05"] == result["tasks"]["diff"]["ci_05"]
    arguments = ["--records", str(records), "--predictions", str(predictions)]
    score_module.main([*arguments, "--allow-missing"])
    table = capsys.readouterr().out
    assert "Static" in table and "Region" in table and "missing 6" in table
    assert summarize_items([])["pooled"]["n"] == 0


@pytest.mark.parametrize("command", ["score", "compare"])
def test_E6_scoring_sets_no_device_and_imports_no_model_library(command):
    code = f"""
import os, sys
before = dict(os.environ)
from univg_nb.__main__ import main
try:
    main([{command!r}, "--help"])
except SystemExit as ended:
    assert not ended.code
heavy = {{"torch", "transformers", "decord", "modelscope"}} & set(sys.modules)
assert not heavy, heavy
assert dict(os.environ) == before
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "example: python -m univg_nb" in run.stdout


def test_E8_any_instance_may_count_where_items_have_several():
    several = item(boxes=((100, 100, 200, 200), (700, 700, 900, 900)))
    text = of("<answer>(700,700),(900,900)</answer>")
    assert score_items([several], text)[0].iou == 0.0
    assert score_items([several], text, ANY)[0].iou == 1.0


def test_E4_boxes_without_area_score_nothing_and_divide_by_nothing():
    """With the original's degenerate answers the released scorer divides by zero."""
    point = item(box=(5, 5, 5, 5))
    for parser in MODES:
        for text in ("(5,5),(5,5)", "(9,9),(1,1)", "none"):
            assert (
                score_items([point], of(text), ScoringOptions(parser=parser))[0].iou
                == 0.0
            )


def released_reading(text):
    """The released parser told anew: first notation found wins, the last of several
    boxes is dropped, the first is taken; floats end as no box (E1, E2)."""
    i, f, s = r"(\d+)", r"(\d+\.\d+)", r",\s*"
    notations = [
        rf"\({i}{s}{i}\){s}\({i}{s}{i}\)",
        rf"\[{f}{s}{f}{s}{f}{s}{f}\]",
        rf"\({f},{f}\),\({f},{f}\)",
        rf"\({f}{s}{f}{s}{f}{s}{f}\)",
        rf"\[{i}{s}{i}{s}{i}{s}{i}\]",
        rf"<box>{i}\s+{i}\s+{i}\s+{i}</box>",
    ]
    found = next((m for n in notations if (m := re.findall(n, text))), [])
    if len(found) > 1:
        found = found[:-1]
    if not found or any("." in number for box in found for number in box):
        return (0.0, 0.0, 0.0, 0.0)
    return tuple(int(number) for number in found[0])


def released_iou(truth, box):
    left, top = max(truth[0], box[0]), max(truth[1], box[1])
    right, bottom = min(truth[2], box[2]), min(truth[3], box[3])
    if right < left or bottom < top:
        return 0.0
    inner = (right - left) * (bottom - top)
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (truth, box)]
    total = sum(areas) - inner
    return inner / total if total else 0.0  # the released code divides by zero here


def fuzzed_reply(rng, truth):
    """A reply as models write them, more or less: boxes near the truth in any style."""
    parts = []
    for _ in range(rng.choice([0, 1, 1, 1, 1, 2, 3])):
        box = [max(0, v + rng.choice([0, 0, 9, -40, 120])) for v in truth]
        if rng.random() < 0.1:
            rng.shuffle(box)
        x1, y1, x2, y2 = box
        parts.append(
            rng.choice(
                [
                    f"({x1},{y1}),({x2},{y2})",
                    f"<answer>({x1},{y1}),({x2},{y2})</answer>",
                    f"({x1}, {y1}), ({x2},  {y2})",
                    f"[{x1}, {y1}, {x2}, {y2}]",
                    f"({x1 / 1000},{y1 / 1000}),({x2 / 1000},{y2 / 1000})",
                    f"[{x1 / 1000:.3f}, {y1 / 1000:.3f}, {x2 / 1000:.3f}, 0.9]",
                    f"<box>{x1} {y1} {x2} {y2}</box>",
                    f"({x1},{y1}),({x2}",
                ]
            )
        )
    return rng.choice(["", "<think>"]) + " and ".join(parts) + rng.choice(["", "."])


@needs_real
def test_real_annotation_scores_as_the_released_scorer_and_fast(tmp_path):
    rng = random.Random(0)
    rows = json.loads(Path(REAL).read_text())
    truths = [[min(999, max(0, round(1000 * v))) for v in r["answer"]] for r in rows]
    texts = [fuzzed_reply(rng, truth) for truth in truths]
    predictions = write_predictions(tmp_path / "p.jsonl", texts)
    began = time.process_time()
    bench = Benchmark.read(REAL)
    result = score(bench, predictions, RELEASED)
    seconds = time.process_time() - began
    assert seconds < 3, seconds
    assert result["benchmark"] == {"name": "MIG-Bench original", "by": "counts"}
    hits: dict[str, Counter] = {}
    sums: Counter = Counter()
    for row, truth, text in zip(rows, truths, texts, strict=True):
        value = released_iou(truth, released_reading(text))
        sums[row["task"]] += value
        for name, threshold in (("03", 0.3), ("05", 0.5), ("07", 0.7)):
            count = hits.setdefault(row["task"], Counter())
            count[name] += value >= threshold
    assert len(hits) == 10
    for task, count in hits.items():
        mine = result["tasks"][task]
        assert [mine[f"hit_{t}"] for t in ("03", "05", "07")] == [
            count[t] for t in ("03", "05", "07")
        ]
        assert mine["mean_iou"] == pytest.approx(sums[task] / mine["n"])
    assert 0.2 < result["pooled_acc_05"] < 0.9
    assert score(bench, predictions)["pooled_acc_05"] > result["pooled_acc_05"]
