"""The benchmarks of a run, and the evaluation of its models on them.

A model is called after the stage that trained it, a benchmark after its folder under
`eval/<model>/`. Finished scores are loaded, unless their records or that stage changed.
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, ProcessorMixin

from univg_nb import io, models, paper, runs
from univg_nb.data.images import check_images
from univg_nb.evaluate import scoring
from univg_nb.evaluate.generate import (
    GenerationOptions,
    SettingsMismatchError,
    adapt_model_section,
    generate,
)
from univg_nb.evaluate.predictions import Reply, read_predictions
from univg_nb.evaluate.score import Benchmark, score
from univg_nb.runs import Run

# The models of a run in training order.
MODELS = (
    *("base", "sft_nocot", "sft_lora", "sft_qlora"),
    *("shipped", "grpo_none", "grpo_exp"),
)
# Zero-shot benchmarks and the key of the scale's `data` section that names their file.
ZERO_SHOT_FILES = {
    "lisa": "lisa_file",
    "lisa_test": "lisa_test_file",
    "llmseg": "llmseg_file",
    "video": "reasonvos_file",
    "revos": "revos_file",
}
# A benchmark of this ending has the items of the one without it, answered once each by
# sampling as in GRPO's rollouts, not greedily.
SAMPLED = "_sampled"
FEATURES = "vision_features"  # folder of a run: features of images, of all its models
ZERO_SHOT = tuple(ZERO_SHOT_FILES)
# Each model is asked as it was trained to be asked: the base as the paper asks its
# baselines (docs/paper_facts.md#prompts), the control without chains by the question.
STYLES = {"base": "direct", "sft_nocot": "plain"}


def get_style(model: str) -> str:
    """Return the prompt style (`prompts.STYLES`) that a model is evaluated with."""
    return STYLES.get(model, "univg")


def get_image_root(run: Run) -> Path:
    """Return the folder that image paths of the run's records start from."""
    data = run.config["data"]
    released = runs.repo_root() / data.get("image_root", "")
    return run.dir / "data" if data["source"] == "minimig" else released


def get_predictions_path(run: Run, model: str, name: str) -> Path:
    """Return the file that records the replies of `model` on the benchmark `name`."""
    return run.dir / "eval" / model / name / "predictions.jsonl"


def read_replies(run: Run, model: str, name: str) -> dict[int, Reply]:
    """Read the recorded replies of `model` on the benchmark `name`, by item."""
    return read_predictions(get_predictions_path(run, model, name))


def find_files(run: Run) -> dict[str, Path]:
    """Return the records files of a run by name: stage `data`'s, and the scale's."""
    marker = _read_marker(run, "data")
    if marker.get("status") != "finished":
        raise ValueError(
            f"{run.dir}: stage 'data' is not finished there; run notebook 01 first"
        )
    data = run.config["data"]
    root = run.dir / "data" if data["source"] == "minimig" else runs.repo_root()
    found = {name: root / file for name, file in marker["results"]["files"].items()}
    if "mig_bench" in found:  # the folders under eval/ say "mig"
        found["mig"] = found.pop("mig_bench")
    for name, key in ZERO_SHOT_FILES.items():
        if key in data:
            found.setdefault(name, root / data[key])
    if "refcoco_dir" in data:
        paths = [root / data["refcoco_dir"] / f"{k}.json" for k in paper.REFCOCO_FILES]
        found |= {path.stem: path for path in paths if path.is_file()}
    return found


def find_chains(run: Run) -> Path:
    """Return the training file of stage 1: notebook 02's, or a released one.

    Raises ValueError if the scale draws its data and notebook 02 has not been run.
    """
    if run.config["data"]["source"] != "minimig":
        return find_files(run)["stage1"]
    marker = _read_marker(run, "chains")
    if marker.get("status") != "finished":
        raise ValueError(
            f"{run.dir}: stage 'chains' is not finished there; run notebook 02 first"
        )
    return run.dir / "chains" / marker["results"]["stage1"]


