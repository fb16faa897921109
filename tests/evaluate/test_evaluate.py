"""Generation, scoring and comparison, from file to number (issue 7, PF sec. 9)."""

import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import builders
import pytest
import torch
from PIL import Image

from univg_nb import io, models, runs
from univg_nb.data import files, images
from univg_nb.data.sample import GroundingSample
from univg_nb.evaluate import (
    benchmarks,
    commands,
    replies,
    scoring,
)
from univg_nb.evaluate import (
    predictions as predictions_module,
)
from univg_nb.evaluate import (
    score as score_files,
)
from univg_nb.evaluate.commands import main
from univg_nb.evaluate.generate import generate, plan_batches
from univg_nb.evaluate.predictions import Reply, settings_path
from univg_nb.evaluate.score import compare, score
from univg_nb.evaluate.scoring import score_items, summarise
from univg_nb.fast import sampling
from univg_nb.paper import MIG_TASKS

REAL = os.environ.get("UNIVG_MIG_BENCH")
needs_real = pytest.mark.skipif(not REAL, reason="UNIVG_MIG_BENCH is not set")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return builders.save_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def loaded(tiny):
    return models.load({"name_or_path": str(tiny)})


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    return builders.questions(tmp_path_factory.mktemp("images"))


def item(i=0, task="diff", box=(100, 100, 200, 200), boxes=()):
    return GroundingSample(f"{task}{i}", task, ("a.png",), "Where?", box, boxes=boxes)


def of(*texts):
    return {i: [Reply(text)] for i, text in enumerate(texts)}


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


RIGHT, WRONG = "<answer>(100,100),(200,200)</answer>", "<answer>(0,0),(9,9)</answer>"


# ---------------------------------------------------------------- generation


def responses(path):
    found = predictions_module.read_predictions(path)
    return {i: [r.text for r in several] for i, several in found.items()}


def test_left_padding_gives_the_logits_of_each_prompt_alone(loaded, items):
    model, processor = loaded
    together = replies.encode(processor, items)
    assert (together["attention_mask"][:, -1] == 1).all()
    assert (together["attention_mask"][:, 0] == 0).any()
    with torch.no_grad():
        batch = model(**together).logits[:, -1]  # (B, V)
        for row, sample in zip(batch, items, strict=True):
            alone = model(**replies.encode(processor, [sample])).logits[0, -1]
            torch.testing.assert_close(row, alone, atol=1e-4, rtol=1e-4)


def test_greedy_replies_are_the_same_for_any_batch_size(loaded, items, tmp_path):
    for size in (1, 4, 9):
        out = tmp_path / f"{size}.jsonl"
        generate(*loaded, items, out, max_new_tokens=8, batch_size=size)
    one, four, nine = (responses(tmp_path / f"{size}.jsonl") for size in (1, 4, 9))
    assert one == four == nine
    assert list(one) == list(range(9))
    assert len({text for [text] in one.values()}) > 1


def test_sampled_replies_depend_on_seed_and_item_only(loaded, items, tmp_path):
    def draw(name, **options):
        generate(
            *loaded,
            items[:3],
            tmp_path / name,
            max_new_tokens=8,
            temperature=1.0,
            num_return_sequences=3,
            **options,
        )
        return responses(tmp_path / name)

    small = draw("a.jsonl", batch_size=4)
    assert small == draw("b.jsonl", batch_size=12)
    assert small != draw("c.jsonl", batch_size=12, seed=1)
    # not necessarily three: ids beyond the small tokenizer decode to nothing
    assert all(len(set(texts)) > 1 for texts in small.values())
    seeds = {
        sampling.noise_seed(s, i, k) for s in (0, 1) for i in (0, 1) for k in (0, 1)
    }
    assert len(seeds) == 8


