"""GRPO updates of one way (stock TRL, or ours), measured in a process of their own.

    python tests/bench/grpo_update.py CASE.json RESULT.json

A process each keeps one way's peak memory out of the other's. CASE.json holds a `Case`,
or a list of two that are timed in turns.
"""

import json
import resource
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import torch
from datasets import Dataset
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    TrainerCallback,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from trl import GRPOConfig, GRPOTrainer

from univg_nb import config, io, models, runs
from univg_nb.fast.attention import get_attention
from univg_nb.fast.sampling import VISION_TOKENS
from univg_nb.train.grpo_trainer import DifficultyGRPOTrainer
from univg_nb.train.rewards import format_reward, iou_reward

PARTS = ("generate", "reward", "reference", "policy", "optimiser")


@dataclass
class Case:
    """What is measured. side: pixels of a square image; prompts: questions an update;
    completion: tokens of every reply (the end token is never sampled); model: "tiny" or
    a name in univg_nb/scales/models, which gets random weights, and with `reduced` few
    narrow layers, to try the same code on a CPU."""

    way: str  # "stock" or "shared"
    images: int
    group: int
    completion: int
    side: int = 128
    prompts: int = 2
    updates: int = 5
    warm_up: int = 1
    model: str = "tiny"
    seed: int = 0
    reduced: bool = False


# Sizes at which a CPU computes what a GPU is to compute; the ratios are arbitrary.
NARROW = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000.0,
        "mrope_section": [2, 3, 3],
    },
}
REDUCED = {
    "qwen2_vl": {
        "text_config": NARROW,
        "vision_config": {
            "depth": 2,
            "embed_dim": 32,
            "num_heads": 2,
            "hidden_size": 64,
            "mlp_ratio": 2,
            "patch_size": 14,
        },
    },
    "qwen3_vl": {
        "text_config": NARROW | {"head_dim": 16},
        "vision_config": {
            "depth": 3,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 64,
            "out_hidden_size": 64,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 2],
        },
    },
}


class Clock:
    """Mixed into a trainer: seconds of each part of the update that is running."""

    def start_clock(self) -> None:
        self.spent = defaultdict(float)

    @contextmanager
    def timed(self, part: str):
        began = now()
        yield
        self.spent[part] += now() - began

    def _generate(self, *args, **kwargs):
        with self.timed("generate"):
            return super()._generate(*args, **kwargs)

    def _calculate_rewards(self, *args, **kwargs):
        with self.timed("reward"):
            return super()._calculate_rewards(*args, **kwargs)

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        with self.timed("policy pass" if torch.is_grad_enabled() else "reference"):
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _prepare_inputs(self, *args, **kwargs):
        with self.timed("prepare"):
            return super()._prepare_inputs(*args, **kwargs)

    def training_step(self, *args, **kwargs):
        with self.timed("step"):
            return super().training_step(*args, **kwargs)


class Stock(Clock, GRPOTrainer):
    pass


class Shared(Clock, DifficultyGRPOTrainer):
    pass


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Watch(TrainerCallback):
    """One row per update: seconds by part, tokens and images that were computed."""

    def __init__(self, trainer, replies: int) -> None:
        self.trainer, self.replies, self.rows = trainer, replies, []
        backbone = models.get_base_model(trainer.model).model
        backbone.visual.register_forward_pre_hook(self.count_images, with_kwargs=True)
        backbone.language_model.register_forward_pre_hook(
            self.count_tokens, with_kwargs=True
        )

    def count_images(self, _module, _args, kwargs) -> None:
        self.images += len(kwargs["grid_thw"])

    def count_tokens(self, _module, _args, kwargs) -> None:
        cache = kwargs.get("past_key_values")
        if cache is None or not cache.get_seq_length():  # else a decoding step
            self.tokens += kwargs["inputs_embeds"].shape[:2].numel()

    def on_train_begin(self, *_args, **_kwargs) -> None:
        self.base = memory()

    def on_step_begin(self, *_args, **_kwargs) -> None:
        self.images = self.tokens = 0
        self.trainer.start_clock()
        self.began = now()

    def on_pre_optimizer_step(self, *_args, **_kwargs) -> None:
        self.before = now()

    def on_optimizer_step(self, *_args, **_kwargs) -> None:
        self.trainer.spent["optimiser"] = now() - self.before

    def on_step_end(self, *_args, **_kwargs) -> None:
        spent = self.trainer.spent
        spent["policy"] = spent["step"] - spent["prepare"]
        row = {part: spent[part] for part in PARTS} | {"update": now() - self.began}
        row["rest"] = row["update"] - sum(spent[part] for part in PARTS)
        # reference and policy passes hold the replies too
        prompt_tokens = self.tokens - 2 * self.replies
        counts = {"prompt_tokens": prompt_tokens, "images": self.images}
        # columns of the batch, padding included
        width = self.trainer._buffered_inputs[0]["prompt_ids"].size(1)
        self.rows.append(row | counts | {"prompt": width})


