"""What is wrong with the folder of a model or an adapter, said in one line.

Libraries go on with a warning where weights found no place, and speak of something else
where a folder is missing.
"""

import logging
import re
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

# Without one of them, its name in a prompt is read as words.
TOKENS = (
    *("<|image_pad|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|im_start|>", "<|im_end|>"),
)
OPENED = "<think>\n"  # the end of a thinking edition's prompts


@contextmanager
def explain_loading(source: str) -> Iterator[None]:
    """Raise what the libraries say of a broken or missing model as one line.

    `source` is a folder or a hub name. A full disk or memory is not its fault.
    """
    is_folder = Path(source).is_dir()
    if not is_folder and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        raise ValueError(
            f"{source}: no such folder, and no hub name (ORGANIZATION/NAME) either; "
            'give a folder that exists, or "tiny"'
        )
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_is_no_report)
    try:
        yield
    except Exception as error:
        outside = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if outside or getattr(error, "errno", None):
            raise
        remedy = "check that the folder is whole and of the kind that is asked for"
        if not is_folder:
            remedy = (
                "it is no folder here; if it is not in the hub's cache either, fetch "
                "it with HF_HUB_OFFLINE=0 and a network, or give a folder"
            )
        reason = textwrap.shorten(str(error), 300)
        raise ValueError(f"{source}: cannot be loaded ({reason}); {remedy}") from error
    finally:
        logger.removeFilter(_is_no_report)


def _is_no_report(entry: logging.LogRecord) -> bool:
    """Return False for the table of weights that do not fit: an error names them."""
    return "LOAD REPORT" not in entry.getMessage()


def leave_tag_to_reply(processor: ProcessorMixin) -> None:
    """Take `<think>` off the end of prompts, where thinking editions' templates put it.

    Here the tag is the reply's, as in the paper: targets and rewards have it there
    once, and a bare box has none. The processor is saved with the changed template.
    """
    template: Any = processor.chat_template
    if not isinstance(template, str) or OPENED.strip() not in template:
        return
    chat = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    if prompt.endswith(OPENED):
        template = template.removesuffix("\n")  # as Jinja does at the end of a file
        processor.chat_template = (
            f"{{% set text %}}{template}{{% endset %}}"
            f"{{{{ text[:-{len(OPENED)}] if add_generation_prompt else text }}}}"
        )


def refuse_names(source: str | Path, problem: str, names: Iterable[str]) -> None:
    """Raise ValueError with a few of the names if there are any."""
    if names := sorted(names):
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise ValueError(f"{source}: {len(names)} weights {problem}: {shown}")


def check_fit(model: PreTrainedModel, processor: ProcessorMixin) -> None:
    """Raise ValueError if model and processor do not belong together."""
    config, tokenizer = model.config, processor.tokenizer
    images: Any = processor.image_processor
    vision: Any = getattr(config, "vision_config", None)
    if not hasattr(model.model, "visual") or not hasattr(vision, "spatial_merge_size"):
        raise ValueError(
            f"{model.name_or_path}: a model of type {config.model_type!r} has no "
            "vision tower as this package expects; take a Qwen-VL model"
        )
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in TOKENS}
    differ = [
        f"no token {token}"
        for token, number in ids.items()
        if number in (None, tokenizer.unk_token_id)
    ]
    facts = {
        "image token": (ids[TOKENS[0]], config.image_token_id),
        "patch size": (getattr(images, "patch_size", None), vision.patch_size),
        "merged patches": (
            getattr(images, "merge_size", None),
            vision.spatial_merge_size,
        ),
    }
    differ += [
        f"{name} {mine} in the processor, {its} in the model"
        for name, (mine, its) in facts.items()
        if mine != its
    ]
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        differ.append(f"{len(tokenizer)} tokens, but {rows} embeddings")
    if differ:
        raise ValueError(
            f"{model.name_or_path}: its processor is of another model "
            f"({'; '.join(differ)}); copy tokenizer and processor files of its own base"
        )
