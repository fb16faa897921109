"""Which image holds the target; what importing the data layer costs."""

import subprocess
import sys
from dataclasses import replace

import pytest

from univg_nb.data import files
from univg_nb.data.sample import GroundingSample, find_target_image, image_numbers
from univg_nb.figures import drawing
from univg_nb.minimig.items import TASKS, make


def sample(task, count, question, chain=None):
    images = tuple(f"{i}.png" for i in range(count))
    return GroundingSample("a", task, images, question, (1, 2, 3, 4), chain=chain)


def test_image_numbers():
    assert image_numbers("image 2, Image-3, the 4th image, the first image") == [
        *(2, 3, 4, 1)
    ]
    assert image_numbers("imagine 2, image 1234, picture 5") == []


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (sample("single", 1, "Find the cup."), 1),
        (sample("object_tracking", 6, "In image 1 it is here; the 4th image?"), 4),
        (sample("region", 4, "Locate the 2th region picture."), 1),
        (sample("refer_grounding", 2, "Where is the object of image-1?"), 2),
        (sample("", 3, "Find it in the third image."), 3),
        (sample("", 3, "Is it in image 1 or in image 2?"), None),
        (sample("diff", 2, "What differs?"), None),
        (sample("diff", 2, "What differs?", "It is only in image 1."), 1),
        (sample("group_grounding", 3, "A girl.", "Image 1 has none, image 2 has."), 2),
        (sample("multi_view", 2, "Find it in image 9."), None),
        (sample("multi_view", 2, "Find it in image 0."), None),
    ],
)
def test_the_target_image_of_a_file_that_does_not_say(one, expected):
    assert find_target_image(one) == expected
    known = replace(one, target_image=len(one.images))
    assert find_target_image(known) == len(one.images)


@pytest.mark.parametrize("task", TASKS)
def test_boxes_are_drawn_on_the_image_that_holds_the_target(tmp_path, task):
    """With and without chains, as drawn from a file of each kind."""
    for index in range(6):
        item = make(task, 3, "train", index)
        number = item.draft.target_image
        assert item.draft.target in item.draft.scenes[number - 1].things
        for path, image in zip(item.sample.images, item.images, strict=True):
            (tmp_path / path).parent.mkdir(exist_ok=True)
            image.save(tmp_path / path)
        for name in ("stage1_cotsft", "stage2_rl", "mig_bench"):
            path = tmp_path / f"{name}.json"
            files.write([item.sample], path, name)
            (read,) = files.read(path, name, tmp_path)
            figure = drawing.show_sample(read)
            titles = [axes.get_title() for axes in figure.axes]
            marked = [title for title in titles if "(target)" in title]
            assert marked == [f"image {number} (target)"]
            assert find_target_image(replace(read, chain=None)) == number


LIGHT = """
import gc, logging, sys, warnings
before = gc.get_threshold(), list(warnings.filters), logging.root.handlers[:]
import univg_nb.data.boxes
after = gc.get_threshold(), list(warnings.filters), logging.root.handlers[:]
assert before == after, (before, after)
loggers = [logging.root, *logging.root.manager.loggerDict.values()]
assert not any(getattr(logger, "filters", []) for logger in loggers), loggers
heavy = {"torch", "transformers", "pandas", "PIL", "numpy", "datasets"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""


def test_importing_boxes_is_light_and_changes_nothing():
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


HELP = """
import sys
from univg_nb.__main__ import main
assert main(["audit", sys.argv[1]]) == 0
heavy = {"torch", "transformers", "pandas", "datasets"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""


def test_the_audit_needs_neither_torch_nor_transformers(tmp_path):
    path = tmp_path / "f.json"
    files.write([sample("diff", 2, "What differs?")], path, "stage2_rl")
    command = [sys.executable, "-c", HELP, str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
