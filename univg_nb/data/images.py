"""Open images, the same way everywhere; their sizes, tokens and paths."""

import base64
import io
import math
import os
import re
import struct
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageFile, TiffImagePlugin, UnidentifiedImageError

from univg_nb.data.sample import GroundingSample
from univg_nb.families import SIDE, get_side

MIN_SIDE = SIDE  # smaller images are enlarged; more where tokens are larger
MIN_PIXELS = 3136  # Qwen2-VL enlarges smaller images to this size
MAX_RATIO = 200  # the processor's limit on long side / short side

# What Pillow raises on damaged data, depending on the decoder.
_DECODE_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, LookupError, RuntimeError),
    *(AssertionError, struct.error),
)
# Files that Pillow recognizes and does not decode, or only with another program.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
# What else lies where an image should be: how it begins, what it is, what to do.
_OTHER_FILES: tuple[tuple[bytes, str, str], ...] = (
    (rb"\Z", "an empty file", "fetch it again"),
    (rb"\s*<(!doctype\s+)?html", "a web page", "fetch it again"),
    (rb"version https://git-lfs", "a Git LFS pointer", "run git lfs pull"),
    (rb"....ftyp(hei|hev|mif1|msf1)", "HEIC", "save it as PNG or JPEG"),
    (rb"\xff\n|....JXL ", "JPEG XL", "save it as PNG or JPEG"),
    (rb"%PDF", "PDF", "save it as PNG or JPEG"),
    (rb".{,250}<svg", "SVG", "save it as PNG or JPEG"),
)
_TURNS = {  # by the EXIF orientation; from 5 on, they exchange width and height
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_DARKEST = 1 / 16  # of white: below, a gray picture has fewer than 16 of 256 levels


_filters = Lock()  # those of warnings are one for all threads


class _RefusedError(Exception):
    """An image that Pillow can read and a model cannot use."""


@contextmanager
def _opened(
    path: str | os.PathLike[str], sample_id: str
) -> Iterator[ImageFile.ImageFile]:
    """Open without decoding; refuse what is missing, damaged, or far too large."""
    name = f"sample {sample_id}: image {path}" if sample_id else f"image {path}"
    try:
        if not Path(path).is_file():
            problem = "is no file" if Path(path).exists() else "does not exist"
            raise _RefusedError(f"{problem}; check image_root and the download")
        with _filters, warnings.catch_warnings():
            # an error from Pillow's own limit on, not from twice as many pixels
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path)
        with image:
            if image.format == "TIFF":
                # Pillow maps a file of known name into memory by its upright width
                image.filename = ""
            if image.format in _NOT_DECODED:
                raise _RefusedError(f"is {image.format}; save it as PNG or JPEG")
            if max(image.size) > MAX_RATIO * min(image.size):
                shape = f"{image.width} x {image.height}, longer than {MAX_RATIO} to 1"
                problem = f"is {shape}, which the processor refuses; crop it"
                raise _RefusedError(problem)
            yield image
    except _RefusedError as error:
        raise ValueError(f"{name} {error}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name}: {error}; scale it down") from error
    except PermissionError as error:
        raise ValueError(f"{name} may not be read; check its permissions") from error
    except UnidentifiedImageError as error:
        with Path(path).open("rb") as file:
            head = file.read(256)
        what, advice = f"begins with {head[:12]!r}", "fetch it again"
        for pattern, *known in _OTHER_FILES:
            if re.match(pattern, head, re.DOTALL | re.IGNORECASE):
                what, advice = known
        problem = f"is not an image Pillow can read ({what}); {advice}"
        raise ValueError(f"{name} {problem}") from error
    except _DECODE_ERRORS as error:
        problem = f"is not an image Pillow can read, or is damaged ({error})"
        raise ValueError(f"{name} {problem}; fetch it again") from error


