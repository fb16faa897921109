"""docs/fast_example.py runs, and the trainer takes any rows that TRL takes."""

import ast
import importlib.util
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig

from univg_nb import models
from univg_nb.fast.trainer import SharedPrefixGRPOTrainer

EXAMPLE = Path(__file__).parents[2] / "docs" / "fast_example.py"


def test_the_example_is_short():
    tree = ast.parse(EXAMPLE.read_text())
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt) and not (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        ):
            last = node.lineno if hasattr(node, "body") else node.end_lineno
            lines |= set(range(node.lineno, last + 1))
    assert len(lines) <= 30


def test_the_example_trains_with_shared_prompts(tmp_path):
    spec = importlib.util.spec_from_file_location("fast_example", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    before, _ = models.load_for_training({"name_or_path": "tiny"})
    trainer = example.main(str(tmp_path))
    assert trainer.state.global_step == 2
    assert trainer.shared_forward and trainer.shared_rollout
    assert trainer.vision.computed == 2  # red and blue, once in two updates
    assert trainer.state.log_history[0]["rewards/length_reward/mean"] < 0
    adapter = trainer.model.named_parameters()
    assert any(p.any() for name, p in adapter if "lora_B" in name)  # it starts at 0
    assert models.hash_weights(trainer.model) == models.hash_weights(before)


@pytest.mark.parametrize("kind", ["string", "messages", "paths", "mixed"])
def test_rows_of_any_form(grpo_folder, tmp_path, kind):
    """Without images as well, and pictures by their paths."""
    section = {"name_or_path": str(grpo_folder / "base")}
    model, processor = models.load_for_training(section, grpo_folder / "sft")
    models.freeze_vision(model)
    text = "find the red cup"
    rows = [
        {"prompt": text if kind == "string" else [{"role": "user", "content": text}]}
    ]
    if kind in ("paths", "mixed"):
        rows[0]["images"] = [str(grpo_folder / "0.png")]
    if kind == "mixed":
        rows.append({**rows[0], "images": []})

    def ends(completions, prompts, **_):
        assert isinstance(prompts[0], str) == isinstance(completions[0], str)
        return [float(len(text)) for text in map(str, completions)]

    args = GRPOConfig(
        str(tmp_path), num_generations=4, per_device_train_batch_size=8, max_steps=1,
        max_completion_length=5, beta=0.04, use_cpu=True, bf16=False,
        gradient_checkpointing=False, report_to="none", save_strategy="no",
    )  # fmt: skip
    losses = []
    for shared in (True, False):
        trainer = SharedPrefixGRPOTrainer(
            model, args, processing_class=processor, reward_funcs=[ends],
            train_dataset=Dataset.from_list(rows * 2), shared_prefix=shared,
        )  # fmt: skip
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        if shared:
            batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        with torch.no_grad():
            losses.append(trainer.compute_loss(trainer.model, batch).item())
        model = trainer.model
        model.delete_adapter("ref")
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
