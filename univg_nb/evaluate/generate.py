"""Replies of a model to a benchmark, batched by length and resumable.

`predictions.jsonl` has one row for each reply: {"index": i, "id": ..., "response":
"...", "tokens": n, "truncated": bool}; `index` is the item's position in the records
file. Boxes stand there in thousandths and in the paper's notation, whatever the model
writes; where that changed a reply, "written" is the model's own. The settings that
replies depend on lie beside the file; a run resumes only under equal settings. Under
torchrun each process generates a batch in turn, and the first writes the rows of all.
"""

import argparse
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from univg_nb import io, models
from univg_nb.config import (
    add_scale_arguments,
    load_scale,
    make_parser,
    output_file,
    override,
    within,
)
from univg_nb.data import files, prompts
from univg_nb.data.conventions import PLAIN, get_convention
from univg_nb.data.images import (
    check_images,
    count_image_tokens,
    find_missing_images,
)
from univg_nb.data.sample import GroundingSample, find_target_image
from univg_nb.evaluate import replies, served
from univg_nb.evaluate.predictions import (
    get_settings_path,
    hash_items,
    is_json_array,
    read_generation_settings,
    read_rows,
)
from univg_nb.evaluate.score import Benchmark
from univg_nb.evaluate.served import ServedModel
from univg_nb.fast.sampling import noise_seed
from univg_nb.fast.vision_features import (
    EncodedImage,
    features_fit,
    get_feature_width,
    vision_features,
)

logger = logging.getLogger(__name__)

ZERO_SHOT_FORMATS = ("lisa", "llmseg", "reasonvos", "revos")
# Most pixels of an image there (docs/paper_facts.md#evaluation).
ZERO_SHOT_MAX_PIXELS = 640_000


class SettingsMismatchError(ValueError):
    """A predictions file was made under other settings, or under unknown ones."""


@dataclass(frozen=True)
class GenerationOptions:
    """How replies are generated.

    Attributes:
        style: prompt style, one of `prompts.STYLES`.
        max_new_tokens: most tokens of a reply.
        batch_size: replies generated together; it does not change them.
        temperature: 0 is greedy; above it replies are sampled.
        seed: of sampling; each item has noise of its own.
        keep: folder for the features of images, on a CPU, where the tower is a third of
            the work: models with the same vision tower share them. None keeps nothing.
    """

    style: str = "univg"
    max_new_tokens: int = 256
    batch_size: int = 64
    temperature: float = 0.0
    seed: int = 0
    keep: Path | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for an option out of range."""
        limits = {"max_new_tokens": 1, "batch_size": 1, "temperature": 0}
        for name, least in limits.items():
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")


def generate(
    model: PreTrainedModel | ServedModel,
    processor: ProcessorMixin,
    samples: Sequence[GroundingSample],
    out: str | Path,
    options: GenerationOptions,
    *,
    indices: Iterable[int] | None = None,
    fresh: bool = False,
    facts: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a reply to every sample into a JSONL file; what it holds is kept.

    Neither batch size nor restarts nor processes change a reply, up to float rounding.

    Args:
        model: a model of this process, or one that a vLLM server holds.
        processor: its processor.
        samples: all items of the records file.
        out: predictions.jsonl.
        options: how replies are generated.
        indices: items to answer; None for all.
        fresh: begin again; what the file holds is kept in replaced/.
        facts: further settings, as the name of the model.

    Returns:
        "replies", "truncated" (the file's), "new", "tokens", "seconds" (this call's).

    Raises:
        ValueError: an image is missing, or another process writes to `out`.
        SettingsMismatchError: `out` was made under other settings.
    """
    indices = sorted(set(range(len(samples)) if indices is None else indices))
    check_images(samples, indices)
    out = Path(out)
    settings = _collect_settings(model, processor, samples, options) | (facts or {})
    if settings.get("convention", {}).get("pixels"):
        _warn_of_unknown_targets([samples[i] for i in indices])
    reply: Any = served.reply if isinstance(model, ServedModel) else replies.reply
    how = {key: settings[key] for key in ("style", "max_new_tokens", "temperature")}
    if isinstance(model, PreTrainedModel) and options.keep:
        asked = [samples[i] for i in indices]
        how["features"] = _find_features(model, processor, asked, options.keep)

    def answer(batch: list[int]) -> list[dict[str, Any]]:
        """Return a batch's rows; the seed tells sampled replies to an item apart."""
        seeds = [noise_seed(0, i, options.seed) for i in batch]
        made = reply(model, processor, [samples[i] for i in batch], seeds=seeds, **how)
        return [
            {"index": i, "id": samples[i].id, "response": one.text}
            | {"tokens": one.tokens, "truncated": one.truncated}
            | ({"written": one.written} if one.written else {})
            for i, one in zip(batch, made, strict=True)
        ]

    with io.locked(out):
        rows = {} if fresh else _read_rows(out, settings)
        batches = plan_batches(processor, samples, indices, options)
        # A batch cut short by a kill is regenerated whole, and only its missing rows
        # are added: the file ends up as that of an undisturbed run.
        todo = [batch for batch in batches if not rows.keys() >= set(batch)]
        state = PartialState(cpu=not torch.cuda.is_available())
        is_first = state.is_main_process
        if is_first:
            _prepare_file(out, settings, fresh)
        began, new = time.perf_counter(), []
        count, name = sum(map(len, todo)), out.parent.name
        with tqdm(total=count, desc=name, unit="reply", disable=not is_first) as bar:
            for start in range(0, len(todo), state.num_processes):
                turn = todo[start : start + state.num_processes]  # one for each process
                mine = turn[state.process_index : state.process_index + 1]
                made = [row for batch in mine for row in answer(batch)]
                added = [row for row in gather_object(made) if row["index"] not in rows]
                if is_first:
                    for row in added:
                        io.append_jsonl(out, row)
                rows |= {row["index"]: row for row in added}
                new += added
                bar.update(sum(map(len, turn)))
    return {
        "replies": len(rows),
        "new": len(new),
        "truncated": sum(row.get("truncated", False) for row in rows.values()),
        "tokens": sum(row["tokens"] for row in new),
        "seconds": round(time.perf_counter() - began, 2),
    }


