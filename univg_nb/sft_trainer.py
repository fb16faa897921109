"""Stage 1's trainer: TRL's SFTTrainer, and what it lacks for an exact resume.

Length-grouped order that is a function of (seed, epoch), vision features computed
once, a stop before a broken update, and checkpoints that say when they are whole.
"""

import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback
from trl import SFTTrainer

from univg_nb import runs
from univg_nb.collator import LengthGroupedBatches

COMPLETE = "complete.json"  # written last into a checkpoint


class GroundingSFTTrainer(SFTTrainer):
    """SFTTrainer that groups batches by length, takes ready-made vision features, and
    stops before an update with a loss or gradient that is not finite."""

    length_sampler: LengthGroupedBatches | None = None
    seen: list[int]  # indices of the samples of the update at hand
    samples = 0  # of this process and this call, as the next two
    tokens = 0  # padding included
    padding = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen = []

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        dataset = self.train_dataset if train_dataset is None else train_dataset
        self.length_sampler = LengthGroupedBatches(
            dataset[self.args.length_column_name],
            self.args.train_batch_size
            * self.args.gradient_accumulation_steps
            * self.args.world_size,
            self.args.seed,
        )
        return self.length_sampler

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


class Recorder(TrainerCallback):
    """Writes metrics.jsonl, marks whole checkpoints, shows one progress bar (the
    Trainer's own prints a line or a table row for every step)."""

    def __init__(self, out: Path, fingerprint: str, progress: bool) -> None:
        self.metrics = out / "metrics.jsonl"
        self.fingerprint = fingerprint
        self.progress = progress
        self.trainer: GroundingSFTTrainer | None = None
        self.began = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began = time.perf_counter()
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=self.metrics.parent.name,
            disable=not (self.progress and state.is_world_process_zero),
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(1)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # accelerate does not reach the sampler of a resumed run on several processes
        if self.trainer is not None and self.trainer.length_sampler is not None:
            epoch = int((state.epoch or 0.0) + 1e-6)
            self.trainer.length_sampler.set_epoch(epoch)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any
    ) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            seconds = round(time.perf_counter() - self.began, 3)
            row = {"step": state.global_step, **logs, "seconds": seconds}
            runs.append_jsonl(self.metrics, row)
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            runs.write_json(folder / COMPLETE, {"fingerprint": self.fingerprint})


def whole_checkpoint(folder: Path, fingerprint: str) -> Path | None:
    """The latest checkpoint that was written to its end by the same training.

    Half-written ones, and those of another configuration or other data, are passed
    over; the Trainer's rotation removes them in time.
    """
    found = sorted(
        folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[-1])
    )
    whole = [path for path in found if (path / COMPLETE).is_file()]
    same = [
        path
        for path in whole
        if runs.read_json(path / COMPLETE)["fingerprint"] == fingerprint
    ]
    return same[-1] if same else None
