"""Stage 1: CoT-SFT with TRL's SFTTrainer; LoRA, QLoRA (NF4) or all language weights.

    python -m univg_nb sft CONFIG --set sft.adapter=qlora --out runs/NAME/sft_qlora
    accelerate launch -m univg_nb.train.sft CONFIG

`sft.adapter` is lora, qlora or none; every other option of the `sft` section has TRL's
or PEFT's own name. The vision tower is frozen. The scale `full` follows
docs/paper_facts.md#training-configuration. An interrupted training that is started
again with the same command goes on from its last whole checkpoint and ends with the
same weights, on a CPU bit for bit.
"""

import gc
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from univg_nb import io, models
from univg_nb.__main__ import main as run_command
from univg_nb.config import (
    add_scale_arguments,
    load_scale,
    make_parser,
    output_folder,
)
from univg_nb.data.conventions import get_convention
from univg_nb.data.images import check_images
from univg_nb.data.sample import GroundingSample
from univg_nb.fast.vision_features import (
    features_fit,
    get_feature_width,
    make_feature_inputs,
    vision_features,
)
from univg_nb.runs import resolve_run_dir
from univg_nb.train import checkpoints
from univg_nb.train.collator import LengthGroupedBatches, VisionCollator, tokenize


class GroundingSFTTrainer(SFTTrainer):
    """SFTTrainer with what an exact resume and fast steps need.

    It groups batches by length, takes vision features that are already computed, and
    stops before an update whose loss or gradient is not finite.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[int] = []  # indices of the samples of the current update
        self.tokens = self.padding = 0  # of this process and this call
        backbone = models.get_base_model(self.model).model
        backbone.register_forward_pre_hook(_drop_mask, with_kwargs=True)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        micro_batches = self.args.gradient_accumulation_steps * self.args.world_size
        size = self.args.train_batch_size * micro_batches
        lengths = list(self.train_dataset["length"])
        return LengthGroupedBatches(lengths, size, self.args.seed)

    def _load_from_checkpoint(self, checkpoint: str, model: Any = None) -> None:
        if isinstance(self.model, PreTrainedModel) and not self.is_fsdp_enabled:
            checkpoints.load_whole(self.model, checkpoint)
        else:
            super()._load_from_checkpoint(checkpoint, model)

    def training_step(self, model: Any, inputs: Any, *args: Any) -> torch.Tensor:
        """Count tokens, then do TRL's step."""
        self.seen += inputs.pop("sample_index").tolist()
        mask = inputs["attention_mask"]
        self.tokens += mask.numel()
        self.padding += mask.numel() - int(mask.sum())
        loss = super().training_step(model, inputs, *args)
        self._check_finite("loss", float(loss))
        return loss

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Hand computed vision features to the model in its own way."""
        if "image_features" in inputs:
            features = inputs.pop("image_features")
            config = models.get_base_model(self.model).config
            inputs |= make_feature_inputs([features], config)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Check the gradient: the Trainer asks for its norm right before the update."""
        norm = super()._get_grad_norm(model, grad_norm)
        self._check_finite("gradient norm", float(norm))
        self.seen = []
        return norm

    def _check_finite(self, what: str, value: float) -> None:
        if math.isfinite(value):
            return
        rows = self.train_dataset.select(self.seen)
        raise FloatingPointError(
            f"{what} is {value} at step {self.state.global_step + 1}, before its "
            f"update; samples {', '.join(rows['sample_id'])}. Lower sft.learning_rate "
            "or look at these samples; the last checkpoint is whole"
        )


def _drop_mask(module: torch.nn.Module, args: tuple, kwargs: dict) -> Any:
    """Use plain causal attention in training, which is faster than a mask.

    On right-padded rows no real token sees padding, and padding carries no loss.
    """
    return (args, {**kwargs, "attention_mask": None}) if module.training else None


def build_trainer(
    config: Mapping[str, Any],
    out: Path,
    samples: Sequence[GroundingSample],
    chains: bool = True,
) -> GroundingSFTTrainer:
    """Prepare everything up to the first step; for the arguments see `train`."""
    section = config["sft"]
    adapter, frozen = section.get("adapter", "lora"), section.get("freeze_vision", True)
    if adapter != "none" and not frozen:
        raise ValueError(
            f"sft.freeze_vision = false with sft.adapter = {adapter}: LoRA is put on "
            "the language model only; set adapter: none or freeze_vision: true"
        )
    arguments = SFTConfig(
        **{
            "train_sampling_strategy": "group_by_length",
            "ddp_find_unused_parameters": False,
            **checkpoints.make_trainer_options(config, "sft", out),
            "max_length": None,  # TRL would cut samples that `tokenize` refuses
            "completion_only_loss": False,  # the collator's labels say it already
        }
    )
    mine = range(arguments.process_index, len(samples), arguments.world_size)
    check_images(samples, mine)
    quantize: models.Quantization | None = "nf4" if adapter == "qlora" else None
    base, processor = models.load_for_training(config["model"], quantize=quantize)
    if frozen:
        models.freeze_vision(base)
    set_seed(arguments.seed)  # LoRA draws its matrices
    model = base if adapter == "none" else models.add_lora(base, section.get("lora"))
    boxes = get_convention(base.config, processor)
    longest = section.get("max_length")
    dataset = tokenize(samples, processor, chains, longest, boxes)
    features = None
    if frozen and features_fit(dataset, get_feature_width(base.config)):
        base.to(models.get_device())
        paths = [path for sample in samples for path in sample.images]
        progress = not section.get("disable_tqdm")
        keep = out.parent / "vision_features"  # the run's other trainings read it too
        with models.gather_weights(base.model.visual):
            features = vision_features(base, processor, paths, keep, progress)
    with checkpoints.keep_adapter_exact(model, adapter == "qlora"):
        return GroundingSFTTrainer(
            model=model,
            args=arguments,
            data_collator=VisionCollator(processor, features),
            train_dataset=dataset,
            processing_class=processor,
        )


