"""Run folders: stages that are reused, and the manifest.

A run folder holds one folder for each stage. A stage is finished when its `stage.json`
says so; that file is written last, so an interrupted stage never looks complete. It
records a hash of the stage's configuration and of the stages it was made from: a change
in either makes the stage run again instead of being reused.
"""

import importlib.metadata
import json
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from univg_nb.config import load_scale as load_scale
from univg_nb.config import override as override
from univg_nb.errors import shorten_in_notebooks
from univg_nb.io import config_hash, locked, read_json, set_aside, write_json

PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes")  # shape a result


# ---------------------------------------------------------------- where, with what


def repo_root(start: str | Path = ".") -> Path:
    """Return the nearest folder at or above `start` that has a pyproject.toml.

    That is `start` itself where there is none, as with an installed package.
    """
    here = Path(start).resolve()
    found = (p for p in (here, *here.parents) if (p / "pyproject.toml").is_file())
    return next(found, here)


def resolve_run_dir(run_dir: str | Path, scale: str = "") -> Path:
    """Return the absolute run folder; an empty `run_dir` means runs/SCALE.

    Relative paths count from the repository root, because JupyterLab starts a notebook
    in its own folder.
    """
    return repo_root() / Path(run_dir or Path("runs") / Path(scale).stem).expanduser()


def versions() -> dict[str, str]:
    """Return the versions of Python and of `PACKAGES`, "" for one that is missing."""
    found = {"python": platform.python_version()} | dict.fromkeys(PACKAGES, "")
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def device() -> str:
    """Return the device that torch will use, in words."""
    import torch  # here and not above: readers of artefacts need no torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)"


def measure_speed(seconds: float = 1.0) -> dict[str, float]:
    """Measure this machine for `seconds` each: torch's fp32 products, Python's loops.

    Returns gflops, of products of the tiny model's size with all threads that torch
    uses, and million_steps, of an empty Python loop a second: with them, times of
    different machines compare.
    """
    import torch

    tokens, weights = torch.rand(2048, 192), torch.rand(192, 512)
    products, loops, block = 0, 0, range(100_000)
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        torch.mm(tokens, weights)
        products += 1
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        for _ in block:
            pass
        loops += 1
    flop = 2 * tokens.numel() * weights.size(1)
    return {
        "gflops": round(products * flop / seconds / 1e9, 1),
        "million_steps": round(loops * len(block) / seconds / 1e6, 1),
    }


def record_speed(run_dir: str | Path) -> dict[str, float]:
    """Measure the machine's speed, write it to manifest.json, and return it."""
    path = Path(run_dir) / "manifest.json"
    speed = measure_speed()
    write_json(path, _read_if_there(path) | {"speed": speed})
    return speed


def format_speed(speed: dict[str, float]) -> str:
    """Return what `measure_speed` found, in words."""
    return (
        f"Machine: {speed['gflops']:.0f} GFLOP/s in fp32 products of the model's size, "
        f"{speed['million_steps']:.0f} million steps a second of a Python loop."
    )


def git_hash() -> str:
    """Return the commit of the repository, "+" behind it if files changed; or ""."""
    root = repo_root()
    if not (root / ".git").exists() or shutil.which("git") is None:
        return ""
    describe = ["describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+"]
    command = ["git", "-C", str(root), *describe]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def peak_memory_mb() -> int:
    """Return the largest memory so far of this process or of any child, in MiB."""
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, KiB on Linux
    usage = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(who).ru_maxrss for who in usage) // unit


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _find_kept(folder: Path, wanted: str) -> Path | None:
    """Return the last version of a stage of that hash in its folder of replaced/."""
    ages = {
        (_find_status(marker.parent) == "finished", marker.stat().st_mtime): marker
        for marker in folder.glob(f"{wanted}*/stage.json")
    }
    return ages[max(ages)].parent if ages else None


def _find_status(stage_dir: Path) -> str:
    return _read_if_there(stage_dir / "stage.json").get("status", "")


def record_stage(
    run_dir: str | Path, name: str, seconds: float, group: str = "stages", **facts: Any
) -> None:
    """Write to manifest.json what a stage (or, another group, a notebook) took."""
    path = Path(run_dir) / "manifest.json"
    manifest = _read_if_there(path) | {"versions": versions(), "git": git_hash()}
    facts = {"seconds": round(seconds, 2), "peak_memory_mb": peak_memory_mb(), **facts}
    manifest.setdefault(group, {})[name] = facts
    write_json(path, manifest)


# ---------------------------------------------------------------- stages


