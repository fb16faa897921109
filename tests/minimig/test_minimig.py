"""MiniMIG: determinism, splits, one right answer, chains, files."""

import re
from functools import lru_cache

import pytest

from univg_nb.data import boxes, files, formats
from univg_nb.minimig import export, items, phrases
from univg_nb.minimig.compose import Draft
from univg_nb.minimig.phrases import QUESTIONS, REASONING
from univg_nb.minimig.pictograms import KINDS, serves_use
from univg_nb.minimig.tasks_pairs import CORRESPONDENCES, NEEDS, TOO_SMALL

COUNT = 9  # items of each task and split: three of each level
ALL_TASKS = tuple(items.TASKS | items.OTHER_TASKS)
IMAGES = {
    "diff": {2}, "view_diff": {2}, "common_object": {3, 4}, "object_tracking": {6},
    "multi_view": {2, 3, 4}, "region": {2, 3}, "refer_grounding": {2},
    "group_grounding": {3, 4}, "reasoning": {2}, "correspondence": {2},
    "single": {1}, "lisa": {1}, "video": {5}, "single_cot": {1},
}  # fmt: skip


@lru_cache
def made(task: str, split: str) -> tuple[items.Item, ...]:
    return tuple(items.make(task, 0, split, i) for i in range(COUNT))


@pytest.mark.parametrize("task", ALL_TASKS)
def test_same_arguments_same_item(task):
    for index in (0, 2):
        again = items.make(task, 0, "train", index)
        first = made(task, "train")[index]
        assert again.sample == first.sample
        assert [i.tobytes() for i in again.images] == [
            i.tobytes() for i in first.images
        ]
    other = items.make(task, 1, "train", 0)
    assert other.sample != made(task, "train")[0].sample


