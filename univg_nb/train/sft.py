"""Stage 1's trainer: TRL's SFTTrainer, and what it lacks for an exact resume.

Length-grouped order that is a function of (seed, epoch), vision features computed
once, attention without a mask where padding is behind, a stop before a broken update.
"""

import argparse
import gc
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from peft import PeftModel
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

from univg_nb import io, models, runs
from univg_nb.config import whole_batch
from univg_nb.data import files
from univg_nb.data.sample import GroundingSample
from univg_nb.fast.vision_features import features_fit, vision_features
from univg_nb.models import whole
from univg_nb.train import checkpoints
from univg_nb.train.collator import LengthGroupedBatches, VisionCollator, tokenize

# DOC of sft:
# """Stage 1: CoT-SFT with TRL's SFTTrainer; LoRA, QLoRA (NF4) or all language weights.

#     python -m univg_nb sft CONFIG.yaml --set sft.adapter=qlora --out runs/NAME/sft_qlora

# One configuration decides (PF sec. 3 is its full scale): `sft.adapter` is lora, qlora
# or none, every other option has TRL's or PEFT's own name. The vision tower is frozen.
# An interrupted training started again with the same command goes on from its last
# whole checkpoint and ends with the same weights, bit for bit on a CPU.
# """


class GroundingSFTTrainer(SFTTrainer):
    """SFTTrainer that groups batches by length, takes ready-made vision features, and
    stops before an update with a loss or gradient that is not finite."""

    epoch_sampler: LengthGroupedBatches | None = None
    seen: list[int]  # indices of the samples of the update at hand
    samples = 0  # of this process and this call, as the next two
    tokens = 0  # padding included
    padding = 0
    counted: int | None = None  # parameters, embeddings left out

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen = []
        collator = self.data_collator
        if isinstance(collator, VisionCollator) and collator.padding_side == "right":
            backbone = models.base_model(self.model).model
            backbone.register_forward_pre_hook(_without_mask, with_kwargs=True)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """The Trainer's own estimate. It counts the parameters anew at every update,
        which takes a twentieth of the time of a small model's."""
        if self.counted is None:
            self.counted = self.model.num_parameters(exclude_embeddings=True)
        return 6 * inputs["input_ids"].numel() * self.counted

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        dataset = self.train_dataset if train_dataset is None else train_dataset
        self.epoch_sampler = LengthGroupedBatches(
            dataset[self.args.length_column_name],
            self.args.train_batch_size
            * self.args.gradient_accumulation_steps
            * self.args.world_size,
            self.args.seed,
        )
        return self.epoch_sampler

    def training_step(self, model: Any, inputs: Any, *args: Any) -> torch.Tensor:
        self.seen += inputs.pop("sample_index").tolist()
        mask = inputs["attention_mask"]
        self.samples += len(mask)
        self.tokens += mask.numel()
        self.padding += mask.numel() - int(mask.sum())
        loss = super().training_step(model, inputs, *args)
        self._check_finite("loss", float(loss))
        return loss

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if "image_features" in inputs:
            # Qwen2-VL's own way in for a vision output that is already there.
            features = inputs.pop("image_features")
            image = SimpleNamespace(pooler_output=(features,))
            inputs["mm_encoder_outputs"] = {"image": image}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The last thing the Trainer asks for before the update."""
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


def _without_mask(module: torch.nn.Module, args: tuple, kwargs: dict) -> Any:
    """In training on right-padded rows no real token looks back at padding, and the
    padding's own outputs carry no loss: plain causal attention, which is faster."""
    return (args, {**kwargs, "attention_mask": None}) if module.training else None


Adapter = Literal["lora", "qlora", "none"]
OWN_OPTIONS = ("adapter", "lora", "freeze_vision")  # of the section; the rest are TRL's


def sft_config(section: Mapping[str, Any], out: Path) -> SFTConfig:
    """The `sft` section as SFTConfig.

    max_length is not handed on, since TRL cuts where we refuse.
    """
    arguments = SFTConfig(
        **{
            "train_sampling_strategy": "group_by_length",
            "ddp_find_unused_parameters": False,
            **checkpoints.library_options(section, out, OWN_OPTIONS),
            "max_length": None,
            "completion_only_loss": False,  # our collator's labels say it already
        }
    )
    checkpoints.check_world(arguments, "sft")
    return arguments


def build_model(
    config: Mapping[str, Any], adapter: Adapter, init_adapter: Path | None
) -> tuple[Any, Any]:
    """(model, processor) with exactly what stage 1 trains set to require a gradient."""
    section = config["sft"]
    frozen = section.get("freeze_vision", True)
    if adapter != "none" and not frozen:
        raise ValueError(
            f"sft.freeze_vision = false with sft.adapter = {adapter}: LoRA is put on "
            "the language model only; set adapter: none or freeze_vision: true"
        )
    quantize = "nf4" if adapter == "qlora" else None
    model, processor = models.load(config["model"], init_adapter, True, quantize)
    if frozen:
        models.freeze_vision(model)
    if isinstance(model, PeftModel) and adapter == "none":
        raise ValueError(
            f"init_adapter {init_adapter} is a LoRA adapter, sft.adapter is none; "
            "use lora or qlora, or merge the adapter first"
        )
    if adapter != "none" and not isinstance(model, PeftModel):
        model = models.add_lora(model, section.get("lora"))
    trained = models.parameter_account(model)["total"]["trainable"]
    if not trained:
        raise ValueError(
            "nothing to train: no parameter requires a gradient; check sft.adapter and "
            "sft.lora.target_modules"
        )
    return model, processor


