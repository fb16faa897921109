"""Stage 2: GRPO with difficulty weights, on TRL's GRPOTrainer.

    python -m univg_nb grpo CONFIG --sft-adapter runs/NAME/sft_lora/adapter
    accelerate launch -m univg_nb.train.grpo CONFIG --sft-adapter ...

TRL does the method; `grpo_trainer` adds the weight of a group's mean IoU. The policy
trains the SFT adapter further. The KL reference is the SFT model: TRL keeps a frozen
copy of the adapter as "ref", so there is no second copy of the base weights. An
interrupted training that is started again with the same command goes on from its last
whole checkpoint and ends with the same replies, metrics and weights, on a CPU bit for
bit.

Comparison forms, each one line of the scale or one --set:

    grpo.scale_rewards=none         advantages not divided by the group's deviation
    grpo.rescale=mad                divided by the mean absolute deviation
    grpo.rescale=drop_silent        groups of equal rewards left out of the mean
    grpo.weight=peak                weight 4m(1-m), largest at a mean IoU of 0.5
    grpo.weight=my_weights.py:mine  a function of yours (difficulty.register_weight)
"""

from __future__ import annotations

import gc
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig

from univg_nb import io, models
from univg_nb.__main__ import main as run_command
from univg_nb.config import (
    OWN_SECTIONS,
    add_scale_arguments,
    load_scale,
    make_parser,
    output_folder,
)
from univg_nb.data.conventions import PLAIN, BoxConvention, get_convention
from univg_nb.data.images import check_images
from univg_nb.data.prompts import user_text
from univg_nb.data.sample import GroundingSample
from univg_nb.fast import vllm
from univg_nb.runs import resolve_run_dir
from univg_nb.train import checkpoints, difficulty
from univg_nb.train.grpo_trainer import DifficultyGRPOTrainer


def to_rows(
    train: Sequence[GroundingSample], convention: BoxConvention = PLAIN
) -> Dataset:
    """Make rows for TRL, which puts the images in front of the text.

    Images stay paths and are opened when needed. `cot` False is the single-image mode:
    the prompt asks for no chain, the format reward for a bare box. `pictures` says what
    a model that writes boxes in pixels must know of the images.
    """
    return Dataset.from_list(
        [
            {
                "prompt": [
                    {"role": "user", "content": user_text(convention.ask(sample))}
                ],
                "images": list(sample.images),
                "answer": [float(v) for v in sample.answer],
                "cot": sample.cot,
                "sample_id": sample.id,
                "task": sample.task,
                **convention.describe(sample),
            }
            for sample in train
        ]
    )


def grpo_config(config: Mapping[str, Any], out: Path, num_samples: int) -> GRPOConfig:
    """Turn a scale's `grpo` section into a GRPOConfig.

    Raises:
        ValueError: for a layout of batches that cannot be, or that takes more than
            `num_samples` training samples at once.
    """
    options = {
        "loss_type": "grpo",
        "beta": 0.04,
        # TRL's default multiplies the KL by the policy ratio; the paper's does not.
        "use_bias_correction_kl": False,
        **checkpoints.make_trainer_options(config, "grpo", out),
        "log_multimodal": False,  # images are on disk; rollouts.jsonl has the rest
    }
    try:
        arguments = GRPOConfig(**options)
    except ValueError as error:
        raise ValueError(
            f"grpo: {error} A generation batch has grpo.per_device_train_batch_size x "
            "processes x steps (gradient_accumulation_steps) replies"
        ) from error
    prompts = arguments.generation_batch_size // arguments.num_generations
    if num_samples < prompts:
        raise ValueError(
            f"{num_samples} training samples, but one generation takes {prompts} "
            "prompts: TRL would drop them all and train nothing; give more samples or "
            "lower grpo.per_device_train_batch_size"
        )
    return arguments


def build_trainer(
    config: Mapping[str, Any],
    out: Path,
    train: Sequence[GroundingSample],
    sft_adapter: Path,
    rollout_log: Path | None = None,
    **options: Any,
) -> DifficultyGRPOTrainer:
    """Build everything up to the first update; for arguments and errors see `train`.

    `options` are those of DifficultyGRPOTrainer; they override the grpo section.
    """
    section = config["grpo"]
    if problem := vllm.find_conflict(config):
        raise ValueError(f"grpo.use_vllm: {problem}")
    arguments = grpo_config(config, out, len(train))
    mine = range(arguments.process_index, len(train), arguments.world_size)
    check_images(train, mine)
    four_bit = config["sft"].get("adapter") == "qlora"
    quantize: models.Quantization | None = "nf4" if four_bit else None
    model, processor = models.load_for_training(config["model"], sft_adapter, quantize)
    convention = get_convention(models.get_base_model(model).config, processor)
    own = {key: section[key] for key in OWN_SECTIONS["grpo"] if key in section}
    if own.pop("freeze_vision", True):
        models.freeze_vision(model)
    with (
        checkpoints.keep_adapter_exact(model, four_bit),
        models.ignore_rename_warnings(),
    ):
        return DifficultyGRPOTrainer(
            model=model,
            args=arguments,
            train_dataset=to_rows(train, convention),
            processing_class=processor,
            convention=convention,
            rollout_log=rollout_log,
            **own | options,
        )


