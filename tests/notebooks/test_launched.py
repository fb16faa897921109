"""The course's own training cells as two processes: what one learns, two learn."""

import shutil

import pytest

from univg_nb import run_notebooks, runs

# One batch for both ways. Replies are the likeliest tokens, because each process draws
# random numbers of its own; all of a group are then equal, and the weight decay is what
# parts the policy from its reference, so that there is a KL to learn from.
BATCH = (
    "sft.per_device_train_batch_size=4",
    "sft.gradient_accumulation_steps=2",
    "grpo.per_device_train_batch_size=8",
    "grpo.gradient_accumulation_steps=2",
    "grpo.top_k=1",
    "grpo.learning_rate=1e-3",
    "grpo.lr_scheduler_type=constant",
    "grpo.weight_decay=100.0",
    "grpo.adam_epsilon=1e-4",  # else Adam steps by the rounding of a gradient of 0
)
TWO = ("launch.processes=2", "launch.written_for=1")


def run(folder, names, options):
    arguments = [*names, "--scale", "smoke", "--run-dir", str(folder)]
    for option in options:
        arguments += ["--set", option]
    assert run_notebooks.main(arguments) == 0


@pytest.mark.slow
def test_sft_and_grpo_on_two_processes_equal_one(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    run(two, ["01", "03", "05"], BATCH + TWO)
    shutil.copytree(two / "data", one / "data")
    run(one, ["03", "05"], BATCH)
    for stage, keys in (
        ("sft_lora", ("loss", "grad_norm")),
        ("grpo_none", ("loss", "grad_norm", "reward", "kl")),
    ):
        state = runs.read_json(two / stage / "launch" / "rank-1.json")
        assert (state["state"], state["world_size"]) == ("finished", 2)
        assert state["distributed_type"] == "MULTI_CPU"
        assert not (one / stage / "launch").exists()
        logs = [runs.read_jsonl(run / stage / "metrics.jsonl") for run in (one, two)]
        first, second = ([row[key] for row in log for key in keys] for log in logs)
        assert first == pytest.approx(second, abs=1e-5), stage
    assert logs[0][-1]["kl"] > 1e-6
