"""Small real things for the tests of evaluation: a model, its items, their images."""

from pathlib import Path

import numpy as np
from PIL import Image

from univg_nb import models
from univg_nb.base_model import architecture
from univg_nb.data.sample import GroundingSample
from univg_nb.evaluate.generate import GenerationOptions, generate


def save_model(folder: Path) -> Path:
    """The shipped architecture with random weights."""
    # a few sentences instead of the course's corpus: the tokenizer is made in no time
    sentences = [f"Find cup {i}. It is near ({i},20),(30,40)." for i in range(10)]
    tokenizer = architecture.train_tokenizer(sentences)
    architecture.build_model(tokenizer, seed=0).save_pretrained(folder)
    architecture.build_processor(tokenizer).save_pretrained(folder)
    return folder


def save_images(folder: Path) -> list[str]:
    """Four pictures of noise in different shapes."""
    rng = np.random.default_rng(0)
    paths = []
    for k, (width, height) in enumerate([(64, 64), (96, 48), (40, 80), (256, 256)]):
        pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
        paths.append(str(folder / f"{k}.png"))
    return paths


def questions(folder: Path, count: int = 9) -> list[GroundingSample]:
    """Questions of 1 to 4 images and different lengths, not sorted by length."""
    paths = save_images(folder)
    found = []
    for i in range(count):
        images = tuple(paths[(i + j) % 4] for j in range(1 + i * 5 % 4))
        question = "Find the cup. " + "It is near (10,20),(30,40). " * (i * 7 % 5)
        box = (100, 100, 300 + i % 9, 400)
        found.append(GroundingSample(f"s{i}", "diff", images, question.strip(), box))
    return found


def make_replies(model: Path, items: list[GroundingSample], out: Path) -> None:
    """Generate in a process of its own, for tests that kill it."""
    loaded = models.load_for_inference({"name_or_path": str(model)})
    generate(*loaded, items, out, GenerationOptions(max_new_tokens=12, batch_size=2))
