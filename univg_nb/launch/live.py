"""What a launched training shows while it runs: a bar, and in a notebook its curves."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from IPython import get_ipython
from IPython.display import display
from tqdm.auto import tqdm

from univg_nb.io import read_jsonl

CURVES = {"sft": ("loss", "mean_token_accuracy"), "grpo": ("reward", "kl")}
EVERY = 15.0  # seconds between two drawings


class Live:
    """Reads out/metrics.jsonl, as the children write it."""

    def __init__(self, out: Path, stage: str) -> None:
        self.out, self.stage = out, stage
        self.bar: Any = None
        self.figure: Any = None
        self.drawn = 0.0

    def update(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Move the bar to the last update; draw the curves now and then."""
        training = [state for state in states if "max_steps" in state]
        metrics = self.out / "metrics.jsonl"
        if not training or not metrics.is_file():
            return
        if self.bar is None:
            first, total = training[0]["first_step"], training[0]["max_steps"]
            world, kind = training[0]["world_size"], training[0]["distributed_type"]
            name = f"{self.out.name}, {world} x {kind}"
            self.bar = tqdm(total=total, initial=first, desc=name)
        rows = read_jsonl(metrics)
        if not rows:
            return
        self.bar.update(rows[-1]["step"] - self.bar.n)
        shown = {k: f"{rows[-1][k]:.3g}" for k in ("loss", "reward") if k in rows[-1]}
        self.bar.set_postfix(shown, refresh=False)
        if get_ipython() is not None and time.monotonic() - self.drawn > EVERY:
            self.draw(rows)

    def draw(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """The curves so far, in place of the last ones."""
        from univg_nb.figures import plots

        keys = [key for key in CURVES[self.stage] if key in rows[-1]]
        figure = plots.training_curves({self.out.name: rows}, keys)
        if self.figure is None:
            self.figure = display(figure, display_id=True)
        else:
            self.figure.update(figure)
        self.drawn = time.monotonic()

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self.bar is not None:
            self.bar.close()
