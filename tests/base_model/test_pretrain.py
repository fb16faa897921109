"""The base model's recipe: same data as the processor's, same text as the template."""

import numpy as np
import pytest
import torch

from univg_nb.base_model.albums import sample_album
from univg_nb.base_model.architecture import (
    build_model,
    build_processor,
    train_tokenizer,
)
from univg_nb.base_model.data import Albums, Lessons, Plan
from univg_nb.base_model.dialogue import IMAGE_TOKENS, tokenize_lesson
from univg_nb.base_model.evaluate import evaluate_model
from univg_nb.base_model.guide import NUMBER, AttentionGuide
from univg_nb.base_model.lessons import sample_lesson
from univg_nb.base_model.training import (
    UNUSED_LENGTH,
    align_words,
    shrink_unused,
    train_language,
    train_vision,
)
from univg_nb.base_model.vision import find_covered_cells, patchify
from univg_nb.data.boxes import format_box
from univg_nb.evaluate.generate import GenerationOptions
from univg_nb.io import read_jsonl
from univg_nb.minimig.scenes import render
from univg_nb.train.difficulty import BINS


@pytest.fixture(scope="module")
def tokenizer():
    rng = np.random.default_rng(0)
    turns = [turn for _ in range(300) for turn in sample_lesson(rng).turns]
    return train_tokenizer([text for turn in turns for text in turn[:2]])


def test_patches_equal_the_processors(tokenizer):
    rng = np.random.default_rng(1)
    image = render(sample_lesson(rng).scenes[0])
    out = build_processor(tokenizer).image_processor([image], return_tensors="pt")
    small = torch.from_numpy(np.array(image.resize((64, 64), 3)))[None]
    torch.testing.assert_close(patchify(small), out["pixel_values"], atol=0.05, rtol=0)


@pytest.mark.parametrize("several", [0.0, 1.0])
def test_dialogue_is_the_chat_template_with_loss_on_replies(tokenizer, several):
    item = sample_lesson(np.random.default_rng(2), several=several)
    made = tokenize_lesson(item, tokenizer)
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
    item = sample_lesson(np.random.default_rng(3), several=0.0)
    made = tokenize_lesson(item, tokenizer)
    digits = {str(d) for d in range(10)}
    for look in made.looks:
        if look.at == look.phrase or len(look.spots) != 1:
            continue
        following = tokenizer.decode([made.ids[look.at + 1]])
        assert made.labels[look.at + 1] >= 0
        if following in digits:  # a coordinate: the box is in the reply
            assert format_box(look.spots[0][1]) in tokenizer.decode(made.ids)


def test_cells_of_a_box():
    assert find_covered_cells((0, 0, 250, 250)).tolist() == [0]
    assert find_covered_cells((100, 100, 140, 140)).tolist() == [0]  # the best
    assert find_covered_cells((0, 0, 1000, 1000)).tolist() == list(range(16))


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
        item = sample_album(rng)
        assert 1 <= len(item.scenes) <= 6
        made = tokenize_lesson(item, tokenizer, numbers=True)
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
        plain = tokenize_lesson(item, tokenizer)
        assert plain.ids == made.ids and plain.labels == made.labels
        assert plain.looks == [k for k in made.looks if k.phrase != NUMBER]
    assert said > 50


def test_albums_compare_no_pictures():
    rng = np.random.default_rng(7)
    words = " ".join(
        turn.question for _ in range(200) for turn in sample_album(rng).turns
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


def test_all_stages_run_and_a_finished_stage_is_loaded(tokenizer, tmp_path):
    sizes = {"vision_batch": 2, "language_batch": 1, "albums_batch": 1}
    steps = dict.fromkeys(
        ("vision_steps", "language_steps", "words_steps", "albums_steps"), 2
    )
    plan = Plan(**sizes, **steps)
    trained = []
    for seed in (0, 1):  # the second time everything is read from the checkpoints
        model = build_model(tokenizer, seed)
        start = model.model.visual.patch_embed.proj.weight.detach().clone()
        train_vision(plan, tmp_path, model)
        tower = model.model.visual.patch_embed.proj.weight
        assert not torch.equal(tower, start)
        heads = torch.load(tmp_path / "vision.pt", weights_only=True)["heads"]
        align_words(model, heads, tokenizer)
        train_language(plan, tmp_path, model, tokenizer)
        trained.append(model.state_dict())
    assert all(torch.equal(trained[0][k], trained[1][k]) for k in trained[0])
    log = read_jsonl(tmp_path / "training_log.jsonl")
    assert [row["stage"] for row in log] == ["vision", "language", "words", "albums"]
    model.save_pretrained(tmp_path / "model")
    build_processor(tokenizer).save_pretrained(tmp_path / "model")
    few = {"single_test": 2, "test_per_task": 1}
    how = GenerationOptions("direct", max_new_tokens=32)
    made = evaluate_model(tmp_path / "model", how, sizes=few, groups=1)
    assert [test["n"] for test in made["tests"].values()] == [2, 10]
    assert made["groups"]["n"] == 10
    assert sum(made["groups"][name] for name in BINS) == pytest.approx(1)
