"""Fetch the released data and weights: python -m univg_nb download full --to data

Sizes are shown and agreed to before anything is fetched. A call that was cut off goes
on where it stopped. Files that the hub has a checksum for are checked against it. What
cannot be fetched by a program is listed with the reason.
"""

import argparse
import hashlib
import os
import shutil
import sys
import urllib.request
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from tqdm.auto import tqdm

from univg_nb.config import load_scale
from univg_nb.io import write_text

BLOCK = 2**20


@dataclass(frozen=True)
class Source:
    """A repository of the hub, and where it goes: a folder below --to, or ("") the
    hub's own cache, where from_pretrained looks for weights."""

    repo: str
    kind: str  # "dataset" or "model"
    folder: str
    what: str


DATA = (
    Source("GD-ML/UniVG-R1-data", "dataset", ".", "released JSON files"),
    Source("Michael4933/MGrounding-630k", "dataset", "images", "training images"),
    Source("Michael4933/MIG-Bench", "dataset", "images", "MIG-Bench images"),
    Source("SuleBai/UniVG-R1-zeroshot", "dataset", "zero_shot_images", "zero-shot"),
)
COCO = "http://images.cocodataset.org/zips/train2014.zip"
BY_HAND = (
    "unpack what came as archives; paths in the JSON files count from data.image_root "
    "(their layout is not documented by the authors: run the audit with --image-root)",
    "ReasonSeg (LISA), LLMSeg-40k, ReVOS and ReasonVOS from their own projects, if "
    "zero_shot_images does not have them: video and image licences, some behind forms",
    "RefCOCO/+/g annotations (refer): the authors' evaluation files are not released",
)


@dataclass(frozen=True)
class Remote:
    """One file of a source. sha256: "" where the hub has none (small text files)."""

    source: Source
    name: str
    size: int
    sha256: str


def remote_files(api: HfApi, source: Source) -> list[Remote]:
    """The files of a repository with sizes and checksums."""
    found = api.repo_info(source.repo, repo_type=source.kind, files_metadata=True)
    return [
        Remote(source, f.rfilename, f.size or 0, f.lfs.sha256 if f.lfs else "")
        for f in found.siblings
    ]


def table(files: Iterable[Remote], extra: Iterable[tuple[str, int]] = ()) -> str:
    """What would be fetched, by source, in GB."""
    sizes: dict[str, list[int]] = {}
    for file in files:
        sizes.setdefault(f"{file.source.repo} ({file.source.what})", []).append(
            file.size
        )
    for name, size in extra:
        sizes[name] = [size]
    lines = [f"{'source':<56}{'files':>7}{'GB':>10}"]
    lines += [f"{k:<56}{len(v):>7}{sum(v) / 1e9:>10.2f}" for k, v in sizes.items()]
    total = sum(map(sum, sizes.values()))
    return "\n".join([*lines, f"{'in all':<63}{total / 1e9:>10.2f}"])


def sha256(path: Path) -> str:
    """Of a file, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def fetch(file: Remote, to: Path) -> Path:
    """Fetch one file, or find it fetched, and check it. ValueError if it is broken."""
    options = {"repo_type": file.source.kind}
    if file.source.folder:
        options["local_dir"] = str(to / file.source.folder)
    path = Path(hf_hub_download(file.source.repo, file.name, **options))
    mark = path.with_name(f".{path.name}.sha256")
    known = mark.read_text() if mark.is_file() else ""
    if file.sha256 and known != file.sha256:
        found = sha256(path)
        if found != file.sha256:
            path.unlink()
            raise ValueError(
                f"{path}: sha256 {found}, the hub says {file.sha256}; the file was "
                "removed, call again"
            )
        if file.source.folder:  # the hub's cache is named by content: nothing to mark
            write_text(mark, found)
    return path


def url_size(url: str) -> int:
    """Bytes of a file on the web."""
    request = urllib.request.Request(url, method="HEAD")
    with urllib.request.urlopen(request, timeout=30) as reply:
        return int(reply.headers["Content-Length"])


def fetch_url(url: str, path: Path, size: int) -> None:
    """Fetch a file of known size, going on after what an earlier call left. It gets
    its name when it is whole. ValueError if its size is not `size`."""
    if path.is_file() and path.stat().st_size == size:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    have = part.stat().st_size if part.is_file() else 0
    if have < size:
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"})
        with urllib.request.urlopen(request, timeout=60) as reply:
            resumed = reply.status == 206  # 200: the server sends all of it again
            with (
                open(part, "ab" if resumed else "wb") as out,
                tqdm(
                    total=size, initial=have * resumed, unit="B", unit_scale=True
                ) as b,
            ):
                while block := reply.read(BLOCK):
                    out.write(block)
                    b.update(len(block))
    if part.stat().st_size != size:
        raise ValueError(
            f"{part} has {part.stat().st_size} bytes, {url} has {size}; call again"
        )
    os.replace(part, path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; 0 done, 1 a file failed or was declined, 2 a wrong call."""
    parser = argparse.ArgumentParser(prog="python -m univg_nb download")
    parser.add_argument("scale", help="small or full: whose weights to fetch")
    parser.add_argument("--to", type=Path, default=Path("data"))
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument("--list", action="store_true", help="sizes only")
    options = parser.parse_args(arguments)
    try:
        config = load_scale(options.scale)
        model = config["model"]["name_or_path"]
        if config["data"].get("source") != "released":
            raise ValueError(
                f"scale {options.scale} needs no download; SCALE=small or SCALE=full"
            )
        return download(model, options.to, options.yes, options.list)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        print(f"error: {error}\nwhat is there stays; call again", file=sys.stderr)
        return 1


def download(model: str, to: Path, yes: bool, only_list: bool) -> int:
    """Show the sizes, ask, fetch; what is left to do by hand comes last."""
    api = HfApi()
    weights = Source(model, "model", "", "weights")
    files = [f for source in (*DATA, weights) for f in remote_files(api, source)]
    coco = url_size(COCO)
    print(table(files, [(f"{COCO} (stage 2, no checksum published)", coco)]))
    needed = sum(file.size for file in files) + coco
    place = to if to.exists() else Path.cwd()
    free = shutil.disk_usage(place).free
    print(f"{free / 1e9:.2f} GB free at {place.absolute()}")
    if only_list:
        return 0
    if free < needed:
        raise ValueError("not enough room; free some, or choose another disk (DATA=)")
    if not yes and input("fetch all this? [y/N] ").strip().lower() != "y":
        return 1
    for file in tqdm(files, desc="files"):
        fetch(file, to)
    fetch_url(COCO, to / "images" / "coco_train2014.zip", coco)
    print("\nstill to be done by hand:")
    print("\n".join(f"  - {line}" for line in BY_HAND))
    return 0


if __name__ == "__main__":
    sys.exit(main())
