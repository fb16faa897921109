"""A lesson of the base model's pre-training as token ids, labels, and where to look."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from transformers import Qwen2Tokenizer

from univg_nb.base_model.guide import NUMBER
from univg_nb.base_model.lessons import Lesson, Look, Turn
from univg_nb.base_model.vision import CELLS
from univg_nb.data.boxes import Box
from univg_nb.minimig.phrases import ORDINALS

IMAGE_TOKENS = CELLS * CELLS
WHOLE: Box = (0, 0, 1000, 1000)
IMAGE_NUMBER = re.compile(rf"[Ii]mage ([1-6])|({'|'.join(ORDINALS)}) image")
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
PICTURE = "<|vision_start|>" + "<|image_pad|>" * IMAGE_TOKENS + "<|vision_end|>"


class Attend(NamedTuple):
    """A token's look: from position ``at`` to ``spots``, (picture, box in 0..1000).

    phrase: position of the last token of the words that name it, or -1; ``at`` itself
    where those words do the looking; NUMBER where "image 2" looks at its picture.
    """

    at: int
    spots: tuple[tuple[int, Box], ...]
    phrase: int


class Dialogue(NamedTuple):
    """A lesson's dialogue as token ids, labels (-100 where no loss is taken), looks."""

    ids: list[int]
    labels: list[int]
    looks: list[Attend]


def named(item: Lesson, turn: Turn, look: Look) -> tuple[tuple[int, Box], ...]:
    """What the words of a question may mean when they are read.

    Which picture is meant is said only after them: a name means every thing of that
    name, and a phrase that tells things apart by place or size means nothing yet.
    """
    if len(item.scenes) == 1:
        return ((look.image, look.box),)
    words = turn.question[look.start : look.end]
    return tuple(
        (number, thing.box)
        for number, scene in enumerate(item.scenes)
        for thing in scene.things
        if thing.name == words
    )


def numbered(text: str, images: int) -> Iterator[tuple[int, int]]:
    """(where the word ends in ``text``, picture from 0) for each "image 2" and each
    "second image"."""
    for found in IMAGE_NUMBER.finditer(text):
        digit, ordinal = found.groups()
        number = int(digit) - 1 if digit else ORDINALS.index(ordinal)
        if number < images:
            yield found.end(1 if digit else 2), number


def dialogue(
    item: Lesson, tokenizer: Qwen2Tokenizer, numbers: bool = False
) -> Dialogue:
    """The chat template applied to all turns; loss on each reply and its end token.

    numbers: whether the words that say which image look at it.
    """
    ids: list[int] = []
    labels: list[int] = []
    looks: list[Attend] = []
    pictures = PICTURE * len(item.scenes)
    for k, turn in enumerate(item.turns):
        opening = (SYSTEM if k == 0 else "\n") + "<|im_start|>user\n"
        opening += pictures if k == 0 else ""
        asked = f"{opening}{turn.question}<|im_end|>\n<|im_start|>assistant\n"
        prompt = tokenizer(asked, return_offsets_mapping=True)
        answer = tokenizer(turn.reply + "<|im_end|>", return_offsets_mapping=True)
        phrase = -1
        for place, (_, end) in enumerate(prompt.offset_mapping):
            for look in turn.asks:
                if end == len(opening) + look.end:
                    phrase = len(ids) + place
                    if spots := named(item, turn, look):
                        looks.append(Attend(phrase, spots, phrase))
        assert not turn.asks or phrase >= 0, turn
        if numbers and len(item.scenes) > 1:
            for text, before, tokens in (
                (turn.question, len(opening), prompt),
                (turn.reply, 0, answer),
            ):
                start = len(ids) + (0 if tokens is prompt else len(prompt.input_ids))
                ends = {end: k for k, (_, end) in enumerate(tokens.offset_mapping)}
                for end, number in numbered(text, len(item.scenes)):
                    spots = ((number, WHOLE),)
                    looks.append(Attend(start + ends[before + end], spots, NUMBER))
        ids += prompt.input_ids
        labels += [-100] * len(prompt.input_ids)
        for place, (_, end) in enumerate(answer.offset_mapping):
            for look in turn.looks:
                if look.start < end <= look.end:  # seen from the token before
                    at = len(ids) + place - 1
                    looks.append(Attend(at, ((look.image, look.box),), phrase))
        ids += answer.input_ids
        labels += answer.input_ids
    return Dialogue(ids, labels, looks)
