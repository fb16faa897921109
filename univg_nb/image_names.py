"""Which image a text speaks of, and which one a question asks about."""

from __future__ import annotations

import re

from univg_nb.rows import GroundingSample

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
