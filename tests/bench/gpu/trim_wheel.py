"""Leaves shared libraries out of a wheel: bitsandbytes brings them for every CUDA.

python tests/bench/gpu/trim_wheel.py WHEEL --keep NAME.so [--keep NAME.so]
"""

import argparse
import os
import zipfile
from collections.abc import Collection
from pathlib import Path


def trim(wheel: Path, keep: Collection[str]) -> None:
    """Rewrite `wheel` with no other .so files than those named in `keep`."""
    made = wheel.with_suffix(".tmp")
    with (
        zipfile.ZipFile(wheel) as source,
        zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as target,
    ):
        names = source.namelist()
        gone = {n for n in names if n.endswith(".so") and Path(n).name not in keep}
        for missing in set(keep) - {Path(name).name for name in names}:
            raise ValueError(f"{wheel.name} holds no {missing}")
        for name in names:
            if name in gone:
                continue
            data = source.read(name)
            if name.endswith(".dist-info/RECORD"):
                rows = data.decode().splitlines(keepends=True)
                data = "".join(r for r in rows if r.split(",")[0] not in gone).encode()
            target.writestr(source.getinfo(name), data, zipfile.ZIP_DEFLATED, 9)
    os.replace(made, wheel)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--keep", action="append", default=[], metavar="NAME.so")
    options = parser.parse_args()
    trim(options.wheel, options.keep)
