"""Where the images of a records file are, without opening them."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from univg_nb.samples import GroundingSample


def missing_images(
    samples: Sequence[GroundingSample], indices: Iterable[int]
) -> dict[int, str]:
    """{index: its first image path that is no file}, where there is one."""
    known: dict[str, bool] = {}
    found: dict[int, str] = {}
    for i in indices:
        for path in samples[i].images:
            if path not in known:
                known[path] = Path(path).is_file()
            if not known[path]:
                found.setdefault(i, path)
    return found


def flatten_image_paths(
    items: Sequence[GroundingSample], indices: Iterable[int], folder: str | Path
) -> list[GroundingSample]:
    """For images that do not exist at their path, take folder/<file name> instead.

    Serves a benchmark of which a few images lie loose in one folder. Only the items at
    `indices` are looked at. Raises ValueError if two different paths would become the
    same file: which one it is cannot be known.
    """
    became: dict[Path, str] = {}
    result = list(items)
    for i in indices:
        paths = []
        for path in items[i].images:
            loose = Path(folder) / Path(path).name
            if not Path(path).is_file() and loose.is_file():
                if became.setdefault(loose, path) != path:
                    raise ValueError(
                        f"--flat-images: {loose} could be {became[loose]} or {path} "
                        f"(item {items[i].id!r}); lay the images out as the records say"
                    )
                path = str(loose)
            paths.append(path)
        result[i] = dataclasses.replace(items[i], images=tuple(paths))
    return result
