"""Ask a model: one to six images and a question give thinking and a box.

`ask` is the function, `build_panel` the same as a form for a notebook (ipywidgets),
`python -m univg_nb ask` the same from a shell, and with `--page` as a page.
"""

from __future__ import annotations

import html
import io
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from univg_nb.errors import shorten_in_notebooks
from univg_nb.evaluate import replies
from univg_nb.figures import drawing
from univg_nb.io import open_atomically, write_text

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
    **options: Any,
) -> ipywidgets.VBox:
    """Build a form: choose an example or upload images, write a question, press Ask.

    The images are shown before anything is asked. What is uploaded is kept in memory,
    and on disk for the time of a question only. A mistake is shown below the form, with
    the user's own file names. The options are style and max_new_tokens of `ask`.
    """
    import ipywidgets  # of the extra `course`: the command does not need it

    example = ipywidgets.Dropdown(options=list(examples), description="example")
    upload = ipywidgets.FileUpload(accept="image/*", multiple=True)
    clear = ipywidgets.Button(description="Clear uploads", icon="trash")
    shown = ipywidgets.HBox(layout={"flex_flow": "row wrap"})
    question = ipywidgets.Textarea(
        placeholder="what to look for", layout={"width": "100%", "max_width": "640px"}
    )
    think = ipywidgets.Checkbox(value=True, description="think")
    press = ipywidgets.Button(description="Ask", button_style="primary")
    output = ipywidgets.VBox()

    def say(text: str) -> None:
        said = f"<pre style='white-space: pre-wrap'>{html.escape(text)}</pre>"
        output.children = (ipywidgets.HTML(said),)

    def show(_: object = None) -> None:
        """Show what would be asked about: the uploads, else those of the example."""
        files = [(file["name"], bytes(file["content"])) for file in upload.value]
        if not files and example.value:
            paths = map(Path, examples[example.value].images)
            files = [(path.name, path.read_bytes()) for path in paths]
        shown.children = [
            ipywidgets.VBox(
                [
                    ipywidgets.Image(value=content, layout={"max_width": "200px"}),
                    ipywidgets.Label(f"image {number}: {name}"),
                ]
            )
            for number, (name, content) in enumerate(files, start=1)
        ]

    def choose(_: object = None) -> None:
        if example.value:
            question.value = examples[example.value].question
            think.value = examples[example.value].cot
        show()

    def empty(_: object) -> None:
        upload.value = ()
        say("")

    def answer(_: object) -> None:
        press.disabled, press.description = True, "Thinking …"
        say("the model is thinking")
        try:
            with _save_uploads(upload.value) as kept:
                known = examples[example.value].images if example.value else ()
                given = (model, processor, kept or known, question.value)
                found = ask(*given, think=think.value, **options)
        except ValueError as error:
            say(_strip_folders(str(error), upload.value))
        else:
            say(f"{found.reply}\n\nbox {found.parsed.box}: {found.parsed.status}")
            buffer = io.BytesIO()
            found.picture.save(buffer, "PNG")
            picture = ipywidgets.Image(
                value=buffer.getvalue(), layout={"max_width": "100%"}
            )
            output.children = (*output.children, picture)
        finally:
            press.disabled, press.description = False, "Ask"

    example.observe(choose, names="value")
    upload.observe(show, names="value")
    clear.on_click(empty)
    press.on_click(answer)
    choose()
    files = ipywidgets.HBox([upload, clear])
    first = [example] if examples else []
    return ipywidgets.VBox([*first, files, shown, question, think, press, output])


@contextmanager
def _save_uploads(uploads: Sequence[Mapping[str, Any]]) -> Iterator[list[Path]]:
    """Write uploaded files for the time of the `with` block; yield their paths."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [_get_upload_path(folder, k, file) for k, file in enumerate(uploads)]
        for path, file in zip(paths, uploads, strict=True):
            path.parent.mkdir()
            path.write_bytes(file["content"])
        yield paths


def _get_upload_path(folder: str, number: int, file: Mapping[str, Any]) -> Path:
    """Return where a file goes: its last name, for what a browser sends is no path."""
    return Path(folder) / f"upload_{number}" / (Path(file["name"]).name or "picture")


def _strip_folders(text: str, uploads: Sequence[Mapping[str, Any]]) -> str:
    """Return an error with the names that the user gave, not where the files lay."""
    for number, file in enumerate(uploads):
        tail = _get_upload_path("", number, file)
        text = re.sub(rf"\S*{re.escape(str(tail))}", tail.name, text)
    return text


PAGE = """
from IPython.display import clear_output
from univg_nb.figures import demo

