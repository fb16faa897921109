"""Boxes between a model and the 0-1000 grid: units, notations, which picture."""

import logging
import math
import random
import time
from dataclasses import replace

import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from univg_nb import io
from univg_nb.__main__ import main as run_command
from univg_nb.data import files
from univg_nb.data.boxes import format_box, iou, parse_box
from univg_nb.data.conventions import PLAIN, BoxConvention, Pictures
from univg_nb.data.images import fit_size
from univg_nb.data.sample import GroundingSample
from univg_nb.evaluate.predictions import Reply
from univg_nb.evaluate.scoring import score_items
from univg_nb.train.rewards import format_reward, iou_reward

PIXELS = BoxConvention(pixels=True, json=True, max_pixels=401_408)
JSON = BoxConvention(json=True, side=32)
# (width, height), from 200 to 1 to 1 to 200
SHAPES = [
    *((5600, 28), (2000, 100), (1280, 720), (640, 640)),
    *((480, 640), (120, 900), (31, 3000), (28, 5600)),
]


def random_size(rng: random.Random) -> tuple[int, int]:
    """A picture's size, up to 200 times as long as wide."""
    short = rng.randint(1, 900)
    sides = [short, min(9000, int(short * math.exp(rng.uniform(0, math.log(200)))))]
    rng.shuffle(sides)
    return sides[0], sides[1]


def test_a_round_trip_loses_one_thousandth_and_half_a_pixel_at_most():
    rng = random.Random(0)
    for _ in range(4000):
        least = rng.choice([784, 3136, 65_536])
        side, most = rng.choice([16, 28, 32]), least * rng.choice([1, 2, 128, 4000])
        size = fit_size(*random_size(rng), side, least, most)
        pictures = Pictures([size], 1)
        x1, x2 = sorted(rng.sample(range(1001), 2))
        y1, y2 = sorted(rng.sample(range(1001), 2))
        box = (x1, y1, x2, y2)
        text = PIXELS.write(format_box(box), pictures)
        edges = parse_box(text).box or pytest.fail(text)
        assert 0 <= edges[0] < edges[2] <= size[0]
        assert 0 <= edges[1] < edges[3] <= size[1]
        back = parse_box(PIXELS.read(text, pictures)).box or pytest.fail(text)
        for axis in (0, 1):
            pixel = 1000 / size[axis]
            thin = box[axis + 2] - box[axis] < pixel  # it is given a whole one
            most_lost = 1 + pixel * (1 if thin else 0.5)
            for k in (axis, axis + 2):
                assert abs(back[k] - box[k]) <= most_lost + 1e-9, (box, size, text)


def test_a_picture_gets_the_size_that_its_processor_gives_it():
    rng = random.Random(1)
    for _ in range(4000):
        width, height = random_size(rng)
        side = rng.choice([16, 28, 32])
        least, most = rng.choice([(784, 3136), (3136, 401_408), (65_536, 16_777_216)])
        if max(width, height) <= 200 * min(width, height):
            h, w = smart_resize(height, width, side, least, most)
            assert fit_size(width, height, side, least, most) == (w, h)


@pytest.mark.parametrize("size", SHAPES)
def test_a_pixel_reply_scores_as_the_same_in_thousandths(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "a.png")
    images, answer = (str(tmp_path / "a.png"),), (200, 300, 700, 900)
    sample = GroundingSample("a", "refer", images, "Find it.", answer)
    pictures = PIXELS.locate(sample)
    guess = (260, 280, 750, 860)
    (width, height), *_ = pictures.sizes
    x1, y1, x2, y2 = (
        round(v * (width, height)[k % 2] / 1000) for k, v in enumerate(guess)
    )
    inside = f'```json\n[{{"bbox_2d": [{x1}, {y1}, {x2}, {y2}], "label": "it"}}]\n```'
    for written in (inside, f"({x1},{y1}),({x2},{y2})", f"[{x1}, {y1}, {x2}, {y2}]"):
        text = f"<think>It is there.</think><answer>{written}</answer>"
        read = PIXELS.read(text, pictures)
        (item,) = score_items([sample], {0: Reply(read)})
        # half a pixel and half a thousandth at each edge
        slack = 2 * (1 + 500 / min(width, height)) / 400
        assert item.status == "ok" and abs(item.iou - iou(guess, answer)) <= slack
        usual = not written.startswith("[")  # which the paper's rewards do not read
        assert iou_reward([read], [answer], [True]) == [pytest.approx(item.iou * usual)]
        assert format_reward([read], [True]) == [float(usual)]
        (lost,) = score_items([sample], {0: Reply(text)})
        assert abs(lost.iou - item.iou) > 0.1  # what converting is for