def build_trainer(
    config: Mapping[str, Any],
    out: Path,
    train: Sequence[GroundingSample],
    adapter: Adapter,
    chains: bool,
    init_adapter: Path | None,
) -> GroundingSFTTrainer:
    """Everything up to the first step: model, token ids, vision features, trainer."""
    arguments = sft_config(config["sft"], out)
    set_seed(arguments.seed)  # before LoRA draws its matrices
    model, processor = build_model(config, adapter, init_adapter)
    max_length = config["sft"].get("max_length")
    dataset = tokenize(train, processor, chains, max_length)
    base = models.base_model(model)
    features = None
    frozen = config["sft"].get("freeze_vision", True)
    hidden = base.config.get_text_config().hidden_size
    if frozen and features_fit(dataset, hidden):
        base.to(models.device())
        paths = [path for sample in train for path in sample.images]
        progress = not config["sft"].get("disable_tqdm")
        keep = out.parent / "vision_features"  # the run's other trainings read it too
        with whole(base.model.visual):
            features = vision_features(base, processor, paths, keep, progress)
    with checkpoints.exact_adapter(model, adapter == "qlora"):
        return GroundingSFTTrainer(
            model=model,
            args=arguments,
            data_collator=VisionCollator(processor, features, max_length=max_length),
            train_dataset=dataset,
            processing_class=processor,
        )


def train(
    config: dict[str, Any],
    out: str | Path,
    train: Sequence[GroundingSample],
    *,
    adapter: Adapter | None = None,
    chains: bool = True,
    init_adapter: str | Path | None = None,
) -> dict[str, Any]:
    """Fine-tune on `train`; write out/{config.yaml, metrics.jsonl, adapter/}.

    config: a whole scale. adapter: overrides sft.adapter. chains=False trains the
    control without reasoning (question alone, reply only the box). init_adapter: goes
    on from the adapter (or the fully trained model) of an earlier training.
    Returns and writes summary.json: steps, seconds, losses, padding_share (padding /
    all tokens, 0..1), samples_per_second, parameters.

    Raises ValueError for a missing image, a sample over sft.max_length, or nothing to
    train; FloatingPointError, naming step and samples, for a loss that is not finite.
    """
    out = Path(out)
    init_adapter = None if init_adapter is None else Path(init_adapter)
    adapter = adapter or config["sft"].get("adapter", "lora")
    config = {**config, "sft": {**config["sft"], "adapter": adapter}}
    fingerprint = io.config_hash(
        [
            [config["model"], whole_batch(config["sft"], checkpoints.processes())],
            [asdict(sample) for sample in train],
            [chains, str(init_adapter)],
        ]
    )
    checkpoint = checkpoints.whole_checkpoint(out / "checkpoints", fingerprint)
    began = time.perf_counter()
    with models.renamed_options():
        trainer = build_trainer(config, out, train, adapter, chains, init_adapter)
        checkpoints.Recorder(
            out, fingerprint, not config["sft"].get("disable_tqdm", False)
        ).attach(trainer)
        if trainer.is_world_process_zero():
            io.write_text(out / "config.yaml", runs.dump(config))
            checkpoints.forget_after(out / "metrics.jsonl", checkpoint)
        prepared = time.perf_counter()
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    seconds = time.perf_counter() - prepared
    trainer.save_model(str(out / "adapter"))
    summary = summarize(trainer, seconds)
    summary |= {"adapter": adapter, "chains": chains, "samples": len(train)}
    summary["prepare_seconds"] = round(prepared - began, 3)
    if trainer.is_world_process_zero():
        io.write_json(out / "summary.json", summary)
    del trainer
    gc.collect()  # model, optimiser and features: a trainer is full of cycles
    return summary


def summarize(trainer: GroundingSFTTrainer, seconds: float) -> dict[str, Any]:
    """What a training did; throughput and padding are those of this call's steps."""
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    tail = losses[-max(1, len(losses) // 10) :]
    drawn = trainer.samples * trainer.args.world_size
    return {
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 3),
        "samples_per_second": round(drawn / seconds, 2),
        "loss_first": losses[0] if losses else None,
        "loss_last": sum(tail) / len(tail) if losses else None,  # of the last tenth
        "padding_share": round(trainer.padding / max(trainer.tokens, 1), 4),
        "parameters": models.parameter_account(trainer.model),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; also what `accelerate launch -m univg_nb.train.sft` runs."""
    parser = argparse.ArgumentParser(prog="python -m univg_nb sft")
    parser.add_argument("config", help="a shipped scale's name or a .yaml file")
    parser.add_argument(
        "--out", type=Path, help="stage folder; default runs/SCALE/sft_ADAPTER"
    )
    parser.add_argument(
        "--data", type=Path, help="default: data.stage1_file, or runs/SCALE/data"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE"
    )
    parser.add_argument("--no-chains", action="store_true", help="the no-CoT control")
    parser.add_argument("--init-adapter", type=Path, help="go on from this adapter")
    options = parser.parse_args(argv)
    config = runs.load_scale(options.config)
    for assignment in options.set:
        config = runs.override(config, assignment)
    data = config["data"]
    adapter = config["sft"].get("adapter", "lora")
    scale = Path(options.config).stem
    path = options.data or data.get("stage1_file")
    path = Path(path or f"runs/{scale}/data/stage1_cotsft.json")
    root = data.get("image_root") or path.parent
    rows = files.read(path, image_root=root)[: data.get("stage1")]
    out = options.out or Path("runs") / scale / f"sft_{adapter}"
    summary = train(
        config,
        out,
        rows,
        chains=not options.no_chains,
        init_adapter=options.init_adapter,
    )
    print({key: value for key, value in summary.items() if key != "parameters"})


if __name__ == "__main__":
    main()