def _find_features(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    samples: Sequence[GroundingSample],
    keep: Path,
) -> Mapping[str, EncodedImage] | None:
    """Return features of all images, or None on a GPU and where they do not fit."""
    if model.device.type != "cpu":
        return None
    rows = [
        {
            "images": one.images,
            "image_tokens": [
                count_image_tokens(path, processor, one.id) for path in one.images
            ],
        }
        for one in samples
    ]
    if not features_fit(rows, get_feature_width(model.config)):
        return None
    paths = [path for one in samples for path in one.images]
    return vision_features(model, processor, paths, keep)


def _warn_of_unknown_targets(samples: Sequence[GroundingSample]) -> None:
    """Warn of replies whose pixels may be read in the wrong image."""
    if unknown := sum(find_target_image(sample) is None for sample in samples):
        logger.warning(
            "%d of %d items do not say which image holds the target: a box in pixels "
            "is read in the image that the reply names last, else in the last; give "
            "target_image in the records",
            *(unknown, len(samples)),
        )


def _prepare_file(out: Path, settings: dict[str, Any], fresh: bool) -> None:
    """Begin a predictions file, or end the last line of the one that goes on."""
    if out.is_file():
        if not fresh:
            io.end_last_line(out)
            return
        for old in (out, get_settings_path(out)):
            if old.is_file():  # the settings are missing beside a file of another tool
                io.set_aside(old, out.parent / "replaced" / old.name)
    io.write_json(get_settings_path(out), settings)
    io.write_text(out, "")


def _collect_settings(
    model: PreTrainedModel | ServedModel,
    processor: ProcessorMixin,
    samples: Sequence[GroundingSample],
    options: GenerationOptions,
) -> dict[str, Any]:
    """Return everything that replies depend on, of a server as far as it is known."""
    settings = asdict(options) | {
        "seed": options.seed if options.temperature > 0 else None,
        "image_size": dict(processor.image_processor.size),
        "items_hash": hash_items(samples),
    }
    for name in ("batch_size", "keep"):  # replies do not depend on them
        del settings[name]
    if isinstance(model, ServedModel):
        convention = model.convention
    else:
        convention = get_convention(models.get_base_model(model).config, processor)
    if convention != PLAIN:
        settings["convention"] = asdict(convention)
    if isinstance(model, ServedModel):
        made_by = {"attention": "server", "weights_hash": ["served", model.model]}
        return settings | made_by
    weights = [models.hash_weights(model), models.hash_weights(model, adapter=True)]
    attention = model.config._attn_implementation
    return settings | {"attention": attention, "weights_hash": weights}


