"""The boxes of the edited photographs are where the pixels say."""

from collections import defaultdict

import numpy as np
import pytest
from PIL import Image

from univg_nb.data import photographs
from univg_nb.data.boxes import to_pixels

pytest.importorskip("skimage", reason="needs the extra 'photos'")


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    found = defaultdict(list)
    for sample in photographs.build_samples(tmp_path_factory.mktemp("photographs")):
        found[sample.task].append(sample)
    return found


def pixels(sample, number):
    return np.asarray(Image.open(sample.images[number - 1])).astype(int)


def cut(picture, box):
    height, width = picture.shape[:2]
    x1, y1, x2, y2 = (round(v) for v in to_pixels(box, width, height))
    return picture[y1:y2, x1:x2]


def test_three_questions_about_each_photograph(samples):
    count = len(photographs.PHOTOGRAPHS)
    assert {task: len(found) for task, found in samples.items()} == {
        "diff": count,
        "region": count,
        "object_tracking": count,
    }


def test_nothing_but_the_box_of_a_diff_item_was_changed(samples):
    for sample in samples["diff"]:
        assert sample.target_image == 2
        changed = np.abs(pixels(sample, 1) - pixels(sample, 2)).sum(axis=2) > 0
        inside = cut(changed, sample.answer)
        assert inside.mean() > 0.9
        # rounding to thousandths may leave one row or column outside
        assert changed.sum() - inside.sum() <= 2 * sum(inside.shape)


def test_the_box_of_a_region_item_holds_what_was_cut_out(samples):
    for sample in samples["region"]:
        assert sample.target_image == 1
        inside, part = cut(pixels(sample, 1), sample.answer), pixels(sample, 2)
        assert inside.shape == part.shape and np.abs(inside - part).mean() < 25


def test_the_thing_of_the_first_frame_is_in_the_box_of_the_last(samples):
    for sample in samples["object_tracking"]:
        assert sample.target_image == len(sample.images) == photographs.FRAMES
        name = sample.id.partition("_")[0]
        (one,) = (p for p in photographs.PHOTOGRAPHS if p.name == name)
        x1, y1, x2, y2 = one.box
        found = cut(pixels(sample, photographs.FRAMES), sample.answer)
        true = pixels(sample, 1)[y1:y2, x1:x2]
        rows, columns = np.minimum(found.shape[:2], true.shape[:2])
        assert abs(len(found) - len(true)) <= 1
        assert np.abs(found[:rows, :columns] - true[:rows, :columns]).mean() < 25