panel = demo.open_page({name!r}, {adapters!r}, {images!r}, {question!r}, **{options!r})
clear_output()  # the bar of loading
panel
"""


def open_page(
    name: str,
    adapters: Sequence[str],
    images: Sequence[str],
    question: str,
    **options: Any,
) -> ipywidgets.VBox:
    """Build the panel of a model; images and question are its example, if given."""
    shorten_in_notebooks()
    sample = GroundingSample("yours", "", tuple(images), question, _ANYWHERE, cot=True)
    examples = {"yours": sample} if images else {}
    return build_panel(*load_model(name, adapters), examples, **options)


def serve_page(port: int, **page: Any) -> int:
    """Serve the panel as a page on this machine, by voila; return its exit code.

    Each visitor gets a kernel, and with it the model, of their own. `page` holds the
    arguments of `open_page`, its options as a dictionary.
    """
    import nbformat  # of the extra `course`, as voila
    import voila  # noqa: F401

    cell = nbformat.v4.new_code_cell(PAGE.format(**page))
    notebook = nbformat.v4.new_notebook(cells=[cell])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ask.ipynb"
        write_text(path, nbformat.writes(notebook))
        command = [sys.executable, "-m", "voila", str(path), f"--port={port}"]
        command += ["--no-browser", "--Voila.ip=127.0.0.1"]
        print(f"open http://localhost:{port} in a browser; Ctrl-C ends it", flush=True)
        return subprocess.run(command).returncode


def _picture_file(text: str) -> str:
    kind = Image.registered_extensions().get(Path(text).suffix.lower())
    if kind not in Image.SAVE:
        raise UnfitError(f"{text}: no picture file; name it .png or .jpg")
    return output_file(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask a model from the command line, print its reply and write the image."""
    parser = make_parser(
        "ask",
        "Ask a model about one to six images.",
        '--model tiny a.png b.png "Find the cup of the first image in the '
        'second image."',
    )
    add = parser.add_argument
    add("words", nargs="*", metavar="IMAGE ... QUESTION", help="in quotes, if long")
    add("--model", required=True, help='"tiny", a local folder or a hub name')
    add("--adapter", action="append", default=[], help="folder; may be repeated")
    add("--style", choices=prompts.STYLES, help="of the prompt; default: the model's")
    add("--no-think", action="store_true", help="ask for a box alone")
    add("--max-new-tokens", type=within(int, 1), default=256, help="default: 256")
    add("--out", default="answer.png", type=_picture_file, help="image to write")
    add("--page", action="store_true", help="serve a form for the browser instead")
    add("--port", type=within(int, 1), default=8866, help="of the page: default 8866")
    options = parser.parse_args(arguments)
    untaught = options.model == "tiny" and not options.adapter
    style = options.style or ("direct" if untaught else "univg")
    how = {"style": style, "max_new_tokens": options.max_new_tokens}
    images, question = options.words[:-1], "".join(options.words[-1:])
    if options.page:
        page = {"name": options.model, "adapters": options.adapter, "options": how}
        page["images"] = [str(Path(image).absolute()) for image in images]
        return serve_page(options.port, question=question, **page)
    loaded = load_model(options.model, options.adapter)
    found = ask(*loaded, images, question, think=not options.no_think, **how)
    kind = Image.registered_extensions()[Path(options.out).suffix.lower()]
    with open_atomically(options.out, "wb") as file:
        found.picture.save(file, format=kind)
    print(f"{found.reply}\nbox {found.parsed.box}: {found.parsed.status}")
    print(f"drawn in {options.out}")
    return 0
