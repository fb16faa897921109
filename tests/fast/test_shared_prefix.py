"""Shared prompts equal whole rows: 40 random layouts; the vision cache; the switch."""

import logging

import pytest
import test_grpo
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from trl.trainer.utils import add_fused_lm_head

from univg_nb import models
from univg_nb.fast import check, packed_rows
from univg_nb.fast import prompts as shared_prefix
from univg_nb.fast.attention import SEGMENTS, Segments
from univg_nb.fast.vision_features import VisionCache

folder = test_grpo.folder  # the fixture: a small model on disk, an adapter, images

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
    """lora, full (tower frozen), tower (all trained), or a Qwen2.5-VL with LoRA."""
    torch.manual_seed(0)
    if kind == "qwen2_5":
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
    if kind in ("lora", "qwen2_5"):
        model = models.add_lora(model, {"r": 4, "lora_alpha": 8})
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


@pytest.fixture(scope="module")
def built():
    return {kind: build(kind) for kind in ("lora", "full", "tower", "qwen2_5")}


def make_prompt(sizes, before: int, after: int, seed: int) -> shared_prefix.Prompt:
    """A prompt of words around images; sizes: (height, width) of each, in tokens."""
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> torch.Tensor:
        return torch.randint(2, WORDS, (count,), generator=generator)

    ids = [words(before)]
    for height, width in sizes:
        ids += [torch.full((height * width,), IMAGE), words(1)]
    ids = torch.cat([*ids, words(after)])
    if not sizes:
        return shared_prefix.Prompt(ids, torch.zeros_like(ids), None, None)
    grid = torch.tensor([(1, 2 * height, 2 * width) for height, width in sizes])
    patches = int(grid.prod(-1).sum())
    pixels = torch.randn(patches, PATCH_DIM, generator=generator)
    return shared_prefix.Prompt(ids, (ids == IMAGE).long(), pixels, grid)


def as_batch(groups) -> dict:
    """[(prompt, replies)] -> the tensors of TRL: one row per reply, prompts padded on
    the left, replies on the right, images repeated."""
    rows = [(prompt, reply) for prompt, replies in groups for reply in replies]

    def padded(values, side):
        return pad_sequence(values, batch_first=True, padding_side=side)

    prompts = padded([p.ids for p, _ in rows], "left")
    replies = padded([r for _, r in rows], "right")
    real = [
        padded([torch.ones_like(p.ids) for p, _ in rows], "left"),
        padded([torch.ones_like(r) for _, r in rows], "right"),
    ]
    types = padded([p.token_types for p, _ in rows], "left")
    seen = [p for p, _ in rows if p.grid is not None]
    return {
        "input_ids": torch.cat([prompts, replies], 1),
        "attention_mask": torch.cat(real, 1),
        "mm_token_type_ids": torch.cat([types, torch.zeros_like(replies)], 1),
        "pixel_values": torch.cat([p.pixel_values for p in seen]) if seen else None,
        "image_grid_thw": torch.cat([p.grid for p in seen]) if seen else None,
        "num_images": [0 if p.grid is None else len(p.grid) for p, _ in rows],
        "width": prompts.size(1),
    }


def whole_rows(model, batch) -> list[torch.Tensor]:
    """Log-probs and entropies (B, C) as TRL computes them."""
    width, names = batch["width"], ("input_ids", "attention_mask", "mm_token_type_ids")
    inputs = {name: batch[name] for name in names}
    if batch["pixel_values"] is not None:
        inputs |= {name: batch[name] for name in ("pixel_values", "image_grid_thw")}
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :width] = -100
    output = model(**inputs, labels=labels, fused_lm_head=True)
    return [output.log_probs[:, width - 1 :], output.entropy[:, width - 1 :]]


def shared_rows(model, batch, max_tokens, vision) -> list[torch.Tensor]:
    """The same from the rows' tensors, with shared prompts."""
    width, backbone = batch["width"], models.get_base_model(model).model
    names = ("input_ids", "attention_mask", "mm_token_type_ids")
    images = [batch[n] for n in ("pixel_values", "image_grid_thw", "num_images")]
    runs = shared_prefix.split_rows(*(batch[n] for n in names), width, *images)
    lengths = batch["attention_mask"][:, width:].sum(1).tolist()
    made = [[None] * len(lengths), [None] * len(lengths)]
    for chunk in packed_rows.chunked(runs, lengths, max_tokens):
        packed = [
            (p, [batch["input_ids"][r, width : width + lengths[r]] for r in rows])
            for p, rows in chunk
        ]
        parts = packed_rows.packed_log_probs(model, backbone, packed, vision)
        for values, part in zip(made, parts, strict=True):
            for (_, rows), group in zip(chunk, part, strict=True):
                for row, value in zip(rows, group, strict=True):
                    values[row] = value
    return [pad_sequence(values, batch_first=True) for values in made]


