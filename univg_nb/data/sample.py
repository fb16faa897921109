"""`GroundingSample`: one question with one target box, from whatever file.

Also here: which image a text names, and which image holds a sample's target.
"""

import re
from dataclasses import dataclass, field

from univg_nb.data.boxes import GRID, Box

IMAGE_MARKER = "<image>"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
# Tokens that no text may hold: an image or the end of a turn would begin there. Those
# around boxes and names of objects are part of the questions of MGrounding-630k.
_RESERVED = re.compile(r"<\|(?!box_|object_ref_|quad_)\w+\|>")
# Half of a surrogate pair, which no file can hold; `files` reads it as U+FFFF.
_NO_TEXT = re.compile(r"[\ud800-\udfff\uffff]")
_GRID_VALUES = frozenset(range(GRID + 1))


@dataclass(frozen=True)
class GroundingSample:
    """One question with one target box.

    The box is relative to the image that holds the target. Benchmarks hold a few
    inverted boxes; training files never do. In single-image mode no chain is asked for
    (docs/paper_facts.md#single-image).
    """

    id: str  # unique within its file
    task: str  # as in the file ("diff", "region", ...); "" if it gives none
    images: tuple[str, ...]  # paths, in the order the question counts them; 1 or more
    question: str  # the text alone: no `<image>` marker, no think/answer request
    answer: Box  # integers 0-1000
    cot: bool = True  # False in single-image mode
    chain: str | None = None  # the text inside `<think>`, without tags
    boxes: tuple[Box, ...] = ()  # where the file marks several: all, the answer first
    target_image: int | None = None  # counted from 1; None: see `find_target_image`
    source: str = field(default="", compare=False)  # "file#row", for messages

    def __post_init__(self) -> None:
        """Check the fields; raise ValueError with id, source and what is wrong."""
        images, question, target = self.images, self.question, self.target_image
        if type(images) is not tuple or not images or "" in images:
            problem = f"images must be a tuple of paths, got {images!r}"
        elif IMAGE_MARKER in question or not question or question[0] == "\n":
            problem = (
                f"question {question[:60]!r} must be text without {IMAGE_MARKER} "
                "and not begin with a newline"
            )
        elif self.chain is not None and any(tag in self.chain for tag in TAGS):
            problem = "chain must be the text inside <think>, without tags"
        elif found := _find_unusable(
            " ".join((question, self.chain or "", self.id, self.task, *images))
        ):
            problem = f"remove {found} from question, chain, id, task or image path"
        elif not _is_on_grid(self.answer) or not all(map(_is_on_grid, self.boxes)):
            boxes = [self.answer, *self.boxes]
            problem = f"boxes {boxes} must each be four integers 0-{GRID}"
        elif self.boxes and (len(self.boxes) == 1 or self.boxes[0] != self.answer):
            problem = f"boxes {self.boxes} must be () or several, the answer first"
        elif target is not None and not (
            type(target) is int and 1 <= target <= len(images)
        ):
            problem = f"target_image {target!r} must be None or 1 to {len(images)}"
        else:
            return
        raise ValueError(f"sample {self.id} {self.source}: {problem}")


def _find_unusable(text: str) -> str:
    """Return what no text may hold, or "" if there is none."""
    if "<|" in text and (token := _RESERVED.search(text)):
        return f"{token[0]}, which is a token of the model's own,"
    if not text.isascii() and _NO_TEXT.search(text):
        return "the half of a surrogate pair"
    return ""


def _is_on_grid(box: Box) -> bool:
    if len(box) != 4:
        return False
    x1, y1, x2, y2 = box
    integers = type(x1) is type(y1) is type(x2) is type(y2) is int
    return integers and _GRID_VALUES.issuperset(box)


_ORDINALS = "first|second|third|fourth|fifth|sixth|seventh|eighth"
_IMAGE_NUMBER = re.compile(
    r"image[ -](\d{1,3}+)(?!\d)|(?<!\d)(\d{1,3}+)(?:st|nd|rd|th) image"
    rf"|({_ORDINALS}) image",
    re.IGNORECASE,
)
# Benchmark tasks whose questions always ask about the same image: the source of the
# crops, and the second of a pair.
_FIXED_IMAGE = {
    "region": 1,
    "view_diff": 2,
    "refer_grounding": 2,
    "correspondence": 2,
    "reasoning": 2,
}
# Tasks whose questions name the target's image last, after the one they start from.
_LAST_NAMED = ("common_object", "object_tracking", "multi_view")


def find_image_names(text: str) -> list[tuple[int, int]]:
    """Return (position, number) where a text names an image; see `image_numbers`."""
    order = _ORDINALS.split("|")
    return [
        (found.start(), order.index(word.lower()) + 1 if word else int(plain or nth))
        for found in _IMAGE_NUMBER.finditer(text)
        for plain, nth, word in [found.groups()]
    ]


def image_numbers(text: str) -> list[int]:
    """Return the images that a text names ("image 2", "2nd image", "second image")."""
    return [number for _, number in find_image_names(text)]


def find_target_image(sample: GroundingSample) -> int | None:
    """Return the number of the image that holds the target, or None if nothing tells.

    This is `sample.target_image` where the file says it. The released files do not:
    then the image follows from the task or from the question, if the question names one
    image only, or else is the last one that the sample's chain names. It counts from 1.
    """
    if sample.target_image is not None or len(sample.images) == 1:
        return sample.target_image or 1
    named = image_numbers(sample.question)
    if sample.task in _FIXED_IMAGE:
        named = [_FIXED_IMAGE[sample.task]]
    elif sample.task not in _LAST_NAMED and len(set(named)) != 1:
        named = image_numbers(sample.chain or "")
    return named[-1] if named and 1 <= named[-1] <= len(sample.images) else None