def load_benchmark(run: Run, name: str) -> Benchmark:
    """Read a benchmark of the run; ValueError if the run has no file of it."""
    known, file = find_files(run), name.removesuffix(SAMPLED)
    if file not in known:
        raise ValueError(
            f"benchmark {name!r}: scale {run.scale!r} names no file for it; it has "
            f"{', '.join(known)}"
        )
    return Benchmark.read(known[file], get_image_root(run), name)


def list_models(run: Run) -> list[str]:
    """Return the models that the run has: "base" and every finished stage's."""
    trained = [
        model
        for model in MODELS[1:]
        if _read_marker(run, model).get("status") == "finished"
        and (run.dir / model / "adapter").is_dir()
    ]
    return ["base", *trained]


def load_model(run: Run, model: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load the weights and the processor of a model of the run, to generate with."""
    adapters = [] if model == "base" else [run.dir / model / "adapter"]
    four_bit = run.config["sft"].get("adapter") == "qlora" or model == "sft_qlora"
    network, processor = models.load_for_inference(
        run.config["model"], adapters, "nf4" if four_bit and adapters else None
    )
    if isinstance(network, PeftModel) and models.get_device().type == "cpu":
        # Faster, and in fp32 as in training: bitsandbytes' layers may take bf16 here.
        network = models.load_adapter(network.unload().dequantize(), adapters[0])
        network = network.merge_and_unload().requires_grad_(False).eval()
    return network, processor


def evaluate(
    run: Run, model: str, names: list[str], fresh: bool = False
) -> dict[str, dict[str, Any]]:
    """Evaluate one of `list_models` on benchmarks of `find_files`.

    Replies are greedy (but see `SAMPLED`) and read by the answer parser. What an
    interrupted call left is continued, if model and settings are still the same; else,
    and with `fresh`, all is generated again, and the old file is kept in replaced/.

    Returns:
        The content of scores.json for each benchmark by name.
    """
    scores: dict[str, dict[str, Any]] = {}
    network = None
    stage = _read_marker(run, model).get("hash", "")
    todo = []
    for name in names:  # all are looked at before the first of them takes hours
        bench = load_benchmark(run, name)
        path = get_predictions_path(run, model, name).with_name("scores.json")
        if not fresh and path.is_file():
            found = io.read_json(path)
            made_by = (found["generation"] or {}).get("stage", stage)
            if found["records_sha256"] == bench.sha256 and made_by == stage:
                scores[name] = found
                continue
        check_images(bench.items)
        todo.append(bench)
    for bench in todo:
        out = get_predictions_path(run, model, bench.name)
        path = out.with_name("scores.json")
        path.unlink(missing_ok=True)  # or an interrupted call would leave it behind
        if network is None:
            network, _ = load_model(run, model)
        began = time.perf_counter()
        facts = {"model": model, "stage": stage, "records": bench.records.name}
        facts |= {"records_sha256": bench.sha256}
        section = adapt_model_section(run.config, bench.records)
        how = GenerationOptions(
            get_style(model), **run.config["evaluate"], keep=run.dir / FEATURES
        )
        if bench.name.endswith(SAMPLED):
            how = replace(how, temperature=run.config["grpo"].get("temperature", 1.0))
        work = network, models.load_processor(section), bench.items, out, how
        try:
            generate(*work, fresh=fresh, facts=facts)
        except SettingsMismatchError:
            generate(*work, fresh=True, facts=facts)
        scores[bench.name] = score(bench, out)
        io.write_json(path, scores[bench.name])
        seconds = time.perf_counter() - began
        runs.record_stage(run.dir, f"eval/{model}/{bench.name}", seconds)
    return {name: scores[name] for name in names}


def score_items(
    run: Run,
    model: str,
    bench: Benchmark,
    options: scoring.ScoringOptions = scoring.DEFAULT_OPTIONS,
) -> list[scoring.ItemScore]:
    """Score every item of a benchmark from the recorded replies of a model."""
    replies = read_predictions(
        get_predictions_path(run, model, bench.name), bench.items
    )
    return scoring.score_items(bench.items, replies, options)


def _read_marker(run: Run, stage: str) -> dict[str, Any]:
    path = run.dir / stage / "stage.json"
    return io.read_json(path) if path.is_file() else {}
