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
    """Where one token should look.

    Attributes:
        at: position of the token.
        spots: what it should look at, (picture from 0, box in 0..1000) each.
        phrase: position of the last token of the words that name it, or -1; `at` itself
            where those words look; NUMBER where "image 2" looks at its picture.
    """

    at: int
    spots: tuple[tuple[int, Box], ...]
    phrase: int


class Dialogue(NamedTuple):
    """A tokenized lesson.

    Attributes:
        ids: token ids.
        labels: the same, -100 where no loss is taken.
        looks: where tokens should look.
    """

    ids: list[int]
    labels: list[int]
    looks: list[Attend]


def find_named(lesson: Lesson, turn: Turn, look: Look) -> tuple[tuple[int, Box], ...]:
    """Return what the words of a question may mean when they are read.

    Which picture is meant is said only after them: a name means every thing of that
    name, and a phrase that tells things apart by position or size means nothing yet.

    Args:
        lesson: the lesson.
        turn: one of its turns.
        look: one of the turn's `asks`.
    """
    if len(lesson.scenes) == 1:
        return ((look.image, look.box),)
    words = turn.question[look.start : look.end]
    return tuple(
        (number, thing.box)
        for number, scene in enumerate(lesson.scenes)
        for thing in scene.things
        if thing.name == words
    )


def find_image_numbers(text: str, num_images: int) -> Iterator[tuple[int, int]]:
    """Yield (end of the word, picture from 0) for "image 2" and "second image".

    Args:
        text: a question or a reply.
        num_images: numbers above it are left out.
    """
    for found in IMAGE_NUMBER.finditer(text):
        digit, ordinal = found.groups()
        number = int(digit) - 1 if digit else ORDINALS.index(ordinal)
        if number < num_images:
            yield found.end(1 if digit else 2), number


def tokenize_lesson(
    lesson: Lesson, tokenizer: Qwen2Tokenizer, numbers: bool = False
) -> Dialogue:
    """Apply the chat template to all turns; the loss is on replies and their ends.

    Args:
        lesson: the lesson.
        tokenizer: the model's.
        numbers: whether the words that say which image look at it.
    """
    ids: list[int] = []
    labels: list[int] = []
    looks: list[Attend] = []
    for k, turn in enumerate(lesson.turns):
        opening = "\n<|im_start|>user\n"
        if k == 0:
            pictures = PICTURE * len(lesson.scenes)
            opening = f"{SYSTEM}<|im_start|>user\n{pictures}"
        asked = f"{opening}{turn.question}<|im_end|>\n<|im_start|>assistant\n"
        prompt = tokenizer(asked, return_offsets_mapping=True)
        answer = tokenizer(turn.reply + "<|im_end|>", return_offsets_mapping=True)
        phrase = -1
        for place, (_, end) in enumerate(prompt.offset_mapping):
            for look in turn.asks:
                if end == len(opening) + look.end:
                    phrase = len(ids) + place
                    if spots := find_named(lesson, turn, look):
                        looks.append(Attend(phrase, spots, phrase))
        assert not turn.asks or phrase >= 0, turn
        if numbers and len(lesson.scenes) > 1:
            for text, offset, tokens, start in (
                (turn.question, len(opening), prompt, len(ids)),
                (turn.reply, 0, answer, len(ids) + len(prompt.input_ids)),
            ):
                ends = {end: k for k, (_, end) in enumerate(tokens.offset_mapping)}
                for end, number in find_image_numbers(text, len(lesson.scenes)):
                    spots = ((number, WHOLE),)
                    looks.append(Attend(start + ends[offset + end], spots, NUMBER))
        ids += prompt.input_ids
        labels += [-100] * len(prompt.input_ids)
        for place, (_, end) in enumerate(answer.offset_mapping):
            for look in turn.looks:
                if look.start < end <= look.end:  # from the token before
                    at = len(ids) + place - 1
                    looks.append(Attend(at, ((look.image, look.box),), phrase))
        ids += answer.input_ids
        labels += answer.input_ids
    return Dialogue(ids, labels, looks)
