"""Draws the pictures and questions that the step `tiny` trains on.

    python tests/bench/gpu/data.py FOLDER [--dry]

A script of its own: the processes that draw import it again, and it imports little.
"""

import sys
from pathlib import Path

from univg_nb.minimig import export

if __name__ == "__main__":
    sizes = {"stage2": 1600}
    if "--dry" in sys.argv:
        sizes = {"stage2": 24}
    export.build(Path(sys.argv[1]), dict.fromkeys(export.SIZES, 0) | sizes)
