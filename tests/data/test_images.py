"""Opening images: orientation, color, size limits, damaged files, defect T5."""

import random
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, features
from transformers import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from univg_nb.data.audit import audit
from univg_nb.data.images import (
    MAX_RATIO,
    MIN_PIXELS,
    MIN_SIDE,
    count_image_tokens,
    estimate_image_tokens,
    image_size,
    open_image,
)

RAMP = np.linspace(0, 255, 1200).round().astype(np.uint8).reshape(30, 40)


def save(path, size, mode="RGB", color=None, **options):
    Image.new(mode, size, color if color is not None else 0).save(path, **options)
    return path


def test_plain_image(tmp_path):
    image = open_image(save(tmp_path / "a.png", (64, 48), color=(255, 0, 0)))
    assert (image.mode, image.size) == ("RGB", (64, 48))
    assert image.getpixel((3, 3)) == (255, 0, 0)


def test_T5_each_image_is_enlarged_for_itself(tmp_path):
    sizes = [(640, 480), (10, 20), (300, 200), (28, 28), (27, 100)]
    paths = [save(tmp_path / f"{i}.png", s) for i, s in enumerate(sizes)]
    opened = [open_image(p).size for p in paths]
    assert opened == [(640, 480), (28, 56), (300, 200), (28, 28), (28, 104)]


def test_tokens_of_a_small_image_are_those_of_the_image_as_opened(tmp_path):
    processor = SimpleNamespace(image_processor=Qwen2VLImageProcessor())
    for size in [(10, 100), (100, 10), (27, 100), (1, 150), (60, 40)]:
        path = save(tmp_path / "a.png", size)
        grid = processor.image_processor([open_image(path)]).image_grid_thw[0]
        assert count_image_tokens(path, processor) == grid.prod() // 4


# ---------------------------------------------------------------- orientation


def exif(value: bytes, type: int = 3, count: int = 1) -> bytes:
    """Return EXIF with an orientation of a TIFF type (3 is a 16-bit number)."""
    entry = struct.pack("<HHHI", 1, 0x0112, type, count) + value.ljust(4, b"\0")
    return b"Exif\0\0II*\0" + struct.pack("<I", 8) + entry + bytes(4)


def tiff(tags: dict[int, tuple[int, ...]], data: bytes) -> bytes:
    """Return a little-endian TIFF of 40 x 30 pixels; the tags are of 16-bit numbers."""
    tags = {256: (40,), 257: (30,), 278: (30,), 277: (1,), 262: (1,), **tags}
    begin = 8 + 2 + 12 * (len(tags) + 2) + 4
    more = b""
    for tag, values in tags.items():
        packed = struct.pack(f"<{len(values)}H", *values)
        if len(packed) > 4:
            place = struct.pack("<I", begin + len(more))
            more, packed = more + packed, place
        tags[tag] = struct.pack("<HHI", tag, 3, len(values)) + packed.ljust(4, b"\0")
    tags[273] = struct.pack("<HHII", 273, 4, 1, begin + len(more))
    tags[279] = struct.pack("<HHII", 279, 4, 1, len(data))
    entries = b"".join(tags[tag] for tag in sorted(tags))
    return (
        b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + more + data
    )


def open_bytes(tmp_path, data: bytes) -> Image.Image:
    """Open what a file holds; its size by `image_size` must be the same."""
    path = tmp_path / "a.img"
    path.write_bytes(data)
    image = open_image(path)
    # an image of few pixels is opened larger
    assert image_size(path) == image.size or min(image.size) == MIN_SIDE
    return image


