"""What the tests of GRPO share: a small model, an SFT adapter, trainers, updates."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import TrainerCallback

from univg_nb import io, models
from univg_nb.base_model import architecture
from univg_nb.data.sample import GroundingSample
from univg_nb.train import grpo, grpo_trainer

G = 4
COLORS = ["red", "blue", "green", "black"]


def build_folder(out: Path) -> Path:
    """Save a Qwen2-VL far smaller than the shipped one, an SFT adapter, and images."""
    tokenizer = architecture.train_tokenizer(
        ["find the red cup 0123456789 <think></think>"] * 3
    )
    config = architecture.make_config(tokenizer)
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size = 64, 96
    text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads = 2, 2, 1
    text.layer_types = text.layer_types[:2]
    vision.depth, vision.embed_dim, vision.num_heads, vision.hidden_size = 1, 32, 2, 64
    torch.manual_seed(0)
    model = models.AutoModelForImageTextToText.from_config(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(out / "base")
    architecture.build_processor(tokenizer).save_pretrained(out / "base")
    lora = models.add_lora(model, {"r": 4, "lora_alpha": 8})
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    lora.save_pretrained(out / "sft")
    for number, color in enumerate(COLORS):
        picture = Image.new("RGB", (64, 64), color)
        picture.paste("white", (8 * number, 8, 8 * number + 20, 40))
        picture.save(out / f"{number}.png")
    return out


def make_samples(folder: Path, count: int = 4) -> list[GroundingSample]:
    """Prompts of different lengths: 1 to 3 images, single-image mode every third."""
    return [
        GroundingSample(
            id=f"s{i}",
            task="refer" if i % 3 == 0 else "diff",
            images=tuple(str(folder / f"{(i + j) % 4}.png") for j in range(1 + i % 3)),
            question="find the red cup " * (1 + i % 2) + str(i),
            answer=(100, 100, 500, 500),
            cot=bool(i % 3),
        )
        for i in range(count)
    ]


def make_config(folder: Path, **grpo_options) -> dict:
    section = {
        "num_generations": G,
        "beta": 0.04,
        "max_completion_length": 6,
        "per_device_train_batch_size": 2 * G,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
    }
    return {
        "model": {"name_or_path": str(folder / "base")},
        "data": {},
        "sft": {"adapter": "lora"},
        "grpo": section | grpo_options,
        "evaluate": {},
    }


def make_trainer(folder: Path, out: Path, count: int = 4, keep=None, **options):
    """A trainer ready to train; `keep` are options of DifficultyGRPOTrainer."""
    return grpo.build_trainer(
        make_config(folder, **options),
        out,
        make_samples(folder, count),
        folder / "sft",
        **(keep or {}),
    )


def box_text(side: int) -> str:
    return f"<think>a</think><answer>(100,100),({side},{side})</answer>"


class Scripted(grpo_trainer.DifficultyGRPOTrainer):
    """Samples fixed replies, so that any layout sees the same ones."""

    def _generate_single_turn(self, prompt_ids, *_args, **_kwargs):
        first = self.accelerator.process_index * len(prompt_ids)
        texts = [
            # each group its own difficulty, by its prompt, and each reply its own box
            box_text((500, 400, 300, 150)[(first + row) % G] + sum(ids) % 7 * 10)
            for row, ids in enumerate(prompt_ids)
        ]
        ids = self._tokenizer(texts)["input_ids"]
        return [row + [self._tokenizer.eos_token_id] for row in ids], None


def scripted_update(folder, out, per_device, accumulation):
    """(rollout rows, gradient of each adapter matrix) of one update, in float64."""
    config = make_config(
        folder,
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=1e9,
    )
    config["model"]["dtype"] = "float64"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "DifficultyGRPOTrainer", Scripted)
        log = out / "rollouts.jsonl"
        trainer = grpo.build_trainer(
            config, out, make_samples(folder), folder / "sft", log, weight="exp"
        )
    # The reference moves away from the policy: the KL has a gradient too.
    for name, parameter in trainer.model.named_parameters():
        if ".ref." in name:
            torch.manual_seed(len(name))
            parameter.data += 0.05 * torch.randn_like(parameter)
    gradients = {}

    class Catch(TrainerCallback):
        def on_pre_optimizer_step(self, *_args, model=None, **_kwargs):
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    gradients[name] = parameter.grad.clone()

    trainer.add_callback(Catch())
    trainer.train()
    return io.read_jsonl(log), gradients


def sampled_updates(folder: Path, out: Path, per_device: int) -> None:
    """Three updates of two groups each, wherever the replies are drawn.

    No reply has a box: the weight decay parts the policy from the reference, so that
    there is a KL to learn from. A larger epsilon: else Adam steps by the rounding of a
    gradient of 0.
    """
    decay = {"weight_decay": 100.0, "adam_epsilon": 1e-4, "max_steps": 3}
    config = make_config(folder, per_device_train_batch_size=per_device, **decay)
    grpo.train(config, out, make_samples(folder), sft_adapter=folder / "sft")


UNTIMED = ("seconds", "step_time", "train_runtime")


def what_was_learned(out: Path):
    """(metrics but for times, rollouts, weights) of a finished training."""
    metrics = [
        {k: v for k, v in row.items() if not k.startswith(UNTIMED)}
        for row in io.read_jsonl(out / "metrics.jsonl")
    ]
    (weights,) = (out / "adapter").glob("*model.safetensors")
    return metrics, io.read_jsonl(out / "rollouts.jsonl"), weights.read_bytes()


class Interrupt(TrainerCallback):
    """Ends the training as Ctrl-C would, after an update and before its log."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def ready_batch(trainer):
    """Return the micro-batch of an update, as compute_loss takes it."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def scored_batch(trainer):
    """One rollout's tensors, as `_get_per_token_logps_and_entropies` takes them."""
    trainer.model.train()
    rows = next(iter(trainer.get_train_dataloader()))
    batch = trainer._generate_and_score_completions(rows)
    fields = ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")
    return {
        "input_ids": torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
        "attention_mask": torch.cat(
            [batch["prompt_mask"], batch["completion_mask"]], 1
        ),
        "logits_to_keep": batch["completion_ids"].size(1),
        **{name: batch[name] for name in fields},
    }, batch["completion_mask"]
