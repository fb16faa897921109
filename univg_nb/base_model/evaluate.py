"""What the base model can do, on held-out scenes: written beside its weights.

    python -m univg_nb.base_model.evaluate MODEL_FOLDER

Two tests: pointing at a named thing in one picture, which it was taught, and the ten
tasks, which it was not. Both with the request that the paper gives its baselines.
"""

import sys
import tempfile
from pathlib import Path

from univg_nb import io, models, runs
from univg_nb.evaluate.generate import GenerationOptions, generate
from univg_nb.evaluate.score import Benchmark, score
from univg_nb.minimig import export

ITEMS = {"single_test": 600, "test_per_task": 40}
NONE = {"stage1": 0, "stage2": 0, "single": 0, "zero_shot": 0}
TESTS = {"single": "pointing in one picture", "mig_bench": "the ten tasks, macro"}


def evaluate_base(folder: Path, seed: int = 0) -> dict:
    """Scores of the model in ``folder``: {"tests": {name: {n, acc_05, ci_05}}}."""
    config = {**runs.load_scale("tiny")["model"], "name_or_path": str(folder)}
    model, processor = models.load_for_inference(config)
    tests = {}
    with tempfile.TemporaryDirectory() as place:
        files = export.build(place, NONE | ITEMS, seed)
        for key, name in TESTS.items():
            bench = Benchmark.read(files[key], place)
            replies = Path(place) / f"{key}.jsonl"
            options = GenerationOptions("direct", max_new_tokens=32, batch_size=100)
            generate(model, processor, bench.items, replies, options)
            scores = score(bench, replies)
            summary = scores["pooled"]
            if key == "mig_bench":
                tests[name] = {"n": summary["n"], "acc_05": scores["macro_acc_05"]}
                tests[name]["ci_05"] = scores["macro_ci_05"]
                by_task = {t: row["acc_05"] for t, row in scores["tasks"].items()}
                tests[name]["tasks"] = by_task
            else:
                tests[name] = {k: summary[k] for k in ("n", "acc_05", "ci_05")}
    return {"tests": tests, "seed": seed}


def main() -> None:
    """Command line."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m univg_nb.base_model.evaluate MODEL_FOLDER")
    folder = Path(sys.argv[1])
    result = evaluate_base(folder)
    io.write_json(folder / "evaluation.json", result)
    print(result)


if __name__ == "__main__":
    main()
