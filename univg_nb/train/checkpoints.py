"""What both trainings share: data, options, metrics.jsonl and whole checkpoints.

A killed training that is started again with the same command goes on from its last
checkpoint that was written to its end. Rows that are newer than that checkpoint are
dropped from the files it writes, because their updates are made again.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from torch.nn import Module
from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainingArguments,
)

from univg_nb import io, models
from univg_nb.config import FORMER_NAMES, OWN_SECTIONS, dump, whole_batch
from univg_nb.data import files
from univg_nb.data.sample import GroundingSample
from univg_nb.runs import resolve_run_dir

Stage = Literal["sft", "grpo"]  # the section of a scale
COMPLETE = "complete.json"  # written last into a checkpoint
DATA_FILES = {"stage1": "stage1_cotsft.json", "stage2": "stage2_rl.json"}


def read_training_set(
    options: argparse.Namespace,
    config: Mapping[str, Any],
    stage: Literal["stage1", "stage2"],
) -> list[GroundingSample]:
    """Read the samples that a command line (`--data`, `scale`) asks to train on.

    The default file is the scale's data.stage1_file or data.stage2_file, else the one
    in runs/SCALE/data. Relative image paths start at data.image_root, else at the
    file's folder. data.stage1 and data.stage2 limit the number of samples.
    """
    section = config["data"]
    made = resolve_run_dir("", options.scale) / "data" / DATA_FILES[stage]
    path = Path(options.data or section.get(f"{stage}_file") or made)
    root = section.get("image_root") or path.parent
    return files.read(path, image_root=root, training=True)[: section.get(stage)]


def make_trainer_options(
    config: Mapping[str, Any], stage: Stage, out: Path
) -> dict[str, Any]:
    """Return a scale's section as options of TRL's config class, without our own.

    On a CPU, bf16 and activation checkpointing are off; TRL would turn both on.
    """
    section, gpu = config[stage], torch.cuda.is_available()
    options = {
        "output_dir": str(out / "checkpoints"),
        "logging_steps": 1,
        "report_to": "none",
        "save_total_limit": 2,
        "bf16": gpu,
        "dataloader_pin_memory": gpu,
        "use_cpu": not gpu,  # without it torchrun on CPUs starts unconnected processes
        **{k: v for k, v in section.items() if k not in OWN_SECTIONS[stage]},
        "remove_unused_columns": False,
        "disable_tqdm": True,  # Progress shows the updates
    }
    if "gradient_checkpointing" not in options:  # the old name of the same option
        options.setdefault("activation_checkpointing", gpu)
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    former = {new: old for new, old in FORMER_NAMES.items() if new not in known}
    return {former.get(key, key): value for key, value in options.items()}


@contextmanager
def keep_adapter_exact(model: Module, quantized: bool) -> Iterator[None]:
    """Restore the adapter of a quantized model at the end of the `with` block.

    TRL rounds such an adapter to bf16, whatever the computing dtype.
    """
    adapter = [p for p in model.parameters() if p.requires_grad and quantized]
    exact = [parameter.detach().clone() for parameter in adapter]
    yield
    for parameter, values in zip(adapter, exact, strict=True):
        parameter.data = values.to(parameter.device)


def run_training(
    trainer: Any,
    config: dict[str, Any],
    stage: Stage,
    out: Path,
    made_from: Any,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Train from the last whole checkpoint on, and save the adapter.

    Args:
        trainer: a trainer of TRL.
        config: a whole scale.
        stage: its section that is trained.
        out: folder of the training.
        made_from: the samples and what else decides the result, JSON-like. Only
            checkpoints of the same configuration and `made_from` are used.
        callbacks: for the trainer, called before metrics are written.

    Returns:
        What every summary has: steps, parameters, and of this call seconds,
        seconds_per_update and samples_per_second (of stage 2: replies).
    """
    whole = whole_batch(config[stage], trainer.args.world_size)
    used = {"model": config["model"], "sft": config["sft"], stage: whole}
    fingerprint = io.config_hash([used, made_from])
    checkpoint = find_checkpoint(out / "checkpoints", fingerprint)
    first = 0 if checkpoint is None else get_step(checkpoint)
    progress = [] if config[stage].get("disable_tqdm") else [Progress()]
    recorder = Recorder(out / "metrics.jsonl", fingerprint)
    trainer.remove_callback(PrinterCallback)
    for callback in (*callbacks, *progress, recorder):
        trainer.add_callback(callback)
    if trainer.is_world_process_zero():
        io.write_text(out / "config.yaml", dump(config))
        for name in ("metrics.jsonl", "rollouts.jsonl"):
            if (out / name).is_file():
                _drop_rows_after(out / name, first)
    base = models.sample_base(trainer.model)  # before it is sharded over processes
    with models.ignore_rename_warnings():
        done = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    trainer.save_model(str(out / "adapter"))
    if trainer.is_world_process_zero() and models.is_adapter(out / "adapter"):
        io.write_json(out / "adapter" / models.BASE_FILE, base)
    seconds, updates = done.metrics["train_runtime"], done.global_step - first
    samples = updates * trainer.get_total_train_batch_size(trainer.args)
    return {
        "steps": done.global_step,
        "seconds": seconds,
        "seconds_per_update": round(seconds / updates, 3),
        "samples_per_second": round(samples / seconds, 3),
        "parameters": models.count_parameters(trainer.model),
    }