@pytest.mark.parametrize("task", ALL_TASKS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_items_are_sound(task, split):
    for index, item in enumerate(made(task, split)):
        sample, draft = item.sample, item.draft
        assert all(scene.split == split for scene in draft.scenes)
        assert len(item.images) == len(sample.images) in IMAGES[task]
        assert all(i.size == (256, 256) and i.mode == "RGB" for i in item.images)
        assert all(p.startswith(f"images/{split}_{task}_") for p in sample.images)
        assert sample.id.split("-")[3] == item.level
        assert item.level == ("easy", "medium", "hard")[index % 3]
        assert boxes.box_status(sample.answer) == boxes.OK
        assert max(sample.answer) < 1000
        assert "{" not in sample.question
        scene = draft.scenes[draft.target_image - 1]
        assert draft.target in scene.things
        assert len({t.name for t in scene.things}) == len(scene.things)
        if task != "correspondence":
            assert boxes.iou(sample.answer, draft.target.box) > 0.98


@pytest.mark.parametrize("task", items.TASKS)
def test_chains_name_the_target_in_known_words(task):
    for split in ("train", "test"):
        for item in made(task, split):
            chain = item.sample.chain
            assert 15 <= len(chain.split()) <= 70, chain
            last = re.search(
                r"So the target is the (?:\w+ of the )?(\w+ \w+) in image (\d), "
                r"(?:at|in) the [a-z ]+\.$",
                chain,
            )
            assert last, chain
            assert last[1] == item.draft.target.name
            assert int(last[2]) == item.draft.target_image
            assert "(" not in chain and "  " not in chain


def test_diff_has_one_difference_and_the_chain_says_which():
    for split in ("train", "test"):
        for item in made("diff", split):
            one, two = item.draft.scenes
            changed = {*one.things} ^ {*two.things}
            places = {(t.x, t.y) for t in changed}
            assert len(places) == 1
            assert item.draft.target in changed
        for item in made("view_diff", split):
            one, two = ({t.name for t in s.things} for s in item.draft.scenes)
            assert two - one == {item.draft.target.name}


def test_common_object_is_the_only_thing_in_common():
    for item in made("common_object", "train") + made("common_object", "test"):
        names = [{t.name for t in s.things} for s in item.draft.scenes]
        kinds = [{t.kind for t in s.things} for s in item.draft.scenes]
        in_all = set.intersection(*kinds)
        assert in_all == {item.draft.target.kind}
        if not set.intersection(*names):  # one kind in several colours
            scene = item.draft.scenes[item.draft.target_image - 1]
            assert sum(t.kind in in_all for t in scene.things) == 1
        # The chain looks at two images: they settle it.
        shared = names[0] & names[1] or kinds[0] & kinds[1]
        assert len(shared) == 1


def test_group_phrase_fits_one_thing_in_all_images():
    for item in made("group_grounding", "train") + made("group_grounding", "test"):
        phrase = re.search(r"start\|>the (.+)<\|object_ref_end", item.sample.question)
        noun = phrase[1].removesuffix(" thing")
        things = [t for s in item.draft.scenes for t in s.things]
        fits = [t for t in things if noun in (t.name, t.kind, t.color)]
        assert fits == [item.draft.target]


def test_box_in_words_is_that_of_the_target_in_image_1():
    for task in ("object_tracking", "multi_view"):
        for item in made(task, "test"):
            box = boxes.parse_box(item.sample.question).box
            first = item.draft.scenes[0]
            there = [t for t in first.things if t.box == box]
            assert [t.name for t in there] == [item.draft.target.name]
            assert f"image {item.draft.target_image}" in item.sample.question


def test_needs_have_one_answer():
    for item in made("reasoning", "train") + made("reasoning", "test"):
        first, second = item.draft.scenes
        kind = item.draft.target.kind
        context = first.things[0].kind
        need = next(
            n for n in NEEDS
            if kind in n.answers and n.place == first.place
            and n.kind in (None, context)
        )  # fmt: skip
        others = {t.kind for t in second.things if t != item.draft.target}
        assert others.isdisjoint((*need.answers, *need.rivals))
    for item in made("lisa", "test"):
        fits = [
            t for t in item.draft.scenes[0].things
            if serves_use(t.kind, item.draft.target.kind)
        ]  # fmt: skip
        assert fits == [item.draft.target]


def test_one_picture_asked_by_use_or_need_has_one_answer():
    by_use = by_need = 0
    for index in range(40):
        draft = items.make("single_cot", 0, "train", index).draft
        kind, (scene,) = draft.target.kind, draft.scenes
        others = {t.kind for t in scene.things if t != draft.target}
        about = KINDS[kind]
        if about.use in draft.question or about.need in draft.question:
            by_use += 1
            assert not any(serves_use(other, kind) for other in others)
            continue
        reason = draft.steps.removesuffix(".").rpartition(". ")[2] + "."
        named = phrases.add_article(kind)
        told = [n for n in NEEDS if n.reason.format(named) == reason]
        by_need += len(told)
        for need in told:
            assert kind in need.answers
            assert others.isdisjoint((*need.answers, *need.rivals))
    assert by_use and by_need


def test_no_wording_of_the_zero_shot_families_is_asked_in_training():
    zero_shot = (*phrases.IMPLICIT_USE, *phrases.IMPLICIT_NEED, *phrases.MOTION)
    trained = [phrases.FIND, phrases.SINGLE_USE, phrases.SINGLE_NEED]
    for group in (QUESTIONS, REASONING, phrases.SINGLE_REASONING):
        trained += group.values()
    texts = [text.lower() for wordings in trained for text in wordings]
    assert not [w for w in zero_shot if any(w.lower() in text for text in texts)]


def test_correspondence_pairs_one_part():
    for purpose, parts in CORRESPONDENCES.items():
        assert all(KINDS[kind].parts[part].purpose == purpose for kind, part in parts)
        for kind, part in parts:
            x1, y1, x2, y2 = KINDS[kind].parts[part].box
            is_small = min(x2 - x1, y2 - y1) < 0.27
            assert ((kind, part) in TOO_SMALL) == is_small
    for item in made("correspondence", "train"):
        kind = item.draft.target.kind
        assert item.sample.answer in [
            tuple(min(999, v) for v in item.draft.target.compute_part_box(p))
            for p in KINDS[kind].parts
        ]
        purpose = re.search(r"used to (\w+)\.", item.sample.chain)[1]
        able = [
            t for t in item.draft.scenes[1].things
            if any(p.purpose == purpose for p in KINDS[t.kind].parts.values())
        ]  # fmt: skip
        assert able == [item.draft.target]


def test_video_motion_is_unique():
    ways = {"to the left": ("x", -1), "to the right": ("x", 1)}
    ways |= {"up": ("y", -1), "down": ("y", 1)}
    checked = 0
    for item in made("video", "test"):
        text = item.sample.question.removesuffix(".")
        way = next((w for w in ways if text.endswith(w)), None)
        if way is None:
            continue
        checked += 1
        axis, sign = ways[way]
        first, last = item.draft.scenes[0], item.draft.scenes[-1]
        going = [
            a.name for a, b in zip(first.things, last.things, strict=True)
            if sign * (getattr(b, axis) - getattr(a, axis)) > 0.15
        ]  # fmt: skip
        assert going == [item.draft.target.name]
    assert checked


def test_wordings():
    assert set(QUESTIONS) | {"reasoning"} == set(items.TASKS)
    assert all(len(texts) >= 3 for texts in (QUESTIONS | REASONING).values())
    levels = {item.level for item in made("diff", "train")}
    assert levels == {"easy", "medium", "hard"}
    assert {need.group for need in NEEDS} == set(REASONING)
    substitutes = {name for kind in KINDS.values() for name in kind.substitutes}
    assert substitutes < set(KINDS)


SIZES = {
    "stage1": 10, "stage2": 7, "single": 2, "test_per_task": 1, "zero_shot": 2,
    "single_test": 2,
}  # fmt: skip


def test_drawn_by_several_processes_is_the_same(tmp_path, monkeypatch):
    alone = export.build(tmp_path / "alone", SIZES, seed=4)
    monkeypatch.setattr(export, "MIN_PARALLEL", 1)
    monkeypatch.setattr(export.os, "cpu_count", lambda: 2)
    together = export.build(tmp_path / "together", SIZES, seed=4)
    for key, path in alone.items():
        assert path.read_bytes() == together[key].read_bytes()
    for picture in (tmp_path / "alone" / "images").iterdir():
        other = tmp_path / "together" / "images" / picture.name
        assert picture.read_bytes() == other.read_bytes()


def test_test_files_can_be_of_the_validation_split(tmp_path):
    made_files = export.build(tmp_path, SIZES, seed=3, test_split="val")
    for key, path in made_files.items():
        read = files.read(path, image_root=tmp_path)
        split = "train" if key.startswith("stage") else "val"
        assert all(f"/{split}_" in name for s in read for name in s.images)
    bench = files.read(made_files["mig_bench"], image_root=tmp_path)
    assert [s.task for s in bench] == list(items.TASKS)


def test_export_round_trip_and_same_bytes(tmp_path):
    one = export.build(tmp_path / "one", SIZES, seed=3)
    two = export.build(tmp_path / "two", SIZES, seed=3)
    counts = {"stage1": 10, "stage2": 7, "mig_bench": 10, "single": 2, "lisa": 2}
    counts["video"] = 2
    named = {}
    for key, path in one.items():
        read = files.read(path, image_root=path.parent)  # format detected
        assert len(read) == counts[key]
        named[key] = {p for s in read for p in s.images}
        for sample in read:
            _, task, split, _, index = sample.id.split("-")
            item = items.make(task, 3, split, int(index))
            folder = f"{path.parent}/"
            relative = tuple(p.removeprefix(folder) for p in sample.images)
            assert relative == item.sample.images
            kept = ("question", "answer", "chain", "cot", "target_image")
            for field in kept:
                assert getattr(sample, field) == getattr(item.sample, field), field
        assert path.read_bytes() == two[key].read_bytes()
    train = named["stage1"] | named["stage2"]
    assert train.isdisjoint(set.union(*(named[k] for k in counts if "stage" not in k)))
    assert named["stage1"].isdisjoint(named["stage2"])
    images = sorted((tmp_path / "one" / "images").iterdir())
    assert {str(f) for f in images} == set.union(*named.values())
    assert all(
        f.read_bytes() == (tmp_path / "two" / "images" / f.name).read_bytes()
        for f in images
    )
    stage2 = files.read(one["stage2"])
    assert [s.task == "single" for s in stage2].count(True) == 2
    assert all(s.cot == (s.task != "single") for s in stage2)
    assert formats.SINGLE_IMAGE_PATH not in stage2[0].images[0]


def test_the_target_image_is_recorded():
    for task in ALL_TASKS:
        for item in made(task, "train") + made(task, "test"):
            assert item.sample.target_image == item.draft.target_image
    # Both images of `diff` are asked for: the question alone does not tell which.
    assert {i.sample.target_image for i in made("diff", "train")} == {1, 2}


def draw_largest(sampler):
    """A new task: one picture, and the question asks for its only large thing."""
    labels = sampler.sample_labels()
    while True:
        scene = sampler.sample_scene(labels, large=labels[:1])
        if [t.label for t in scene.things if t.is_large] == labels[:1]:
            break
    question = sampler.choose(("Find the largest thing.", "What is the largest?"))
    steps = "All things in image 1 but one are small."
    return Draft([scene], question, steps, scene.find(labels[0]))


def test_a_new_task_needs_one_entry_and_changes_no_other(tmp_path, monkeypatch):
    before = {task: items.make(task, 3, "test", 0) for task in ALL_TASKS}
    free = max(task.stream for task in (items.TASKS | items.OTHER_TASKS).values()) + 1
    monkeypatch.setitem(items.TASKS, "largest", items.Task(draw_largest, free))
    made_files = export.build(tmp_path, SIZES | {"stage1": 11}, seed=3)
    for key in ("stage1", "mig_bench"):
        read = files.read(made_files[key], image_root=tmp_path)
        (sample,) = (s for s in read if s.task == "largest")
        assert "largest" in sample.question and sample.target_image == 1
    item = items.make("largest", 3, "train", 0)
    assert f"So the target is the {item.draft.target.name} in image 1" in (
        item.sample.chain
    )
    for task, item in before.items():
        again = items.make(task, 3, "test", 0)
        assert again.sample == item.sample and again.images == item.images


def test_every_task_has_random_numbers_of_its_own():
    streams = [task.stream for task in (items.TASKS | items.OTHER_TASKS).values()]
    assert len(set(streams)) == len(streams)
    assert all(0 <= stream < 16 for stream in streams)


def test_clear_errors(tmp_path):
    with pytest.raises(ValueError, match="task 'dif' is unknown"):
        items.make("dif", 0, "train", 0)
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        items.make("diff", 0, "dev", 0)
    with pytest.raises(ValueError, match="stage3"):
        export.build(tmp_path, {"stage3": 1})
    with pytest.raises(ValueError, match="more than the 1 rows of stage2"):
        export.build(tmp_path, {**SIZES, "stage2": 1})
