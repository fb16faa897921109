"""The base model's recipe: same data as the processor's, same text as the template."""

import numpy as np
import pytest
import torch

from univg_nb.boxes import format_box
from univg_nb.minimig.albums import album
from univg_nb.minimig.lessons import lesson
from univg_nb.minimig.scenes import render
from univg_nb.pretrain import UNUSED_LENGTH, shrink_unused, train_vision
from univg_nb.pretrain_data import Albums, Lessons, Plan
from univg_nb.pretrain_dialogue import IMAGE_TOKENS, dialogue
from univg_nb.pretrain_guide import NUMBER, AttentionGuide
from univg_nb.pretrain_vision import covered_cells, patchify
from univg_nb.tiny_model import build_model, build_processor, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    rng = np.random.default_rng(0)
    turns = [turn for _ in range(300) for turn in lesson(rng).turns]
    return train_tokenizer([text for turn in turns for text in turn[:2]])


def test_patches_equal_the_processors(tokenizer):
    rng = np.random.default_rng(1)
    image = render(lesson(rng).scenes[0])
    out = build_processor(tokenizer).image_processor([image], return_tensors="pt")
    small = torch.from_numpy(np.array(image.resize((64, 64), 3)))[None]
    torch.testing.assert_close(patchify(small), out["pixel_values"], atol=0.05, rtol=0)


@pytest.mark.parametrize("several", [0.0, 1.0])
def test_dialogue_is_the_chat_template_with_loss_on_replies(tokenizer, several):
    item = lesson(np.random.default_rng(2), several=several)
    made = dialogue(item, tokenizer)
    chat = []
    for k, turn in enumerate(item.turns):
        images = [{"type": "image"}] * (len(item.scenes) if k == 0 else 0)
        text = {"type": "text", "text": turn.question}
        chat += [
            {"role": "user", "content": [*images, text]},
            {"role": "assistant", "content": turn.reply},
        ]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    text = text.replace("<|image_pad|>", "<|image_pad|>" * IMAGE_TOKENS)
    assert made.ids == tokenizer(text).input_ids[:-1]  # but for the last line break
    kept = [i for i, label in zip(made.ids, made.labels, strict=True) if label >= 0]
    assert kept == [i for i in made.labels if i >= 0]
    replies = "".join(turn.reply + "<|im_end|>" for turn in item.turns)
    assert tokenizer.decode(kept) == replies


def test_a_look_is_from_the_token_before_the_one_it_serves(tokenizer):
    item = lesson(np.random.default_rng(3), several=0.0)
    made = dialogue(item, tokenizer)
    digits = {str(d) for d in range(10)}
    for look in made.looks:
        if look.at == look.phrase or len(look.spots) != 1:
            continue
        following = tokenizer.decode([made.ids[look.at + 1]])
        assert made.labels[look.at + 1] >= 0
        if following in digits:  # a coordinate: the box is in the reply
            assert format_box(look.spots[0][1]) in tokenizer.decode(made.ids)


def test_cells_of_a_box():
    assert covered_cells((0, 0, 250, 250)).tolist() == [0]
    assert covered_cells((100, 100, 140, 140)).tolist() == [0]  # small: the best one
    assert covered_cells((0, 0, 1000, 1000)).tolist() == list(range(16))


def test_batches_and_guide(tokenizer):
    plan = Plan(language_batch=4, language_steps=50)
    data = Lessons(plan, tokenizer)
    batch = data[40]
    looks = batch.pop("looks")
    again = Lessons(plan, tokenizer)[40]
    assert torch.equal(batch["input_ids"], again["input_ids"])
    assert looks.thing.any(1).all() and (looks.thing.sum(1) <= 6 * IMAGE_TOKENS).all()
    model = build_model(tokenizer, seed=0)
    images = batch["input_ids"] == model.config.image_token_id
    assert not looks.thing[~images[looks.row]].any()
    guide = AttentionGuide(model.model.language_model.layers)
    out = model(**batch, mm_token_type_ids=images.int(), use_cache=False)
    losses = guide.loss(looks)
    (out.loss + sum(losses.values())).backward()
    # Random attention spreads over the keys before the query: -log of a small share.
    assert all(1.0 < float(loss.detach()) < 8.0 for loss in losses.values())


def test_which_image_is_meant_is_looked_up_where_it_is_said(tokenizer):
    rng = np.random.default_rng(6)
    said = 0
    for _ in range(40):
        item = album(rng)
        assert 1 <= len(item.scenes) <= 6
        made = dialogue(item, tokenizer, numbers=True)
        for look in made.looks:
            if look.phrase != NUMBER:
                continue
            said += 1
            ((image, box),) = look.spots
            assert box == (0, 0, 1000, 1000)
            word = tokenizer.decode([made.ids[look.at]]).strip()
            ordinals = ("first", "second", "third", "fourth", "fifth", "sixth")
            # a word of a small vocabulary may end in a later piece
            assert word == str(image + 1) or any(o.endswith(word) for o in ordinals)
        plain = dialogue(item, tokenizer)
        assert plain.ids == made.ids and plain.labels == made.labels
        assert plain.looks == [k for k in made.looks if k.phrase != NUMBER]
    assert said > 50


def test_albums_compare_no_pictures():
    rng = np.random.default_rng(7)
    words = " ".join(
        turn.question for _ in range(200) for turn in album(rng).turns
    ).lower()
    for word in ("differen", "change", "common", "share", "same", "both", "purpose"):
        assert word not in words, word
    assert "describe all images" in words


def test_only_unused_words_are_shortened(tokenizer):
    model = build_model(tokenizer, 0)
    before = model.get_input_embeddings().weight.detach().clone()
    shrink_unused(model, tokenizer)
    after = model.get_input_embeddings().weight
    text = "Image 1 shows a red cup. So the target is the red cup in image 1."
    kept = (after == before).all(dim=1)
    assert kept[tokenizer(text).input_ids].all() and not kept.all()
    torch.testing.assert_close(after[~kept], UNUSED_LENGTH * before[~kept])
    assert model.get_output_embeddings().weight is after


def test_albums_come_as_batches(tokenizer):
    data = Albums(Plan(albums_steps=5, albums_batch=2), tokenizer)
    batch = data[4]
    assert len(data) == 5 and batch["input_ids"].shape[0] == 2
    looks = batch["looks"]
    assert looks.thing.any(1).all() and (looks.phrase == NUMBER).any()
    assert torch.equal(data[4]["input_ids"], batch["input_ids"])


def test_the_first_stage_trains_the_tower(tokenizer, tmp_path):
    visual = build_model(tokenizer, 0).model.visual
    before = visual.merger.mlp[0].weight.detach().clone()
    train_vision(Plan(vision_steps=2, vision_batch=2), tmp_path, visual)
    assert not torch.equal(before, visual.merger.mlp[0].weight)
    assert (tmp_path / "vision.pt").is_file()