def test_noise_samples_the_softmax():
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])
    seeded = sampling.SeededNoise(range(5_000), temperature=2.0)
    drawn = seeded(None, logits.expand(5_000, 4)).argmax(-1)
    shares = torch.bincount(drawn, minlength=4) / 5_000
    torch.testing.assert_close(shares, (logits / 2).softmax(-1), atol=0.025, rtol=0)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_rows_that_have_ended_leave_the_batch(loaded, items, temperature, request):
    """...and the others go on as they would have: same cache, positions and noise."""
    model, processor = loaded
    ends = model.generation_config.eos_token_id
    request.addfinalizer(lambda: setattr(model.generation_config, "eos_token_id", ends))
    model.generation_config.eos_token_id = list(range(5, 1024, 6))
    rows = []
    hook = model.register_forward_pre_hook(
        lambda _, __, given: rows.append(len(given["input_ids"])), with_kwargs=True
    )
    request.addfinalizer(hook.remove)
    options = {"max_new_tokens": 24, "temperature": temperature}
    together = replies.reply(model, processor, items, seeds=range(9), **options)
    batched, rows[:] = rows[:], []
    for k, (sample, made) in enumerate(zip(items, together, strict=True)):
        (alone,) = replies.reply(model, processor, [sample], seeds=[k], **options)
        assert alone == made, k
    assert len({made.tokens for made in together}) > 2
    assert batched[0] == 9 and batched[-1] < 5
    # without leaving, every row would be computed until the longest ends
    assert sum(batched) < 9 * len(batched)
    assert sum(rows) == sum(made.tokens for made in together)


def test_vision_tokens_are_never_sampled(loaded, items):
    model, processor = loaded
    inputs = replies.encode(processor, items[:2])
    banned = processor.tokenizer.convert_tokens_to_ids(list(replies.VISION_TOKENS))
    config = replies.generation_config(model, processor, 3)

    def wish(_, scores):
        """A model that wants nothing but vision tokens."""
        scores[:, banned] += 1000.0
        return scores

    def new_tokens():
        out = model.generate(
            **inputs, generation_config=config, logits_processor=[wish]
        )
        return out[:, inputs["input_ids"].shape[1] :].flatten().tolist()

    assert not set(new_tokens()) & set(banned)
    config.suppress_tokens = None
    assert set(new_tokens()) <= set(banned)


def test_a_run_cut_anywhere_ends_as_an_undisturbed_one(loaded, items, tmp_path):
    out = tmp_path / "p.jsonl"
    items = items[:5]
    options = {"max_new_tokens": 2, "batch_size": 2}
    generate(*loaded, items, out, **options)
    whole = out.read_bytes()
    cuts = random.Random(0).sample(range(len(whole)), 5)
    for cut in [0, len(whole) - 1, *cuts]:
        out.write_bytes(whole[:cut])
        generate(*loaded, items, out, **options)
        assert out.read_bytes() == whole, cut
    summary = generate(*loaded, items, out, **options)
    assert (summary["new"], summary["replies"]) == (0, 5)


def test_resuming_under_other_settings_or_weights_is_refused(loaded, items, tmp_path):
    model, processor = loaded
    out = tmp_path / "p.jsonl"
    generate(model, processor, items[:2], out, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"max_new_tokens = 2 there, now 3.*--fresh"):
        generate(model, processor, items[:2], out, max_new_tokens=3)
    with pytest.raises(ValueError, match="items_hash"):
        generate(model, processor, items[:3], out, max_new_tokens=2)
    weight = model.lm_head.weight.data
    weight[5, 5] += 1
    with pytest.raises(ValueError, match="weights_hash"):
        generate(model, processor, items[:2], out, max_new_tokens=2)
    weight[5, 5] -= 1
    generate(model, processor, items[:2], out, max_new_tokens=3, fresh=True)
    settings_path(out).unlink()
    with pytest.raises(ValueError, match="what made it is unknown"):
        generate(model, processor, items[:2], out, max_new_tokens=3)


