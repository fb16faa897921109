"""The one way an image is opened."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
import os
import struct
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from univg_nb.data.sample import GroundingSample

# DOC of image_paths:
# """Where the images of a records file are, without opening them."""


def image_url(path: str, sample_id: str = "", max_pixels: int = 1_003_520) -> str:
    """The image as a data URL: opened as everywhere, shrunk to max_pixels, JPEG."""
    image = open_image(path, sample_id)
    shrink = (max_pixels / (image.width * image.height)) ** 0.5
    if shrink < 1:
        image.thumbnail((image.width * shrink, image.height * shrink))
    return encode_data_url(image, "JPEG", quality=92)


def encode_data_url(image: Image.Image, format: str = "PNG", **options: int) -> str:
    """Return an image as a data URL.

    Args:
        image: the image.
        format: "PNG" or "JPEG".
        options: of Pillow for the format, such as the quality.
    """
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f"data:image/{format.lower()};base64,{encoded}"


MIN_SIDE = 28  # one merged patch of Qwen2-VL; smaller images its processor refuses
MAX_PIXELS = 89_478_485  # Pillow's own limit, made an error instead of a warning
MAX_RATIO = 200  # the processor's limit on long side / short side

# What Pillow raises on damaged data, depending on the decoder.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error)


def _header(path: str | os.PathLike[str], sample_id: str) -> Image.Image:
    """Open without decoding; refuse what is missing, no image, or far too large."""
    who = f"sample {sample_id}: " if sample_id else ""
    if not os.path.isfile(path):
        raise ValueError(
            f"{who}image {path} does not exist; check image_root and the download"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{who}image {path}: {error}; scale it down") from error
    except _DECODE_ERRORS as error:
        raise ValueError(
            f"{who}{path} is not an image Pillow can read ({error}); fetch it again"
        ) from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        image.close()
        raise ValueError(
            f"{who}image {path} has {width} x {height} pixels, more than {MAX_PIXELS}; "
            "scale it down"
        )
    if max(width, height) > MAX_RATIO * min(width, height):
        image.close()
        raise ValueError(
            f"{who}image {path} is {width} x {height}, longer than {MAX_RATIO} to 1, "
            "which the processor refuses; crop it"
        )
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def enlarged(image: Image.Image, min_side: int = MIN_SIDE) -> Image.Image:
    """The image, its short side brought up to min_side; decided by this image alone.

    The released code resizes *every* image after a small one to that one's size (PF
    sec. 9, T5).
    """
    width, height = image.size
    short = min(width, height)
    if short >= min_side:
        return image
    scale = min_side / short
    size = (max(min_side, round(width * scale)), max(min_side, round(height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC)


def open_image(path: str | os.PathLike[str], sample_id: str = "") -> Image.Image:
    """Open and decode an image: RGB, upright by EXIF, short side at least 28 px.

    Transparent parts become white. The processor's min_pixels/max_pixels do the rest.

    Raises ValueError, naming sample and path, for a missing file, a file that is no
    image or is truncated, more than MAX_PIXELS pixels, or a ratio beyond MAX_RATIO.
    """
    with _header(path, sample_id) as image:
        try:
            upright = ImageOps.exif_transpose(image)
            return enlarged(_to_rgb(upright))
        except _DECODE_ERRORS as error:
            who = f"sample {sample_id}: " if sample_id else ""
            raise ValueError(
                f"{who}image {path} is damaged ({error}); fetch it again"
            ) from error


def image_size(path: str | os.PathLike[str], sample_id: str = "") -> tuple[int, int]:
    """(width, height) in pixels, upright, from the header alone; errors as above."""
    with _header(path, sample_id) as image:
        width, height = image.size
        if width == height:  # looking for the orientation decodes a whole PNG
            return width, height
        orientation = image.getexif().get(0x0112, 1)
    return (height, width) if orientation >= 5 else (width, height)


def image_tokens(
    width: int,
    height: int,
    min_pixels: int = 3136,
    max_pixels: int = 401_408,
    factor: int = 28,
) -> int:
    """Tokens one image takes in Qwen2-VL: one per factor x factor block after resizing.

    Defaults are the released limits (PF sec. 3). The real processor rounds like this;
    the audit needs no processor to count.
    """
    h = max(factor, round(height / factor) * factor)
    w = max(factor, round(width / factor) * factor)
    if h * w > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        h = max(factor, math.floor(height / shrink / factor) * factor)
        w = max(factor, math.floor(width / shrink / factor) * factor)
    elif h * w < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        h = math.ceil(height * grow / factor) * factor
        w = math.ceil(width * grow / factor) * factor
    return (h // factor) * (w // factor)


def count_image_tokens(path: str, processor: Any, sample_id: str = "") -> int:
    """Return the tokens an image takes in a prompt, from the file's header alone.

    Args:
        path: the image file.
        processor: the processor of the model.
        sample_id: the sample that an error message names.
    """
    width, height = image_size(path, sample_id)
    image_processor = processor.image_processor
    patches = image_processor.get_number_of_image_patches(
        max(height, MIN_SIDE), max(width, MIN_SIDE)
    )
    return patches // image_processor.merge_size**2


def missing_images(
    samples: Sequence[GroundingSample], indices: Iterable[int]
) -> dict[int, str]:
    """{index: its first image path that is no file}, where there is one."""
    known: dict[str, bool] = {}
    found: dict[int, str] = {}
    for i in indices:
        for path in samples[i].images:
            if path not in known:
                known[path] = Path(path).is_file()
            if not known[path]:
                found.setdefault(i, path)
    return found


def flatten_image_paths(
    items: Sequence[GroundingSample], indices: Iterable[int], folder: str | Path
) -> list[GroundingSample]:
    """For images that do not exist at their path, take folder/<file name> instead.

    Serves a benchmark of which a few images lie loose in one folder. Only the items at
    `indices` are looked at. Raises ValueError if two different paths would become the
    same file: which one it is cannot be known.
    """
    became: dict[Path, str] = {}
    result = list(items)
    for i in indices:
        paths = []
        for path in items[i].images:
            loose = Path(folder) / Path(path).name
            if not Path(path).is_file() and loose.is_file():
                if became.setdefault(loose, path) != path:
                    raise ValueError(
                        f"--flat-images: {loose} could be {became[loose]} or {path} "
                        f"(item {items[i].id!r}); lay the images out as the records say"
                    )
                path = str(loose)
            paths.append(path)
        result[i] = dataclasses.replace(items[i], images=tuple(paths))
    return result
