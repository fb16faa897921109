"""Real photographs made into questions whose true box is known.

scikit-image ships a few photographs that are free to use: those of `PHOTOGRAPHS` are in
the public domain or under CC0. A patch is pasted into one, a part is cut out of it, or
a window is moved over it; each time the box follows from what was done. The extra
`photos` of this package installs scikit-image.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from univg_nb.data.boxes import GRID, Box, format_box
from univg_nb.data.sample import GroundingSample

FRAMES = 4  # of a tracking item
_WINDOW = 0.75  # width of the moved window, as a share of the picture


class Photograph(NamedTuple):
    """A photograph of scikit-image, and a thing in it."""

    name: str  # function of `skimage.data`
    thing: str  # what is at `box`
    box: tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels
    source: str  # who made the picture, and its license


PHOTOGRAPHS = (
    Photograph("chelsea", "eye", (133, 85, 207, 150), "Stefan van der Walt, CC0"),
    Photograph("coffee", "cup", (172, 15, 425, 325), "Rachel Michetti, CC0"),
    Photograph("astronaut", "head", (152, 14, 303, 203), "NASA, public domain"),
    Photograph("rocket", "rocket", (305, 127, 338, 406), "SpaceX, public domain"),
)


def build_samples(folder: str | Path) -> list[GroundingSample]:
    """Write pictures as PNG into a folder; return three questions on each photograph.

    Tasks and wordings are MIG-Bench's and MiniMIG's: `diff`, a patch of another
    photograph is pasted into the second image; `region`, the second image is the thing
    cut out of the first; `object_tracking`, a window moves to the right, and the thing
    of the first frame is asked for in the last. Raises ValueError if scikit-image is
    not installed.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [_load(one.name) for one in PHOTOGRAPHS]
    samples = []
    for index, photograph in enumerate(PHOTOGRAPHS):
        following = (index + 1) % len(PHOTOGRAPHS)
        patch = pictures[following].crop(PHOTOGRAPHS[following].box)
        for task, question, images, box, target in _make_items(
            pictures[index], photograph.box, patch
        ):
            name = f"{photograph.name}_{task}"
            paths = [folder / f"{name}_{k}.png" for k in range(1, len(images) + 1)]
            for path, image in zip(paths, images, strict=True):
                image.save(path)
            samples.append(
                GroundingSample(
                    id=name,
                    task=task,
                    images=tuple(map(str, paths)),
                    question=question,
                    answer=_put_on_grid(box, images[target - 1]),
                    target_image=target,
                )
            )
    return samples


def _load(name: str) -> Image.Image:
    try:
        from skimage import data
    except ImportError as error:
        raise ValueError(
            "the photographs come with scikit-image, which is not installed: run "
            "pip install -e '.[photos]'"
        ) from error
    return Image.fromarray(np.asarray(getattr(data, name)())).convert("RGB")


Item = tuple[str, str, list[Image.Image], tuple[int, int, int, int], int]


def _make_items(
    picture: Image.Image, thing: tuple[int, int, int, int], patch: Image.Image
) -> Iterator[Item]:
    """Yield task, question, images, true box in pixels and number of its image."""
    width, height = picture.size
    edited, size = picture.copy(), (width // 4, height // 3)
    corner = (round(0.68 * width), round(0.55 * height))
    edited.paste(patch.resize(size), corner)
    box = (*corner, corner[0] + size[0], corner[1] + size[1])
    question = "Find the one thing that changed between image 1 and image 2."
    yield "diff", question, [picture, edited], box, 2

    question = "Where in image 1 is the thing that image 2 shows?"
    yield "region", question, [picture, picture.crop(thing)], thing, 1

    window = round(_WINDOW * width)
    starts = [round(k * (width - window) / (FRAMES - 1)) for k in range(FRAMES)]
    frames = [picture.crop((x, 0, x + window, height)) for x in starts]
    first = format_box(_put_on_grid(thing, frames[0]))
    question = f"The thing at {first} in image 1 moves. Where is it in image {FRAMES}?"
    x1, y1, x2, y2 = thing
    box = (x1 - starts[-1], y1, x2 - starts[-1], y2)
    yield "object_tracking", question, frames, box, FRAMES


def _put_on_grid(box: tuple[int, int, int, int], image: Image.Image) -> Box:
    """Return a box in pixels of an image in thousandths."""
    width, height = image.size
    sides = (width, height, width, height)
    x1, y1, x2, y2 = (
        min(GRID, round(GRID * v / side)) for v, side in zip(box, sides, strict=True)
    )
    return x1, y1, x2, y2