def test_batches_hold_prompts_of_like_length(loaded, items):
    _, processor = loaded
    plan = plan_batches(processor, items, range(9), "univg", batch_size=3)
    lengths = [
        [int(replies.encode(processor, [items[i]])["input_ids"].shape[1]) for i, _ in b]
        for b in plan
    ]
    assert [n for batch in lengths for n in batch] == sorted(
        n for b in lengths for n in b
    )
    assert sorted(i for batch in plan for i, _ in batch) == list(range(9))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"num_return_sequences": 2}, "set a temperature"),
        ({"indices": [9]}, "reach beyond the 9 samples"),
    ],
)
def test_options_out_of_range_are_refused(loaded, items, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        generate(*loaded, items, tmp_path / "p.jsonl", **options)


# ---------------------------------------------------------------- scoring


def test_score_counts_rates_and_statuses(tmp_path, records):
    texts = [RIGHT, RIGHT, WRONG, "none", RIGHT, "<answer>none</answer>"]
    texts += ["<answer>(9,9),(1,1)</answer>", "<answer>(1,1),(5,2000)</answer>"]
    texts += [RIGHT] * 3 + ["(100,100),(200,150)"]
    predictions = write_predictions(tmp_path / "p.jsonl", texts)
    result = score(records, predictions, out=tmp_path / "scores.json")
    assert json.loads((tmp_path / "scores.json").read_text()) == result
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
    assert (result["parser"], result["generation"]) == ("answer", None)


def test_missing_predictions_are_an_error_unless_allowed(tmp_path, records):
    predictions = write_predictions(tmp_path / "p.jsonl", [RIGHT] * 11)
    with pytest.raises(ValueError, match=r"1 of 12 items .*index 11.*--allow-missing"):
        score(records, predictions)
    result = score(records, predictions, allow_missing=True)
    assert result["tasks"]["region"]["n"] == 5
    assert result["tasks"]["region"]["missing"] == 1
    assert result["pooled"]["n"] == 11
    assert score(records, predictions, only=["diff0"])["pooled"]["n"] == 1
    with pytest.raises(ValueError, match="no item has this id"):
        score(records, predictions, only=["12"])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"index": 12, "response": ""}\n', "belong to another file"),
        ('{"index": 0, "response": ""}\n' * 2, "line 2: index 0 is predicted twice"),
        ('{"index": -1, "response": ""}\n', "line 1: expected"),
        ('{"index": 1.0, "response": ""}\n', "line 1: expected"),
        ('{"index": 0}\n', "no text under 'response'"),
        ('{"index"\n{"index": 0, "response": ""}\n', "line 1: malformed JSON"),
        ("[]\n", "line 1: expected"),
    ],
)
def test_malformed_predictions_name_the_line(tmp_path, records, lines, message):
    path = tmp_path / "p.jsonl"
    path.write_text(lines)
    with pytest.raises(ValueError, match=message):
        score(records, path, allow_missing=True)


def test_expected_scores_average_over_replies(tmp_path, records):
    rows = [
        {"index": i, "sample": k, "response": RIGHT if k < 1 + (i == 0) else WRONG}
        for i in range(12)
        for k in range(4)
    ]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = score(records, path, expected=True)
    assert result["tasks"]["diff"]["mean_iou"] == pytest.approx((0.5 + 5 * 0.25) / 6)
    assert result["pooled"]["acc_05"] == pytest.approx(13 / 48)
    assert result["pooled"]["best_iou"] == 1.0
    assert result["pooled"]["replies"] == 48
    with pytest.raises(ValueError, match=r"4 sampled replies.*--expected"):
        score(records, path)


def test_benchmarks_are_told_apart():
    def name(counts, prefix=""):
        found = [
            GroundingSample(f"{prefix}{i}", task, ("a",), "?", (0, 0, 1, 1))
            for task, n in counts.items()
            for i in range(n)
        ]
        return score_files.benchmark(found, "0" * 64)["name"]

    assert name({t.name: t.original for t in MIG_TASKS}) == "MIG-Bench original"
    assert name({t.name: t.revised for t in MIG_TASKS}) == "MIG-Bench revised"
    assert name({t.name: 2 for t in MIG_TASKS}, "minimig-") == "MiniMIG"
    assert name({t.name: 2 for t in MIG_TASKS}) == "unknown"
    assert name({"diff": 528}) == "unknown"


