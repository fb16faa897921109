"""The words of MiniMIG: wordings of the questions, and the sentences of the chains.

The wordings and their fields are in `assets/minimig/questions.yaml`.
A chain is made of what the base model can already do (say what a picture shows, find a
named thing), so the lessons of the base model use the same sentences.
"""

from collections.abc import Sequence

from univg_nb import io
from univg_nb.minimig.scenes import Scene, Thing

PLACE_WORDS = {
    "clear": "the weather is clear",
    "rain": "it is raining",
    "night": "it is night",
    "water": "there is water",
    "sun": "the sun is hot",
}
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")

_WORDINGS = io.read_asset("minimig/questions.yaml")
FIND: tuple[str, ...] = _WORDINGS["find"]
QUESTIONS: dict[str, tuple[str, ...]] = _WORDINGS["questions"]
REASONING: dict[str, tuple[str, ...]] = _WORDINGS["reasoning"]
SINGLE_REASONING: dict[str, tuple[str, ...]] = _WORDINGS["single_reasoning"]
SINGLE_USE: tuple[str, ...] = _WORDINGS["single_use"]
SINGLE_NEED: tuple[str, ...] = _WORDINGS["single_need"]
IMPLICIT_USE: tuple[str, ...] = _WORDINGS["implicit_use"]
IMPLICIT_NEED: tuple[str, ...] = _WORDINGS["implicit_need"]
MOTION: tuple[str, ...] = _WORDINGS["motion"]
DIRECTIONS: dict[str, tuple[int, int]] = {
    "to the left": (-1, 0),
    "to the right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
}


def add_article(name: str) -> str:
    """Return the name with "a" or "an" before it."""
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def describe_scene(scene: Scene, number: int) -> str:
    """Return a sentence such as "Image 2 shows a red cup and a blue key.".

    The things are named from left to right.
    """
    *names, last = (add_article(t.name) for t in scene.sort_by_position())
    listing = f"{', '.join(names)} and {last}" if names else last
    place = "" if scene.place == "clear" else f" and {PLACE_WORDS[scene.place]}"
    return f"Image {number} shows {listing}{place}."


def describe_scenes(scenes: Sequence[Scene]) -> str:
    """Return a sentence on each image, in order."""
    return " ".join(describe_scene(s, number) for number, s in enumerate(scenes, 1))


def describe_position(x: float, y: float) -> str:
    """Return the part of the picture a point is in, such as "at the top left"."""
    row = "top" if y < 0.36 else "bottom" if y > 0.64 else ""
    side = "left" if x < 0.36 else "right" if x > 0.64 else ""
    if not row and not side:
        return "in the middle"
    return "at the " + " ".join(word for word in (row, side) if word)


_EXTREMES = (
    ("x", -1, "furthest to the left"),
    ("x", 1, "furthest to the right"),
    ("y", -1, "at the very top"),
    ("y", 1, "at the very bottom"),
)


def list_referring_phrases(thing: Thing, things: Sequence[Thing]) -> list[str]:
    """Return the noun phrases that fit `thing` and nothing else among `things`.

    The fullest name comes first, as in ["red cup", "cup", "red thing", "large cup"].
    """
    others = [t for t in things if t is not thing]
    phrases = []
    if all(t.label != thing.label for t in others):
        phrases.append(thing.name)
    if all(t.kind != thing.kind for t in others):
        phrases.append(thing.kind)
    if all(t.color != thing.color for t in others):
        phrases.append(f"{thing.color} thing")
    same_kind = [t for t in others if t.kind == thing.kind]
    if same_kind and all(t.is_large != thing.is_large for t in same_kind):
        phrases.append(f"{'large' if thing.is_large else 'small'} {thing.kind}")
    for group, noun in ((same_kind, thing.kind), (others, "thing")):
        for axis, sign, position in _EXTREMES:
            at = sign * getattr(thing, axis)
            if group and all(at > sign * getattr(t, axis) + 0.12 for t in group):
                phrases.append(f"{noun} {position}")
    return phrases