def memory() -> float:
    """MB in use: of the GPU, or resident on the host."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 1e6
    return psutil.Process().memory_info().rss / 1e6


def peak_memory() -> float:
    """Largest MB in use so far."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def random_model(
    name: str, side: int, reduced: bool = False, device: torch.device | None = None
):
    """(model, processor) in bfloat16 with the shape of `name` and random weights.

    Tokenizer and special tokens are the tiny model's, whose ids lie within the larger
    vocabulary; an image has side x side pixels.
    """
    bounds = {"min_pixels": side**2, "max_pixels": side**2}
    tiny = {"name_or_path": "tiny", "attn_implementation": "sdpa"} | bounds
    model, processor = models.load_for_inference(tiny)
    shape = io.read_json(config.SCALES / "models" / f"{name}.json")
    family = shape.pop("model_type")
    for key, narrow in REDUCED[family].items() if reduced else ():
        shape[key] = shape[key] | narrow
    for kind in ("image", "video", "vision_start", "vision_end"):
        key = f"{kind}_token_id"
        shape[key] = getattr(model.config, key)
    with torch.device(device or models.get_device()):
        large = AutoModelForImageTextToText.from_config(
            CONFIG_MAPPING[family](**shape),
            dtype=torch.bfloat16,
            attn_implementation="sdpa",
        )
    large.generation_config = model.generation_config
    images = processor.image_processor
    images.patch_size = large.config.vision_config.patch_size
    if family == "qwen3_vl":
        processor = Qwen3VLProcessor(
            image_processor=images,
            tokenizer=processor.tokenizer,
            video_processor=Qwen3VLVideoProcessor(),
            chat_template=processor.chat_template,
        )
    return large, processor


def build_model(case: Case):
    """(model with a LoRA adapter, processor); the vision tower is frozen."""
    if case.model == "tiny":
        bounds = {"min_pixels": case.side**2, "max_pixels": case.side**2}
        tiny = {"name_or_path": "tiny", "attn_implementation": "sdpa"} | bounds
        model, processor = models.load_for_inference(tiny)
    else:
        model, processor = random_model(case.model, case.side, case.reduced)
    models.freeze_vision(model)
    return models.add_lora(model, {"r": 32, "lora_alpha": 64}), processor


def make_rows(case: Case) -> Dataset:
    """Questions with pictures of their own, as many as all updates take."""
    noise = np.random.default_rng(case.seed)
    shape = (case.side, case.side, 3)
    question = "Find in the last image the thing that the first image does not show."
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"{number}. {question}"}],
                "images": [
                    Image.fromarray(noise.integers(0, 256, shape, dtype=np.uint8))
                    for _ in range(case.images)
                ],
                "answer": [100.0, 100.0, 500.0, 500.0],
                "cot": True,
                "sample_id": str(number),
                "task": "diff",
            }
            for number in range(case.prompts * (case.updates + case.warm_up))
        ]
    )


def build_trainer(case: Case, out: str):
    model, processor = build_model(case)
    tokenizer, end = processor.tokenizer, model.generation_config.eos_token_id
    never = tokenizer.convert_tokens_to_ids(list(VISION_TOKENS))
    never += [tokenizer.eos_token_id, *(end if isinstance(end, list) else [end])]
    arguments = GRPOConfig(
        output_dir=out,
        num_generations=case.group,
        per_device_train_batch_size=case.prompts * case.group,
        max_completion_length=case.completion,
        max_steps=case.updates + case.warm_up,
        generation_kwargs={"suppress_tokens": sorted(set(never))},
        beta=0.04,
        learning_rate=1e-5,
        bf16=case.model != "tiny",
        use_cpu=not torch.cuda.is_available(),
        activation_checkpointing=case.model != "tiny",
        seed=case.seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )
    common = {
        "model": model,
        "args": arguments,
        "train_dataset": make_rows(case),
        "processing_class": processor,
    }
    if case.way == "shared":
        return Shared(**common)
    return Stock(reward_funcs=[iou_reward, format_reward], **common)


def measure(case: Case) -> dict:
    """Medians over the updates after warm-up."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as out, models.ignore_rename_warnings():
        trainer = build_trainer(case, out)
        watch = Watch(trainer, case.prompts * case.group * case.completion)
        trainer.add_callback(watch)
        trainer.train()
    if case.way == "shared" and not trainer.shared_rollout:
        raise RuntimeError("the trainer fell back to TRL's way; see its message")
    rows = watch.rows[case.warm_up :]
    middle = {name: median(row[name] for row in rows) for name in rows[0]}
    counted = ("prompt", "prompt_tokens", "images")
    whole = {name: round(middle.pop(name)) for name in counted}
    language = models.get_base_model(trainer.model).model
    return {
        **asdict(case),
        "device": runs.device(),
        "attention": get_attention(language),
        "prompt": whole["prompt"],
        "seconds": {name: round(value, 4) for name, value in middle.items()},
        "updates_seconds": [round(row["update"], 3) for row in watch.rows],
        "prompt_tokens": whole["prompt_tokens"],
        "images_encoded": whole["images"],
        "base_mb": round(watch.base),
        "peak_mb": round(peak_memory()),
    }


def in_turns(first: Case, second: Case, rounds: int = 9) -> dict:
    """Time of an update of `second` over that of `first`, the two measured in turns: a
    shared machine changes its speed between one process and the next."""
    ratios = []
    for _ in range(rounds):
        one, two = measure(first), measure(second)
        ratios.append(two["seconds"]["update"] / one["seconds"]["update"])
    rounds = [round(ratio, 3) for ratio in ratios]
    return {
        "completion": first.completion,
        "groups": [first.group, second.group],
        "ratio": median(rounds),
        "rounds": rounds,
    }


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text())
    if isinstance(given, list):
        made = in_turns(*(Case(**one) for one in given))
    else:
        made = measure(Case(**given))
    io.write_json(sys.argv[2], made)