def describe(
    config: dict[str, Any],
    samples: Sequence[GroundingSample],
    *,
    adapter: Literal["lora", "qlora", "none"] | None = None,
    chains: bool = True,
    processes: int | None = None,
) -> checkpoints.Training:
    """Return what `train` trains; `processes` is how many will, if not this many."""
    adapter = adapter or config["sft"].get("adapter", "lora")
    config = {**config, "sft": {**config["sft"], "adapter": adapter}}
    return checkpoints.describe("sft", config, samples, chains, processes)


def train(
    config: dict[str, Any],
    out: str | Path,
    samples: Sequence[GroundingSample],
    *,
    adapter: Literal["lora", "qlora", "none"] | None = None,
    chains: bool = True,
    fresh: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Fine-tune; write out/{config.yaml, metrics.jsonl, adapter/, summary.json}.

    Args:
        config: a whole scale.
        out: folder of the training.
        samples: the training set.
        adapter: overrides sft.adapter.
        chains: False trains the control without reasoning (see `collator.tokenize`).
        fresh: begin again; a training that is in the folder is kept in replaced/.
        callbacks: for the trainer, called before metrics are written.

    Returns:
        The summary: steps, seconds, losses, padding_share (of all tokens, 0 to 1),
        samples_per_second, parameters, ... That of a finished training is read.

    Raises:
        ValueError: for a missing image, a sample over sft.max_length, or a folder that
            holds another training or that another process works in.
        FloatingPointError: for a loss or gradient that is not finite.
    """
    out = Path(out)
    training = describe(config, samples, adapter=adapter, chains=chains)
    with training.claim(out, fresh) as finished:
        return finished or _train(training, out, samples, chains, callbacks)


def _train(
    training: checkpoints.Training,
    out: Path,
    samples: Sequence[GroundingSample],
    chains: bool,
    callbacks: Sequence[TrainerCallback],
) -> dict[str, Any]:
    """Train in a folder that is claimed; see `train`."""
    with models.ignore_rename_warnings():
        trainer = build_trainer(training.config, out, samples, chains)
    summary = checkpoints.run_training(trainer, training, out, callbacks)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    tail = losses[-max(1, len(losses) // 10) :]
    summary |= {
        "loss_first": losses[0] if losses else None,
        "loss_last": sum(tail) / len(tail) if losses else None,  # of the last tenth
        "padding_share": round(trainer.padding / trainer.tokens, 4),
        "adapter": training.config["sft"]["adapter"],
        "chains": chains,
        "samples": len(samples),
    }
    if trainer.is_world_process_zero():
        io.write_json(out / "summary.json", summary)
    del trainer
    gc.collect()  # a trainer is full of cycles that hold model, optimizer and features
    return summary


def main(arguments: Sequence[str] | None = None) -> None:
    """Train stage 1 from the command line."""
    parser = make_parser(
        "sft",
        "Stage 1: fine-tune a model on reasoning chains.",
        "tiny --set sft.learning_rate=1e-4",
    )
    add = parser.add_argument
    add_scale_arguments(parser)
    add("--out", type=output_folder, help="default: runs/SCALE/sft_ADAPTER")
    add("--data", type=Path, help="default: data.stage1_file, else runs/SCALE/data")
    add("--no-chains", action="store_true", help="the control without reasoning")
    add("--fresh", action="store_true", help="begin again; keep the old in replaced/")
    options = parser.parse_args(arguments)
    config = load_scale(options.scale, options.set)
    adapter = config["sft"].get("adapter", "lora")
    summary = train(
        config,
        options.out or resolve_run_dir("", options.scale) / f"sft_{adapter}",
        checkpoints.read_training_set(options, config, "stage1"),
        chains=not options.no_chains,
        fresh=options.fresh,
    )
    hidden = ("parameters", "fingerprint")
    print({key: value for key, value in summary.items() if key not in hidden})


if __name__ == "__main__":
    sys.exit(run_command(["sft", *sys.argv[1:]]))
