"""The benchmarks of a run: found, evaluated once, continued after an interruption."""

import dataclasses

import builders
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit

from univg_nb import io, models, runs
from univg_nb.config import load_scale
from univg_nb.data import files
from univg_nb.evaluate import benchmarks


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return builders.save_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    return builders.questions(tmp_path_factory.mktemp("images"))


@pytest.fixture
def run(tmp_path, tiny, items):
    """A run folder of scale tiny with the random model and three items of MIG."""
    config = load_scale("tiny")
    config["model"]["name_or_path"] = str(tiny)
    config["evaluate"] = {"max_new_tokens": 2, "batch_size": 1}
    files.write(items[:3], tmp_path / "data" / "mig.json", "mig_bench")
    marker = {"status": "finished", "results": {"files": {"mig_bench": "mig.json"}}}
    io.write_json(tmp_path / "data" / "stage.json", marker)
    return runs.Run("tiny", tmp_path, 0, config)


def test_an_interrupted_evaluation_of_a_run_is_continued(run):
    first = benchmarks.evaluate(run, "base", ["mig"])["mig"]
    assert first["pooled"]["n"] == 3
    out = benchmarks.get_predictions_path(run, "base", "mig")
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


def test_a_sampled_benchmark_has_the_same_items_and_other_replies(run):
    run.config["evaluate"]["max_new_tokens"] = 8
    run.config["grpo"]["temperature"] = 3.0
    scores = benchmarks.evaluate(run, "base", ["mig", "mig_sampled"])
    assert scores["mig"]["pooled"]["n"] == scores["mig_sampled"]["pooled"]["n"] == 3
    greedy, sampled = (benchmarks.read_replies(run, "base", name) for name in scores)
    assert greedy.keys() == sampled.keys() and greedy != sampled
    out = benchmarks.get_predictions_path(run, "base", "mig_sampled")
    settings = io.read_json(out.with_name("predictions.settings.json"))
    assert settings["temperature"] == 3.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU keeps four bits")
def test_on_a_cpu_rounded_weights_are_written_out_and_the_adapter_merged(run):
    section = run.config["model"]
    model = models.add_lora(models.load_for_inference(section)[0], {"r": 4})
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(run.dir / "sft_qlora" / "adapter")
    loaded = benchmarks.load_model(run, "sft_qlora")[0]
    assert not any("lora" in name or "quant" in name for name in loaded.state_dict())
    rounded, _ = models.load_for_inference(section, quantize="nf4")
    change = model.base_model.model  # its layers know what the adapter adds
    for name in models.find_language_linears(loaded):
        layer = rounded.get_submodule(name)
        wanted = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        wanted = wanted + change.get_submodule(name).get_delta_weight("default")
        torch.testing.assert_close(loaded.get_submodule(name).weight, wanted)


def test_a_late_benchmark_is_looked_at_before_the_first_is_generated(run, items):
    gone = dataclasses.replace(items[0], id="gone", images=("no.png",))
    files.write([items[0], gone], run.dir / "data" / "own.json", "mig_bench")
    marker = {"mig_bench": "mig.json", "own": "own.json"}
    marker = {"status": "finished", "results": {"files": marker}}
    io.write_json(run.dir / "data" / "stage.json", marker)
    with pytest.raises(ValueError, match=r"'gone' \(index 1\): .*no\.png does not"):
        benchmarks.evaluate(run, "base", ["mig", "own"])
    with pytest.raises(ValueError, match=r"benchmark 'lisa'.*it has own, mig"):
        benchmarks.evaluate(run, "base", ["mig", "lisa"])
    assert not benchmarks.get_predictions_path(run, "base", "mig").exists()


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
    found = benchmarks.find_files(run)
    assert set(found) == {
        *("mig", "lisa_test", "llmseg", "revos", "refcoco_val", "refcocog_test"),
    }


def test_scores_are_made_again_for_other_records_and_kept_for_equal_ones(run):
    first = benchmarks.evaluate(run, "base", ["mig"])["mig"]
    bench = benchmarks.load_benchmark(run, "mig")
    scored = benchmarks.score_items(run, "base", bench)
    assert [item.id for item in scored] == [row["id"] for row in first["items"]]
    path = benchmarks.get_predictions_path(run, "base", "mig").with_name("scores.json")
    io.write_json(path, first | {"pooled": "kept"})
    assert benchmarks.evaluate(run, "base", ["mig"])["mig"]["pooled"] == "kept"
    files.write(bench.items[:2], bench.records, "mig_bench")
    assert benchmarks.evaluate(run, "base", ["mig"])["mig"]["pooled"]["n"] == 2
