"""The architecture, tokenizer and processor of the shipped tiny Qwen2-VL.

All classes are those of transformers: `Qwen2VLForConditionalGeneration` with small
sizes, a byte-level BPE in Qwen2's format trained on sentences of this world (each digit
is a token), Qwen2-VL's special tokens and a chat template of its shape.
"""

import json
from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>",
    "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>",
    "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
VOCAB_SIZE = 1024
PATCH, MERGE = 8, 2
MIN_PIXELS, MAX_PIXELS = 16 * 16, 64 * 64
# Qwen2-VL's dialogue: a default system turn, then user and assistant alternate.
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if loop.first and m.role != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(sentences: Iterable[str]) -> Qwen2Tokenizer:
    """Train a byte-level BPE on `sentences` with Qwen2's rule for splitting words."""
    # An empty Qwen2 tokenizer has the rule: single digits, words with the blank before
    # them, runs of punctuation.
    rule = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = rule
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(sentences, trainer)
    model = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=SPECIAL_TOKENS[1:],
        padding_side="left",
        model_max_length=4096,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_processor(tokenizer: Qwen2Tokenizer) -> Qwen2VLProcessor:
    """Return the standard processor; an image of 256 pixels a side gives 16 tokens."""
    numbers = {
        "patch_size": PATCH,
        "merge_size": MERGE,
        "size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
    }
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**numbers),
        video_processor=Qwen2VLVideoProcessor(**numbers),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    )


def make_config(tokenizer: Qwen2Tokenizer) -> Qwen2VLConfig:
    """Return the configuration: 2.8 million parameters.

    There are 4 text layers of width 192 and 3 vision layers of width 128.
    """
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    return Qwen2VLConfig(
        text_config={
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            # With the default of 0.02, made for wide models, it hardly learns.
            "initializer_range": 0.06,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [4, 6, 6],
            },
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 3,
            "embed_dim": 128,
            "hidden_size": 192,
            "num_heads": 4,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "initializer_range": 0.06,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
        initializer_range=0.06,
        dtype="float32",
    )


def build_model(
    tokenizer: Qwen2Tokenizer, seed: int
) -> Qwen2VLForConditionalGeneration:
    """Return the model with random weights.

    Args:
        tokenizer: from `train_tokenizer`.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(make_config(tokenizer))
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.pad_token_id,
    )
    return model
