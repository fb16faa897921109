"""`GroundingSample`: one question with one target box, from whatever file."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from univg_nb.data.boxes import GRID, Box

# DOC of image_names:
# """Which image a text speaks of, and which one a question asks about."""

IMAGE_MARKER = "<image>"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_INTEGERS = frozenset((int,))


@dataclass(frozen=True, init=False)
class GroundingSample:
    """One question with one target box.

    Attributes:
        id: unique within its file.
        task: task name as in the file ("diff", "region", …; "" if it gives none).
        images: paths, in the order the question counts them; at least one.
        question: the text alone: no ``<image>`` marker, no think/answer request.
        answer: target box, integers 0-1000 relative to the target image. Benchmarks
            hold a few inverted ones; training files never do.
        cot: False in single-image mode, where no chain is asked for (PF sec. 2.2).
        chain: the text inside ``<think>``, without tags; None if there is none.
        boxes: all instances where a benchmark marks several, else ().
        source: "file#row", for messages; not part of equality.
    """

    id: str
    task: str
    images: tuple[str, ...]
    question: str
    answer: Box
    cot: bool = True
    chain: str | None = None
    boxes: tuple[Box, ...] = ()
    source: str = field(default="", compare=False)

    def __init__(
        self,
        id: str,
        task: str,
        images: tuple[str, ...],
        question: str,
        answer: Box,
        cot: bool = True,
        chain: str | None = None,
        boxes: tuple[Box, ...] = (),
        source: str = "",
    ) -> None:
        """Check and set the fields; the generated method takes four times as long to
        set them, a tenth of reading a long file.

        Raises ValueError naming id, source and what is wrong.
        """
        if type(images) is not tuple or not images or "" in images:
            problem = f"images must be a tuple of paths, got {images!r}"
        elif IMAGE_MARKER in question or not question or question[0] == "\n":
            problem = (
                f"question {question[:60]!r} must be text without {IMAGE_MARKER} "
                "and not begin with a newline"
            )
        elif chain is not None and any(tag in chain for tag in TAGS):
            problem = "chain must be the text inside <think>, without tags"
        elif not _on_grid(answer):
            problem = f"box {answer!r} must be four integers 0-{GRID}"
        elif boxes and (bad := [b for b in boxes if not _on_grid(b)]):
            problem = f"box {bad[0]!r} must be four integers 0-{GRID}"
        else:
            fields = self.__dict__  # frozen: not by assignment
            fields["id"], fields["task"], fields["images"] = id, task, images
            fields["question"], fields["answer"], fields["cot"] = question, answer, cot
            fields["chain"], fields["boxes"], fields["source"] = chain, boxes, source
            return
        raise ValueError(f"sample {id} {source}: {problem}")


def _on_grid(box: Box) -> bool:
    if len(box) != 4 or not _INTEGERS.issuperset(map(type, box)):
        return False
    x1, y1, x2, y2 = box
    return 0 <= x1 <= GRID and 0 <= y1 <= GRID and 0 <= x2 <= GRID and 0 <= y2 <= GRID


ORDINALS = "first second third fourth fifth sixth seventh eighth".split()
_IMAGE_NUMBER = re.compile(
    r"image[ -](\d{1,3}+)(?!\d)|(?<!\d)(\d{1,3}+)(?:st|nd|rd|th) image"
    rf"|({'|'.join(ORDINALS)}) image",
    re.IGNORECASE,
)
# Benchmark tasks whose questions always ask about the same image: the source of the
# crops, and the second of a pair.
FIXED_IMAGE = {
    "region": 1,
    "view_diff": 2,
    "refer_grounding": 2,
    "correspondence": 2,
    "reasoning": 2,
}
# Those whose questions name it last, behind the one they start from.
_LAST_NAMED = ("common_object", "object_tracking", "multi_view")


def image_numbers(text: str) -> list[int]:
    """The images a text names ("image 2", "2nd image", "second image"), in order."""
    return [
        ORDINALS.index(word.lower()) + 1 if word else int(plain or ordinal)
        for plain, ordinal, word in _IMAGE_NUMBER.findall(text)
    ]


def asked_image(sample: GroundingSample) -> int | None:
    """The image (from 1) the box must be in, by question and task; None if left open.

    The formats do not record it. Questions of unknown tasks count if they name one
    image and no other.
    """
    if len(sample.images) == 1:
        return 1
    if sample.task in FIXED_IMAGE:
        return FIXED_IMAGE[sample.task]
    named = image_numbers(sample.question)
    clear = sample.task in _LAST_NAMED or len(set(named)) == 1
    return named[-1] if named and clear else None
