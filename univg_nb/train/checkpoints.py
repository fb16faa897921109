"""What both trainings share: data, options, folders, metrics.jsonl, whole checkpoints.

A folder holds one training: another one, or a second process, is refused. A killed
training that is started again with the same command goes on from its last checkpoint
that was written to its end. Rows that are newer than that checkpoint are dropped from
the files it writes, because their updates are made again.
"""

import argparse
import dataclasses
import difflib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from torch.nn import Module
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainingArguments,
)

from univg_nb import io, models
from univg_nb.config import FORMER_NAMES, OWN_SECTIONS, dump, whole_batch
from univg_nb.data import files
from univg_nb.data.sample import GroundingSample
from univg_nb.runs import Run, resolve_run_dir

Stage = Literal["sft", "grpo"]  # the section of a scale
STOPPING = (signal.SIGINT, signal.SIGTERM)
COMPLETE = "complete.json"  # written last into a checkpoint
DATA_FILES = {"stage1": "stage1_cotsft.json", "stage2": "stage2_rl.json"}
SHIPPED = "shipped"  # the stage of the stage-1 model that ships (docs/model_card.md)


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


def find_start(run: Run, name: str = SHIPPED) -> str:
    """Return the stage that stage 2 starts from; a shipped model becomes a stage.

    `name` is "shipped", or a finished stage-1 training of the run. Where the scale's
    base is not the tiny model, whose stage 1 ships, "shipped" means sft_lora.
    """
    if name != SHIPPED:
        return name
    if run.config["model"]["name_or_path"] != "tiny":
        return "sft_lora"
    folder = models.STAGE1
    weights = io.sha256_of(folder / "model.safetensors")
    stage = run.stage(SHIPPED, {"weights": weights})
    if not stage.done:
        shutil.copytree(folder, stage.dir / "adapter", dirs_exist_ok=True)
        shutil.copy(folder / "config.yaml", stage.dir)
        stage.finish(**io.read_json(folder / "evaluation.json"))
    return SHIPPED


def make_trainer_options(
    config: Mapping[str, Any], stage: Stage, out: Path
) -> dict[str, Any]:
    """Return a scale's section as options of TRL's config class, without our own.

    On a CPU, bf16 and activation checkpointing are off; TRL would turn both on.
    """
    section, gpu = config[stage], torch.cuda.is_available()
    steps, epochs = section.get("max_steps", -1), section.get("num_train_epochs", 3)
    if steps < -1 or steps == 0 or (steps < 0 and epochs <= 0):
        raise ValueError(
            f"{stage}: no update in max_steps = {steps}, num_train_epochs = {epochs}; "
            "give at least one, or -1 steps and more than 0 epochs"
        )
    if "output_dir" in section:
        raise ValueError(f"{stage}.output_dir: leave it out; --out names the folder")
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


