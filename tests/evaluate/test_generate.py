"""Generation: any batch size, resumed, shared between processes, killed."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import builders
import pytest
from interrupted import held_by_another_process

from univg_nb import io, models
from univg_nb.config import load_scale
from univg_nb.data import files
from univg_nb.data.sample import GroundingSample
from univg_nb.evaluate import generate as generation
from univg_nb.evaluate import predictions as predictions_module
from univg_nb.evaluate import replies
from univg_nb.evaluate.generate import (
    GenerationOptions,
    adapt_model_section,
    generate,
    main,
    plan_batches,
)
from univg_nb.evaluate.predictions import get_settings_path
from univg_nb.evaluate.score import Benchmark, score
from univg_nb.evaluate.scoring import score_items, summarize_items
from univg_nb.fast import sampling, vision_features
from univg_nb.fast.prompts import split_rows

KILLS = 10
REAL = os.environ.get("UNIVG_MIG_BENCH")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return builders.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(folder):
    return models.load_for_inference({"name_or_path": str(folder)})


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    return builders.questions(tmp_path_factory.mktemp("images"))


def run(loaded, items, out, *, indices=None, fresh=False, **options):
    how = GenerationOptions(**options)
    return generate(*loaded, items, out, how, indices=indices, fresh=fresh)


def responses(path):
    found = predictions_module.read_predictions(path)
    return {i: reply.text for i, reply in found.items()}


def test_greedy_replies_are_the_same_for_any_batch_size(loaded, items, tmp_path):
    for size in (1, 4, 9):
        out = tmp_path / f"{size}.jsonl"
        run(loaded, items, out, max_new_tokens=8, batch_size=size)
    one, four, nine = (responses(tmp_path / f"{size}.jsonl") for size in (1, 4, 9))
    assert one == four == nine
    assert list(one) == list(range(9))
    assert len(set(one.values())) > 1


def test_sampled_replies_depend_on_seed_and_item_only(loaded, items, tmp_path):
    def draw(name, **options):
        how = {"max_new_tokens": 8, "temperature": 1.0} | options
        run(loaded, items[:3], tmp_path / name, **how)
        return responses(tmp_path / name)

    small = draw("a.jsonl", batch_size=1)
    assert small == draw("b.jsonl", batch_size=3)
    other = draw("c.jsonl", seed=1)
    assert all(small[i] != other[i] for i in small)
    seeds = {
        sampling.noise_seed(s, i, k) for s in (0, 1) for i in (0, 1) for k in (0, 1)
    }
    assert len(seeds) == 8


def test_replies_are_the_same_from_kept_features(loaded, items, tmp_path, monkeypatch):
    keep = tmp_path / "features"
    for name in ("first", "again"):
        run(loaded, items, tmp_path / name, keep=keep, max_new_tokens=12)
        # the next model reads them, and looks at no image
        monkeypatch.setattr(vision_features, "encode_images", None)
        monkeypatch.setattr(replies, "encode", None)
    monkeypatch.undo()
    run(loaded, items, tmp_path / "plain", max_new_tokens=12)
    expected = responses(tmp_path / "plain")
    assert responses(tmp_path / "first") == responses(tmp_path / "again") == expected
    monkeypatch.setattr(vision_features, "FEATURE_BYTES", 1)  # too many: not kept
    run(loaded, items, tmp_path / "large", keep=tmp_path / "none", max_new_tokens=12)
    assert responses(tmp_path / "large") == expected
    assert not (tmp_path / "none").exists()


def test_prompts_with_kept_features_have_the_processor_s_tokens(loaded, items):
    model, processor = loaded
    paths = {path for one in items for path in one.images}
    pixels = {
        path: vision_features.preprocess_images(processor, [path]) for path in paths
    }
    features = {
        path: (vision_features.encode_images(model.model, *image)[0], image[1])
        for path, image in pixels.items()
    }
    inputs = replies.encode(processor, items)
    counts = [len(one.images) for one in items]
    rows = split_rows(groups=range(len(items)), num_images=counts, **inputs)
    made = replies.make_prompts(processor, items, "univg", features)
    for (wanted, _), prompt in zip(rows, made, strict=True):
        assert prompt.ids.equal(wanted.ids)
        assert prompt.token_types.equal(wanted.token_types)


def test_a_run_cut_anywhere_ends_as_an_undisturbed_one(loaded, items, tmp_path):
    out = tmp_path / "p.jsonl"
    items = items[:5]
    options = {"max_new_tokens": 2, "batch_size": 2}
    run(loaded, items, out, **options)
    whole = out.read_bytes()
    cuts = random.Random(0).sample(range(len(whole)), 5)
    for cut in [0, len(whole) - 1, *cuts]:
        out.write_bytes(whole[:cut])
        run(loaded, items, out, **options)
        assert out.read_bytes() == whole, cut
    summary = run(loaded, items, out, **options)
    assert (summary["new"], summary["replies"]) == (0, 5)


def test_resuming_under_other_settings_or_weights_is_refused(loaded, items, tmp_path):
    model, _ = loaded
    out = tmp_path / "p.jsonl"
    run(loaded, items[:2], out, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"max_new_tokens = 2 there, now 3.*--fresh"):
        run(loaded, items[:2], out, max_new_tokens=3)
    with pytest.raises(ValueError, match="items_hash"):
        run(loaded, items[:3], out, max_new_tokens=2)
    weight = model.lm_head.weight.data
    weight[5, 5] += 1
    with pytest.raises(ValueError, match="weights_hash"):
        run(loaded, items[:2], out, max_new_tokens=2)
    weight[5, 5] -= 1
    run(loaded, items[:2], out, max_new_tokens=3, fresh=True)
    get_settings_path(out).unlink()
    with pytest.raises(ValueError, match="made under other settings"):
        run(loaded, items[:2], out, max_new_tokens=3)


def test_batches_hold_prompts_of_like_length(loaded, items):
    _, processor = loaded
    plan = plan_batches(processor, items, range(9), GenerationOptions(batch_size=3))
    order = [i for batch in plan for i in batch]
    encoded = [replies.encode(processor, [items[i]])["input_ids"] for i in order]
    lengths = [ids.shape[1] for ids in encoded]
    assert lengths == sorted(lengths)
    assert sorted(order) == list(range(9))
    assert [len(batch) for batch in plan] == [3, 3, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"temperature": -1.0}, "temperature must be at least 0"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GenerationOptions(**options)


@pytest.mark.slow
def test_kill_9_at_ten_random_moments_changes_nothing(folder, tmp_path):
    items = builders.questions(tmp_path, 20)
    builders.make_replies(folder, items, tmp_path / "whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_bytes()
    # A forkserver: libraries are imported once, and no thread of this one is forked.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["builders", "univg_nb.evaluate.generate"])
    out, rng = tmp_path / "cut.jsonl", random.Random(0)
    killed, cuts = 0, set()
    while killed < KILLS:
        child = context.Process(target=builders.make_replies, args=(folder, items, out))
        child.start()
        # At a random place of the file, then a random moment later: some kills hit a
        # row half written, some a batch half made, some a model half loaded.
        already = out.stat().st_size if out.exists() else 0
        place = already + rng.randrange(len(whole) // 8)
        while child.is_alive() and (not out.exists() or out.stat().st_size < place):
            time.sleep(0.0005)
        time.sleep(0.03 * rng.random())
        child.kill()
        child.join()
        assert child.exitcode in (0, -signal.SIGKILL)
        killed += child.exitcode != 0
        cuts.add(out.stat().st_size if out.exists() else 0)
        if child.exitcode == 0:  # it was done: begin again
            assert out.read_bytes() == whole
            out.unlink()
            get_settings_path(out).unlink()
    assert len(cuts) > 3, "the kills did not fall at different places"
    builders.make_replies(folder, items, out)
    assert out.read_bytes() == whole


@pytest.mark.slow
def test_two_processes_go_on_with_the_file_of_one(folder, tmp_path):
    items = builders.questions(tmp_path, 7)
    files.write(items, tmp_path / "r.json", "mig_bench")
    command = ["--records", str(tmp_path / "r.json"), "--model", str(folder)]
    command += ["--scale", "tiny", "--max-new-tokens", "3"]
    command += ["--set", "evaluate.batch_size=2", "--out", str(tmp_path / "p.jsonl")]
    main(command)
    out = tmp_path / "p.jsonl"
    whole = out.read_bytes()
    out.write_bytes(b"".join(whole.splitlines(keepends=True)[:3])[:-9])
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    made = subprocess.run(
        [sys.executable, *torchrun, "-m", "univg_nb", "generate", *command],
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    assert made.stdout.count("7 replies") == made.stdout.count("(5 new") == 1
    assert out.read_bytes() == whole


def test_released_zero_shot_files_get_their_own_pixel_limit(tmp_path):
    full, tiny = load_scale("full"), load_scale("tiny")
    row = {"image_path": "a.png", "instruction": "cup", "boxes": [[0, 0, 9, 9]]}
    lisa, mig = tmp_path / "lisa.json", tmp_path / "mig.json"
    lisa.write_text(json.dumps([row]))
    files.write(builders.questions(tmp_path, 1), mig, "mig_bench")
    assert adapt_model_section(full, lisa)["max_pixels"] == 640_000
    assert adapt_model_section(full, mig)["max_pixels"] == 401_408
    # drawn pictures are small: there the scale's own limit holds
    assert adapt_model_section(tiny, lisa) == tiny["model"]

    def limit(*more):
        options = Namespace(records=lisa, model="m", scale="full", set=more)
        options.max_new_tokens = None
        return generation._load_config(options)["model"]["max_pixels"]

    assert limit() == 640_000
    assert limit("model.max_pixels=5000") == 5000


def test_the_command_continues_a_file(folder, tmp_path):
    items = builders.questions(tmp_path, 3)
    files.write(items, tmp_path / "r.json", "mig_bench")
    out = tmp_path / "p.jsonl"
    arguments = ["--records", str(tmp_path / "r.json"), "--out", str(out)]
    arguments += ["--model", str(folder), "--max-new-tokens", "2"]
    with pytest.raises(ValueError, match="give --scale too"):
        main(arguments)
    arguments += ["--scale", "tiny", "--set", "evaluate.batch_size=1"]
    main([*arguments, "--seed", "3"])
    whole = out.read_bytes()
    assert sorted(responses(out)) == [0, 1, 2]
    out.write_bytes(whole.replace(b'"response": "', b'"response": "kept', 1)[:-9])
    main(arguments)
    assert out.read_bytes().count(b"kept") == 1
    out.write_bytes(whole[:-1])  # all but the last newline
    main(arguments)
    assert out.read_bytes() == whole
    main([*arguments, "--fresh"])
    assert out.read_bytes() == whole
    kept = sorted(path.name for path in (tmp_path / "replaced").iterdir())
    assert kept == ["p.jsonl", "p.settings.json"]


def test_what_can_be_known_is_said_before_the_model_is_loaded(
    folder, tmp_path, monkeypatch
):
    items = builders.questions(tmp_path, 3)
    files.write(items, tmp_path / "r.json", "mig_bench")
    monkeypatch.setattr(models, "load_for_inference", None)
    words = ["--records", str(tmp_path / "r.json"), "--model", str(folder)]
    words += ["--scale", "tiny", "--out"]
    with (
        held_by_another_process(tmp_path / "p.jsonl") as pid,
        pytest.raises(ValueError, match=f"process {pid}, since .* works on it"),
    ):
        main([*words, str(tmp_path / "p.jsonl")])
    Path(items[2].images[0]).unlink()
    with pytest.raises(
        ValueError, match=r"lack an image, first sample .*\.png does not"
    ):
        main([*words, str(tmp_path / "p.jsonl")])


def test_a_file_that_was_made_into_an_array_is_not_continued(loaded, items, tmp_path):
    out = tmp_path / "p.jsonl"
    run(loaded, items[:2], out, max_new_tokens=2)
    out.write_text(json.dumps(io.read_jsonl(out)))
    assert sorted(responses(out)) == [0, 1]
    with pytest.raises(ValueError, match="a JSON array, which cannot be continued"):
        run(loaded, items[:2], out, max_new_tokens=2)


def test_E5_questions_stay_as_they_are(loaded, items, tmp_path):
    before = [sample.question for sample in items]
    run(loaded, items, tmp_path / "p.jsonl", max_new_tokens=1)
    assert [sample.question for sample in items] == before


def test_E7_the_prompt_is_never_scored_with_the_reply(loaded, items, tmp_path):
    out = tmp_path / "p.jsonl"
    run(loaded, items, out, max_new_tokens=3)
    for i, text in responses(out).items():
        assert "(10,20),(30,40)" not in text, i
        assert "Find" not in text and "assistant" not in text
        assert not text.startswith("\n")


def test_E7_a_missing_image_is_an_error(loaded, items, tmp_path):
    gone = GroundingSample("lost", "diff", ("no/where.png",), "?", (0, 0, 1, 1))
    out = tmp_path / "p.jsonl"
    with pytest.raises(ValueError, match=r"'lost' \(index 1\): no/where.png"):
        run(loaded, [items[0], gone], out)
    assert not out.exists()


def test_E9_truncated_replies_are_counted(loaded, items, tmp_path):
    model, processor = loaded
    out = tmp_path / "p.jsonl"
    assert run(loaded, items, out, max_new_tokens=3)["truncated"] == 9
    items_scored = score_items(items, predictions_module.read_predictions(out))
    result = summarize_items(items_scored)["pooled"]
    assert (result["truncated"], result["status"]) == (9, {"truncated": 9})
    # a reply that ends by itself is not: let the model's second token be an end token
    made = replies.reply(model, processor, items[:1], max_new_tokens=6)
    inputs = replies.encode(processor, items[:1])
    banned = sampling.get_vision_token_ids(processor)
    options = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": banned}
    tokens = model.generate(**inputs, **options)[0]
    second = int(tokens[inputs["input_ids"].shape[1] + 1])
    ends = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [ends, second]
    stopped = replies.reply(model, processor, items[:1], max_new_tokens=6)
    model.generation_config.eos_token_id = ends
    assert (made[0].truncated, made[0].tokens) == (True, 6)
    assert not stopped[0].truncated and stopped[0].tokens <= 2


@pytest.mark.skipif(not REAL, reason="UNIVG_MIG_BENCH is not set")
def test_real_pair_goes_from_file_to_score(loaded, tmp_path):
    bench = Benchmark.read(REAL)
    names = {"case076_1.jpg", "case076_2.jpg"}
    [index] = [
        i
        for i, sample in enumerate(bench.items)
        if {Path(path).name for path in sample.images} == names
    ]
    out = tmp_path / "p.jsonl"
    # the annotation's folders are not there, and nothing is guessed unasked
    with pytest.raises(ValueError, match=r"case076_1.jpg does not exist"):
        run(loaded, bench.items, out, indices=[index])
    items = list(bench.items)
    beside = [Path(REAL).parent / Path(path).name for path in items[index].images]
    items[index] = replace(items[index], images=tuple(map(str, beside)))
    run(loaded, items, out, indices=[index], max_new_tokens=8)
    result = score(bench, out, indices=[index])
    assert result["tasks"]["correspondence"]["n"] == 1
    assert result["tasks"]["correspondence"]["truncated"] == 1
    assert result["benchmark"]["name"] == "MIG-Bench original"
    assert result["generation"]["weights_hash"]