def _read_rows(out: Path, settings: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Read the rows that were made under `settings`, by item; {} without a file."""
    if not out.is_file():
        return {}
    if is_json_array(out):
        raise ValueError(
            f"{out} is a JSON array, which cannot be continued; choose another file, "
            "or replace it with --fresh"
        )
    before = read_generation_settings(out) or {}
    differ = [key for key in settings if before.get(key) != settings[key]]
    if differ:
        key = differ[0]
        raise SettingsMismatchError(
            f"{out} was made under other settings ({', '.join(differ)}): "
            f"{key} = {before.get(key)!r} there, now {settings[key]!r}; choose another "
            "file, or replace it with --fresh"
        )
    return read_rows(out)


def plan_batches(
    processor: ProcessorMixin,
    samples: Sequence[GroundingSample],
    indices: Sequence[int],
    options: GenerationOptions,
) -> list[list[int]]:
    """Put indices of items whose prompts are of similar length into batches.

    They depend on all of `indices`, not on what is done: a resumed run has the same.
    """
    if not indices:
        return []
    chosen = [samples[i] for i in indices]
    texts = [replies.render_prompt(processor, one, options.style) for one in chosen]
    lengths = [len(ids) for ids in processor.tokenizer(texts).input_ids]
    for k, one in enumerate(chosen):
        images = [count_image_tokens(path, processor, one.id) for path in one.images]
        lengths[k] += sum(images)
    order = [i for _, i in sorted(zip(lengths, indices, strict=True))]
    size = options.batch_size
    return [order[start : start + size] for start in range(0, len(order), size)]


# ---------------------------------------------------------------- command line


def adapt_model_section(config: dict[str, Any], records: str | Path) -> dict[str, Any]:
    """Return a scale's `model` section; released zero-shot images may be larger."""
    row = next(files.iter_rows(records), {})
    is_zero_shot = files.detect_format(row, str(records)) in ZERO_SHOT_FORMATS
    if is_zero_shot and config["data"]["source"] == "released":
        return config["model"] | {"max_pixels": ZERO_SHOT_MAX_PIXELS}
    return dict(config["model"])


def _load_config(options: argparse.Namespace) -> dict[str, Any]:
    """Load the scale with the benchmark's pixel limit, then `--set` on top."""
    if options.scale is None and options.model != "tiny":
        raise ValueError(
            f"--model {options.model}: give --scale too (small, full or a .yaml file); "
            "it holds the pixel limits, dtype and batch size"
        )
    config = load_scale(options.scale or "tiny")
    config["model"] = adapt_model_section(config, options.records)
    config["model"]["name_or_path"] = options.model
    if options.max_new_tokens is not None:
        config["evaluate"]["max_new_tokens"] = options.max_new_tokens
    return reduce(override, options.set, config)


def _connect(
    section: Mapping[str, Any], options: argparse.Namespace
) -> tuple[ServedModel, ProcessorMixin]:
    """Return a model that a server holds, and the processor for the same name."""
    if options.adapter or options.quantize:
        raise ValueError(
            "--server answers with what it serves: merge the adapter (python -m "
            "univg_nb merge), serve that folder and name it with --model, without "
            "--adapter and --quantize"
        )
    config, processor = models.load_config(section), models.load_processor(section)
    own = models.load_processor({"name_or_path": options.model})
    most = own.image_processor.size["longest_edge"]
    asked = processor.image_processor.size["longest_edge"]
    if most < asked:
        raise ValueError(
            f"the processor in {options.model} shrinks images to {most} pixels, and so "
            f"would a server, but {asked} are asked for; serve a folder that "
            "python -m univg_nb merge wrote"
        )
    convention = get_convention(config, processor)
    return ServedModel(options.server, options.model, convention), processor


def main(arguments: Sequence[str] | None = None) -> None:
    """Generate replies from the command line."""
    parser = make_parser(
        "generate",
        "Write the replies of a model to a benchmark. Under torchrun "
        "several GPUs share the work.",
        "--records MIG_data.json --model tiny --out p.jsonl",
    )
    add = parser.add_argument
    add("--records", required=True, help="annotation file in any released format")
    add("--image-root", help="folder that image paths start from")
    add("--out", required=True, type=output_file, help="continued if it exists")
    add("--fresh", action="store_true", help="begin again; keep the old in replaced/")
    add("--allow-missing", action="store_true", help="leave out items without image")
    add("--model", required=True, help='"tiny", a local folder or a hub name')
    add("--adapter", nargs="+", default=[], help="adapters, each on top of the last")
    add("--quantize", choices=("nf4",))
    add("--server", metavar="URL", help="ask a vLLM server that serves --model")
    add_scale_arguments(parser, "tiny")
    parser.set_defaults(scale=None)  # required for another --model
    add("--style", choices=prompts.STYLES, default="univg", help="of the prompt")
    add("--max-new-tokens", type=within(int, 1), help="default: the scale's")
    add(
        "--temperature",
        type=within(float, 0),
        default=0.0,
        help="0 (default) is greedy",
    )
    add("--seed", type=int, default=0, help="of sampling")
    options = parser.parse_args(arguments)
    bench = Benchmark.read(options.records, options.image_root)
    indices = list(range(len(bench.items)))
    if options.allow_missing:
        absent = find_missing_images(bench.items, indices)
        indices = [i for i in indices if i not in absent]
        print(f"{len(absent)} items left out: an image is missing")
    else:
        check_images(bench.items)  # here too: loading the model takes minutes
    config = _load_config(options)
    how = GenerationOptions(
        options.style,
        temperature=options.temperature,
        seed=options.seed,
        **config["evaluate"],
    )
    facts = {"model": options.model, "adapters": options.adapter}
    facts |= {"quantize": options.quantize, "records": bench.records.name}
    with io.locked(options.out):
        if options.server:
            model, processor = _connect(config["model"], options)
        else:
            model, processor = models.load_for_inference(
                config["model"], options.adapter, options.quantize
            )
        summary = generate(
            *(model, processor, bench.items, options.out, how),
            indices=indices,
            fresh=options.fresh,
            facts=facts,
        )
    state = PartialState()
    if state.is_main_process:
        print(
            f"{summary['replies']} replies in {options.out} ({summary['new']} new, "
            f"{summary['truncated']} truncated) in {summary['seconds']} s"
        )
    state.destroy_process_group()
