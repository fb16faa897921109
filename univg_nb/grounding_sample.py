"""`GroundingSample`: one question with one target box, from whatever file."""

from __future__ import annotations

from dataclasses import dataclass, field

from univg_nb.boxes import GRID, Box

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