def test_curve_falls_from_every_box_to_the_exact_ones():
    texts = of(RIGHT, "(100,100),(200,160)", "(100,100),(200,120)", WRONG)
    curve = summarise(score_items([item(i) for i in range(4)], texts))["curve"]
    assert curve["iou"][0] == 0.05 and curve["iou"][-1] == 0.95
    reached = dict(zip(curve["iou"], curve["acc"], strict=True))
    assert (reached[0.2], reached[0.5], reached[0.6], reached[0.65]) == (
        *(0.75, 0.5, 0.5, 0.25),
    )
    assert summarise([])["curve"] is None


def test_every_item_has_one_kind():
    texts = [RIGHT, "(100,100),(200,140)", "(100,100),(200,110)", WRONG, "none"]
    texts.append("<answer>(200,200),(100,100)</answer>")
    scored = score_items([item(i) for i in range(6)], of(*texts))
    best = [scoring.failure_kind(one) for one in scored]
    assert best == [*scoring.KINDS, scoring.KINDS[-1]]


def test_migician_stretch_is_an_option_of_the_score(tmp_path, capsys):
    """y1 x 1.05, y2 x 1.10: the box (100,200),(200,400) becomes (100,210),(200,440)."""
    files.write(
        [item(box=(100, 210, 200, 440))], tmp_path / "one.json", "mig_bench_revised"
    )
    predictions = write_predictions(tmp_path / "p.jsonl", ["(100,200),(200,400)"])
    assert score(tmp_path / "one.json", predictions)["pooled"]["mean_iou"] < 0.9
    result = score(tmp_path / "one.json", predictions, stretch=True)
    assert result["pooled"]["mean_iou"] == pytest.approx(1.0)
    assert result["stretch"] is True
    arguments = ["score", "--records", str(tmp_path / "one.json"), "--migician-stretch"]
    assert main([*arguments, "--predictions", str(predictions)]) == 0
    assert " 1.000" in capsys.readouterr().out
    low = item(box=(0, 990, 100, 999))
    assert score_items([low], of("(0,944),(100,999)"), stretch=True)[0].iou > 0.75


# ---------------------------------------------------------------- other benchmarks


def test_pixel_boxes_are_scored_with_an_image_root(tmp_path, capsys):
    Image.new("RGB", (200, 100)).save(tmp_path / "lisa_cup.png")
    row = {
        "image_path": "lisa_cup.png",
        "instruction": "cup",
        "boxes": [[20, 10, 40, 20]],
    }
    (tmp_path / "lisa.json").write_text(json.dumps([row]))
    predictions = write_predictions(tmp_path / "p.jsonl", [RIGHT])
    arguments = ["score", "--records", str(tmp_path / "lisa.json")]
    arguments += ["--predictions", str(predictions)]
    assert main(arguments) == 2
    assert "pixel boxes need the size" in capsys.readouterr().err
    assert main([*arguments, "--image-root", str(tmp_path)]) == 0
    assert "100.0%" in capsys.readouterr().out
    assert compare(
        tmp_path / "lisa.json", predictions, predictions, image_root=tmp_path
    )["overall"]["acc_05_a"] == pytest.approx(1.0)


def test_refcoco_is_asked_in_single_image_mode_wherever_its_images_lie(tmp_path):
    Image.new("RGB", (200, 100)).save(tmp_path / "a.png")
    row = {"image": "a.png", "problem": "the left cup", "solution": [20, 10, 40, 20]}
    path = tmp_path / "refcocop_testA.json"
    path.write_text(json.dumps([row, row]))
    first, _ = files.read(path, image_root=tmp_path)
    assert (first.task, first.answer, first.cot) == (
        *("refcocop_testA", (100, 100, 200, 200), False),
    )
    asked = replies.prompts.user_text(first)
    assert asked == replies.prompts.SINGLE_IMAGE_PREFIX + "the left cup"
    predictions = write_predictions(tmp_path / "p.jsonl", ["(100,100),(200,200)"] * 2)
    result = score(path, predictions, image_root=tmp_path)
    assert result["tasks"]["refcocop_testA"]["hit_05"] == 2
    files.write([first], tmp_path / "again.json", "refcoco", tmp_path)
    assert files.read(tmp_path / "again.json", image_root=tmp_path) == [first]
    with pytest.raises(ValueError, match="asks for no chain"):
        files.write([item()], tmp_path / "no.json", "refcoco", tmp_path)