def gradient_of(model, value: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    value.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([p.grad.flatten() for p in trained if p.grad is not None])


SIZES = st.tuples(st.integers(1, 2), st.integers(1, 3))
GROUP = st.tuples(
    st.sampled_from([0, 1, 2, 6]).flatmap(
        lambda count: st.lists(SIZES, min_size=count, max_size=count)
    ),
    st.integers(1, 5),  # words before the images
    st.integers(1, 9),  # and after: rows of different length, padded on the left
    st.lists(st.integers(1, 7), min_size=1, max_size=4),  # where each reply ends
)


@settings(max_examples=40, derandomize=True)
@given(
    kind=st.sampled_from(["lora", "full", "tower", "qwen2_5"]),
    layout=st.lists(GROUP, min_size=1, max_size=3),
    max_tokens=st.sampled_from([1, 60, packed_rows.UNLIMITED]),
    attention=st.sampled_from(["sdpa", SEGMENTS]),
)
def test_shared_rows_equal_whole_rows(built, kind, layout, max_tokens, attention):
    model = built[kind]
    language = models.get_base_model(model).model.language_model
    language.set_attn_implementation("sdpa")
    groups = []
    for number, (sizes, before, after, lengths) in enumerate(layout):
        generator = torch.Generator().manual_seed(100 + number)
        replies = [
            torch.cat([torch.randint(2, WORDS, (n - 1,), generator=generator), end])
            for n, end in ((n, torch.tensor([END])) for n in lengths)
        ]
        groups.append((make_prompt(sizes, before, after, number), replies))
    batch = as_batch(groups)
    vision = None if kind == "tower" else VisionCache()
    expected = whole_rows(model, batch)
    language.set_attn_implementation(attention)
    made = shared_rows(model, batch, max_tokens, vision)
    torch.manual_seed(0)
    factor = torch.randn_like(expected[0]) * (expected[0] != 0)
    for ours, theirs in zip(made, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    true = gradient_of(model, (expected[0].exp() * factor).sum())
    error = gradient_of(model, (made[0].exp() * factor).sum()) - true
    assert true.norm() > 0 and error.norm() <= 1e-4 * true.norm()


def test_a_chunk_keeps_to_the_token_budget_and_cuts_no_group():
    groups = [(make_prompt([], 1, n - 1, n), [n]) for n in (8, 3, 5, 30)]
    lengths = dict.fromkeys((8, 3, 5, 30), 2)  # of row n, whose prompt has n tokens
    chunks = packed_rows.chunked(groups, lengths, 20)
    # 2 x (5 + 2) = 14 fit in 20; a third of 8 + 2 would make 30; 32 are alone
    assert [[rows[0] for _, rows in chunk] for chunk in chunks] == [[3, 5], [8], [30]]


def test_flex_attention_gets_the_same_mask():
    segments = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [0, 0, 1, 2, 2, 3, -1, -1]])
    dense = packed_rows.block_mask(segments)
    rule = packed_rows.segment_rule(segments)
    made = create_mask(rule, 2, None, 8, 8, device="cpu")[:, 0]
    assert torch.equal(made, dense)
    # by hand: the second reply's first token sees the prompt and itself
    assert dense[0, 5].tolist() == [True] * 3 + [False] * 2 + [True] + [False] * 2


def test_segments_know_the_pieces_and_read_other_masks_as_sdpa_does(built):
    rows = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [0, 0, 1, 2, 2, 3, -1, -1]])
    assert Segments.of(rows).sizes == [[3, 2, 3, 0], [2, 1, 2, 1, 2]]
    backbone = models.get_base_model(built["full"]).model
    ids = torch.randint(2, WORDS, (2, 8), generator=torch.Generator().manual_seed(0))
    real = torch.tensor([[0] * 3 + [1] * 5, [1] * 8])  # left-padded
    states = []
    for name in ("sdpa", SEGMENTS):
        backbone.language_model.set_attn_implementation(name)
        with torch.no_grad():
            out = backbone(input_ids=ids, attention_mask=real).last_hidden_state
        states.append(out[real.bool()])
    assert torch.equal(*states)


# ---------------------------------------------------------------- vision features


