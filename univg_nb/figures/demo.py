"""Ask a model something: one to six images and a question give thinking and a box.

`ask` is the function, `panel` the same as a form for a notebook (ipywidgets).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from univg_nb import runs
from univg_nb.data.boxes import ParsedBox, parse_box
from univg_nb.data.images import open_image
from univg_nb.data.sample import GroundingSample, asked_image, image_numbers
from univg_nb.figures import drawing

if TYPE_CHECKING:
    import ipywidgets
    from transformers import PreTrainedModel, ProcessorMixin

MOST_IMAGES = 6
_GAP = 8  # px between pictures
_ANYWHERE = (0, 0, 1000, 1000)  # a sample needs an answer; here nobody knows it


@dataclass(frozen=True)
class Answer:
    """A reply as it was written, what was read from it, and the images with the box."""

    reply: str
    parsed: ParsedBox
    picture: Image.Image


def load(name: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Model and processor: "tiny", a local folder, or a hub name like GD-ML/UniVG-R1.

    Others than the shipped one get the pixel limits of the scale `full`, and bf16 with
    FlashAttention where there are a GPU and the package. A hub name needs the network
    (HF_HUB_OFFLINE=0) once.
    """
    import torch

    from univg_nb import models

    section = runs.load_scale("tiny" if name == "tiny" else "full")["model"]
    section["name_or_path"] = name
    if name != "tiny":
        gpu = torch.cuda.is_available()
        flash = gpu and importlib.util.find_spec("flash_attn") is not None
        section["attn_implementation"] = "flash_attention_2" if flash else "sdpa"
        section["dtype"] = "bfloat16" if gpu else "float32"
    return models.load(section)


def ask(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    images: Sequence[str | Path],
    question: str,
    *,
    style: str = "univg",
    think: bool = True,
    max_new_tokens: int = 256,
) -> Answer:
    """The model's greedy reply to a question about `images`.

    The box is drawn on the image that the question names ("in the second image"); where
    it names none or several, on the last one that the thinking mentions, else on all.
    think=False asks in single-image mode, for a box alone. Raises ValueError for no
    question, for no or more than six images, and for a file that is no image.
    """
    from univg_nb.evaluate.replies import reply

    if not 1 <= len(images) <= MOST_IMAGES:
        raise ValueError(
            f"{len(images)} images given; choose one to {MOST_IMAGES} of them"
        )
    if not question.strip():
        raise ValueError("the question is empty; write what to look for")
    paths = tuple(map(str, images))
    sample = GroundingSample("demo", "", paths, question.strip(), _ANYWHERE, cot=think)
    options = {"style": style, "max_new_tokens": max_new_tokens}
    (made,) = reply(model, processor, [sample], **options)
    parsed = parse_box(made.response)
    asked = asked_image(sample)
    place = asked - 1 if asked is not None and asked <= len(paths) else None
    if place is None:
        named = [n for n in image_numbers(made.response) if 1 <= n <= len(paths)]
        place = named[-1] - 1 if named else None
    return Answer(made.response, parsed, _sheet(paths, parsed, place))


def _sheet(paths: Sequence[str], parsed: ParsedBox, place: int | None) -> Image.Image:
    """The images side by side, the box on number `place` (None: on each)."""
    drawn = []
    for index, path in enumerate(paths):
        shown = parsed.box is not None and place in (index, None)
        boxes = [(parsed.box, drawing.RED, "")] if shown else []
        drawn.append(drawing.draw_boxes(open_image(path), boxes, 300))
    width = sum(picture.width + _GAP for picture in drawn) - _GAP
    sheet = Image.new("RGB", (width, max(p.height for p in drawn)), "white")
    left = 0
    for picture in drawn:
        sheet.paste(picture, (left, 0))
        left += picture.width + _GAP
    return sheet


def panel(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    examples: Mapping[str, GroundingSample],
    folder: str | Path,
    *,
    style: str = "univg",
    max_new_tokens: int = 256,
) -> ipywidgets.VBox:
    """A form: choose an example or upload images, write a question, press Ask.

    examples: {name: sample} to start from. folder: where uploaded images are kept. A
    mistake is shown below the form. Without a browser nothing is asked.
    """
    import ipywidgets as widgets
    from IPython.display import display

    choice = widgets.Dropdown(options=list(examples), description="example")
    upload = widgets.FileUpload(accept="image/*", multiple=True)
    question = widgets.Textarea(layout=widgets.Layout(width="640px"))
    think = widgets.Checkbox(value=True, description="ask for thinking")
    button = widgets.Button(description="Ask", button_style="primary")
    output = widgets.Output()

    def choose(_: object = None) -> None:
        question.value = examples[choice.value].question
        think.value = examples[choice.value].cot

    def answer(_: object) -> None:
        output.clear_output()
        with output:
            images = _keep(upload.value, folder) or examples[choice.value].images
            options = {"think": think.value, "max_new_tokens": max_new_tokens}
            try:
                found = ask(
                    model, processor, images, question.value, style=style, **options
                )
            except ValueError as error:
                print(error)
                return
            display(found.picture)
            print(f"{found.reply}\n\nbox {found.parsed.box}: {found.parsed.status}")

    choice.observe(choose, names="value")
    button.on_click(answer)
    choose()
    pictures = widgets.HBox([choice, widgets.Label("or your own:"), upload])
    return widgets.VBox([pictures, question, think, button, output])


def _keep(uploads: Sequence[Mapping], folder: str | Path) -> list[Path]:
    """Write uploaded files into `folder`, under names of our own; their paths."""
    kept = []
    for number, upload in enumerate(uploads, start=1):
        suffix = Path(upload["name"]).suffix.lower()
        path = Path(folder) / f"upload_{number}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(upload["content"]))
        kept.append(path)
    return kept
