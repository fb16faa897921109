"""What things are good for: which thing answers a need, in one place.

An implicit instruction has to have one right answer, so every need lists the kinds
that answer it and the kinds a person might accept too (``rivals``); scenes made for
that need never show a rival.
"""

from dataclasses import dataclass

from univg_nb.minimig.pictograms import KINDS


@dataclass(frozen=True)
class Need:
    """A need that image 1 shows: by its ``place``, or by a thing of ``kind``.

    ``answers`` are the kinds that help, ``rivals`` those that would do as well and so
    stay away. ``reason`` is the chain's sentence on why ``{}`` (the kind) is right.
    ``group`` picks the questions (`phrases.REASONING`).
    """

    answers: tuple[str, ...]
    reason: str
    group: str
    place: str = "clear"
    kind: str | None = None
    rivals: tuple[str, ...] = ()


NEEDS: dict[str, Need] = {
    "rain": Need(
        ("umbrella",), "In the rain {} keeps you dry.", "help", "rain",
        rivals=("house", "tree", "car")),
    "night": Need(
        ("lamp", "candle"), "In the dark {} gives light.", "help", "night",
        rivals=("house",)),
    "water": Need(
        ("boat",), "On the water {} floats.", "help", "water", rivals=("fish",)),
    "sun": Need(
        ("tree",), "In the hot sun {} gives shade.", "help", "sun",
        rivals=("umbrella", "house", "car")),
    "sea life": Need(
        ("fish",), "In the water {} swims.", "live", "water"),
    "lock": Need(
        ("key",), "To open a lock you need {}.", "with", kind="lock",
        rivals=("house", "hammer")),
    "key": Need(
        ("lock",), "A key opens {}.", "with", kind="key", rivals=("house", "car")),
    "tree": Need(
        ("apple",), "On a tree grows {}.", "with", kind="tree",
        rivals=("house", "chair", "cart")),
    "lamp": Need(
        ("candle",), "A lamp gives light, and so does {}.", "use", kind="lamp"),
    "candle": Need(
        ("lamp",), "A candle gives light, and so does {}.", "use", kind="candle"),
    "cart": Need(
        ("car",), "A cart has wheels, and so has {}.", "use", kind="cart",
        rivals=("boat",)),
    "car": Need(
        ("cart",), "A car has wheels, and so has {}.", "use", kind="car",
        rivals=("boat",)),
}  # fmt: skip

# Kinds that might serve the use or need of a kind (`Kind.use`, `Kind.need`) as well:
# an instruction by use is asked only where none of them is in the picture.
SAME_USE: dict[str, frozenset[str]] = {
    kind: frozenset(others)
    for kind, others in {
        "umbrella": ("house", "tree", "car"),
        "key": ("lock", "hammer"),
        "lock": ("key",),
        "fish": ("boat",),
        "boat": ("fish",),
        "tree": ("umbrella", "house"),
        "lamp": ("candle",),
        "candle": ("lamp",),
        "car": ("cart",),
        "cart": ("car", "boat"),
        "house": ("car", "boat"),
    }.items()
} | {kind: frozenset() for kind in ("cup", "clock", "hammer", "apple", "chair")}
assert set(SAME_USE) == set(KINDS), "a kind without an entry in SAME_USE"


def answers_use(asked: str, shown: str) -> bool:
    """Whether a thing of kind ``shown`` could answer an instruction for ``asked``."""
    return shown == asked or shown in SAME_USE[asked]
