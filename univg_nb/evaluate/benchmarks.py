"""The benchmarks of a run, and its models evaluated on them.

A model has the name of its stage ("base" has none), a benchmark the name of its folder
under `eval/<model>/`. What is already scored is loaded; it is made again when its
records or the stage its model came from have changed.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from univg_nb import io, paper, runs
from univg_nb.data import files as samples
from univg_nb.data.sample import GroundingSample
from univg_nb.evaluate import (
    predictions as predictions_module,
)
from univg_nb.evaluate import (
    score as score_files,
)
from univg_nb.evaluate import (
    scoring,
)
from univg_nb.evaluate.generate import OtherSettings, generate
from univg_nb.evaluate.predictions import generation_settings
from univg_nb.figures.tables import MODELS
from univg_nb.io import sha256_of
from univg_nb.runs import Run

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

# Zero-shot benchmarks and the key of the scale's `data` section that names their file.
ZERO_SHOT_FILES = {
    "lisa": "lisa_file",
    "lisa_test": "lisa_test_file",
    "llmseg": "llmseg_file",
    "video": "reasonvos_file",
    "revos": "revos_file",
}
ZERO_SHOT = tuple(ZERO_SHOT_FILES)
ZERO_SHOT_FORMATS = ("lisa", "llmseg", "reasonvos", "revos")
# Pixels an image may have there; the released MIG-Bench run has 401,408 (PF sec. 9).
ZERO_SHOT_MAX_PIXELS = 640_000
# Each model is asked as it was trained to be asked: the base as the paper asks its
# baselines (PF sec. 9), the control without chains by the question alone.
STYLES = {"base": "direct", "sft_nocot": "plain"}


@dataclass(frozen=True)
class Benchmark:
    """A benchmark of this run: its file, its items, and the file's hash."""

    name: str
    records: Path
    items: list[GroundingSample]
    sha256: str


def style_of(model: str) -> str:
    """The prompt style (prompts.STYLES) a model of the run is evaluated with."""
    return STYLES.get(model, "univg")


def image_root(run: Run) -> Path:
    """The folder that image paths of the run's records start from."""
    data = run.config["data"]
    if data["source"] == "minimig":
        return run.dir / "data"
    return runs.repo_root() / data.get("image_root", "")


def files(run: Run) -> dict[str, Path]:
    """Records of each kind: what notebook 01 noted, and the scale's other files.

    Raises ValueError when stage `data` is not finished.
    """
    marker = _marker(run, "data")
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
        if name not in found and key in data:
            found[name] = root / data[key]
    if "refcoco_dir" in data:
        folder = root / data["refcoco_dir"]
        there = {path.stem: path for path in folder.glob("*.json")}
        found |= {name: there[name] for name in paper.REFCOCO_FILES if name in there}
    return found


def model_section(config: dict[str, Any], zero_shot: bool) -> dict[str, Any]:
    """The scale's `model` section for a benchmark: photographs of the released
    zero-shot files may be larger (PF sec. 9)."""
    if zero_shot and config["data"]["source"] == "released":
        return config["model"] | {"max_pixels": ZERO_SHOT_MAX_PIXELS}
    return config["model"]


def load(run: Run, name: str) -> Benchmark:
    """Read one benchmark. Raises ValueError for one that this run has no file of."""
    known = files(run)
    if name not in known:
        raise ValueError(
            f"benchmark {name!r}: scale {run.scale!r} names no file for it; it has "
            f"{', '.join(known)}"
        )
    records = known[name]
    items = samples.read(records, image_root=image_root(run))
    return Benchmark(name, records, items, sha256_of(records))


def models_of(run: Run) -> list[str]:
    """Models this run can evaluate, in training order: the base and every finished
    stage that left an adapter."""
    return [
        model
        for model in MODELS
        if model == "base"
        or (
            _marker(run, model).get("status") == "finished"
            and (run.dir / model / "adapter").is_dir()
        )
    ]


