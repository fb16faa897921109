"""Draws the pictures and questions that the step `tiny` trains on.

    python tests/bench/gpu/data.py FOLDER [--dry]

A script of its own: the processes that draw import it again, and it imports little.
"""

import sys
from pathlib import Path

from univg_nb.minimig import export

if __name__ == "__main__":
    sizes = {"stage1": 1200, "stage2": 800, "single": 100}
    if "--dry" in sys.argv:
        sizes = {"stage1": 24, "stage2": 24, "single": 0}
    export.build(Path(sys.argv[1]), dict.fromkeys(export.SIZES, 0) | sizes)