@dataclass
class Stage:
    """One stage of a run, with its folder `dir`."""

    run_dir: Path
    name: str
    hash: str  # of its configuration and of the stages it was made from
    done: bool = False
    results: dict[str, Any] = field(default_factory=dict)  # what `finish` was given
    began: float = field(default_factory=time.perf_counter)

    @property
    def dir(self) -> Path:
        """The folder of the stage."""
        return self.run_dir / self.name

    def finish(self, **results: Any) -> dict[str, Any]:
        """Mark the stage finished, record it in the manifest, return its results.

        Raises ValueError if the folder is another process's by now.
        """
        seconds = time.perf_counter() - self.began
        marker = _read_if_there(self.dir / "stage.json")
        if marker.get("hash") != self.hash:
            raise ValueError(
                f"{self.dir} was begun again by another process since this one opened "
                "it; open the stage again"
            )
        marker |= {"status": "finished", "seconds": round(seconds, 2)}
        write_json(self.dir / "stage.json", marker | {"results": results})
        record_stage(self.run_dir, self.name, seconds, hash=self.hash, device=device())
        self.done, self.results = True, results
        return results


@dataclass(frozen=True)
class Run:
    """What every notebook starts from; `start` makes it."""

    scale: str
    dir: Path
    seed: int
    config: dict[str, Any]

    def stage(
        self, name: str, config: Any, fresh: bool = False, needs: Iterable[str] = ()
    ) -> Stage:
        """Open the folder of a stage.

        A finished stage of the same configuration comes back with `.done` True and its
        `.results`; an interrupted one keeps its files, so that training can resume.
        With `fresh`, or when the configuration differs, the old folder is moved to
        replaced/NAME/HASH. A finished one that is kept there comes back when its
        configuration does, unless `fresh`; else an empty one begins.

        Args:
            name: of the stage; may contain slashes.
            config: what decides the result, JSON-like.
            fresh: begin again even if the stage is finished.
            needs: names of stages of this run that this one is made from.

        Raises:
            ValueError: `fresh` is neither True nor False, a stage that it needs is not
                finished, or another process works on this one.
        """
        if not isinstance(fresh, bool):
            raise ValueError(f"FRESH = {fresh!r}: write True or False")
        upstream = {}
        for other in needs:
            if _find_status(self.dir / other) != "finished":
                raise ValueError(
                    f"{self.dir}: {name!r} needs {other!r}, which is not finished; "
                    "run the notebook that makes it first (00_start_here lists them)"
                )
            upstream[other] = read_json(self.dir / other / "stage.json")["hash"]
        wanted = config_hash({"config": config, "needs": upstream})
        folder = self.dir / name
        with locked(folder):
            found = _read_if_there(folder / "stage.json")
            if found.get("hash") != wanted or fresh:
                kept = self.dir / "replaced" / name
                free = found or not folder.exists()
                back = _find_kept(kept, wanted) if free and not fresh else None
                if found or (fresh and folder.is_dir()):
                    set_aside(folder, kept / found.get("hash", "no_stage"))
                if found and not fresh:
                    again = "what was kept is back" if back else "it runs again"
                    print(f"{name}: its configuration changed, so {again}")
                if back:
                    back.replace(folder)
                    found = read_json(folder / "stage.json")
            if found.get("hash") == wanted and not fresh:
                done = found["status"] == "finished"
                return Stage(self.dir, name, wanted, done, found.get("results", {}))
            begun = {
                "name": name,
                "status": "started",
                "hash": wanted,
                "needs": upstream,
                "config": json.loads(json.dumps(config, default=str)),
            }
            write_json(folder / "stage.json", begun)
        return Stage(self.dir, name, wanted)


def check_parameters(scale: Any, run_dir: Any, seed: Any, overrides: Any) -> None:
    """Raise ValueError for a common parameter of a notebook that cannot be meant."""
    if not isinstance(scale, str) or not scale:
        raise ValueError(f'SCALE = {scale!r}: write a name, as "tiny"')
    if not isinstance(run_dir, str | Path):
        raise ValueError(
            f'RUN_DIR = {run_dir!r}: write a folder in quotes, as "runs/mine", or ""'
        )
    if type(seed) is not int or seed < 0:
        raise ValueError(f"SEED = {seed!r}: write a whole number from 0 on, as 1")
    if isinstance(overrides, str):
        raise ValueError(f"OVERRIDES = {overrides!r}: write a list, as [{overrides!r}]")


def start(
    scale: str = "tiny",
    run_dir: str | Path = "",
    seed: int = 0,
    overrides: Iterable[str] = (),
) -> Run:
    """Load the scale, make the run folder, and print one line of versions.

    Args:
        scale: name of a shipped scale or a .yaml file.
        run_dir: the run folder; "" means runs/SCALE. That of another scale raises
            ValueError: its stages would all be replaced.
        seed: of the data and of both trainings; 0 or above.
        overrides: options to set, each as "SECTION.KEY=VALUE".
    """
    shorten_in_notebooks()
    check_parameters(scale, run_dir, seed, overrides)
    seeds = [f"{section}.seed={seed}" for section in ("data", "sft", "grpo")]
    config = load_scale(scale, [*seeds, *overrides])
    folder = resolve_run_dir(run_dir, scale)
    path = folder / "manifest.json"
    manifest = _read_if_there(path)
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
