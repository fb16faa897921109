"""The design of a study: its arms, seeds and items, read from a YAML file.

`assets/study.yaml` is the course's and explains the keys.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import reduce
from pathlib import Path
from typing import Any, Literal

from univg_nb import config, io
from univg_nb.minimig.items import TASKS

DEFAULT = io.ASSETS / "study.yaml"
PLAN = "plan.json"  # in the run folder: what `study plan` found
RATES = "rates.json"  # in the run folder: what `study rates` found
START, BASE = "start", "base"  # what an arm may begin from


@dataclass(frozen=True)
class Arm:
    """What is trained and how it is asked; without `train` it is only evaluated.

    `begins` is `from` in the file, which explains the rest.
    """

    name: str
    train: Literal["sft", "grpo"] | None = None
    begins: Literal["base", "start"] = "base"
    questions: int | None = None
    set: tuple[str, ...] = ()
    chains: bool = True
    style: Literal["univg", "direct", "plain"] = "univg"
    constant_of: str | None = None
    rejection: int = 0


@dataclass(frozen=True)
class Goal:
    """The difference that a study must see: of which arms, how large, how surely."""

    pair: tuple[str, str]
    points: float = 1.0
    power: float = 0.8
    most_items: int = 10_000


@dataclass(frozen=True)
class Rates:
    """How learning rates are chosen: of which arms, times which factors."""

    arms: tuple[str, ...] = ()
    factors: tuple[float, ...] = (0.25, 0.5, 1, 2, 4)


@dataclass(frozen=True)
class Study:
    """A study; `read_study` makes it. `items` are of all tasks together.

    `pair_seeds` are the seeds of the two arms whose difference must be seen, `seeds`
    those of the others. `chosen` has the learning rates of `study rates`, by arm.
    """

    scale: str
    arms: dict[str, Arm]
    data: dict[str, Any]
    plan: Goal
    set: tuple[str, ...] = ()
    start: str = "shipped"
    seeds: int = 5
    pair_seeds: int = 0
    items: int = 2000
    claims: dict[str, str] = field(default_factory=dict)
    rates: Rates = Rates()
    chosen: dict[str, float] = field(default_factory=dict)

    @property
    def per_task(self) -> int:
        """Test items of each task, so that there are at least `items`."""
        return -(-self.items // len(TASKS))

    def count_seeds(self, arm: Arm) -> int:
        """Return how many seeds an arm is trained with."""
        return max(self.seeds, self.pair_seeds if arm.name in self.plan.pair else 0)

    def find_rate(self, arm: Arm) -> float | None:
        """Return the learning rate that was chosen for an arm, if any was.

        It is that of the arm of `rates` that is trained the same way from the same
        start, else of the first that is trained the same way.
        """
        like = [n for n in self.chosen if self.arms[n].train == arm.train]
        like.sort(key=lambda name: self.arms[name].begins != arm.begins)
        return self.chosen[like[0]] if like else None

    def make_config(self, arm: Arm, seed: int) -> dict[str, Any]:
        """Return the scale as this arm and seed set it."""
        own = [f"{arm.train}.seed={seed}"] if arm.train else []
        if rate := self.find_rate(arm):
            own.append(f"{arm.train}.learning_rate={rate!r}")
        options = [*self.set, *arm.set, *own]
        return reduce(config.override, options, config.load_scale(self.scale))

    def list_jobs(
        self, only: Collection[str] = (), seeds: Collection[int] = ()
    ) -> list[tuple[Arm, int]]:
        """List arms with seeds, seed by seed; what is not trained has seed 0 only."""
        for name in only:
            if name not in self.arms:
                hint = config.suggestion(name, self.arms)
                raise ValueError(f"the study has no arm {name!r}{hint}")
        chosen = [arm for arm in self.arms.values() if not only or arm.name in only]
        jobs = [(arm, 0) for arm in chosen if not arm.train]
        numbers = {arm.name: self.count_seeds(arm) for arm in chosen}
        for seed in seeds or range(max(numbers.values(), default=0)):
            here = [a for a in chosen if a.train and (seeds or seed < numbers[a.name])]
            jobs += [(arm, seed) for arm in here]
        return jobs


def read_study(path: str | Path = DEFAULT, run_dir: Path | None = None) -> Study:
    """Read a study, and what is in `run_dir`: learning rates, and a plan.

    The plan may raise the seeds of its pair and the number of items.

    Raises ValueError, naming the file and the key, for what a study cannot have.
    """
    content = config.load_yaml(io.read_text(path), str(path))
    arms: dict[str, Arm] = {}
    for name, given in content["arms"].items():
        renamed = {"begins" if k == "from" else k: v for k, v in given.items()}
        arms[name] = _make(Arm, {"name": name} | renamed, f"{path}: arm {name}")
        if arms[name].constant_of not in (None, *arms):
            raise ValueError(f"{path}: arm {name}: constant_of names no arm above it")
    goal = _make(Goal, content["plan"], f"{path}: plan")
    rates = _make(Rates, content.get("rates", {}), f"{path}: rates")
    if unknown := [n for n in rates.arms if n not in arms or not arms[n].train]:
        raise ValueError(f"{path}: rates: no trained arm {', '.join(unknown)}")
    parts = {"arms": arms, "plan": goal, "rates": rates}
    study = _make(Study, content | parts, str(path))
    file = run_dir / PLAN if run_dir else None
    plan = io.read_json(file) if file and file.is_file() else {}
    numbers = {"items": max(study.items, plan.get("items", 0))}
    numbers["pair_seeds"] = max(study.pair_seeds, plan.get("seeds", 0))
    file = run_dir / RATES if run_dir else None
    found = io.read_json(file)["chosen"] if file and file.is_file() else {}
    return replace(study, **numbers, chosen=found)


def _make(kind: type, values: Mapping[str, Any], where: str) -> Any:
    known = {one.name: one.type for one in fields(kind)}
    for key, value in values.items():
        if key not in known:
            hint = config.suggestion(key, known)
            raise ValueError(f"{where}: unknown key {key}{hint}")
        if not config.accepts(known[key], value) and not isinstance(value, list):
            wanted = config.describe(known[key])
            raise ValueError(f"{where}: {key} = {value!r}; expected {wanted}")
    lists = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return kind(**lists)
