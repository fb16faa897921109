"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL with a few thousand random weights, and prompts."""

import shutil
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from trl.trainer.utils import add_fused_lm_head

from univg_nb import models
from univg_nb.base_model.architecture import CHAT_TEMPLATE
from univg_nb.fast.prompts import Prompt

IMAGE, WORDS, END = 60, 50, 1  # token ids: image place; words are 2..49
PATCH_DIM = 3 * 2 * 8 * 8

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "initializer_range": 0.15,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [4, 2, 2],
    },
    "bos_token_id": 0,
    "eos_token_id": END,
    "pad_token_id": 0,
}
TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": 61,
    "vision_start_token_id": 62,
    "vision_end_token_id": 63,
}
TOWER = {"depth": 1, "num_heads": 2, "initializer_range": 0.15}


CLASSES = {
    "qwen2": Qwen2VLForConditionalGeneration,
    "qwen2_5": Qwen2_5_VLForConditionalGeneration,
    "qwen3": Qwen3VLForConditionalGeneration,
}
# Patches of the real sizes: merged, 28 pixels for Qwen2.5-VL and 32 for Qwen3-VL.
PROCESSORS = {
    "qwen2_5": (14, Qwen2_5_VLProcessor, Qwen2VLVideoProcessor),
    "qwen3": (16, Qwen3VLProcessor, Qwen3VLVideoProcessor),
}


def make_config(family: str, tokens=TOKENS, patch: int = 8, **text):
    """The configuration of a "qwen2", "qwen2_5" or "qwen3"."""
    text, tower = TEXT | text, TOWER | {"patch_size": patch}
    hidden = text["hidden_size"]
    if family == "qwen2":
        tower |= {"embed_dim": 32, "hidden_size": hidden, "mlp_ratio": 2}
        return Qwen2VLConfig(text_config=text, vision_config=tower, **tokens)
    tower |= {"hidden_size": 32, "out_hidden_size": hidden, "intermediate_size": 64}
    if family == "qwen2_5":
        tower |= {"window_size": 4 * patch, "fullatt_block_indexes": [0]}
        return Qwen2_5_VLConfig(text_config=text, vision_config=tower, **tokens)
    tower |= {"depth": 3, "deepstack_visual_indexes": [0, 2]}
    tower |= {"num_position_embeddings": 16}
    # Heads of a width of their own: together wider than the states.
    rope = {"mrope_interleaved": True, "mrope_section": [4, 6, 6]}
    text |= {"head_dim": 32, "rope_parameters": text["rope_parameters"] | rope}
    return Qwen3VLConfig(text_config=text, vision_config=tower, **tokens)


def add_lora(model):
    """LoRA that changes what the model computes."""
    model = models.add_lora(model, {"r": 4, "lora_alpha": 8})
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def build(kind: str, **text):
    """FAMILY with LoRA, FAMILY_full (the tower is frozen) or FAMILY_tower (all is
    trained), with TRL's fused head."""
    family = kind.removesuffix("_tower").removesuffix("_full")
    torch.manual_seed(0)
    model = CLASSES[family](make_config(family, **text))
    add_fused_lm_head(model, temperature=0.8, outputs=("log_probs", "entropy"))
    if not kind.endswith("tower"):
        models.freeze_vision(model)
    if kind == family:
        model = add_lora(model)
    return model.train()


def save_base(folder: Path, family: str, tokenizer, **text):
    """Save a model of random weights and its processor, whose images have at most nine
    tokens; return the model."""
    patch, processor, video_processor = PROCESSORS[family]
    names = ("image_pad", "video_pad", "vision_start", "vision_end")
    ids = tokenizer.convert_tokens_to_ids([f"<|{name}|>" for name in names])
    text |= {"bos_token_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer)}
    text |= {"eos_token_id": tokenizer.eos_token_id}
    text |= {"pad_token_id": tokenizer.pad_token_id}
    config = make_config(family, dict(zip(TOKENS, ids, strict=True)), patch, **text)
    torch.manual_seed(0)
    model = CLASSES[family](config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    sides = {"shortest_edge": (2 * patch) ** 2, "longest_edge": (6 * patch) ** 2}
    numbers = {"patch_size": patch, "merge_size": 2, "size": sides}
    processor(
        image_processor=Qwen2VLImageProcessor(**numbers),
        video_processor=video_processor(**numbers),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return model


def save_model(folder: Path, grpo_folder: Path, family: str) -> Path:
    """What `grpo_builders.build_folder` saves, for another family than Qwen2-VL: base,
    sft, images."""
    shutil.copytree(grpo_folder, folder, ignore=shutil.ignore_patterns("base", "sft"))
    tokenizer = AutoTokenizer.from_pretrained(grpo_folder / "base")
    add_lora(save_base(folder / "base", family, tokenizer)).save_pretrained(
        folder / "sft"
    )
    return folder


def make_prompt(sizes, before: int, after: int, seed: int) -> Prompt:
    """A prompt of words around images; sizes: (height, width) of each, in tokens."""
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> torch.Tensor:
        return torch.randint(2, WORDS, (count,), generator=generator)

    ids = [words(before)]
    for height, width in sizes:
        ids += [torch.full((height * width,), IMAGE), words(1)]
    ids = torch.cat([*ids, words(after)])
    if not sizes:
        return Prompt(ids, torch.zeros_like(ids))
    grids = [torch.tensor([[1, 2 * height, 2 * width]]) for height, width in sizes]
    images = [
        (torch.randn(int(grid.prod()), PATCH_DIM, generator=generator), grid)
        for grid in grids
    ]
    return Prompt(ids, (ids == IMAGE).long(), images)
