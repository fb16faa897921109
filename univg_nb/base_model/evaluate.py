"""What the base model can do on held-out scenes, written beside its weights.

Two tests: pointing at a named thing in one picture, which it was taught, and the ten
tasks, which it was not. Both use the request that the paper gives its baselines.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from univg_nb import config, io, models
from univg_nb.evaluate.generate import GenerationOptions, generate
from univg_nb.evaluate.score import Benchmark, score
from univg_nb.minimig import export

SIZES = dict.fromkeys(export.SIZES, 0) | {"single_test": 600, "test_per_task": 40}
TESTS = {"single": "pointing in one picture", "mig_bench": "the ten tasks, macro"}


def evaluate_base(
    folder: Path, seed: int = 0, sizes: dict[str, int] = SIZES
) -> dict[str, Any]:
    """Return the scores of a model.

    Args:
        folder: model folder.
        seed: of the test items.
        sizes: number of test items, as for `minimig.export.build`.

    Returns:
        {"tests": {name: {n, acc_05, ci_05, ...}}, "seed": seed}.
    """
    section = config.load_scale("tiny")["model"] | {"name_or_path": str(folder)}
    model, processor = models.load_for_inference(section)
    options = GenerationOptions("direct", max_new_tokens=32, batch_size=100)
    tests = {}
    with tempfile.TemporaryDirectory() as data:
        files = export.build(data, sizes, seed)
        for key, name in TESTS.items():
            bench = Benchmark.read(files[key], data)
            predictions = Path(data) / f"{key}.jsonl"
            generate(model, processor, bench.items, predictions, options)
            scores = score(bench, predictions)
            tests[name] = {k: scores["pooled"][k] for k in ("n", "acc_05", "ci_05")}
            if key == "mig_bench":
                tests[name]["acc_05"] = scores["macro_acc_05"]
                tests[name]["ci_05"] = scores["macro_ci_05"]
                by_task = {t: row["acc_05"] for t, row in scores["tasks"].items()}
                tests[name]["tasks"] = by_task
    return {"tests": tests, "seed": seed}


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate a model folder and write evaluation.json into it."""
    parser = argparse.ArgumentParser(
        prog="python -m univg_nb.base_model.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python -m univg_nb.base_model.evaluate runs/base/model",
    )
    parser.add_argument("model", type=Path, help="model folder")
    folder = parser.parse_args(arguments).model
    result = evaluate_base(folder)
    io.write_json(folder / "evaluation.json", result)
    print(result)


if __name__ == "__main__":
    main()