def _find_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1 (upright) if broken, as viewers do."""
    if image.format == "TIFF":
        return 1  # Pillow turns it while decoding and gives its size upright
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except _DECODE_ERRORS:
        return 1
    return orientation if orientation in _TURNS else 1


def _scale_to_8_bits(image: Image.Image) -> Image.Image:
    """Scale gray values of more than 8 bits as `open_image` says, or refuse them."""
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    if tags.get(TiffImagePlugin.BITSPERSAMPLE) == (12,):
        whites = [4095]
    elif image.mode.startswith("I;16") or (image.format, image.mode) == ("PPM", "I"):
        whites = [65_535]
    else:
        whites = [255, 65_535] if image.mode == "I" else [1, 255, 65_535]
    values = np.asarray(image)  # (H, W)
    low, high = values.min(), values.max()
    white = next((w for w in whites if low >= 0 and high <= w), None)
    # of zeros alone, the picture is black at any scale
    if white is None or 0 < high < white * _DARKEST:
        scales = " or ".join(map(str, whites))
        problem = f"has gray values from {low:g} to {high:g}, where white is {scales}"
        raise _RefusedError(f"{problem}; scale them to 0-255 and save 8 bits")
    gray = np.rint(values * (255 / white)).astype(np.uint8)
    if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:
        gray = 255 - gray  # white is zero, which Pillow minds up to 8 bits only
    gray[values == image.info.get("transparency", -1)] = 255
    return Image.fromarray(gray)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode[0] in "IF":
        return _scale_to_8_bits(image).convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")  # Pillow converts it to nothing else
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _scale_transparency(image: ImageFile.ImageFile) -> None:
    """Bring the transparent value of a PNG to 8 bits, as Pillow does with the pixels.

    To be called before decoding, which forgets the bits of the file.
    """
    value: Any = image.info.get("transparency")
    bits = image.tile[0].args if value is not None and image.tile else None
    if bits in ("L;2", "L;4"):
        image.info["transparency"] = value * (85 if bits == "L;2" else 17)
    elif bits == "RGB;16B":
        image.info["transparency"] = tuple(v >> 8 for v in value)


def _enlarge(width: int, height: int, side: int) -> tuple[int, int]:
    """Bring the short side up to `MIN_SIDE` or a token; decided by this image alone.

    The released code resizes every image after a small one to that one's size
    (docs/paper_facts.md#t5).
    """
    scale = max(1, max(MIN_SIDE, side) / min(width, height))
    return round(width * scale), round(height * scale)


def open_image(
    path: str | os.PathLike[str], sample_id: str = "", side: int = MIN_SIDE
) -> Image.Image:
    """Open and decode an image: RGB, upright by EXIF, short side at least a token.

    `side` is that of a token (`get_side`); below MIN_SIDE it changes nothing.
    Transparent parts become white. Of several frames or pages the first is taken. The
    processor's min_pixels/max_pixels do the rest.

    Gray values of more than 8 bits are scaled linearly, black 0 to white 255. White is
    the largest value of 12 or 16 bits. Files of 32-bit integers and floats do not say
    what is white: it is the least of 1 (floats only), 255 and 65535 that no value
    exceeds. Values that are negative, larger, or darker than a sixteenth of white are
    refused: with another scale in mind, they would silently be a black picture.

    Raises:
        ValueError: the file is missing, no image, truncated, larger than Pillow's
            limit, longer than MAX_RATIO to 1, or of gray values without a known scale.
            Names the file and, if given, the sample.
    """
    with _opened(path, sample_id) as image:
        _scale_transparency(image)
        image.load()
        rgb = _to_rgb(image)
        turn = _TURNS.get(_find_orientation(image))
    if turn is not None:
        rgb = rgb.transpose(turn)
    size = _enlarge(*rgb.size, side)
    return rgb if size == rgb.size else rgb.resize(size)


def image_size(path: str | os.PathLike[str], sample_id: str = "") -> tuple[int, int]:
    """Return (width, height) of the upright image in the file's pixels.

    Reads the header; decodes where that does not tell whether `open_image` turns or
    refuses the image.
    """
    with _opened(path, sample_id) as image:
        if image.mode[0] in "IF":
            _scale_to_8_bits(image)
        elif image.width == image.height:
            return image.size
        elif image.format == "PNG" or (image.format == "TIFF" and "xmp" in image.info):
            image.load()  # EXIF may follow the pixels; XMP of a TIFF turns its size
        width, height = image.size
        turned = _find_orientation(image) >= 5
    return (height, width) if turned else (width, height)


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


def fit_size(
    width: int, height: int, side: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Return (width, height) as a processor resizes a picture, multiples of `side`.

    This is the rule of `smart_resize` in transformers (a test compares them), computed
    here so that audit and scores take seconds and need no transformers.
    """
    sides = (width, height)
    columns, rows = (round(value / side) for value in sides)
    pixels = columns * rows * side**2
    if pixels > max_pixels:
        shrink = math.sqrt(width * height / max_pixels)
        columns, rows = (max(1, math.floor(v / shrink / side)) for v in sides)
    elif pixels < min_pixels:
        grow = math.sqrt(min_pixels / (width * height))
        columns, rows = (math.ceil(v * grow / side) for v in sides)
    return columns * side, rows * side


def fit_image(
    path: str, side: int, limits: tuple[int, int], sample_id: str = ""
) -> tuple[int, int]:
    """Return (width, height) of an image as a model sees it; see `image_size`.

    `limits` are the least and the most pixels of its processor.
    """
    size = _enlarge(*image_size(path, sample_id), side)
    return fit_size(*size, side, *limits)


def count_image_tokens(path: str, processor: Any, sample_id: str = "") -> int:
    """Return the tokens of an image in a prompt of this processor; see `image_size`."""
    width, height = _enlarge(*image_size(path, sample_id), get_side(processor))
    image_processor = processor.image_processor
    patches = image_processor.get_number_of_image_patches(height, width)
    return patches // image_processor.merge_size**2


def estimate_image_tokens(width: int, height: int, max_pixels: int = 401_408) -> int:
    """Return the tokens of an image of so many pixels in Qwen2-VL.

    One token stands for a block of 28 x 28 pixels after resizing to `max_pixels` at
    most. A model with larger tokens has fewer of them.
    """
    columns, rows = fit_size(width, height, SIDE, MIN_PIXELS, max_pixels)
    return columns * rows // SIDE**2


def find_missing_images(
    samples: Sequence[GroundingSample], indices: Iterable[int]
) -> dict[int, str]:
    """Return {index: first path that is no file} of the samples that lack an image."""
    is_file = cache(os.path.isfile)  # items share images
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
    new: dict[tuple[str, int], str] = {}
    for index in wanted:
        for path in samples[index].images:
            version = (path, Path(path).stat().st_mtime_ns)
            if version not in _usable:
                new.setdefault(version, samples[index].id)
    with ThreadPoolExecutor() as pool:
        # sizes: pictures that wait for their turn would fill the memory
        sizes = pool.map(lambda one: open_image(one[0], new[one]).size, new)
        _usable.update(version for version, _ in zip(new, sizes, strict=True))