def load_model(run: Run, model: str) -> tuple["PreTrainedModel", "ProcessorMixin"]:
    """Weights and processor of a model of the run, ready to generate."""
    from univg_nb import models  # torch only when a model is really needed

    adapter = None if model == "base" else run.dir / model / "adapter"
    four_bit = run.config["sft"].get("adapter") == "qlora" or model == "sft_qlora"
    quantize = "nf4" if four_bit and adapter else None
    network, processor = models.load(
        run.config["model"],
        adapter,
        quantize=quantize,
        merge=adapter is not None and quantize is None,
    )
    return network.eval(), processor


def evaluate(
    run: Run, model: str, names: list[str], fresh: bool = False
) -> dict[str, dict[str, Any]]:
    """Scores of `model` on each benchmark, {name: content of scores.json}.

    Finished ones are loaded; the others are generated (greedily, as the scale's
    `evaluate` section says), scored with the answer parser and written. The model is
    loaded only if something is missing.
    """
    scores: dict[str, dict[str, Any]] = {}
    network = None
    for name in names:
        bench = load(run, name)
        folder = run.dir / "eval" / model / name
        stage = _marker(run, model).get("hash", "")
        if not fresh and _is_current(folder, bench, stage):
            scores[name] = io.read_json(folder / "scores.json")
            continue
        if network is None:
            network, _ = load_model(run, model)
        began = time.perf_counter()
        _generate(run, network, model, bench, stage, fresh)
        scores[name] = score(bench, folder / "predictions.jsonl")
        io.write_json(folder / "scores.json", scores[name])
        seconds = time.perf_counter() - began
        runs.record_stage(run.dir, f"eval/{model}/{name}", seconds)
    return scores


def _generate(
    run: Run,
    network: "PreTrainedModel",
    model: str,
    bench: Benchmark,
    stage: str,
    fresh: bool,
) -> None:
    """Replies of `network` to the benchmark: an interrupted file is continued, one made
    under other settings (by other weights, say) begun anew."""
    from univg_nb import models

    section = model_section(run.config, bench.name in ZERO_SHOT)
    facts = {"model": model, "stage": stage, "records": bench.records.name}
    facts["records_sha256"] = bench.sha256
    options = {"style": style_of(model), "facts": facts, **run.config["evaluate"]}
    processor = models.load_processor(section)
    out = predictions(run, model, bench.name)
    before = generation_settings(out) or {}
    fresh = fresh or any(before.get(key) != value for key, value in facts.items())
    try:
        generate(network, processor, bench.items, out, fresh=fresh, **options)
    except OtherSettings:
        generate(network, processor, bench.items, out, fresh=True, **options)


def score(bench: Benchmark, predictions: Path, parser: str = "answer") -> dict:
    """The content of scores.json for a benchmark already read."""
    return score_files.scores_of(bench.items, bench.records, predictions, parser=parser)


def item_scores(
    run: Run, model: str, bench: Benchmark, parser: str = "answer", rule: str = "one"
) -> list[scoring.ItemScore]:
    """Every item of `bench` scored for `model`, from its recorded replies."""
    replies = predictions_module.read_predictions(predictions(run, model, bench.name))
    return scoring.score_items(bench.items, replies, parser=parser, rule=rule)


def predictions(run: Run, model: str, name: str) -> Path:
    """Where the replies of `model` on a benchmark are recorded."""
    return run.dir / "eval" / model / name / "predictions.jsonl"


def _marker(run: Run, stage: str) -> dict[str, Any]:
    path = run.dir / stage / "stage.json"
    return io.read_json(path) if path.is_file() else {}


def _is_current(folder: Path, bench: Benchmark, stage: str) -> bool:
    """Whether the folder's scores are of these records and of this model."""
    path = folder / "scores.json"
    if not path.is_file():
        return False
    found = io.read_json(path)
    made_by = (found.get("generation") or {}).get("stage", stage)
    return found["records_sha256"] == bench.sha256 and made_by == stage