@dataclasses.dataclass(frozen=True)
class Training:
    """One training; `describe` makes it.

    Attributes:
        stage: the section of the scale that is trained.
        config: a whole scale, with what the caller overrode.
        fingerprint: of all that decides the result. Only a training with the same one
            goes on from its checkpoints.
    """

    stage: Stage
    config: dict[str, Any]
    fingerprint: str

    @contextmanager
    def claim(self, out: Path, fresh: bool = False) -> Iterator[dict[str, Any] | None]:
        """Keep other processes out of the folder; yield the summary if it is finished.

        Args:
            out: the folder.
            fresh: move a training that is there to replaced/, beside the folder.

        Raises:
            ValueError: another process works there, or another training is there.
        """
        with io.locked(out):
            if not fresh:
                yield self._find_finished(out)
                return
            is_first = os.environ.get("RANK", "0") == "0"
            if is_first and (out / "config.yaml").is_file():
                io.set_aside(out, out.parent / "replaced" / out.name)
            yield None

    def _find_finished(self, out: Path) -> dict[str, Any] | None:
        """Return the summary of this training; ValueError for another one's work."""
        finished = (out / "summary.json").is_file() and (out / "adapter").is_dir()
        summary = io.read_json(out / "summary.json") if finished else None
        marks = (out / "checkpoints").glob(f"*/{COMPLETE}")
        found = [summary] if summary else [io.read_json(mark) for mark in marks]
        if found and self.fingerprint not in [one.get("fingerprint") for one in found]:
            kind = "a finished" if summary else "an interrupted"
            raise ValueError(
                f"{out} holds {kind} training of other settings "
                f"({self._compare_settings(out)}); choose another folder, or begin "
                "again with --fresh (FRESH in a notebook): it is kept in replaced/"
            )
        if summary and os.environ.get("RANK", "0") == "0":
            print(f"{out}: finished before; train it again with --fresh")
        return summary

    def _compare_settings(self, out: Path) -> str:
        """Return how the configuration there differs, or what else may differ."""
        path = out / "config.yaml"
        before = io.read_text(path) if path.is_file() else ""
        lines = difflib.unified_diff(
            before.splitlines(), dump(self.config).splitlines(), n=0, lineterm=""
        )
        names = {"-": "there", "+": "now"}
        found = [f"{names[li[0]]} {li[1:].strip()}" for li in lines if li[0] in names]
        return ", ".join(found[2:6]) or "its samples, or what it starts from"


def describe(
    stage: Stage,
    config: dict[str, Any],
    samples: Sequence[GroundingSample],
    made_from: Any,
    processes: int | None = None,
) -> Training:
    """Return a training as what decides its result.

    Args:
        stage: the section of the scale that is trained.
        config: a whole scale.
        samples: the training set.
        made_from: what else decides the result, JSON-like.
        processes: how many train together; None for as many as there are.
    """
    whole = whole_batch(
        config[stage], processes or int(os.environ.get("WORLD_SIZE", 1))
    )
    used = {"model": config["model"], "sft": config["sft"], stage: whole}
    hashes = [io.config_hash(dataclasses.asdict(sample)) for sample in samples]
    return Training(stage, config, io.config_hash([used, [hashes, made_from]]))