def images_of(*seeds: int) -> tuple[torch.Tensor, torch.Tensor]:
    prompts = [make_prompt([(2, 2)], 1, 1, seed) for seed in seeds]
    pixels = torch.cat([p.pixel_values for p in prompts])
    return pixels, torch.cat([p.grid for p in prompts])


def test_an_image_is_computed_once_and_equals_the_models_own(built):
    backbone, cache = models.get_base_model(built["full"]).model, VisionCache()
    pixels, grid = images_of(1, 2, 1)
    with torch.no_grad():
        own = backbone.get_image_features(pixels, grid, return_dict=True).pooler_output
    made = cache.features(backbone, pixels, grid).pooler_output
    assert (cache.computed, cache.reused) == (2, 1)
    torch.testing.assert_close(torch.cat(made), torch.cat(own), rtol=0, atol=1e-5)
    again = cache.features(backbone, *images_of(2)).pooler_output
    assert torch.equal(again[0], made[1]) and cache.computed == 2
    # other processor settings: other pixels, or the same in another grid
    cache.features(backbone, pixels[:16] * 2, grid[:1])
    cache.features(backbone, pixels[:16], torch.tensor([[1, 2, 8]]))
    assert cache.computed == 4


def test_the_cache_forgets_the_image_not_used_for_longest(built):
    backbone = models.get_base_model(built["full"]).model
    size = 4 * TEXT["hidden_size"] * 4  # bytes of 4 tokens in float32
    cache = VisionCache(limit_bytes=2 * size)
    for seed in (1, 2, 1, 3, 1, 2):  # 3 drives 2 out, 2 drives 3 out
        cache.features(backbone, *images_of(seed))
    assert (cache.computed, cache.reused) == (4, 2)
    assert cache.used_bytes == 2 * size


def test_features_of_a_tower_that_trains_are_refused(built):
    backbone = models.get_base_model(built["tower"]).model
    with pytest.raises(ValueError, match="freeze_vision: true"):
        VisionCache().features(backbone, *images_of(1))


def test_each_image_goes_through_the_tower_once_in_all_updates(folder, tmp_path):
    trainer = test_grpo.make_trainer(folder, tmp_path, count=2, max_steps=3)
    seen = []
    trainer.model.get_base_model().model.visual.register_forward_hook(
        lambda _module, args, kwargs, _out: seen.append(kwargs["grid_thw"]),
        with_kwargs=True,
    )
    trainer.unchecked = False  # the check encodes whole rows too
    trainer.train()
    # two questions over images 0 and 1, 2: three pictures in 3 updates of 2 groups
    assert sum(len(grid) for grid in seen) == trainer.vision.computed == 3
    assert trainer.vision.reused > 3 * trainer.vision.computed


# ---------------------------------------------------------------- the switch


def test_a_difference_turns_sharing_off_with_a_message(
    folder, tmp_path, monkeypatch, caplog
):
    def flat(_backbone, prompt):
        return torch.arange(len(prompt.ids)).expand(
            3, -1
        )  # images as if they were text

    monkeypatch.setattr(packed_rows, "prompt_positions", flat)
    trainer = test_grpo.make_trainer(folder, tmp_path)
    with caplog.at_level(logging.WARNING, "univg_nb"):
        trainer.train()
    assert not trainer.shared_forward and not trainer.shared_rollout
    assert "falls back" in caplog.text and "log-probs differ by" in caplog.text


def test_the_check_passes_and_leaves_random_numbers_alone(folder, tmp_path):
    made = []
    for mode in ("auto", "on"):
        keep = {"shared_prefix": mode}
        trainer = test_grpo.make_trainer(folder, tmp_path, keep=keep)
        assert trainer.unchecked == (mode == "auto")
        inputs, _ = test_grpo.scored_batch(trainer)
        assert trainer.shared_forward and not trainer.unchecked
        made.append(inputs["input_ids"])
    assert torch.equal(*made)


def test_a_wrong_switch_or_an_impossible_on_says_what_to_do(
    folder, tmp_path, monkeypatch
):
    with pytest.raises(ValueError, match="auto, on or off"):
        test_grpo.make_trainer(folder, tmp_path, keep={"shared_prefix": "yes"})
    with pytest.raises(ValueError, match="row_tokens = 0"):
        test_grpo.make_trainer(folder, tmp_path, keep={"row_tokens": 0})
    monkeypatch.setattr(check, "ATTENTION", ())  # as with flash attention
    with pytest.raises(ValueError, match="takes no mask of our own; set it to auto"):
        test_grpo.make_trainer(folder, tmp_path, keep={"shared_prefix": "on"})
    assert not test_grpo.make_trainer(folder, tmp_path).shared_forward
