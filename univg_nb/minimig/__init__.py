"""MiniMIG: a drawn world with the ten tasks of MIG-Bench, small enough for a CPU.

`items.make` draws one item from a seed, `export.build` writes the files of a run in the
released formats. A new task is an entry of `items.TASKS`.
"""

from univg_nb.minimig.export import build, save_images
from univg_nb.minimig.items import TASKS, make

__all__ = ["TASKS", "build", "make", "save_images"]
