"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL with a few thousand random weights, and prompts."""

import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from trl.trainer.utils import add_fused_lm_head

from univg_nb import models
from univg_nb.fast.prompts import Prompt

IMAGE, WORDS, END = 60, 50, 1  # token ids: image place; words are 2..49
PATCH_DIM = 3 * 2 * 8 * 8

TEXT = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "initializer_range": 0.15,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 2, 2],
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
TOWER = {"depth": 1, "num_heads": 2, "patch_size": 8, "initializer_range": 0.15}


def build(kind: str):
    """lora, full (tower frozen), tower (all trained), a Qwen2.5-VL or a Qwen3-VL with
    LoRA."""
    torch.manual_seed(0)
    if kind == "qwen3":
        tower = TOWER | {"hidden_size": 32, "out_hidden_size": 48}
        tower |= {"intermediate_size": 64, "num_position_embeddings": 16}
        tower |= {"deepstack_visual_indexes": [0]}
        text = TEXT | {"head_dim": 12}
        config = Qwen3VLConfig(text_config=text, vision_config=tower, **TOKENS)
        model = Qwen3VLForConditionalGeneration(config)
    elif kind == "qwen2_5":
        tower = TOWER | {"hidden_size": 32, "out_hidden_size": 48, "window_size": 32}
        tower |= {"intermediate_size": 64, "fullatt_block_indexes": [0]}
        config = Qwen2_5_VLConfig(text_config=TEXT, vision_config=tower, **TOKENS)
        model = Qwen2_5_VLForConditionalGeneration(config)
    else:
        tower = TOWER | {"embed_dim": 32, "hidden_size": 48, "mlp_ratio": 2}
        config = Qwen2VLConfig(text_config=TEXT, vision_config=tower, **TOKENS)
        model = Qwen2VLForConditionalGeneration(config)
    add_fused_lm_head(model, temperature=0.8, outputs=("log_probs", "entropy"))
    if kind != "tower":
        models.freeze_vision(model)
    if kind in ("lora", "qwen2_5", "qwen3"):
        model = models.add_lora(model, {"r": 4, "lora_alpha": 8})
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


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