@pytest.mark.parametrize("size", SHAPES)
def test_a_file_of_another_program_is_converted_or_not_scored_in_silence(
    tmp_path, caplog, size
):
    """Pixels of the resized picture in a file without settings."""
    Image.new("RGB", size).save(tmp_path / "a.png")
    answer = (200, 300, 700, 900)
    sample = GroundingSample("a", "refer", ("a.png",), "Find it.", answer)
    records = tmp_path / "bench.json"
    files.write([sample], records, "mig_bench")
    (seen,) = PIXELS.locate(replace(sample, images=(str(tmp_path / "a.png"),))).sizes
    exact = [v * seen[k % 2] / 1000 for k, v in enumerate(answer)]
    x1, y1, x2, y2 = map(round, exact)
    command = ["score", "--records", str(records), "--image-root", str(tmp_path)]
    command += ["--out", str(tmp_path / "scores.json"), "--max-pixels", "401408"]
    command += ["--predictions", str(tmp_path / "p.jsonl")]

    def run(text: str, *options: str) -> int:
        io.write_text(tmp_path / "p.jsonl", "")
        io.append_jsonl(tmp_path / "p.jsonl", {"index": 0, "response": text})
        return run_command([*command, *options])

    def read_iou() -> float:
        return io.read_json(tmp_path / "scores.json")["pooled"]["mean_iou"]

    usual = f'```json\n{{"bbox_2d": [{x1}, {y1}, {x2}, {y2}]}}\n```'
    assert run(usual) == 2 and not (tmp_path / "scores.json").exists()
    with caplog.at_level(logging.WARNING, "univg_nb"):
        assert run(f"({x1},{y1}),({x2},{y2})") == 0
    assert "say how boxes are written" in caplog.text
    least = 1 - 4 * (0.5 + 500 / min(seen)) / 500
    for text in (usual, f"({x1},{y1}),({x2},{y2})"):
        caplog.clear()
        assert run(text, "--boxes", "pixels") == 0 and not caplog.text
        assert read_iou() >= least
    assert run("(200,300),(700,900)", "--boxes", "thousandths") == 0
    assert read_iou() == 1.0


JSON_REPLIES = [
    ('{"bbox_2d": [1, 2, 30, 40], "label": "cup"}', "(1,2),(30,40)"),
    ('```json\n[\n\t{"bbox_2d": [1, 2, 30, 40]}\n]\n```', "(1,2),(30,40)"),
    ('```\n{"label": "a", "bbox_2d" : [1,2,30,40]}\n```', "(1,2),(30,40)"),
    (
        '[{"bbox_2d": [1, 2, 3, 4]}, {"bbox_2d": [5, 6, 7, 8]}]',
        "(1,2),(3,4), (5,6),(7,8)",
    ),
    ("(1,2),(30,40)", "(1,2),(30,40)"),
    ('{"bbox_2d": [0.1, 0.2, 0.3, 0.4]}', '{"bbox_2d": [0.1, 0.2, 0.3, 0.4]}'),
    ('{"bbox_2d": "none"}', '{"bbox_2d": "none"}'),
    ("no box", "no box"),
]


@pytest.mark.parametrize(("written", "read"), JSON_REPLIES)
def test_json_is_read_where_the_family_writes_it(written, read):
    assert JSON.read(written, Pictures()) == read
    assert PLAIN.read(written, Pictures()) == written
    wrapped = f"<think>It is here.</think><answer>{written}</answer>"
    well_formed = float(read == "(1,2),(30,40)")
    assert format_reward([JSON.read(wrapped, Pictures())], [True]) == [well_formed]


def test_each_box_belongs_to_the_picture_that_its_text_names():
    two = Pictures([(100, 100), (1000, 500)], target=2)
    question = "Find the thing at (100,100),(500,500) in image 1 in image 2."
    asked = "Find the thing at (10,10),(50,50) in image 1 in image 2."
    assert PIXELS.write(question, two) == asked
    released = "in the first image(<|box_start|>(100,100),(500,500)<|box_end|>)"
    assert "(10,10),(50,50)" in PIXELS.write(f"{released}. See the 2th image", two)
    reply = (
        "<think>Image 2 has (0,0),(400,400), image 1 has (100,200),(300,400)."
        "</think><answer>(200,400),(600,800)</answer>"
    )
    written = (
        "<think>Image 2 has (0,0),(400,200), image 1 has (10,20),(30,40)."
        "</think><answer>(200,200),(600,400)</answer>"
    )
    assert PIXELS.write(reply, two) == written
    assert PIXELS.read(written, two) == reply
    assert PIXELS.read("Image 1? (200,200),(600,400)", two).endswith(
        "(200,400),(600,800)"
    )


def test_a_target_that_nothing_tells_is_refused_in_training_only():
    answer = "<answer>(200,400),(600,800)</answer>"
    unknown = Pictures([(100, 100), (1000, 500)])
    with pytest.raises(ValueError, match=r"which image .* give target_image"):
        PIXELS.write(answer, unknown)
    same = replace(unknown, sizes=[(1000, 500)] * 2)
    assert PIXELS.write(answer, same) == "<answer>(200,200),(600,400)</answer>"
    named = "<think>It is in image 1.</think><answer>(10,20),(30,40)</answer>"
    assert "(100,200),(300,400)" in PIXELS.read(named, unknown)
    assert "(10,40),(30,80)" in PIXELS.read("(10,20),(30,40)", unknown)


def test_what_is_no_coordinate_is_left_alone():
    one = Pictures([(500, 500)], 1)
    for text in ("(0.1,0.2),(0.3,0.4)", f"(1,2),(3,{'9' * 400})", "step (1,2)", ""):
        assert PIXELS.write(text, one) == PIXELS.read(text, one) == text
    assert PIXELS.read("(10,10),(600,20)", one) == "(20,20),(1200,40)"  # out of range


def test_reading_takes_linear_time():
    one = Pictures([(500, 500)], 1)
    for piece in ('{"bbox_2d":[1]', '{"bbox_2d":', "```json\n[", "{", "[ ", "(1,2),"):
        began = time.perf_counter()
        PIXELS.read(piece * (100_000 // len(piece)), one)
        assert time.perf_counter() - began < 1.0, piece
