"""Qwen2.5-VL and Qwen3-VL with their own processors, as well as Qwen2-VL.

The shared step is exact for 1, 2 and 6 images, in GRPO's trainer and with the features
that stage 1 keeps; what would be wrong is found before anything is trained.
"""

import logging

import grpo_builders
import pytest
import torch
from grpo_builders import make_config, make_samples, make_trainer
from test_shared_prefix import as_batch, gradient_of, shared_rows, whole_rows
from tiny_models import END, TOKENS, WORDS, build, make_prompt

from univg_nb import models
from univg_nb.fast import packed_rows, sampling, vision_features
from univg_nb.fast.attention import SEGMENTS, get_attention
from univg_nb.fast.vision_features import VisionCache
from univg_nb.train import grpo, sft

FAMILIES = ("qwen2", "qwen2_5", "qwen3")
IMAGES = [(2, 3), (1, 2), (3, 2), (2, 2), (1, 1), (4, 1)]  # height, width in tokens


@pytest.fixture(scope="module")
def folders(family_folders):
    return family_folders


def make_groups(images: int) -> list:
    """Two groups of replies, to `images` and to one image."""
    groups = []
    for number, lengths in enumerate([(5, 1, 7), (4, 6)]):
        generator = torch.Generator().manual_seed(number)
        replies = [
            torch.cat([torch.randint(2, WORDS, (n,), generator=generator), end])
            for n, end in ((n, torch.tensor([END])) for n in lengths)
        ]
        sizes = IMAGES[: (images, 1)[number]]
        groups.append((make_prompt(sizes, 3 - number, 5, number), replies))
    return groups


def drop_deepstack(features, config):
    """As if the model had the pooled features only."""
    inputs = make_feature_inputs(features, config)
    levels = inputs["mm_encoder_outputs"]["image"].deepstack_features
    levels[:] = [tuple(torch.zeros_like(one) for one in level) for level in levels]
    return inputs


make_feature_inputs = vision_features.make_feature_inputs


@pytest.mark.parametrize("attention", ["sdpa", SEGMENTS])
@pytest.mark.parametrize("images", [1, 2, 6])
@pytest.mark.parametrize("family", FAMILIES)
def test_shared_rows_equal_whole_rows(family, images, attention):
    model, batch = build(family), as_batch(make_groups(images))
    backbone = models.get_base_model(model).model
    expected = whole_rows(model, batch)
    backbone.language_model.set_attn_implementation(attention)
    vision = VisionCache(backbone)
    made = shared_rows(model, batch, packed_rows.UNLIMITED, vision)
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-5)
    factor = torch.linspace(-1, 1, expected[0].numel()).view_as(expected[0])
    true = gradient_of(model, (expected[0].exp() * factor).sum())
    error = gradient_of(model, (made[0].exp() * factor).sum()) - true
    assert true.norm() > 0 and error.norm() <= 1e-4 * true.norm()


def test_features_of_every_level_are_kept_and_counted():
    model = build("qwen3")
    backbone = models.get_base_model(model).model
    pixels, grid = make_prompt([(2, 3)], 1, 1, 0).images[0]
    cache = VisionCache(backbone)
    features = cache.get_features(pixels, grid)
    width = vision_features.get_feature_width(backbone.config)
    assert features.shape == (6, width) == (6, 3 * 64)
    assert cache.used_bytes == 6 * width * 4
    with torch.no_grad():
        own = backbone.get_image_features(pixels, grid)
    image = make_feature_inputs([features], backbone.config)["mm_encoder_outputs"]
    (pooled,), levels = image["image"].pooler_output, image["image"].deepstack_features
    assert torch.equal(pooled, own.pooler_output[0]) and len(levels) == 2
    for (ours,), (theirs,) in zip(levels, own.deepstack_features, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", FAMILIES[1:])
def test_the_trainers_passes_equal_trl_in_value_and_gradient(folders, tmp_path, family):
    trainer = make_trainer(folders[family], tmp_path)
    inputs, mask = grpo_builders.scored_batch(trainer)
    assert trainer.shared_forward and trainer.shared_rollout  # and checked
    assert get_attention(models.get_base_model(trainer.model).model) == SEGMENTS
    made = {}
    for shared in (True, False):
        trainer.shared_forward = shared
        logps, entropy, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, **inputs, batch_size=8, compute_entropy=True
        )
        gradient = gradient_of(trainer.model, (logps * mask).pow(2).sum())
        made[shared] = (logps * mask).detach(), (entropy * mask).detach(), gradient
    *ours, gradient = made[True]
    *theirs, expected = made[False]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (gradient - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("precision", ["float32", "bf16", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_shares_prompts_and_computes_an_image_once(
    folders, tmp_path, family, precision
):
    folder = folders[family]
    config = make_config(folder, max_steps=3, bf16=precision == "bf16")
    if precision == "nf4":
        config["sft"]["adapter"] = "qlora"
    trainer = grpo.build_trainer(config, tmp_path, make_samples(folder), folder / "sft")
    trainer.train()
    assert trainer.shared_forward and trainer.shared_rollout
    assert trainer.vision.computed == 4  # the folder's images, in 3 updates
    for name, weight in trainer.model.named_parameters():
        if precision == "nf4" and name.endswith("proj.base_layer.weight"):
            # packed for inference by the sampling, it would pass no gradient on
            assert not getattr(weight.quant_state, "packing_format_for_cpu", False)


def test_lost_deepstack_features_turn_sharing_off_with_a_message(
    folders, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(vision_features, "make_feature_inputs", drop_deepstack)
    trainer = make_trainer(folders["qwen3"], tmp_path)
    with caplog.at_level(logging.WARNING, "univg_nb"):
        trainer.train()
    assert not trainer.shared_forward and not trainer.shared_rollout
    assert "falls back" in caplog.text and "log-probs differ by" in caplog.text


@pytest.mark.parametrize("family", FAMILIES)
def test_stage_1_learns_the_same_from_kept_features(
    folders, tmp_path, monkeypatch, family
):
    """Through the tower in each step, or from the file: equal losses and norms."""
    folder, logged = folders[family], []
    config = make_config(folder)
    config["sft"] |= {"per_device_train_batch_size": 2, "max_steps": 3}
    config["sft"] |= {"logging_steps": 1, "save_strategy": "no", "disable_tqdm": True}
    config["sft"] |= {"learning_rate": 1e-2}
    for limit in (2**30, 0):
        monkeypatch.setattr(vision_features, "FEATURE_BYTES", limit)
        out = tmp_path / str(limit) / "sft"
        trainer = sft.build_trainer(config, out, make_samples(folder, 6), chains=False)
        assert (trainer.data_collator.features is not None) == bool(limit)
        trainer.train()
        rows = trainer.state.log_history[:3]
        logged.append([row[key] for row in rows for key in ("loss", "grad_norm")])
    kept, computed = logged
    assert kept == pytest.approx(computed, rel=1e-4) and kept[0] != kept[2]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_processor_calls_an_image_is_never_sampled(folders, family):
    section = {"name_or_path": str(folders[family] / "base")}
    model, processor = models.load_for_training(section)
    banned = sampling.get_vision_token_ids(processor)
    assert len(banned) == 5
    assert {getattr(model.config, name) for name in TOKENS} <= set(banned)
    processor.image_token = "<|box_start|>"
    more = sampling.get_vision_token_ids(processor)
    own = processor.tokenizer.convert_tokens_to_ids("<|box_start|>")
    assert more == sorted([*banned, own])
