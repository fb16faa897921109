"""The words of MiniMIG: wordings of the questions, and the sentences of the chains.

A chain is made of what the base model can already do (say what a picture shows, find a
named thing), so the lessons of the base model use the same sentences.
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
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")

# Referring grounding in one picture. The fields are a noun phrase and the place.
FIND = (
    "Find the {}{}.",
    "Locate the {}{}.",
    "Where is the {}{}? Give the box.",
    "Point to the {}{}.",
    "Give the box of the {}{}.",
)
# Fields in braces: `k` is an image's number, `ordinal` the same as a word, `box` a box
# as text, `phrase` a noun phrase.
QUESTIONS: dict[str, tuple[str, ...]] = {
    "diff": (
        "Compare image 1 and image 2. Give the box of the difference.",
        "What is different in these two images? Find it.",
        "Look at both images. One thing is not the same. Where is it?",
        "Find the one thing that changed between image 1 and image 2.",
    ),
    "view_diff": (
        "Image 2 shows the place of image 1 from another view. Find the real"
        " difference in image 2.",
        "The view has changed, but one thing in image 2 is really different."
        " Where is it?",
        "Compare the two views. What is new in image 2? Give its box.",
    ),
    "common_object": (
        "These images share one thing. Find it in image {k}.",
        "One thing is in every image. Where is it in image {k}?",
        "What do all the images have in common? Give its box in image {k}.",
        "All the images share one thing. Find it in the {ordinal} image.",
    ),
    "object_tracking": (
        "The things in these images move. Follow the thing at {box} in image 1 and"
        " find it in image {k}.",
        "The thing at {box} in image 1 moves. Where is it in image {k}?",
        "These are images of moving things. Find the thing that is at {box} in image"
        " 1 in image {k}.",
    ),
    "multi_view": (
        "These images show one place from several views. Find the thing at {box} in"
        " image 1 in image {k}.",
        "The view changes. Where is the thing at {box} in image 1 now, in image {k}?",
        "All the views share the thing at {box} in image 1. Find it in image {k}.",
    ),
    "region": (
        "Image {k} is cut out of image 1. Find its thing in image 1.",
        "Where in image 1 is the thing that image {k} shows?",
        "Image 1 is the whole picture. Find the part that is shown in image {k}.",
        "Find the thing of the {ordinal} image in the first image.",
    ),
    "refer_grounding": (
        "Find the thing of image 1 in image 2.",
        "Where is the thing from image 1 in image 2?",
        "Look at image 1. Find the same thing in image 2.",
        "Image 2 has the thing that image 1 shows. Give its box.",
    ),
    "group_grounding": (
        "Find the area of <|object_ref_start|>{phrase}<|object_ref_end|> in one of"
        " the images.",
        "Which image has <|object_ref_start|>{phrase}<|object_ref_end|>? Give the box.",
        "Give the box of <|object_ref_start|>{phrase}<|object_ref_end|>.",
    ),
    "correspondence": (
        "Find the part in image 2 with the same purpose as the part in the red box"
        " in image 1.",
        "A part in image 1 is marked with a red box. Which part in image 2 is used"
        " in the same way?",
        "Look at the red box in image 1. Find the part in image 2 that does the same.",
    ),
}

REASONING: dict[str, tuple[str, ...]] = {
    "help": (
        "What in image 2 would help you in the place of image 1?",
        "Think of the place in image 1. Which thing in image 2 is needed there?",
        "You are in image 1. What in image 2 do you look for?",
    ),
    "live": (
        "What in image 2 can live in the place of image 1?",
        "Which thing in image 2 is at home in the place of image 1?",
        "Who swims in the place of image 1? Find it in image 2.",
    ),
    "with": (
        "What in image 2 goes with the thing in image 1?",
        "Which thing in image 2 belongs to the thing in image 1?",
        "Find the thing in image 2 that goes together with the thing in image 1.",
    ),
    "use": (
        "What in image 2 does the same work as the thing in image 1?",
        "The thing in image 1 is lost. What in image 2 could you use instead?",
        "Find the thing in image 2 that has the same use as the thing in image 1.",
    ),
}

# Wordings of the zero-shot families, which no training question uses. The released
# sentence around them adds the full stop.
IMPLICIT_USE: tuple[str, ...] = (
    "the thing that {use}",
    "something that {use}",
    "please point out what {use}",
    "which one of these {use}",
)
IMPLICIT_NEED: tuple[str, ...] = (
    "I want to {need}. Point out what I should choose",
    "if you have to {need}, what is best for it",
    "please show me what a person uses to {need}",
)
MOTION: tuple[str, ...] = (
    "the {noun} that moves {direction}",
    "please point out the {noun} going {direction}",
    "which {noun} travels {direction}",
)
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

    Args:
        scene: what image `number` shows; its things are named from left to right.
        number: number of the image, counted from 1.
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
