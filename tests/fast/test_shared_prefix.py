"""Shared prompts equal whole rows: 40 random layouts; the vision cache; the switch."""

import logging

import grpo_builders
import pytest
import torch
from grpo_builders import G, Scripted, make_config, make_samples, make_trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import END, TEXT, WORDS, build, make_prompt
from torch.nn.utils.rnn import pad_sequence

from univg_nb import models
from univg_nb.fast import check, packed_rows
from univg_nb.fast.attention import SEGMENTS, Segments, get_attention
from univg_nb.fast.prompts import split_rows
from univg_nb.fast.vision_features import VisionCache
from univg_nb.train import grpo

KINDS = ("qwen2", "qwen2_full", "qwen2_tower", "qwen2_5", "qwen3", "qwen3_tower")
FIELDS = ("mm_token_type_ids", "pixel_values", "image_grid_thw", "num_images")


@pytest.fixture(scope="module")
def folder(grpo_folder):
    return grpo_folder


@pytest.fixture(scope="module")
def built():
    return {kind: build(kind) for kind in KINDS}


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
    images = [image for p, _ in rows for image in p.images]
    pixels, grids = (
        map(torch.cat, zip(*images, strict=True)) if images else (None, None)
    )
    return {
        "input_ids": torch.cat([prompts, replies], 1),
        "attention_mask": torch.cat(real, 1),
        "mm_token_type_ids": torch.cat([types, torch.zeros_like(replies)], 1),
        "pixel_values": pixels,
        "image_grid_thw": grids,
        "num_images": [len(p.images) for p, _ in rows],
        "width": prompts.size(1),
        "groups": [n for n, (_, replies) in enumerate(groups) for _ in replies],
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
    tokens = (batch[name][:, :width] for name in ("input_ids", "attention_mask"))
    runs = split_rows(*tokens, batch["groups"], **{n: batch[n] for n in FIELDS})
    lengths = batch["attention_mask"][:, width:].sum(1).tolist()
    pairs = zip(batch["input_ids"][:, width:], lengths, strict=True)
    replies = [row[:length] for row, length in pairs]
    found = {}
    for chunk in packed_rows.split_chunks(runs, lengths, max_tokens):
        found |= packed_rows.compute_log_probs(model, backbone, chunk, replies, vision)
    both = zip(*(found[row] for row in range(len(lengths))), strict=True)
    return [pad_sequence(values, batch_first=True) for values in both]


def test_rows_belong_to_the_group_they_are_said_to_not_to_equal_neighbours():
    prompt = make_prompt([(2, 2)], 3, 2, 0)
    reply = torch.tensor([5, END])
    batch = as_batch([(prompt, [reply] * 4)])
    tokens = [batch[name][:, :-2] for name in ("input_ids", "attention_mask")]
    for groups, expected in (
        ([0, 0, 1, 1], [[0, 1], [2, 3]]),  # the same question twice, two groups
        ([4, 7, 4, 7], [[0, 2], [1, 3]]),  # rows that were shuffled
    ):
        found = split_rows(*tokens, groups, **{name: batch[name] for name in FIELDS})
        assert [rows for _, rows in found] == expected
        for made, _ in found:
            ours, theirs = (
                [p.ids, p.token_types, *p.images[0]] for p in (made, prompt)
            )
            assert all(map(torch.equal, ours, theirs))


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
    st.lists(st.integers(0, 7), min_size=1, max_size=4),  # where each reply ends
)


@settings(max_examples=40, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    layout=st.lists(GROUP, min_size=1, max_size=3),
    max_tokens=st.sampled_from([1, 60, packed_rows.UNLIMITED]),
    attention=st.sampled_from(["sdpa", SEGMENTS]),
)
def test_shared_rows_equal_whole_rows(built, kind, layout, max_tokens, attention):
    model = built[kind]
    backbone = models.get_base_model(model).model
    backbone.language_model.set_attn_implementation("sdpa")
    groups = []
    for number, (sizes, before, after, lengths) in enumerate(layout):
        generator = torch.Generator().manual_seed(100 + number)
        replies = [
            torch.cat([torch.randint(2, WORDS, (n,), generator=generator), end])[1:]
            for n, end in ((n, torch.tensor([END])) for n in lengths)
        ]
        groups.append((make_prompt(sizes, before, after, number), replies))
    batch = as_batch(groups)
    vision = None if "tower" in kind else VisionCache(backbone)
    expected = whole_rows(model, batch)
    backbone.language_model.set_attn_implementation(attention)
    made = shared_rows(model, batch, max_tokens, vision)
    torch.manual_seed(0)
    factor = torch.randn_like(expected[0]) * (expected[0] != 0)
    for ours, theirs in zip(made, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    true = gradient_of(model, (expected[0].exp() * factor).sum())
    error = gradient_of(model, (made[0].exp() * factor).sum()) - true
    some = any(len(reply) for _, replies in groups for reply in replies)
    assert bool(true.norm() > 0) == some and error.norm() <= 1e-4 * true.norm()


def test_a_chunk_keeps_to_the_token_budget_and_cuts_no_group():
    groups = [(make_prompt([], 1, n - 1, n), [n]) for n in (8, 3, 5, 30)]
    lengths = dict.fromkeys((8, 3, 5, 30), 2)  # of row n, whose prompt has n tokens
    chunks = packed_rows.split_chunks(groups, lengths, 20)
    # 2 x (5 + 2) = 14 fit in 20; a third of 8 + 2 would make 30; 32 are alone
    assert [[rows[0] for _, rows in chunk] for chunk in chunks] == [[3, 5], [8], [30]]


def test_a_reply_sees_the_prompt_and_its_own_past():
    rows = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [0, 0, 1, 2, 2, 3, -1, -1]])
    seen = packed_rows.block_mask(rows)
    for row, query, key in torch.cartesian_prod(*map(torch.arange, seen.shape)):
        ours, theirs = rows[row, query], rows[row, key]
        own = theirs == 0 or theirs == ours
        assert seen[row, query, key] == (key <= query and own)
    # by hand: the second reply's first token sees the prompt and itself
    assert seen[0, 5].tolist() == [True] * 3 + [False] * 2 + [True] + [False] * 2