def describe(
    config: dict[str, Any],
    train: Sequence[GroundingSample],
    *,
    sft_adapter: str | Path,
    processes: int | None = None,
    **overrides: Any,
) -> checkpoints.Training:
    """Return what `train` trains; `processes` is how many will, if not this many."""
    given = {key: value for key, value in overrides.items() if value is not None}
    config = {**config, "grpo": {**config["grpo"], **given}}
    start = str(Path(sft_adapter).resolve())
    for name in ("adapter_model.safetensors", "model.safetensors"):
        weights = Path(sft_adapter) / name
        if weights.is_file():  # else a large model, in several files
            start = io.sha256_of(weights)
    if code := difficulty.identify_weight(config["grpo"].get("weight", "exp")):
        start += code
    return checkpoints.describe("grpo", config, train, start, processes)


def train(
    config: dict[str, Any],
    out: str | Path,
    train: Sequence[GroundingSample],
    *,
    sft_adapter: str | Path,
    fresh: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    **overrides: Any,
) -> dict[str, Any]:
    """Train with GRPO from an SFT adapter; return the summary.

    Writes config.yaml, metrics.jsonl, rollouts.jsonl, adapter/ and summary.json.

    Args:
        config: a whole scale.
        out: stage folder.
        train: the training samples.
        sft_adapter: the adapter of stage 1, or the folder of a fully trained model. The
            new adapter replaces it: it is loaded the same way, on the same base.
        fresh: begin again; a training that is in the folder is kept in replaced/.
        callbacks: further callbacks of the trainer.
        **overrides: options of the grpo section, such as weight; None changes nothing.

    Raises:
        ValueError: for an impossible layout or option, a folder that holds another
            training or that another process works in, and for a policy that never earns
            a reward.
        FloatingPointError: for a loss or KL out of bounds.
    """
    out, sft_adapter = Path(out), Path(sft_adapter)
    training = describe(config, train, sft_adapter=sft_adapter, **overrides)
    with training.claim(out, fresh) as finished:
        return finished or _train(training, out, train, sft_adapter, callbacks)


def _train(
    training: checkpoints.Training,
    out: Path,
    samples: Sequence[GroundingSample],
    sft_adapter: Path,
    callbacks: Sequence[TrainerCallback],
) -> dict[str, Any]:
    """Train in a folder that is claimed; see `train`."""
    trainer = build_trainer(
        training.config, out, samples, sft_adapter, out / "rollouts.jsonl"
    )
    summary = checkpoints.run_training(trainer, training, out, callbacks)
    rows = [row for row in trainer.state.log_history if "reward" in row]
    tenth = max(1, len(rows) // 10)  # of the generations
    for key, name in (("reward", "reward"), ("groups/mean_iou", "mean_iou")):
        for when, part in (("first", rows[:tenth]), ("last", rows[-tenth:])):
            summary[f"{name}_{when}"] = sum(row[key] for row in part) / len(part)
    summary["weight"] = trainer.weight_options | {"rescale": trainer.rescale}
    summary["sft_adapter"] = str(sft_adapter)
    if trainer.is_world_process_zero():
        # PEFT saves the frozen reference too; that is the SFT adapter, where it was.
        shutil.rmtree(out / "adapter" / "ref", ignore_errors=True)
        io.write_json(out / "summary.json", summary)
    del trainer
    gc.collect()  # model, reference and optimizer: a trainer is full of cycles
    return summary


def main(arguments: Sequence[str] | None = None) -> None:
    """Train stage 2 from the command line."""
    parser = make_parser(
        "grpo",
        "Stage 2: train with GRPO and difficulty weights.",
        "tiny --sft-adapter runs/tiny/sft_lora/adapter --set grpo.weight=exp",
    )
    add = parser.add_argument
    add_scale_arguments(parser)
    add("--sft-adapter", type=Path, required=True, help="adapter of stage 1")
    add("--out", type=output_folder, help="default: runs/SCALE/grpo_WEIGHT")
    add("--data", type=Path, help="default: data.stage2_file, else runs/SCALE/data")
    add("--fresh", action="store_true", help="begin again; keep the old in replaced/")
    options = parser.parse_args(arguments)
    config = load_scale(options.scale, options.set)
    name = difficulty.get_weight_name(config["grpo"].get("weight", "exp"))
    summary = train(
        config,
        options.out or resolve_run_dir("", options.scale) / f"grpo_{name}",
        checkpoints.read_training_set(options, config, "stage2"),
        sft_adapter=options.sft_adapter,
        fresh=options.fresh,
    )
    hidden = ("parameters", "fingerprint")
    print({key: value for key, value in summary.items() if key not in hidden})


if __name__ == "__main__":
    sys.exit(run_command(["grpo", *sys.argv[1:]]))