@pytest.fixture
def run(tmp_path, tiny, items):
    """A run folder of scale tiny with the random model and three items of MIG."""
    config = runs.load_scale("tiny")
    config["model"]["name_or_path"] = str(tiny)
    config["evaluate"] = {"max_new_tokens": 2, "batch_size": 1}
    files.write(items[:3], tmp_path / "data" / "mig.json", "mig_bench")
    marker = {"status": "finished", "results": {"files": {"mig_bench": "mig.json"}}}
    io.write_json(tmp_path / "data" / "stage.json", marker)
    return runs.Run("tiny", tmp_path, 0, config)


def test_an_interrupted_evaluation_of_a_run_is_continued(run):
    first = benchmarks.evaluate(run, "base", ["mig"])["mig"]
    assert first["pooled"]["n"] == 3
    out = benchmarks.predictions(run, "base", "mig")
    rows = out.read_text().splitlines(keepends=True)
    (out.parent / "scores.json").unlink()
    kept = rows[0].replace('"response": "', '"response": "kept')
    out.write_text(kept + rows[1][:9])
    benchmarks.evaluate(run, "base", ["mig"])
    assert out.read_text() == "".join([kept, *rows[1:]])
    # other settings: nothing of it may stay
    (out.parent / "scores.json").unlink()
    run.config["evaluate"]["max_new_tokens"] = 1
    benchmarks.evaluate(run, "base", ["mig"])
    assert "kept" not in out.read_text()


def test_released_zero_shot_files_get_their_own_pixel_limit(run, tmp_path):
    full = runs.load_scale("full")
    assert benchmarks.model_section(full, True)["max_pixels"] == 640_000
    assert benchmarks.model_section(full, False)["max_pixels"] == 401_408
    # drawn pictures are small: there the scale's own limit holds
    assert benchmarks.model_section(run.config, True) == run.config["model"]
    row = {"image_path": "a.png", "instruction": "cup", "boxes": [[0, 0, 9, 9]]}
    (tmp_path / "lisa.json").write_text(json.dumps([row]))

    def limit(*more):
        arguments = ["generate", "--records", str(tmp_path / "lisa.json"), "--out", "p"]
        arguments += ["--model", "m", "--scale", "full", *more]
        options = commands.parser().parse_args(arguments)
        return commands._scale(options)["model"]["max_pixels"]

    assert limit() == 640_000
    assert limit("--set", "model.max_pixels=5000") == 5000


def test_a_full_run_knows_all_zero_shot_and_refcoco_files(run, tmp_path):
    data = run.config["data"]
    data |= {"source": "released", "refcoco_dir": str(tmp_path / "rec")}
    data |= {
        "lisa_test_file": "t.json",
        "llmseg_file": "l.json",
        "revos_file": "r.json",
    }
    (tmp_path / "rec").mkdir()
    for name in ("refcoco_val", "refcocog_test", "refgta"):
        (tmp_path / "rec" / f"{name}.json").write_text("[]")
    found = benchmarks.files(run)
    assert set(found) == {
        *("mig", "lisa_test", "llmseg", "revos", "refcoco_val", "refcocog_test"),
    }


# ---------------------------------------------------------------- comparison


