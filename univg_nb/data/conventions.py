"""How a model writes boxes: the border between its texts and the 0-1000 grid.

Inside this project a box is four integers 0-1000 of its picture, written as
`(x1,y1),(x2,y2)`. Qwen2-VL and Qwen3-VL were taught the same unit. Qwen2.5-VL writes
pixels of the picture as its processor resizes it, so what a number means depends on
the picture. Qwen2.5-VL and Qwen3-VL usually reply in JSON: `{"bbox_2d": [...]}`.
Texts for a model go through `ask` and `write`, texts of a model through `read`.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from univg_nb.data.boxes import GRID, format_box, scan_boxes
from univg_nb.data.images import fit_image
from univg_nb.data.sample import GroundingSample, find_image_names, find_target_image
from univg_nb.families import JSON_REPLIES, SIDE, box_convention, get_side

# One object of a JSON reply, a list of them, and the fence around it. Possessive: the
# time of a search is linear in the length of the text.
_OBJECT = r'\{[^{}\[\]]*?"bbox_2d"\s*+:\s*+(\[[^\[\]{}]*+\])[^{}]*+\}'
_JSON = re.compile(_OBJECT)
_REPLY = re.compile(
    rf"(?:```(?:json)?\s*+)?+(?:\[\s*+)?+{_OBJECT}(?:\s*+,\s*+{_OBJECT})*+"
    r"(?:\s*+\])?+(?:\s*+```)?+"
)


_NUMBER = re.compile(r"[0-9.+-]++")  # in a box that `scan_boxes` found
_Change = Callable[[Sequence[float], Sequence[int]], list[int]]


@dataclass(frozen=True)
class Pictures:
    """The pictures of a sample as its model sees them."""

    # (width, height) of each after resizing; empty where nothing needs them.
    sizes: Sequence[Sequence[int]] = ()
    target: int | None = None  # that holds the target, from 1; None if nothing tells


@dataclass(frozen=True)
class BoxConvention:
    """How a model writes boxes; `get_convention` chooses it."""

    pixels: bool = False  # numbers are pixels of the resized picture, not thousandths
    json: bool = False  # replies may be JSON with `bbox_2d`, in a fence or not
    side: int = SIDE  # pixels of a token's side (patch size x merged patches)
    min_pixels: int = 3136  # of a resized picture, as its processor has it
    max_pixels: int = 12_845_056

    def locate(self, sample: GroundingSample) -> Pictures:
        """Return what `write` and `read` need to know of the sample's pictures.

        Raises ValueError for an image that cannot be read.
        """
        if not self.pixels:
            return Pictures()
        limits = self.min_pixels, self.max_pixels
        sizes = [fit_image(p, self.side, limits, sample.id) for p in sample.images]
        return Pictures(sizes, find_target_image(sample))

    def describe(self, sample: GroundingSample) -> dict[str, Any]:
        """Return `locate` as the column "pictures" of a data set; {} if not needed."""
        return {"pictures": asdict(self.locate(sample))} if self.pixels else {}

    def ask(self, sample: GroundingSample) -> GroundingSample:
        """Return the sample with the boxes in its question as the model writes them."""
        if not self.pixels or not scan_boxes(sample.question):
            return sample
        return replace(
            sample, question=self.write(sample.question, self.locate(sample))
        )

    def write(self, text: str, pictures: Pictures) -> str:
        """Return a text of this project as the model would write it.

        A pixel is the nearest one, so that an edge moves by half a pixel at most; a box
        thinner than a pixel gets one pixel.

        Raises:
            ValueError: nothing tells which picture, of several sizes, a box is in.
        """
        if not self.pixels:
            return text

        def to_pixels(box: Sequence[float], size: Sequence[int]) -> list[int]:
            exact = [v * size[k % 2] / GRID for k, v in enumerate(box)]
            edges = [round(v) for v in exact]
            for low, high in ((0, 2), (1, 3)):
                if edges[low] == edges[high] and box[low] < box[high]:
                    edges[low] = int(exact[low])
                    edges[high] = edges[low] + 1
            return edges

        return _convert(text, pictures, to_pixels, reading=False)

    def read(self, text: str, pictures: Pictures) -> str:
        """Return a text of the model as this project writes it.

        An edge beyond the picture stays beyond 1000. Where nothing tells in which of
        several pictures a box is, the last one that the text names counts, else the
        last.
        """
        if self.json:
            text = _REPLY.sub(_rewrite_json, text)
        if not self.pixels:
            return text

        def to_grid(box: Sequence[float], size: Sequence[int]) -> list[int]:
            return [round(GRID * v / size[k % 2]) for k, v in enumerate(box)]

        return _convert(text, pictures, to_grid, reading=True)


PLAIN = BoxConvention()  # that of the paper, and of this project


def get_convention(config: Any, processor: Any) -> BoxConvention:
    """Return how a model writes boxes, for pictures as its processor resizes them.

    `config` is that of the model that was loaded by `models`, which notes there what
    `model.boxes` and the adapter say.
    """
    pixels = box_convention(config) == "pixels"
    json = config.model_type in JSON_REPLIES
    if not pixels and not json:
        return PLAIN
    size = processor.image_processor.size
    limits = size["shortest_edge"], size["longest_edge"]
    return BoxConvention(pixels, json, get_side(processor), *limits)


def _rewrite_json(match: re.Match[str]) -> str:
    """Write a JSON reply's boxes, most often one, in the paper's notation."""
    found = [box for part in _JSON.findall(match[0]) for _, _, box in scan_boxes(part)]
    usual = all(max(box) > 1 for box in found)  # else shares of the picture
    boxes = [format_box([round(v) for v in box]) for box in found if usual]
    return ", ".join(boxes) or match[0]


def _convert(text: str, pictures: Pictures, change: _Change, reading: bool) -> str:
    """Put other numbers into every box of a text, in the notation it has.

    `change` is a function of a box and of its picture's size.
    """
    made, done, names = [], 0, find_image_names(text)
    for start, end, box in scan_boxes(text):
        if max(map(abs, box)) >= 1e9 or (max(box) <= 1 and "." in text[start:end]):
            continue  # no coordinate, or a share of the picture in any unit
        size = _choose_size(text, start, pictures, names, reading)
        notation = _NUMBER.sub("{}", text[start:end])
        made += [text[done:start], notation.format(*change(box, size))]
        done = end
    return "".join([*made, text[done:]])


def _choose_size(
    text: str,
    start: int,
    pictures: Pictures,
    names: Sequence[tuple[int, int]],
    reading: bool,
) -> Sequence[int]:
    """Return the size of the picture that the box at `start` of a text is in.

    An answer is in the target's picture. Elsewhere it is the one that the text names
    before the box, else the one that it names first after it.
    """
    sizes, target = pictures.sizes, pictures.target
    if all(list(size) == list(sizes[0]) for size in sizes):
        return sizes[0]
    before = [n for at, n in names if at < start and 1 <= n <= len(sizes)]
    thinking = text.rfind("<think>", 0, start) > text.rfind("</think>", 0, start)
    if thinking or not (reading or "<answer>" in text[:start]):
        after = [n for at, n in names if at > start and 1 <= n <= len(sizes)]
        target = before[-1] if before else (*after, target)[0]
    elif target is None and before:
        target = before[-1]
    if target is None and not reading:
        raise ValueError(
            f"nothing tells which image the box in {text[:80]!r} is in, and they have "
            "several sizes, so that it has no value in pixels; give target_image in "
            "the file, or set model.boxes=thousandths"
        )
    return sizes[(target or 0) - 1]
