"""Run folders: atomic files, JSONL, stages that are reused, and the manifest.

A run folder (DESIGN sec. 7) holds one folder per stage. A stage is finished when its
`stage.json` says so; that file is written last, so an interrupted stage never looks
whole. It records a hash of the stage's configuration and of the stages it was made
from: a change in either makes the stage run again instead of being reused.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from univg_nb.config import check, dump, load_scale, override

__all__ = [
    "Run",
    "Stage",
    "append_jsonl",
    "check",
    "config_hash",
    "dump",
    "load_scale",
    "override",
    "read_json",
    "read_jsonl",
    "record_stage",
    "repo_root",
    "resolve_run_dir",
    "stage",
    "start",
    "write_json",
    "write_text",
]

PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes")


# ---------------------------------------------------------------- files


def write_text(path: str | Path, text: str) -> None:
    """Write `text` so that `path` holds either the old or the whole new content."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: str | Path, obj: Any) -> None:
    """Write `obj` as indented JSON, atomically. NaN is refused: it is not JSON."""
    write_text(path, json.dumps(obj, indent=1, ensure_ascii=False, allow_nan=False))


def read_json(path: str | Path) -> Any:
    """Read a JSON file; ValueError names the file and line if it is malformed."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}: malformed JSON ({error.msg}); "
            "repair the file or delete it and run its stage again"
        ) from error


def append_jsonl(path: str | Path, row: dict[str, Any]) -> None:
    """Append one row, after cutting off what an interrupted write left at the end."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
    with open(path, "a+b") as handle:
        end = handle.seek(0, os.SEEK_END)
        if end:
            handle.seek(end - 1)
            if handle.read(1) != b"\n":
                handle.seek(0)
                handle.truncate(handle.read().rfind(b"\n") + 1)
        handle.write(line)


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """All whole rows; a last line without its newline is a cut-off write: left out.

    Raises ValueError with file and line number for a malformed line elsewhere.
    """
    rows = []
    with open(path, encoding="utf-8", errors="replace") as handle:
        for number, line in enumerate(handle, start=1):
            if not line.endswith("\n"):
                break
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}: malformed JSON ({error.msg}); "
                    "delete the line or the file and run its stage again"
                ) from error
    return rows