TURNED = {1: "wx", 2: "xw", 3: "zy", 4: "yz", 5: "wy", 6: "yw", 7: "zx", 8: "xz"}


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "avif", "tiff"])
@pytest.mark.parametrize("orientation", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_orientation(tmp_path, kind, orientation):
    """The image as opened is turned, and the size for boxes is its size."""
    if kind in ("webp", "avif") and not features.check(kind):
        pytest.skip(f"Pillow without {kind}")
    corners = {"w": 0, "x": 80, "y": 160, "z": 240}
    image = Image.new("L", (2, 2))
    image.putdata(list(corners.values()))
    image = image.resize((80, 40), Image.Resampling.NEAREST).convert("RGB")
    tags = Image.Exif()
    tags[0x0112] = orientation
    image.save(tmp_path / f"a.{kind}", exif=tags)
    opened = open_image(tmp_path / f"a.{kind}")
    turned = 5 <= orientation <= 8
    assert opened.size == ((40, 80) if turned else (80, 40))
    assert image_size(tmp_path / f"a.{kind}") == opened.size
    top = [opened.getpixel((x, 5))[0] for x in (5, opened.width - 5)]
    expected = [corners[c] for c in TURNED.get(orientation, "wx")]
    assert top == pytest.approx(expected, abs=12)


BROKEN = {
    "large": exif(struct.pack("<H", 65535)),
    "text": exif(b"6\0", 2, 2),
    "byte": exif(b"\6", 1),
    "undefined": exif(b"\6", 7),
    "unknown type": exif(b"\6", 99),
    "no value": exif(b"\6", 3, 0),
    "many values": exif(b"\6", 3, 2**31),
    "cut in the tag": exif(b"\6")[:20],
    "cut in the header": exif(b"\6")[:10],
    "empty": b"Exif\0\0",
    "noise": b"Exif\0\0 no TIFF at all",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
@pytest.mark.parametrize("defect", BROKEN)
def test_broken_exif_turns_nothing(tmp_path, kind, defect):
    if kind == "webp" and not features.check("webp"):
        pytest.skip("Pillow without webp")
    path = save(tmp_path / f"a.{kind}", (80, 40), exif=BROKEN[defect])
    assert open_image(path).size == image_size(path) == (80, 40)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_turned_tiff_of_every_mode(tmp_path, mode, compression):
    """Pillow alone turns rows of the wrong length, where it maps the file."""
    image = Image.fromarray(RAMP.astype(np.uint16) * 257 if mode == "I;16" else RAMP)
    image = image if mode == "I;16" else image.convert(mode)
    tags = Image.Exif()
    for orientation in (1, 6):
        tags[0x0112] = orientation
        path = tmp_path / f"{orientation}.tiff"
        image.save(path, exif=tags, compression=compression)
    upright, turned = (open_image(tmp_path / f"{n}.tiff") for n in (1, 6))
    assert image_size(tmp_path / "6.tiff") == turned.size == (30, 40)
    expected = upright.transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(np.asarray(turned), np.asarray(expected))


def test_tiff_turned_by_xmp(tmp_path):
    """Pillow gives the size of the header, and turns the image while decoding."""
    image = Image.new("L", (40, 30))
    xmp = {700: b'<rdf:Description tiff:Orientation="6"/>'}
    image.save(tmp_path / "a.tiff", tiffinfo=xmp)
    opened = open_image(tmp_path / "a.tiff")
    assert opened.size == image_size(tmp_path / "a.tiff") == (30, 40)


# ---------------------------------------------------------------- color and depth


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    name = "a.jpg" if mode == "CMYK" else "a.png"
    assert open_image(save(tmp_path / name, (40, 40), mode)).mode == "RGB"


def test_transparent_is_white(tmp_path):
    path = save(tmp_path / "a.png", (30, 30), "RGBA", (255, 0, 0, 0))
    assert open_image(path).getpixel((0, 0)) == (255, 255, 255)


DEEP = {
    "16-bit png": RAMP.astype(np.uint16) * 257,
    "16-bit tiff": RAMP.astype(np.uint16) * 257,
    "16-bit pgm": RAMP.astype(np.uint16) * 257,
    "16-bit jp2": RAMP.astype(np.uint16) * 257,
    "32-bit integers of 16 bits tiff": RAMP.astype(np.int32) * 257,
    "32-bit integers of 8 bits tiff": RAMP.astype(np.int32),
    "floats to 1 tiff": RAMP.astype(np.float32) / 255,
    "floats to 255 tiff": RAMP.astype(np.float32),
    "floats to 65535 tiff": RAMP.astype(np.float32) * 257,
    "all black png": RAMP.astype(np.uint16) * 0,
}


@pytest.mark.parametrize("kind", DEEP)
def test_deep_gray_is_scaled(tmp_path, kind):
    path = tmp_path / f"a.{kind.split()[-1]}"
    Image.fromarray(DEEP[kind]).save(path)
    expected = RAMP * DEEP[kind].any()
    assert np.array_equal(np.asarray(open_image(path))[..., 1], expected)
    assert image_size(path) == (40, 30)


def test_deep_gray_of_other_tiffs(tmp_path):
    ramp = RAMP.astype(np.uint16)
    inverted = tiff({258: (16,), 262: (0,)}, (ramp * 257).tobytes())
    opened = np.asarray(open_bytes(tmp_path, inverted))
    assert np.array_equal(opened[..., 0], 255 - RAMP)
    pairs = zip(*[iter((ramp.astype(int) * 4095 // 255).ravel())] * 2, strict=True)
    packed = [(a >> 4, (a & 15) << 4 | b >> 8, b & 255) for a, b in pairs]
    data = np.array(packed, np.uint8).tobytes()
    opened = np.asarray(open_bytes(tmp_path, tiff({258: (12,)}, data)))
    assert np.array_equal(opened[..., 0], RAMP)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (RAMP.astype(np.uint16) * 10, "0 to 2550, where white is 65535"),
        (RAMP.astype(np.int32) - 9, "-9 to 246, where white is 255 or 65535"),
        (RAMP.astype(np.int32) * 999, "0 to 254745, where white is 255 or"),
        (RAMP.astype(np.float32) / 99, "0 to 2.57576, where white is 1 or 255 or"),
        (RAMP.astype(np.float32) * np.nan, "nan to nan, where white is 1"),
    ],
)
def test_deep_gray_without_a_scale_is_refused(tmp_path, values, message):
    Image.fromarray(values).save(tmp_path / "a.tiff")
    for call in (open_image, image_size):
        with pytest.raises(ValueError, match=message) as caught:
            call(tmp_path / "a.tiff", "s7")
        assert str(caught.value).endswith("; scale them to 0-255 and save 8 bits")
    row = '[{"images": ["a.tiff"], "question": "Where?", "answer": [1, 2, 30, 40]}]'
    (tmp_path / "a.json").write_text(row)
    (problem,) = audit(tmp_path / "a.json", image_root=tmp_path)["problems"]
    assert message in problem["detail"] and problem["severity"] == "error"


def png(depth: int, color: int, pixels: bytes, **chunks: bytes) -> bytes:
    """Return a PNG of 48 x 32 pixels, whose rows repeat the given ones."""
    header = struct.pack(">IIBBBBB", 48, 32, depth, color, 0, 0, 0)
    channels = {0: 1, 2: 3, 3: 1, 4: 2}[color]
    row = b"\0" + pixels * (48 * depth * channels // (8 * len(pixels)))
    parts = {"IHDR": header, **chunks, "IDAT": zlib.compress(row * 32), "IEND": b""}
    data = b"\x89PNG\r\n\x1a\n"
    for name, part in parts.items():
        body = name.encode() + part
        data += (
            struct.pack(">I", len(part)) + body + struct.pack(">I", zlib.crc32(body))
        )
    return data


COLORS = bytes([200, 10, 10, 10, 200, 10])
RGB_16 = b"\x03\1\x04\2\x05\3" + b"\x06\1\x07\2\x08\3"
TRANSPARENT = {  # the first of two pixels; the color of the second
    "1 bit": (png(1, 0, b"\xaa", tRNS=b"\0\1"), (0, 0, 0)),
    "2 bits": (png(2, 0, b"\x99", tRNS=b"\0\2"), (85, 85, 85)),
    "4 bits": (png(4, 0, b"\x35", tRNS=b"\0\3"), (85, 85, 85)),
    "8 bits": (png(8, 0, b"\3\5", tRNS=b"\0\3"), (5, 5, 5)),
    "16 bits": (png(16, 0, b"\3\1\x64\x64", tRNS=b"\3\1"), (100, 100, 100)),
    "gray, alpha": (png(16, 4, b"\3\1\0\0\5\0\xff\xff"), (5, 5, 5)),
    "RGB": (png(8, 2, b"\3\4\5\6\7\x08", tRNS=b"\0\3\0\4\0\5"), (6, 7, 8)),
    "RGB of 16 bits": (png(16, 2, RGB_16, tRNS=RGB_16[:6]), (6, 7, 8)),
    "palette, one": (png(8, 3, b"\0\1", PLTE=COLORS, tRNS=b"\0"), (10, 200, 10)),
    "palette": (png(8, 3, b"\0\1", PLTE=COLORS, tRNS=b"\0\x80"), (132, 227, 132)),
}


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_transparent_value_of_a_png(tmp_path, kind):
    data, second = TRANSPARENT[kind]
    image = open_bytes(tmp_path, data)
    assert image.getpixel((0, 9)) == (255, 255, 255)
    assert image.getpixel((1, 9)) == pytest.approx(second, abs=1)


def test_premultiplied_gray(tmp_path):
    pixels = np.dstack([RAMP // 2, np.full_like(RAMP, 128)]).tobytes()
    data = tiff({258: (8, 8), 277: (2,), 338: (1,)}, pixels)
    pixel = open_bytes(tmp_path, data).getpixel((39, 29))
    assert pixel == pytest.approx((254, 254, 254), abs=2)  # white, half transparent


def test_lab(tmp_path):
    """CIELAB, which only TIFF has, becomes the color that it was made of."""
    spaces = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
    image = Image.new("RGB", (40, 30), (200, 50, 30))
    ImageCms.profileToProfile(image, *spaces, outputMode="LAB").save(
        tmp_path / "a.tiff"
    )
    pixel = open_image(tmp_path / "a.tiff").getpixel((0, 0))
    assert pixel == pytest.approx((200, 50, 30), abs=3)


@pytest.mark.parametrize("kind", ["jpeg", "tiff"])
def test_cmyk(tmp_path, kind):
    """Red stays red, though a JPEG of Adobe holds it inverted."""
    path = save(tmp_path / f"a.{kind}", (40, 30), "CMYK", (0, 255, 255, 0))
    assert open_image(path).getpixel((0, 0)) == pytest.approx((255, 0, 0), abs=2)


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tiff", "mpo"])
def test_first_frame(tmp_path, kind):
    red, blue = (Image.new("RGB", (80, 40), color) for color in ("red", "blue"))
    red.save(tmp_path / f"a.{kind}", save_all=True, append_images=[blue])
    opened = open_image(tmp_path / f"a.{kind}")
    assert opened.size == image_size(tmp_path / f"a.{kind}") == (80, 40)
    assert opened.getpixel((9, 9)) == pytest.approx((255, 0, 0), abs=3)


# ---------------------------------------------------------------- no usable image


def test_missing(tmp_path):
    for call in (open_image, image_size):
        with pytest.raises(ValueError, match=r"sample s7: .*no.png does not exist"):
            call(tmp_path / "no.png", "s7")


def test_folder(tmp_path):
    with pytest.raises(ValueError, match="is no file; check image_root"):
        open_image(tmp_path)


def test_no_permission(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(ValueError, match=r"s7: .* may not be read; check its permi"):
        open_image(save(tmp_path / "a.png", (40, 30)), "s7")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "an empty file); fetch it again"),
        (b"<html>404</html>", "a web page); fetch it again"),
        (b"\n<!DOCTYPE html>", "a web page); fetch it again"),
        (b"version https://git-lfs.github.com", "a Git LFS pointer); run git lfs pull"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC); save it as PNG or JPEG"),
        (b"\xff\n" + bytes(50), "JPEG XL); save it as PNG or JPEG"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL); save it as PNG or JPEG"),
        (b'<?xml version="1.0"?>\n<svg/>', "SVG); save it as PNG or JPEG"),
        (b"%PDF-1.7\n", "PDF); save it as PNG or JPEG"),
        (b'{"error": 403}', "begins with b'{\"error\": 40'); fetch it again"),
        (b"P6 0 4 255\n", "begins with b'P6 0 4 255\\n'); fetch it again"),
        (
            png(8, 0, b"a").replace(b"\0\0\0\x30", bytes(4)),  # 0 pixels wide
            "begins with b'\\x89PNG\\r\\n\\x1a\\n\\x00\\x00\\x00\\r'); fetch it again",
        ),
    ],
)
def test_not_an_image(tmp_path, data, message):
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    for call in (open_image, image_size):
        with pytest.raises(ValueError, match="sample s7") as caught:
            call(path, "s7")
        problem = f"{path} is not an image Pillow can read ({message}"
        assert str(caught.value) == f"sample s7: image {problem}"


@pytest.mark.parametrize(
    "head", [b"\x89HDF\r\n\x1a\n", b"GRIB\0\0\0\1", b"\0\0\1\xb3\x14\0\xf0"]
)
def test_file_that_pillow_only_recognizes(tmp_path, head):
    path = tmp_path / "a.jpg"
    path.write_bytes(head + bytes(50))
    for call in (open_image, image_size):
        with pytest.raises(ValueError, match=r"is [A-Z5]+; save it as PNG or JPEG"):
            call(path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "avif", "gif", "tiff", "dds"])
def test_damaged_files_open_or_are_refused(tmp_path, kind):
    """No other error than ValueError, in one line, and the size is that as opened."""
    if kind in ("webp", "avif") and not features.check(kind):
        pytest.skip(f"Pillow without {kind}")
    rng = random.Random(kind)
    Image.effect_noise((80, 40), 90).save(tmp_path / "whole", kind, exif=exif(b"\6"))
    for _ in range(200):
        data = bytearray((tmp_path / "whole").read_bytes())
        for _ in range(rng.choice((1, 2, 8))):
            data[rng.randrange(min(len(data), 400))] = rng.randrange(256)
        try:
            image = open_bytes(tmp_path, data)
        except ValueError as error:
            assert "\n" not in str(error)
        else:
            assert image.mode == "RGB"


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "bmp"])
def test_truncated(tmp_path, kind):
    if kind == "webp" and not features.check("webp"):
        pytest.skip("Pillow without webp")
    path = tmp_path / f"a.{kind}"
    Image.effect_noise((200, 200), 90).convert("RGB").save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"sample s7: .*(damaged|not an image)"):
        open_image(path, "s7")


@pytest.mark.parametrize("factor", [0.9, 0.1])
def test_decompression_bomb(tmp_path, monkeypatch, factor):
    """Refused from Pillow's limit on, where Pillow alone would only warn."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(200 * 100 * factor))
    path = save(tmp_path / "a.png", (200, 100))
    for call in (open_image, image_size):
        with pytest.raises(ValueError, match=r"sample s7: .*scale it down"):
            call(path, "s7")


def test_too_long(tmp_path):
    with pytest.raises(ValueError, match="200 to 1"):
        open_image(save(tmp_path / "a.png", (402, 2)))


sides = st.integers(1, 4000)


@settings(max_examples=500, deadline=None)
@given(sides, sides, st.sampled_from([12_544, 401_408, 640_000, 12_845_056]))
def test_image_tokens_as_the_processor_counts(width, height, max_pixels):
    assume(max(width, height) <= MAX_RATIO * min(width, height))
    h, w = smart_resize(height, width, 28, MIN_PIXELS, max_pixels)
    assert estimate_image_tokens(width, height, max_pixels) == (h // 28) * (w // 28)