def test_compare_finds_the_items_only_one_model_got(tmp_path, records):
    a = write_predictions(tmp_path / "a.jsonl", [RIGHT] * 2 + [WRONG] * 10)
    b = write_predictions(tmp_path / "b.jsonl", [WRONG] + [RIGHT] * 10 + [WRONG])
    result = compare(records, a, b, out=tmp_path / "c.json")
    overall = result["overall"]
    assert (overall["mcnemar"]["b"], overall["mcnemar"]["c"]) == (1, 9)
    assert overall["acc_05"]["mean_diff"] == pytest.approx(8 / 12)
    assert overall["acc_05"]["lo"] > 0
    assert result["tasks"]["diff"]["n"] == 6
    same = compare(records, a, a)["overall"]
    assert (same["mean_iou"]["mean_diff"], same["mcnemar"]["p"]) == (0.0, 1.0)
    part = write_predictions(tmp_path / "part.jsonl", [RIGHT] * 4)
    with pytest.raises(ValueError, match="have no prediction"):
        compare(records, a, part)
    assert compare(records, a, part, allow_missing=True)["overall"]["n"] == 4


# ---------------------------------------------------------------- defects of PF sec. 9


def test_E1_a_box_in_the_thinking_does_not_beat_the_answer():
    text = "<think>near (0,0),(50,50)</think><answer>(100,100),(200,200)</answer>"
    assert score_items([item()], of(text))[0].iou == 1.0
    assert score_items([item()], of(text), parser="released")[0].iou == 0.0


def test_E2_floats_are_read():
    text = "(0.1,0.1),(0.2,0.2)"
    assert score_items([item()], of(text))[0].iou == 1.0
    assert score_items([item()], of(text), parser="released")[0].iou == 0.0


def test_E5_questions_stay_as_they_are_and_one_table_holds_all_tasks(
    loaded, items, tmp_path, records, capsys
):
    before = [sample.question for sample in items]
    generate(*loaded, items, tmp_path / "p.jsonl", max_new_tokens=1)
    assert [sample.question for sample in items] == before
    # a task of which nothing is predicted used to end the released script
    predictions = tmp_path / "q.jsonl"
    rows = [{"index": i, "response": RIGHT} for i in range(0, 12, 2)]
    predictions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = score(records, predictions, allow_missing=True)
    assert result["tasks"]["region"]["n"] == 0
    assert result["tasks"]["region"]["acc_05"] is None
    assert result["macro_acc_05"] == 1.0
    arguments = ["score", "--records", str(records), "--predictions", str(predictions)]
    assert main([*arguments, "--allow-missing"]) == 0
    table = capsys.readouterr().out
    assert "Static" in table and "Region" in table and "missing 6" in table
    assert summarise([])["pooled"]["n"] == 0