def test_segments_know_the_pieces_and_read_other_masks_as_sdpa_does(built):
    rows = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [0, 0, 1, 2, 2, 3, -1, -1]])
    assert Segments(rows).sizes == [[3, 2, 3, 0], [2, 1, 2, 1, 2]]
    backbone = models.get_base_model(built["qwen2_full"]).model
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


def image_of(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return make_prompt([(2, 2)], 1, 1, seed).images[0]


def test_an_image_is_computed_once_and_equals_the_models_own(built):
    backbone = models.get_base_model(built["qwen2_full"]).model
    cache = VisionCache(backbone)
    images = [image_of(seed) for seed in (1, 2, 1)]
    pixels, grids = map(torch.cat, zip(*images, strict=True))
    with torch.no_grad():
        own = backbone.get_image_features(pixels, grids, return_dict=True).pooler_output
    made = [cache.get_features(*image) for image in images]
    assert cache.computed == 2
    torch.testing.assert_close(torch.cat(made), torch.cat(own), rtol=0, atol=1e-5)
    again = cache.get_features(*image_of(2))
    assert torch.equal(again, made[1]) and cache.computed == 2
    # other processor settings: other pixels, or the same in another grid
    cache.get_features(pixels[:16] * 2, grids[:1])
    cache.get_features(pixels[:16], torch.tensor([[1, 2, 8]]))
    assert cache.computed == 4


def test_the_cache_forgets_the_image_not_used_for_longest(built):
    backbone = models.get_base_model(built["qwen2_full"]).model
    size = 4 * TEXT["hidden_size"] * 4  # bytes of 4 tokens in float32
    cache = VisionCache(backbone, limit_bytes=2 * size)
    for seed in (1, 2, 1, 3, 1, 2):  # 3 drives 2 out, 2 drives 3 out
        cache.get_features(*image_of(seed))
    assert cache.computed == 4
    assert cache.used_bytes == 2 * size


def test_features_of_a_tower_that_trains_are_refused(built):
    backbone = models.get_base_model(built["qwen2_tower"]).model
    with pytest.raises(AssertionError, match="the vision tower trains"):
        VisionCache(backbone)


def test_each_image_goes_through_the_tower_once_in_all_updates(folder, tmp_path):
    trainer = make_trainer(folder, tmp_path, count=2, max_steps=3)
    seen = []
    trainer.model.get_base_model().model.visual.register_forward_hook(
        lambda _module, args, kwargs, _out: seen.append(kwargs["grid_thw"]),
        with_kwargs=True,
    )
    trainer.unchecked = False  # the check encodes whole rows too
    trainer.train()
    # two questions over images 0 and 1, 2: three pictures in 3 updates of 2 groups
    assert sum(len(grid) for grid in seen) == trainer.vision.computed == 3


# ---------------------------------------------------------------- the switch


def test_a_difference_turns_sharing_off_with_a_message(
    folder, tmp_path, monkeypatch, caplog
):
    def flat(_backbone, prompt):
        return torch.arange(len(prompt.ids)).expand(
            3, -1
        )  # images as if they were text

    monkeypatch.setattr(packed_rows, "compute_positions", flat)
    trainer = make_trainer(folder, tmp_path)
    with caplog.at_level(logging.WARNING, "univg_nb"):
        trainer.train()
    assert not trainer.shared_forward and not trainer.shared_rollout
    assert "falls back" in caplog.text and "log-probs differ by" in caplog.text


def test_the_check_passes_and_leaves_random_numbers_alone(folder, tmp_path):
    made = []
    for unchecked in (True, False):
        trainer = make_trainer(folder, tmp_path)
        assert trainer.unchecked
        trainer.unchecked = unchecked
        inputs, _ = grpo_builders.scored_batch(trainer)
        assert trainer.shared_forward and not trainer.unchecked
        made.append(inputs["input_ids"])
    assert torch.equal(*made)


def test_prompts_are_shared_in_mixed_precision(folder, tmp_path):
    """Queries and keys leave the rotation in float32, values are in bfloat16."""
    trainer = make_trainer(folder, tmp_path, bf16=True)
    trainer.train()
    assert trainer.shared_forward and trainer.shared_rollout
    assert check.get_attention(models.get_base_model(trainer.model).model) == SEGMENTS


def test_an_obstacle_turns_sharing_off_with_a_message(
    folder, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr("univg_nb.fast.trainer.MODEL_TYPES", ("qwen2_5_vl",))
    with caplog.at_level(logging.WARNING, "univg_nb"):
        assert not make_trainer(folder, tmp_path).shared_forward
    assert "qwen2_vl takes TRL's own passes" in caplog.text


def test_what_cannot_be_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="row_tokens = 0"):
        make_trainer(folder, tmp_path, keep={"row_tokens": 0})
    with pytest.raises(ValueError, match="tools: not supported with shared prompts"):
        make_trainer(folder, tmp_path, keep={"tools": [print]})


# ---------------------------------------------------------------- whole passes


@pytest.mark.parametrize("batch_size", [2 * G, 3])
def test_the_trainers_passes_equal_trl_in_value_and_gradient(
    folder, tmp_path, batch_size
):
    trainer = make_trainer(folder, tmp_path)
    assert trainer.shared_forward and trainer.shared_rollout
    inputs, mask = grpo_builders.scored_batch(trainer)
    made = {}
    for shared in (True, False):
        trainer.shared_forward = shared
        trainer.model.zero_grad()
        logps, entropy, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, **inputs, batch_size=batch_size, compute_entropy=True
        )
        (logps * mask).pow(2).sum().backward()
        gradient = torch.cat(
            [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
        )
        made[shared] = (logps * mask).detach(), (entropy * mask).detach(), gradient
    *ours, gradient = made[True]
    *theirs, expected = made[False]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (gradient - expected).norm() < 1e-4 * expected.norm()


def test_the_whole_model_trains_against_a_reference_of_its_own(
    folder, tmp_path, monkeypatch
):
    """As at full scale: no adapter, so the reference is a second model, which attends
    as the policy does. Shared prompts and whole rows give the same updates."""
    monkeypatch.setattr(grpo, "DifficultyGRPOTrainer", Scripted)
    logged = {}
    for shared in (True, False):
        out = tmp_path / str(shared)
        config = make_config(folder, max_steps=2)
        config["model"]["dtype"] = "float64"
        config["sft"]["adapter"] = "none"
        samples, start = make_samples(folder), folder / "base"
        trainer = grpo.build_trainer(
            config, out, samples, start, out / "r.jsonl", shared_prefix=shared
        )
        trainer.train()
        attention = [
            get_attention(model.model) for model in (trainer.model, trainer.ref_model)
        ]
        assert attention == [SEGMENTS if shared else "sdpa"] * 2
        logged[shared] = [
            [row[key] for key in ("loss", "kl", "grad_norm", "entropy")]
            for row in trainer.state.log_history[:2]
        ]
    first, second = logged[True]
    assert abs(first[1]) < 1e-9 and second[1] > 1e-6  # the policy leaves its reference
    for shared, whole in zip(logged[True], logged[False], strict=True):
        assert shared == pytest.approx(whole, rel=1e-6, abs=1e-9)


def test_groups_stay_groups_through_shuffling_and_micro_batches(folder, tmp_path):
    """Of equal neighbors too: six rows ask the same question, in two groups."""
    config = make_config(
        folder, per_device_train_batch_size=G // 2, gradient_accumulation_steps=6
    )
    one, other = make_samples(folder, 2)
    trainer = grpo.build_trainer(config, tmp_path, [one, one, other], folder / "sft")
    trainer.model.train()
    rendered = []
    render = trainer.processing_class.apply_chat_template

    def count(conversation, **options):
        many = isinstance(conversation[0], list)
        rendered.append(len(conversation) if many else 1)
        return render(conversation, **options)

    trainer.processing_class.apply_chat_template = count
    rows = next(iter(trainer.get_train_dataloader()))
    trainer._prepare_inputs(rows)
    assert sum(rendered) == 3  # one for each group, not one for each reply
    prompts = {}
    for batch in trainer._buffered_inputs:
        assert len(set(batch["group"].tolist())) == 1  # a micro-batch is half a group
        rows = batch["group"].tolist(), batch["prompt_ids"].tolist()
        for group, ids in zip(*rows, strict=True):
            prompts.setdefault(group, []).append(ids)
    assert [len(rows) for rows in prompts.values()] == [G] * 3
    assert all(row == rows[0] for rows in prompts.values() for row in rows)
    assert len({tuple(rows[0]) for rows in prompts.values()}) == 2