def config_hash(obj: Any) -> str:
    """16 hex digits that change when any value in a JSON-like object changes."""
    text = json.dumps(obj, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ---------------------------------------------------------------- where, with what


def repo_root(start: str | Path | None = None) -> Path:
    """The nearest folder at or above `start` (default: here) with a pyproject.toml;
    `start` itself where there is none, as with an installed package."""
    here = Path(start or ".").resolve()
    for folder in (here, *here.parents):
        if (folder / "pyproject.toml").is_file():
            return folder
    return here


def resolve_run_dir(run_dir: str | Path, scale: str = "") -> Path:
    """Absolute run folder: relative paths count from the repository root, because
    JupyterLab starts a notebook in its own folder; "" means runs/<scale>."""
    if not run_dir and not scale:
        raise ValueError("RUN_DIR and SCALE are both empty; set RUN_DIR to a folder")
    return repo_root() / Path(run_dir or Path("runs") / Path(scale).stem).expanduser()


def versions() -> dict[str, str]:
    """Installed versions of Python and of the libraries that shape a result; "" for one
    that is not installed (bitsandbytes, where nothing is quantized)."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return found


def device() -> str:
    """The device torch will use, in words."""
    import torch  # here and not above: readers of artefacts need no torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"


def git_hash() -> str:
    """Commit of the repository, "+" behind it when files changed since; "" if none."""
    root = repo_root()
    if not (root / ".git").exists() or shutil.which("git") is None:
        return ""
    head = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"],
        capture_output=True,
        text=True,
    )
    if head.returncode:  # a repository without a commit
        return ""
    changed = subprocess.run(
        ["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"],
        capture_output=True,
        text=True,
    )
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def peak_memory_mb() -> int:
    """Largest resident memory so far of this process or of any child, MiB."""
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB on Linux
    usage = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(who).ru_maxrss for who in usage) // unit


def record_stage(
    run_dir: str | Path,
    name: str,
    seconds: float,
    group: str = "stages",
    **facts: Any,
) -> None:
    """Write what a stage (or, group "notebooks", a notebook) took to manifest.json."""
    path = Path(run_dir) / "manifest.json"
    manifest = read_json(path) if path.is_file() else {}
    manifest["versions"] = versions()
    manifest["git"] = git_hash()
    facts = {"seconds": round(seconds, 2), "peak_memory_mb": peak_memory_mb(), **facts}
    manifest.setdefault(group, {})[name] = facts
    write_json(path, manifest)


# ---------------------------------------------------------------- stages


@dataclass
class Stage:
    """One stage of a run: `.done`, `.dir`, `.results`, and `.finish(**results)`."""

    run_dir: Path
    name: str
    hash: str
    done: bool = False
    results: dict[str, Any] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)

    @property
    def dir(self) -> Path:
        return self.run_dir / self.name

    def finish(self, **results: Any) -> dict[str, Any]:
        """Mark the stage finished, record it in the manifest, return its results."""
        seconds = time.perf_counter() - self.began
        marker = read_json(self.dir / "stage.json")
        marker |= {"status": "finished", "seconds": round(seconds, 2)}
        write_json(self.dir / "stage.json", marker | {"results": results})
        record_stage(self.run_dir, self.name, seconds, hash=self.hash, device=device())
        self.done, self.results = True, results
        return results

    def __enter__(self) -> "Stage":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to undo: without finish() the marker keeps saying "started"."""


def stage(
    run_dir: str | Path,
    name: str,
    config: Any,
    fresh: bool = False,
    needs: Iterable[str] = (),
) -> Stage:
    """Open the stage folder run_dir/name for `config` (anything JSON-like).

    A finished stage of the same configuration comes back with `.done` True and its
    `.results`; an interrupted one keeps its files, so that training can resume; with
    `fresh`, or when the configuration differs, the old folder is moved to
    run_dir/replaced/ and an empty one begins. `needs` names stages of this run that
    this one is made from; ValueError if one of them is not finished.
    """
    run_dir = Path(run_dir)
    upstream = {}
    for other in needs:
        marker = run_dir / other / "stage.json"
        found = read_json(marker) if marker.is_file() else {}
        if found.get("status") != "finished":
            raise ValueError(
                f"{run_dir}: stage {name!r} needs {other!r}, which is not finished "
                "there; run the notebook that makes it first (00_start_here lists them)"
            )
        upstream[other] = found["hash"]
    wanted = config_hash({"config": config, "needs": upstream})
    folder = run_dir / name
    marker = folder / "stage.json"
    if marker.is_file():
        found = read_json(marker)
        if found["hash"] == wanted and not fresh:
            done = found["status"] == "finished"
            return Stage(run_dir, name, wanted, done, found.get("results", {}))
        aside = run_dir / "replaced" / name
        shutil.rmtree(aside, ignore_errors=True)
        aside.parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder, aside)
        if not fresh:
            print(f"{name}: its configuration changed, so it runs again")
    begun = {"name": name, "status": "started", "hash": wanted, "needs": upstream}
    write_json(marker, begun | {"config": json.loads(json.dumps(config, default=str))})
    return Stage(run_dir, name, wanted)


@dataclass(frozen=True)
class Run:
    """What every notebook starts from; see start()."""

    scale: str
    dir: Path
    seed: int
    config: dict[str, Any]

    def stage(
        self,
        name: str,
        config: Any,
        fresh: bool = False,
        needs: Iterable[str] = (),
    ) -> Stage:
        """stage() in this run's folder."""
        return stage(self.dir, name, config, fresh, needs)


def start(
    scale: str = "tiny",
    run_dir: str | Path = "",
    seed: int = 0,
    overrides: Iterable[str] = (),
) -> Run:
    """Load the scale, set `seed` for data and training, make the run folder, and
    print one line of versions.

    Raises ValueError for an unknown scale, and for a run folder of another scale:
    its stages would all be replaced.
    """
    config = load_scale(scale)
    for section in ("data", "sft", "grpo"):
        config[section]["seed"] = seed
    for assignment in overrides:
        config = override(config, assignment)
    folder = resolve_run_dir(run_dir, scale)
    path = folder / "manifest.json"
    manifest = read_json(path) if path.is_file() else {}
    if manifest.get("scale", scale) != scale:
        raise ValueError(
            f"{folder} holds a run at scale {manifest['scale']!r}, not {scale!r}; "
            f"set RUN_DIR to another folder (empty: runs/{Path(scale).stem})"
        )
    manifest |= {"scale": scale, "seed": seed, "config_hash": config_hash(config)}
    manifest |= {"versions": versions(), "device": device(), "git": git_hash()}
    write_json(path, manifest)
    used = " · ".join(f"{name} {number}" for name, number in versions().items())
    print(f"{used} · {device()} · scale {scale}, seed {seed} · {folder}")
    return Run(scale, folder, seed, config)
