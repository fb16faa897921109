"""Open images, the same way everywhere; their sizes, tokens and paths."""

import base64
import io
import math
import os
import struct
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from univg_nb.data.sample import GroundingSample

MIN_SIDE = 28  # one merged patch of Qwen2-VL; smaller images its processor refuses
MIN_PIXELS = 3136  # Qwen2-VL enlarges smaller images to this size
MAX_RATIO = 200  # the processor's limit on long side / short side

# What Pillow raises on damaged data, depending on the decoder.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error)


@contextmanager
def _opened(path: str | os.PathLike[str], sample_id: str) -> Iterator[Image.Image]:
    """Open without decoding; refuse what is missing, damaged, or far too large."""
    name = f"sample {sample_id}: image {path}" if sample_id else f"image {path}"
    if not Path(path).is_file():
        raise ValueError(f"{name} does not exist; check image_root and the download")
    try:
        with warnings.catch_warnings():
            # an error from Pillow's own limit on, not from twice as many pixels
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path)
        with image:
            if max(image.size) <= MAX_RATIO * min(image.size):
                yield image
                return
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name}: {error}; scale it down") from error
    except _DECODE_ERRORS as error:
        problem = f"is not an image Pillow can read, or is damaged ({error})"
        raise ValueError(f"{name} {problem}; fetch it again") from error
    shape = f"{image.width} x {image.height}, longer than {MAX_RATIO} to 1"
    raise ValueError(f"{name} is {shape}, which the processor refuses; crop it")


def _to_rgb(image: Image.Image) -> Image.Image:
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _enlarge(image: Image.Image) -> Image.Image:
    """Bring the short side of an image up to `MIN_SIDE`; decided by this image alone.

    The released code resizes every image after a small one to that one's size
    (docs/paper_facts.md#t5).
    """
    width, height = image.size
    scale = MIN_SIDE / min(width, height)
    if scale <= 1:
        return image
    return image.resize((round(width * scale), round(height * scale)))


def open_image(path: str | os.PathLike[str], sample_id: str = "") -> Image.Image:
    """Open and decode an image: RGB, upright by EXIF, short side at least 28 px.

    Transparent parts become white. The processor's min_pixels/max_pixels do the rest.

    Raises:
        ValueError: the file is missing, no image, truncated, larger than Pillow's limit
            or longer than MAX_RATIO to 1. Names the file and, if given, the sample.
    """
    with _opened(path, sample_id) as image:
        return _enlarge(_to_rgb(ImageOps.exif_transpose(image)))


def image_size(path: str | os.PathLike[str], sample_id: str = "") -> tuple[int, int]:
    """Return (width, height) in pixels, upright, from the header; see `open_image`."""
    with _opened(path, sample_id) as image:
        width, height = image.size
        if width == height:  # looking for the orientation decodes a whole PNG
            return width, height
        orientation = image.getexif().get(0x0112, 1)
    return (height, width) if orientation >= 5 else (width, height)


def encode_data_url(image: Image.Image, format: str = "PNG", **options: int) -> str:
    """Return an image as a data URL; format and options are those of Pillow's save."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f"data:image/{format.lower()};base64,{encoded}"


def load_data_url(path: str, sample_id: str = "", max_pixels: int = 1_003_520) -> str:
    """Open an image; return it as a JPEG data URL of at most `max_pixels` pixels."""
    image = open_image(path, sample_id)
    shrink = (max_pixels / (image.width * image.height)) ** 0.5
    if shrink < 1:
        image.thumbnail((image.width * shrink, image.height * shrink))
    return encode_data_url(image, "JPEG", quality=92)


def count_image_tokens(path: str, processor: Any, sample_id: str = "") -> int:
    """Return the tokens of an image in a prompt of this processor; see `image_size`."""
    width, height = image_size(path, sample_id)
    image_processor = processor.image_processor
    patches = image_processor.get_number_of_image_patches(
        max(height, MIN_SIDE), max(width, MIN_SIDE)
    )
    return patches // image_processor.merge_size**2


def estimate_image_tokens(width: int, height: int, max_pixels: int = 401_408) -> int:
    """Return the tokens of an image of so many pixels in Qwen2-VL.

    One token stands for a block of 28 x 28 pixels after resizing to `max_pixels` at
    most. This is the rule of `smart_resize` in transformers (a test compares them),
    computed here so that the audit takes seconds and needs no transformers.
    """
    sides = (width, height)
    columns, rows = (round(side / MIN_SIDE) for side in sides)
    pixels = columns * rows * MIN_SIDE**2
    if pixels > max_pixels:
        shrink = math.sqrt(width * height / max_pixels)
        columns, rows = (max(1, math.floor(v / shrink / MIN_SIDE)) for v in sides)
    elif pixels < MIN_PIXELS:
        grow = math.sqrt(MIN_PIXELS / (width * height))
        columns, rows = (math.ceil(v * grow / MIN_SIDE) for v in sides)
    return columns * rows


def find_missing_images(
    samples: Sequence[GroundingSample], indices: Iterable[int]
) -> dict[int, str]:
    """Return {index: first path that is no file} of the samples that lack an image."""
    is_file = cache(lambda path: Path(path).is_file())  # items share images
    missing = ((i, [p for p in samples[i].images if not is_file(p)]) for i in indices)
    return {i: paths[0] for i, paths in missing if paths}


_usable: set[tuple[str, int]] = set()  # paths and times of change


def check_images(
    samples: Sequence[GroundingSample], indices: Iterable[int] | None = None
) -> None:
    """Raise ValueError if an image of any sample (of `indices`) cannot be used.

    All are decoded, as training and evaluation will do it, so that none of them ends
    there. What opened once in this process is not opened again until it changes.
    """
    wanted = range(len(samples)) if indices is None else list(indices)
    if missing := find_missing_images(samples, wanted):
        index, path = next(iter(missing.items()))
        raise ValueError(
            f"{len(missing)} of {len(wanted)} samples lack an image, first sample "
            f"{samples[index].id!r} (index {index}): {path} does not exist; set the "
            "image root, or leave these samples out (generate: --allow-missing)"
        )
    for index in wanted:
        for path in samples[index].images:
            version = (path, os.stat(path).st_mtime_ns)
            if version not in _usable:
                open_image(path, samples[index].id)
                _usable.add(version)