class Progress(ProgressCallback):
    """The Trainer's bar, with values beside it and no printed line for each update."""

    def on_log(self, *_: Any, logs: Any, **__: Any) -> None:
        """Show the last loss and reward."""
        if self.training_bar is not None:
            shown = {k: f"{logs[k]:.3f}" for k in ("loss", "reward") if k in logs}
            self.training_bar.set_postfix(shown, refresh=False)


@dataclasses.dataclass(eq=False)
class Recorder(TrainerCallback):
    """Writes metrics.jsonl and marks whole checkpoints.

    A row of metrics.jsonl is one update: `step` from 1, `seconds` since the start, and
    what the Trainer logs.
    """

    metrics: Path
    fingerprint: str
    began: float = dataclasses.field(default_factory=time.perf_counter)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **event: Any) -> None:
        """Set the epoch, which accelerate does not when several processes resume."""
        event["train_dataloader"].set_epoch(int((state.epoch or 0.0) + 1e-6))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Log before saving and at the end: no checkpoint has sums between two logs."""
        control.should_log |= control.should_save or control.should_training_stop

    def on_log(self, args: Any, state: Any, control: Any, **event: Any) -> None:
        """Append a row to metrics.jsonl."""
        logs = event["logs"]
        if state.is_world_process_zero and "loss" in logs:
            seconds = round(time.perf_counter() - self.began, 3)
            row = {"step": state.global_step, **logs, "seconds": seconds}
            io.append_jsonl(self.metrics, row)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Mark a checkpoint that a training can resume from as whole."""
        if args.save_only_model:
            return
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            io.write_json(folder / COMPLETE, {"fingerprint": self.fingerprint})


def find_checkpoint(folder: Path, fingerprint: str) -> Path | None:
    """Return the latest checkpoint that the same training wrote to its end, if any.

    Checkpoints of another configuration or of other data are passed over, and so is
    one of the last update: resumed from there, the Trainer would make one more.
    """
    whole = [mark.parent for mark in folder.glob(f"*/{COMPLETE}")]
    for checkpoint in sorted(whole, key=get_step, reverse=True):
        state = io.read_json(checkpoint / "trainer_state.json")
        same = io.read_json(checkpoint / COMPLETE)["fingerprint"] == fingerprint
        if same and state["global_step"] < state["max_steps"]:
            return checkpoint
    return None


def get_step(checkpoint: Path) -> int:
    """Return the update after which a checkpoint was written."""
    return int(checkpoint.name.split("-")[-1])


def _drop_rows_after(path: Path, last: int) -> None:
    """Drop the rows of a JSONL file that are of updates after `last`."""
    kept = [row for row in io.read_jsonl(path) if row["step"] <= last]
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
    io.write_text(path, "".join(lines))