def test_E6_scoring_sets_no_device_and_imports_no_model_library():
    code = (
        "import os, sys; before = dict(os.environ); import univg_nb.evaluate.commands; "
        "heavy = {'torch', 'transformers', 'decord', 'modelscope'} & set(sys.modules); "
        "assert not heavy, heavy; assert dict(os.environ) == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_E7_the_prompt_is_never_scored_with_the_reply(loaded, items, tmp_path):
    out = tmp_path / "p.jsonl"
    generate(*loaded, items, out, max_new_tokens=3)
    for i, [text] in responses(out).items():
        assert "(10,20),(30,40)" not in text, i
        assert "Find" not in text and "assistant" not in text
        assert not text.startswith("\n")


def test_E7_a_missing_image_is_an_error(loaded, items, tmp_path):
    gone = GroundingSample("lost", "diff", ("no/where.png",), "?", (0, 0, 1, 1))
    out = tmp_path / "p.jsonl"
    with pytest.raises(ValueError, match=r"'lost' \(index 1\): no/where.png"):
        generate(*loaded, [items[0], gone], out)
    assert not out.exists()


def test_E8_any_instance_may_count_where_items_have_several():
    several = item(boxes=((100, 100, 200, 200), (700, 700, 900, 900)))
    text = of("<answer>(700,700),(900,900)</answer>")
    assert score_items([several], text)[0].iou == 0.0
    assert score_items([several], text, rule="any")[0].iou == 1.0


def test_E4_boxes_without_area_score_nothing_and_divide_by_nothing():
    """With the original's degenerate answers the released scorer divides by zero."""
    point = item(box=(5, 5, 5, 5))
    for parser in scoring.PARSERS:
        for text in ("(5,5),(5,5)", "(9,9),(1,1)", "none"):
            assert score_items([point], of(text), parser=parser)[0].iou == 0.0


def test_E9_truncated_replies_are_counted(loaded, items, tmp_path):
    model, processor = loaded
    out = tmp_path / "p.jsonl"
    assert generate(model, processor, items, out, max_new_tokens=3)["truncated"] == 9
    items_scored = score_items(items, predictions_module.read_predictions(out))
    result = summarise(items_scored)["pooled"]
    assert (result["truncated"], result["status"]) == (9, {"truncated": 9})
    # a reply that ends by itself is not: let the model's second token be an end token
    made = replies.reply(model, processor, items[:1], max_new_tokens=6)
    inputs = replies.encode(processor, items[:1])
    config = replies.generation_config(model, processor, 6)
    tokens = model.generate(**inputs, generation_config=config)[0]
    second = int(tokens[inputs["input_ids"].shape[1] + 1])
    ends = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [ends, second]
    stopped = replies.reply(model, processor, items[:1], max_new_tokens=6)
    model.generation_config.eos_token_id = ends
    assert (made[0].truncated, made[0].tokens) == (True, 6)
    assert not stopped[0].truncated and stopped[0].tokens <= 2


# ---------------------------------------------------------------- real annotation


def released_reading(text):
    """The released parser told anew: first notation found wins, the last of several
    boxes is dropped, the first is taken; floats end as no box (PF sec. 9, E1, E2)."""
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
    result = score(REAL, predictions, parser="released")
    seconds = time.process_time() - began
    assert seconds < 3, seconds
    assert result["benchmark"] == {"name": "MIG-Bench original", "by": "sha256"}
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
    assert score(REAL, predictions)["pooled_acc_05"] > result["pooled_acc_05"]


@needs_real
def test_real_pair_goes_from_file_to_score(tiny, tmp_path, capsys):
    found = files.read(REAL)
    names = {"case076_1.jpg", "case076_2.jpg"}
    [index] = [
        i for i, s in enumerate(found) if {Path(p).name for p in s.images} == names
    ]
    out = tmp_path / "predictions.jsonl"
    common = ["--records", REAL, "--only", str(index)]
    generating = ["generate", *common, "--model", str(tiny), "--out", str(out)]
    generating += ["--scale", "tiny", "--image-root", str(Path(REAL).parent)]
    generating += ["--max-new-tokens", "8"]
    # the annotation's folders are not there, and nothing is guessed unasked
    assert main(generating) == 2
    assert "case076_1.jpg does not exist" in capsys.readouterr().err
    assert main([*generating, "--flat-images"]) == 0
    scoring_ = ["score", *common, "--predictions", str(out)]
    assert main([*scoring_, "--out", str(tmp_path / "scores.json")]) == 0
    result = json.loads((tmp_path / "scores.json").read_text())
    assert result["tasks"]["correspondence"]["n"] == 1
    assert result["tasks"]["correspondence"]["truncated"] == 1
    assert result["benchmark"]["name"] == "MIG-Bench original"
    assert result["generation"]["weights_hash"]


def test_flat_images_refuses_two_images_of_one_name(tmp_path):
    (tmp_path / "a.png").touch()
    two = [
        GroundingSample("0", "diff", ("x/a.png",), "?", (0, 0, 1, 1)),
        GroundingSample("1", "diff", ("y/a.png",), "?", (0, 0, 1, 1)),
    ]
    [first, second] = images.flatten_image_paths(two, [0], tmp_path)
    assert first.images == (str(tmp_path / "a.png"),)
    assert second.images == ("y/a.png",)
    with pytest.raises(ValueError, match="lay the images out"):
        images.flatten_image_paths(two, [0, 1], tmp_path)


def test_command_line_names_its_mistakes(tmp_path, records, capsys):
    base = ["generate", "--records", str(records), "--out", str(tmp_path / "p.jsonl")]
    assert main([*base, "--model", "other"]) == 2
    assert "give --scale too" in capsys.readouterr().err
    assert main([*base, "--model", "tiny", "--flat-images"]) == 2
    assert "--image-root" in capsys.readouterr().err
