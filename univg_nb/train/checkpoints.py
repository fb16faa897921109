"""What both trainings share: data, options, metrics.jsonl and whole checkpoints.

A killed training that is started again with the same command goes on from its last
checkpoint that was written to its end. Rows that are newer than that checkpoint are
dropped from the files it writes, because their updates are made again.
"""

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn import Module
from tqdm.auto import tqdm
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from univg_nb import io, models
from univg_nb.config import FORMER_NAMES, dump
from univg_nb.data import files
from univg_nb.data.sample import GroundingSample
from univg_nb.runs import resolve_run_dir

COMPLETE = "complete.json"  # written last into a checkpoint
LOGS = {"sft": ("metrics.jsonl",), "grpo": ("metrics.jsonl", "rollouts.jsonl")}
DATA_FILES = {"stage1": "stage1_cotsft.json", "stage2": "stage2_rl.json"}


def count_processes() -> int:
    """Return how many processes torchrun or accelerate launched."""
    return int(os.environ.get("WORLD_SIZE", "1"))


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
    return files.read(path, image_root=root)[: section.get(stage)]


def make_trainer_options(
    section: Mapping[str, Any], out: Path, own: Sequence[str]
) -> dict[str, Any]:
    """Return a scale's section as options of TRL's config classes.

    On a CPU, bf16 and activation checkpointing are off; TRL would turn both on.

    Args:
        section: the `sft` or `grpo` section of a scale.
        out: folder of the training.
        own: keys of the section that are this package's and not TRL's.
    """
    gpu = torch.cuda.is_available()
    options = {
        "output_dir": str(out / "checkpoints"),
        "logging_steps": 1,
        "report_to": "none",
        "save_total_limit": 2,
        "bf16": gpu,
        "dataloader_pin_memory": gpu,
        "use_cpu": not gpu,  # without it torchrun on CPUs starts unconnected processes
        **{key: value for key, value in section.items() if key not in own},
        "remove_unused_columns": False,
        "disable_tqdm": True,  # Recorder shows the progress
    }
    if "gradient_checkpointing" not in options:  # the old name of the same option
        options.setdefault("activation_checkpointing", gpu)
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    former = {new: old for new, old in FORMER_NAMES.items() if new not in known}
    return {former.get(key, key): value for key, value in options.items()}


def check_world_size(arguments: TrainingArguments, section: str) -> None:
    """Raise ValueError if launched processes would each train by themselves."""
    if arguments.world_size != count_processes():
        raise ValueError(
            f"{count_processes()} processes were launched but each trains by itself "
            f"(world size {arguments.world_size}); use torchrun, and "
            f"{section}.use_cpu: true without GPU"
        )


@contextmanager
def keep_adapter_exact(model: Module, quantized: bool) -> Iterator[None]:
    """Restore the adapter of a quantized model at the end of the `with` block.

    TRL rounds such an adapter to bf16, whatever the computing dtype.
    """
    exact = {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and quantized
    }
    yield
    for name, parameter in model.named_parameters():
        if name in exact:
            parameter.data = exact[name].to(parameter.device)


def run_training(
    trainer: Any,
    config: dict[str, Any],
    stage: Literal["sft", "grpo"],
    out: Path,
    fingerprint: str,
    callbacks: Sequence[TrainerCallback] = (),
) -> "Recorder":
    """Train from the last whole checkpoint on, and save the adapter.

    Args:
        trainer: a trainer of TRL with `epoch_sampler`, its sampler or None.
        config: a whole scale.
        stage: the section of the scale.
        out: folder of the training.
        fingerprint: of configuration and data; only checkpoints with it are used.
        callbacks: for the trainer, called before metrics are written.

    Returns:
        The recorder: `seconds` of this call, `first` update that it made, from 0.
    """
    checkpoint = find_checkpoint(out / "checkpoints", fingerprint)
    progress = not config[stage].get("disable_tqdm", False)
    shown = "loss" if stage == "sft" else "reward"
    recorder = Recorder(trainer, out / LOGS[stage][0], fingerprint, progress, shown)
    trainer.remove_callback(PrinterCallback)
    for callback in (*callbacks, recorder):
        trainer.add_callback(callback)
    if trainer.is_world_process_zero():
        io.write_text(out / "config.yaml", dump(config))
        for name in LOGS[stage]:
            _drop_rows_after(out / name, checkpoint)
    began = time.perf_counter()
    with models.ignore_rename_warnings():
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    recorder.seconds = time.perf_counter() - began
    trainer.save_model(str(out / "adapter"))
    return recorder


@dataclasses.dataclass(eq=False)
class Recorder(TrainerCallback):
    """Writes metrics.jsonl, marks whole checkpoints and shows one progress bar.

    A row of metrics.jsonl is one update: `step` from 1, `seconds` since the start, and
    what the Trainer logs.
    """

    trainer: Any
    metrics: Path
    fingerprint: str
    progress: bool  # whether to show the bar
    shown: str  # the logged value beside the bar
    first: int = 0
    seconds: float = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock and the bar."""
        self.began = time.perf_counter()
        self.first = state.global_step
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=self.metrics.parent.name,
            disable=not (self.progress and state.is_world_process_zero),
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Log before saving: sums between two logs are in no checkpoint."""
        self.bar.update(1)
        control.should_log |= control.should_save

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the bar."""
        self.bar.close()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Set the epoch, which accelerate does not when several processes resume."""
        if self.trainer.epoch_sampler is not None:
            self.trainer.epoch_sampler.set_epoch(int((state.epoch or 0.0) + 1e-6))

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any
    ) -> None:
        """Append a row to metrics.jsonl."""
        if state.is_world_process_zero and logs and "loss" in logs:
            seconds = round(time.perf_counter() - self.began, 3)
            row = {"step": state.global_step, **logs, "seconds": seconds}
            io.append_jsonl(self.metrics, row)
            if self.shown in logs:
                note = {self.shown: f"{logs[self.shown]:.3f}"}
                self.bar.set_postfix(note, refresh=False)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Mark a checkpoint that a training can resume from as whole."""
        if args.save_only_model:
            return
        self.trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            io.write_json(folder / COMPLETE, {"fingerprint": self.fingerprint})


def find_checkpoint(folder: Path, fingerprint: str) -> Path | None:
    """Return the latest checkpoint that the same training wrote to its end, if any.

    Checkpoints of another configuration or of other data are passed over, and so is
    one of the last update: resumed from there, the Trainer would make one more.
    """
    marks = sorted(folder.glob(f"*/{COMPLETE}"), key=lambda mark: get_step(mark.parent))
    for mark in reversed(marks):
        state = io.read_json(mark.parent / "trainer_state.json")
        same = io.read_json(mark)["fingerprint"] == fingerprint
        if same and state["global_step"] < state["max_steps"]:
            return mark.parent
    return None


def get_step(checkpoint: Path) -> int:
    """Return the update after which a checkpoint was written."""
    return int(checkpoint.name.split("-")[-1])


def _drop_rows_after(path: Path, checkpoint: Path | None) -> None:
    """Drop the rows of a JSONL file that are newer than a checkpoint (None: all)."""
    last = 0 if checkpoint is None else get_step(checkpoint)
    rows = io.read_jsonl(path) if path.is_file() else []
    kept = [json.dumps(r, ensure_ascii=False) + "\n" for r in rows if r["step"] <= last]
    io.write_text(path, "".join(kept))
