"""Opening images: orientation, color, size limits, damaged files, defect T5."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image, features
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from univg_nb.data.images import (
    MAX_RATIO,
    MIN_PIXELS,
    estimate_image_tokens,
    image_size,
    open_image,
)


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


def test_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    path = save(tmp_path / "a.jpg", (80, 40), exif=exif)
    assert open_image(path).size == (40, 80)
    assert image_size(path) == (40, 80)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    name = "a.jpg" if mode == "CMYK" else "a.png"
    assert open_image(save(tmp_path / name, (40, 40), mode)).mode == "RGB"


def test_transparent_is_white(tmp_path):
    path = save(tmp_path / "a.png", (30, 30), "RGBA", (255, 0, 0, 0))
    assert open_image(path).getpixel((0, 0)) == (255, 255, 255)


def test_missing(tmp_path):
    for call in (open_image, image_size):
        with pytest.raises(ValueError, match=r"sample s7: .*no.png does not exist"):
            call(tmp_path / "no.png", "s7")


def test_not_an_image(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("<html>404</html>")
    with pytest.raises(ValueError, match=r"sample s7: .*not an image"):
        open_image(path, "s7")


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
