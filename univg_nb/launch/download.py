"""Fetch the released data and weights: ``python -m univg_nb download full --to data``.

The sizes are shown and confirmed before anything is fetched. A call that was cut off
resumes where it stopped. Files of the hub are checked against its checksums. What a
program cannot fetch is listed with the reason.
"""

import shutil
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.file_download import http_get

from univg_nb.config import (
    add_scale_arguments,
    load_scale,
    make_parser,
    output_folder,
)
from univg_nb.io import read_asset, write_text

LISTED = read_asset("downloads.yaml")
COCO = LISTED["coco"]
IGNORED = list(LISTED["ignored"])


def fetch(source: Mapping[str, Any], to: Path, commit: str) -> None:
    """Fetch a repository and check it, unless that was done for this commit.

    Raises OSError if a file arrived broken; it is removed, so that it is fetched again.
    """
    mark = to / ".verified" / source["repo_id"].replace("/", "--")
    if mark.is_file() and mark.read_text() == commit:
        return
    snapshot_download(**source, ignore_patterns=IGNORED)
    checked = HfApi().verify_repo_checksums(**source)
    broken = [checked.verified_path / bad["path"] for bad in checked.mismatches]
    for path in broken:
        path.resolve().unlink()  # the content, if this is a link into the hub's cache
        path.unlink(missing_ok=True)
    if broken:
        names = ", ".join(map(str, broken))
        raise OSError(f"{names}: wrong checksum, removed; call again")
    write_text(mark, commit)


def fetch_url(url: str, path: Path, size: int) -> None:
    """Fetch a file of known size, resuming what an earlier call left.

    It gets its name when it is complete. Raises OSError if its size is not `size`.
    """
    if path.is_file() and path.stat().st_size == size:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with part.open("ab") as out:
        http_get(url, out, resume_size=out.tell(), expected_size=size)
    part.replace(path)


def url_size(url: str) -> int:
    """Return the size of a file on the web in bytes."""
    request = urllib.request.Request(url, method="HEAD")
    with urllib.request.urlopen(request, timeout=30) as reply:
        return int(reply.headers["Content-Length"])


def download(model: str, to: Path, confirmed: bool) -> int:
    """Show the sizes, ask unless `confirmed`, fetch; list what is to be done by hand.

    The weights of `model` go to the hub's own cache, where `from_pretrained` looks.
    Returns 0, or 1 if the user declined. Raises OSError if there is too little room or
    a file could not be fetched.
    """
    coco = url_size(COCO)
    planned, needed = [], coco
    print(f"{'source':<56}{'files':>7}{'GB':>10}")
    for one in (*LISTED["datasets"], {"repo": model, "what": "weights"}):
        source = {"repo_id": one["repo"], "repo_type": "model"}
        if "folder" in one:
            source |= {"repo_type": "dataset", "local_dir": to / one["folder"]}
        found = snapshot_download(**source, ignore_patterns=IGNORED, dry_run=True)
        size = sum(file.file_size or 0 for file in found)
        name = f"{one['repo']} ({one['what']})"
        print(f"{name:<56}{len(found):>7}{size / 1e9:>10.2f}")
        planned.append((source, found[0].commit_hash))
        needed += sum(file.file_size or 0 for file in found if file.will_download)
    print(f"{f'{COCO} (stage 2)':<56}{1:>7}{coco / 1e9:>10.2f}")
    place = to.absolute() if to.exists() else Path.cwd()
    free = shutil.disk_usage(place).free
    print(f"{needed / 1e9:.2f} GB to fetch, {free / 1e9:.2f} GB free at {place}")
    if free < needed:
        raise OSError("not enough room; free some, or choose another disk (DATA=)")
    if not confirmed and not _ask():
        return 1
    for source, commit in planned:
        fetch(source, to, commit)
    fetch_url(COCO, to / "images" / "coco_train2014.zip", coco)
    print(f"\n{LISTED['by_hand']}", end="")
    return 0


def _ask() -> bool:
    print("fetch all this? [y/N] ", end="", flush=True)
    return sys.stdin.readline().strip().lower() == "y"  # nobody there: no


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command `download`; return 0, or 1 if the user declined."""
    parser = make_parser(
        "download",
        "Fetch the released data and a scale's weights.",
        "full --to data",
    )
    add_scale_arguments(parser)
    parser.add_argument(
        "--to", type=output_folder, default="data", help="default: data"
    )
    parser.add_argument("--yes", action="store_true", help="do not ask")
    options = parser.parse_args(arguments)
    config = load_scale(options.scale, options.set)
    if config["data"].get("source") != "released":
        raise ValueError(
            f"scale {options.scale} needs no download; SCALE=small or SCALE=full"
        )
    return download(config["model"]["name_or_path"], options.to, options.yes)