def run_training(
    trainer: Any,
    training: Training,
    out: Path,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Train from the last whole checkpoint on, and save the adapter.

    Args:
        trainer: a trainer of TRL.
        training: what it trains.
        out: folder of the training, which is claimed.
        callbacks: for the trainer, called before metrics are written.

    Returns:
        What every summary has: steps, parameters, fingerprint, and of this call
        seconds, seconds_per_update and samples_per_second (of stage 2: replies).
    """
    section, fingerprint = training.config[training.stage], training.fingerprint
    checkpoint = find_checkpoint(out / "checkpoints", fingerprint)
    first = 0 if checkpoint is None else get_step(checkpoint)
    progress = [] if section.get("disable_tqdm") else [Progress()]
    limit = None
    if not trainer.args.save_only_model:  # Recorder deletes old ones when it is safe
        limit, trainer.args.save_total_limit = trainer.args.save_total_limit, None
    recorder = Recorder(out / "metrics.jsonl", fingerprint, limit)
    supervised = any(isinstance(callback, EndEarly) for callback in callbacks)
    end_early = EndEarly()
    trainer.remove_callback(PrinterCallback)
    for callback in (*callbacks, end_early, *progress, recorder):
        trainer.add_callback(callback)
    if trainer.is_world_process_zero():
        if checkpoint:
            print(f"{out.name} {describe_resume(checkpoint)}", flush=True)
        io.write_text(out / "config.yaml", dump(training.config))
        for name in ("metrics.jsonl", "rollouts.jsonl"):
            if (out / name).is_file():
                _drop_rows_after(out / name, first)
    base = models.sample_base(trainer.model)  # before it is sharded over processes
    if checkpoint and trainer.args.save_steps < 1:  # a share: as it was counted out
        state = io.read_json(checkpoint / "trainer_state.json")
        trainer.args.save_steps = state["save_steps"]
    # Several processes have to agree on the update: their launcher sees to it.
    signals = () if supervised or trainer.args.world_size > 1 else STOPPING
    with models.ignore_rename_warnings(), end_early.listen(signals):
        done = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    if end_early.stopping:
        end_early.raise_signal(f"{out.name} {describe_stop(trainer.state)}")
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
        "fingerprint": fingerprint,
    }


def load_whole(model: PreTrainedModel, checkpoint: str) -> None:
    """Load the weights of a checkpoint into a model that trains as a whole.

    The Trainer looks for the model's names in the file, where transformers writes
    others: with a warning it would go on from the weights that training began with.
    """
    model.load_state_dict(type(model).from_pretrained(checkpoint).state_dict())


def describe_resume(checkpoint: Path) -> str:
    """Say with which update a training goes on from a checkpoint."""
    state = io.read_json(checkpoint / "trainer_state.json")
    return f"resumes at update {state['global_step'] + 1} of {state['max_steps']}"


def describe_stop(state: Any) -> str:
    """Say after which update a training ended early, and how to go on."""
    done = f"update {state.global_step} of {state.max_steps}"
    return f"stopped after {done}, with a checkpoint; run it again to go on"


class EndEarly(TrainerCallback):
    """Ends a training after the current update, with a checkpoint, at a signal.

    A second signal ends it at once, without a checkpoint.
    """

    def __init__(self) -> None:
        self.signal = 0  # the number of the one received
        self.stopping = False

    def note_signal(self, number: int, _: Any = None) -> None:
        """Signal handler: end after the current update."""
        if self.signal:
            self.raise_signal("")
        self.signal = number

    def raise_signal(self, text: str) -> None:
        """Raise what the signal raises otherwise."""
        if self.signal == signal.SIGTERM:
            print(text)
            raise SystemExit(128 + self.signal)
        raise KeyboardInterrupt(text)

    @contextmanager
    def listen(self, numbers: Sequence[int]) -> Iterator[None]:
        """Handle these signals during the `with` block; only a main thread can."""
        if threading.current_thread() is not threading.main_thread():
            numbers = ()
        before = {number: signal.signal(number, self.note_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save and end if asked to, unless this was the last update."""
        if self.signal and state.global_step < state.max_steps:
            self.stopping = control.should_save = control.should_training_stop = True


class Progress(ProgressCallback):
    """The Trainer's bar, with values beside it and no printed line for each update."""

    def on_log(self, *_: Any, logs: Any, **__: Any) -> None:
        """Show the last loss and reward."""
        if self.training_bar is not None:
            shown = {k: f"{logs[k]:.3f}" for k in ("loss", "reward") if k in logs}
            self.training_bar.set_postfix(shown, refresh=False)


@dataclasses.dataclass(eq=False)
class Recorder(TrainerCallback):
    """Writes metrics.jsonl, marks whole checkpoints and deletes old ones.

    A row of metrics.jsonl is one update: `step` from 1, `seconds` since the start, and
    what the Trainer logs. `limit` is the number of checkpoints to keep. The Trainer
    would delete the last whole one before the new one is marked as whole.
    """

    metrics: Path
    fingerprint: str
    limit: int | None = None
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
            if self.limit:
                delete_old_checkpoints(folder.parent, self.limit)


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


def delete_old_checkpoints(folder: Path, limit: int) -> None:
    """Keep the last whole checkpoints, `limit` of them; delete others and half ones."""
    whole = [mark.parent for mark in folder.glob(f"*/{COMPLETE}")]
    kept = sorted(whole, key=get_step)[-limit:]
    for checkpoint in folder.glob("checkpoint-*"):
        if checkpoint not in kept:
            (checkpoint / COMPLETE).unlink(missing_ok=True)
            shutil.rmtree(checkpoint, ignore_errors=True)


def get_step(checkpoint: Path) -> int:
    """Return the update after which a checkpoint was written."""
    return int(checkpoint.name.split("-")[-1])


def _drop_rows_after(path: Path, last: int) -> None:
    """Drop the rows of a JSONL file that are of updates after `last`."""
    kept = [row for row in io.read_jsonl(path) if row["step"] <= last]
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
    io.write_text(path, "".join(lines))
