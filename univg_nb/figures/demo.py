"""Ask a model: one to six images and a question give thinking and a box.

`ask` is the function, `build_panel` the same as a form for a notebook (ipywidgets), and
`python -m univg_nb ask` the same from a shell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from univg_nb import models
from univg_nb.config import UnfitError, load_scale, make_parser, output_file, within
from univg_nb.data import prompts
from univg_nb.data.boxes import Box, ParsedBox, parse_box
from univg_nb.data.images import open_image
from univg_nb.data.sample import GroundingSample, find_target_image, image_numbers
from univg_nb.evaluate import replies
from univg_nb.figures import drawing
from univg_nb.io import open_atomically

if TYPE_CHECKING:
    import ipywidgets

MOST_IMAGES = 6
_GAP = 8  # px between images
_ANYWHERE = (0, 0, 1000, 1000)  # a sample needs an answer; here nobody knows it


@dataclass(frozen=True)
class Answer:
    """A reply as it was written, what was read from it, and the images with the box."""

    reply: str
    parsed: ParsedBox
    picture: Image.Image


def load_model(
    name: str, adapters: Sequence[str | Path] = ()
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load a model, and adapters each on top of the one before.

    It is "tiny" or, with the options of the scale `full` (float32 on a CPU), a local
    folder or a hub name (online once: HF_HUB_OFFLINE=0).
    """
    section = load_scale("tiny" if name == "tiny" else "full")["model"]
    section |= {"name_or_path": name, "attn_implementation": "sdpa"}
    if not torch.cuda.is_available():
        section["dtype"] = "float32"
    return models.load_for_inference(section, adapters)


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
    """Return the model's greedy reply to a question about images.

    The box is drawn on the image that the question names ("in the second image"); where
    it names none or several, on the last one that the thinking names, else on all. With
    `think=False` the model is asked in single-image mode, for a box alone.

    Raises:
        ValueError: no question, no or too many images, or a file that is no image.
    """
    if not 1 <= len(images) <= MOST_IMAGES:
        raise ValueError(
            f"{len(images)} images given; choose one to {MOST_IMAGES} of them"
        )
    if not question.strip():
        raise ValueError("the question is empty; write what to look for")
    paths = tuple(map(str, images))
    sample = GroundingSample("demo", "", paths, question.strip(), _ANYWHERE, cot=think)
    (made,) = replies.reply(
        model, processor, [sample], style=style, max_new_tokens=max_new_tokens
    )
    parsed = parse_box(made.text)
    target = find_target_image(sample)
    if target is None:
        named = [n for n in image_numbers(made.text) if 1 <= n <= len(paths)]
        target = named[-1] if named else None
    return Answer(
        made.written or made.text, parsed, _draw_sheet(paths, parsed.box, target)
    )


def _draw_sheet(
    paths: Sequence[str], box: Box | None, target: int | None
) -> Image.Image:
    """Draw the images side by side, the box on number `target` (None: on each)."""
    drawn = []
    for number, path in enumerate(paths, start=1):
        marked = [(box, drawing.RED, "")] if box and target in (None, number) else []
        drawn.append(drawing.draw_boxes(open_image(path), marked, 300))
    width = sum(picture.width + _GAP for picture in drawn) - _GAP
    sheet = Image.new("RGB", (width, max(p.height for p in drawn)), "white")
    left = 0
    for picture in drawn:
        sheet.paste(picture, (left, 0))
        left += picture.width + _GAP
    return sheet


def build_panel(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    examples: Mapping[str, GroundingSample],
    folder: str | Path,
    **options: Any,
) -> ipywidgets.interactive:
    """Build a form: choose an example or upload images, write a question, press Ask.

    A mistake is shown below the form. Uploaded images are kept in `folder`; the options
    are style and max_new_tokens of `ask`.
    """
    import ipywidgets  # of the extra `course`: the command does not need it

    def answer(
        example: str, upload: Sequence[Mapping], question: str, think: bool
    ) -> Image.Image | None:
        kept = []
        for number, file in enumerate(upload, start=1):
            kept.append(Path(folder) / f"upload_{number}")  # its own name is no path
            kept[-1].parent.mkdir(parents=True, exist_ok=True)
            kept[-1].write_bytes(file["content"])
        images = kept or examples[example].images
        try:
            found = ask(model, processor, images, question, think=think, **options)
        except ValueError as error:
            print(error)
            return None
        print(f"{found.reply}\n\nbox {found.parsed.box}: {found.parsed.status}")
        return found.picture

    form = ipywidgets.interactive(
        answer,
        {"manual": True, "manual_name": "Ask"},
        example=list(examples),
        upload=ipywidgets.FileUpload(accept="image/*", multiple=True),
        question=ipywidgets.Textarea(layout={"width": "640px"}),
        think=True,
    )
    example, _, question, think = form.children[:4]

    def choose(_: object = None) -> None:
        question.value = examples[example.value].question
        think.value = examples[example.value].cot

    example.observe(choose, names="value")
    choose()
    return form


def _picture_file(text: str) -> str:
    kind = Image.registered_extensions().get(Path(text).suffix.lower())
    if kind not in Image.SAVE:
        raise UnfitError(f"{text}: no picture file; name it .png or .jpg")
    return output_file(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Ask a model from the command line, print its reply and write the image."""
    parser = make_parser(
        "ask",
        "Ask a model about one to six images.",
        '--model tiny a.png b.png "Find the cup of the first image in the '
        'second image."',
    )
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE")
    add("question", help="what to look for, in quotes")
    add("--model", required=True, help='"tiny", a local folder or a hub name')
    add("--adapter", action="append", default=[], help="folder; may be repeated")
    add("--style", choices=prompts.STYLES, default="univg", help="of the prompt")
    add("--no-think", action="store_true", help="ask for a box alone")
    add("--max-new-tokens", type=within(int, 1), default=256, help="default: 256")
    add("--out", default="answer.png", type=_picture_file, help="image to write")
    options = parser.parse_args(arguments)
    found = ask(
        *load_model(options.model, options.adapter),
        options.images,
        options.question,
        style=options.style,
        think=not options.no_think,
        max_new_tokens=options.max_new_tokens,
    )
    kind = Image.registered_extensions()[Path(options.out).suffix.lower()]
    with open_atomically(options.out, "wb") as file:
        found.picture.save(file, format=kind)
    print(f"{found.reply}\nbox {found.parsed.box}: {found.parsed.status}")
    print(f"drawn in {options.out}")
