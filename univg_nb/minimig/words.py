"""Phrases shared by the base model's lessons and by the reasoning chains.

A chain is made of what the base model can already do (say what a picture shows,
find a named thing), so both use the same words.
"""

from collections.abc import Sequence

from univg_nb.minimig.scenes import Scene, Thing

PLACE_WORDS = {
    "clear": "the weather is clear",
    "rain": "it is raining",
    "night": "it is night",
    "water": "there is water",
    "sun": "the sun is hot",
}


def article(name: str) -> str:
    """The name with "a" or "an" before it."""
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


def join(parts: Sequence[str]) -> str:
    """Joins parts: "x", "x and y", or "x, y and z"."""
    if len(parts) < 2:
        return "".join(parts)
    return ", ".join(parts[:-1]) + " and " + parts[-1]


def listing(things: Sequence[Thing]) -> str:
    """What stands in a picture, from left to right: "a red cup and a blue key"."""
    ordered = sorted(things, key=lambda t: (t.x, t.y))
    return join([article(t.name) for t in ordered]) or "nothing"


def description(scene: Scene, number: int) -> str:
    """One sentence on a picture: "Image 2 shows a red cup and a blue key."."""
    place = "" if scene.place == "clear" else f" and {PLACE_WORDS[scene.place]}"
    return f"Image {number} shows {listing(scene.things)}{place}."


def where(thing: Thing) -> str:
    """The part of the picture a thing stands in, as in "at the top left"."""
    row = "top" if thing.y < 0.36 else "bottom" if thing.y > 0.64 else ""
    side = "left" if thing.x < 0.36 else "right" if thing.x > 0.64 else ""
    if not row and not side:
        return "in the middle"
    return "at the " + " ".join(word for word in (row, side) if word)


def referring_phrases(thing: Thing, things: Sequence[Thing]) -> list[str]:
    """The noun phrases that name ``thing`` and nothing else among ``things``.

    Fullest name first; e.g. ["red cup", "cup", "red thing", "large cup"].
    """
    others = [t for t in things if t is not thing]
    phrases = []
    if all((t.kind, t.colour) != (thing.kind, thing.colour) for t in others):
        phrases.append(thing.name)
    if all(t.kind != thing.kind for t in others):
        phrases.append(thing.kind)
    if all(t.colour != thing.colour for t in others):
        phrases.append(f"{thing.colour} thing")
    same_kind = [t for t in others if t.kind == thing.kind]
    if same_kind and all(t.large != thing.large for t in same_kind):
        phrases.append(f"{'large' if thing.large else 'small'} {thing.kind}")
    for group, noun in ((same_kind, thing.kind), (others, "thing")):
        if not group:
            continue
        if all(thing.x < t.x - 0.12 for t in group):
            phrases.append(f"{noun} furthest to the left")
        if all(thing.x > t.x + 0.12 for t in group):
            phrases.append(f"{noun} furthest to the right")
        if all(thing.y < t.y - 0.12 for t in group):
            phrases.append(f"{noun} at the very top")
        if all(thing.y > t.y + 0.12 for t in group):
            phrases.append(f"{noun} at the very bottom")
    return phrases
