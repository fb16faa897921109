"""What a shipped model can do on held-out scenes, written beside its weights.

Four tests: pointing at a named thing in one picture, the ten tasks, and the two
zero-shot families. With `--groups`, GRPO's groups as the model would start them: eight
sampled replies to each of so many items of the ten tasks.
"""

import argparse
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, ProcessorMixin

from univg_nb import config, errors, io, models
from univg_nb.evaluate import scoring
from univg_nb.evaluate.generate import GenerationOptions, generate
from univg_nb.evaluate.predictions import read_predictions
from univg_nb.evaluate.score import Benchmark, score
from univg_nb.minimig import export
from univg_nb.train.difficulty import BINS, difficulty_bin

SIZES = {"single_test": 600, "test_per_task": 100, "zero_shot": 200}
TESTS = {
    "single": "pointing in one picture",
    "mig_bench": "the ten tasks, macro",
    "lisa": "LISA family, zero-shot",
    "video": "video family, zero-shot",
}
GROUP = 8  # replies of a group, as in the paper


def evaluate_model(
    folder: Path,
    options: GenerationOptions,
    seed: int = 0,
    sizes: Mapping[str, int] = SIZES,
    groups: int = 0,
) -> dict[str, Any]:
    """Return the scores of a model.

    Args:
        folder: model folder.
        options: how it is asked.
        seed: of the test items.
        sizes: number of test items, as for `minimig.export.build`; the others are 0.
        groups: items of each task for which a group of replies is sampled.

    Returns:
        {"tests": {name: {n, acc_05, ci_05, ...}}, "seed": seed, "style": ...}, and
        "groups" if there are any.
    """
    section = config.load_scale("tiny")["model"] | {"name_or_path": str(folder)}
    model, processor = models.load_for_inference(section)
    made: dict[str, Any] = {"seed": seed, "style": options.style, "tests": {}}
    with tempfile.TemporaryDirectory() as data:
        files = export.build(data, dict.fromkeys(export.SIZES, 0) | dict(sizes), seed)
        for key, name in TESTS.items():
            bench = Benchmark.read(files[key], data)
            if not bench.items:
                continue
            predictions = Path(data) / f"{key}.jsonl"
            generate(model, processor, bench.items, predictions, options)
            scores = score(bench, predictions)
            row = {k: scores["pooled"][k] for k in ("n", "acc_05", "ci_05")}
            if key == "mig_bench":
                row |= {"acc_05": scores["macro_acc_05"]}
                row |= {"ci_05": scores["macro_ci_05"]}
                row["tasks"] = {t: one["acc_05"] for t, one in scores["tasks"].items()}
            made["tests"][name] = row
        if groups:
            bench = Benchmark.read(files["mig_bench"], data)
            ious = sample_groups(model, processor, bench, options, groups)
            made["groups"] = describe_groups(ious)
    return made


def sample_groups(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    bench: Benchmark,
    options: GenerationOptions,
    groups: int,
) -> np.ndarray:
    """Return the IoU of sampled replies to the first `groups` items of each task.

    Shape (items, GROUP), at temperature 1 as in GRPO.
    """
    seen: Counter[str] = Counter()
    chosen = []
    for index, item in enumerate(bench.items):
        seen[item.task] += 1
        chosen += [index] if seen[item.task] <= groups else []
    columns = []
    for seed in range(GROUP):
        how = replace(options, temperature=1.0, seed=seed)
        path = bench.records.with_name(f"sampled_{seed}.jsonl")
        generate(model, processor, bench.items, path, how, indices=chosen)
        replies = read_predictions(path)
        scored = scoring.score_items(bench.items, replies, indices=chosen)
        columns.append([item.iou for item in scored])
    return np.array(columns).T


def describe_groups(ious: np.ndarray) -> dict[str, Any]:
    """Return how hard groups are, from the IoU of their replies, (groups, G)."""
    means = ious.mean(axis=1)  # (groups,)
    levels = [difficulty_bin(mean) for mean in means]
    return {
        "n": len(means),
        "expected_iou": round(float(means.mean()), 4),
        "best_of_group_05": float((ious.max(axis=1) >= 0.5).mean()),
        **{name: levels.count(name) / len(levels) for name in BINS},
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate a model folder and write evaluation.json into it."""
    parser = argparse.ArgumentParser(
        prog="python -m univg_nb.base_model.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python -m univg_nb.base_model.evaluate runs/base/model",
    )
    add = parser.add_argument
    add("model", type=Path, help="model folder")
    add("--style", default="direct", help="direct for a base model, univg for others")
    add("--groups", type=int, default=0, help="groups sampled of each task")
    add("--seed", type=int, default=0, help="of the test items")
    add("--out", type=Path, help="default: MODEL/evaluation.json")
    options = parser.parse_args(arguments)
    how = GenerationOptions(options.style, max_new_tokens=128, batch_size=64)
    made = evaluate_model(options.model, how, options.seed, groups=options.groups)
    io.write_json(options.out or options.model / "evaluation.json", made)
    print(made)


if __name__ == "__main__":
    raise SystemExit(errors.run(main))
