"""What both trainings share: options, metrics.jsonl, and checkpoints that are whole.

A killed training started again with the same command goes on from its last checkpoint
that was written to its end, and repeats nothing: rows of the files it writes that are
newer than that checkpoint are dropped, and come again.
"""

import dataclasses
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn import Module
from tqdm.auto import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from univg_nb import io
from univg_nb.config import FORMER_NAMES

COMPLETE = "complete.json"  # written last into a checkpoint


def processes() -> int:
    """How many processes torchrun or accelerate launched."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def library_options(
    section: Mapping[str, Any], out: Path, own: Sequence[str]
) -> dict[str, Any]:
    """A scale's section as options of TRL's config classes, on a CPU without bf16 and
    checkpointed activations, both of which TRL would turn on.

    own: the section's keys that are this package's and not TRL's.
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


def check_world(arguments: TrainingArguments, section: str) -> None:
    """ValueError if launched processes do not know of each other (DESIGN sec. 9)."""
    if arguments.world_size != processes():
        raise ValueError(
            f"{processes()} processes were launched but each trains by itself (world "
            f"size {arguments.world_size}); use torchrun, and {section}.use_cpu: true "
            "without GPU"
        )


@contextmanager
def exact_adapter(model: Module, quantized: bool) -> Iterator[None]:
    """Inside, TRL may round the adapter of a quantised model to bf16, as it does
    whatever the computing dtype; afterwards it is what it was."""
    exact = {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and quantized
    }
    yield
    for name, parameter in model.named_parameters():
        if name in exact:
            parameter.data = exact[name].to(parameter.device)


class Recorder(TrainerCallback):
    """Writes metrics.jsonl (one row per update, `step` from 1, `seconds` since the
    start), marks whole checkpoints, shows one progress bar (the Trainer's own prints a
    line or a table row for every step).

    shown: the logged value beside the bar. The trainer has `epoch_sampler`, whose
    order is a function of (seed, epoch), or None.
    """

    def __init__(
        self, out: Path, fingerprint: str, progress: bool, shown: str = "loss"
    ) -> None:
        self.metrics = out / "metrics.jsonl"
        self.fingerprint = fingerprint
        self.progress = progress
        self.shown = shown
        self.trainer: Any = None
        self.first = 0  # updates made before this call
        self.began = time.perf_counter()

    def attach(self, trainer: Trainer) -> None:
        """Take the place of the Trainer's own output."""
        self.trainer = trainer
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began = time.perf_counter()
        self.first = state.global_step
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=self.metrics.parent.name,
            disable=not (self.progress and state.is_world_process_zero),
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(1)
        if control.should_save:  # else what is averaged between two logs were lost
            control.should_log = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # accelerate does not reach the sampler of a resumed run on several processes
        if self.trainer.epoch_sampler is not None:
            self.trainer.epoch_sampler.set_epoch(int((state.epoch or 0.0) + 1e-6))

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any
    ) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            seconds = round(time.perf_counter() - self.began, 3)
            row = {"step": state.global_step, **logs, "seconds": seconds}
            io.append_jsonl(self.metrics, row)
            if self.shown in logs:
                note = {self.shown: f"{logs[self.shown]:.3f}"}
                self.bar.set_postfix(note, refresh=False)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.save_only_model:  # nothing to go on from: no optimiser, no generators
            return
        self.trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            io.write_json(folder / COMPLETE, {"fingerprint": self.fingerprint})


def whole_checkpoint(folder: Path, fingerprint: str) -> Path | None:
    """The latest checkpoint that was written to its end by the same training.

    Half-written ones, and those of another configuration or other data, are passed
    over; the Trainer's rotation removes them in time. So is one of the last update:
    resumed from there, the Trainer would make one more.
    """
    found = sorted(
        folder.glob(f"checkpoint-*/{COMPLETE}"), key=lambda p: step_of(p.parent)
    )
    for mark in reversed(found):
        state = io.read_json(mark.parent / "trainer_state.json")
        if (
            io.read_json(mark)["fingerprint"] == fingerprint
            and state["global_step"] < state["max_steps"]
        ):
            return mark.parent
    return None


def step_of(checkpoint: Path) -> int:
    """The update after which a checkpoint was written."""
    return int(checkpoint.name.split("-")[-1])


def forget_after(path: Path, checkpoint: Path | None) -> None:
    """Keep the rows of a JSONL file up to a checkpoint; later steps come again."""
    last = 0 if checkpoint is None else step_of(checkpoint)
    rows = io.read_jsonl(path) if path.is_file() else []
    kept = [
        json.dumps(row, ensure_ascii=False) + "\n"
        for row in rows
        if row["step"] <= last
    ]
    io.write_text(path, "".join(kept))
