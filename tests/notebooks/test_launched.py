"""The course's own training cells as two processes: what one learns, two learn."""

import pytest

from univg_nb import io, runs
from univg_nb.launch import runner, worker
from univg_nb.train import grpo, sft

# One batch for both ways. No reply at this scale has a box: the weight decay is what
# parts the policy from its reference, so that there is a KL to learn from.
BATCH = (
    "sft.per_device_train_batch_size=4",
    "sft.gradient_accumulation_steps=2",
    "grpo.per_device_train_batch_size=8",
    "grpo.gradient_accumulation_steps=2",
    "grpo.learning_rate=1e-3",
    "grpo.lr_scheduler_type=constant",
    "grpo.weight_decay=100.0",
    "grpo.adam_epsilon=1e-4",  # else Adam steps by the rounding of a gradient of 0
)
TWO = ("launch.processes=2", "launch.written_for=1")


def by_one_process(stage, out):
    """What the notebook asked two processes for in `stage`, trained by this one."""
    request = io.read_json(stage / "launch" / "request.json")
    config = request["config"]
    del config["launch"]
    for option in BATCH:  # the launcher had spread the batch over the two
        config = runs.override(config, option)
    train = {"sft": sft.train, "grpo": grpo.train}[request["stage"]]
    train(config, out, worker.rows_of(request["rows"]), **request["options"])


@pytest.mark.slow
def test_sft_and_grpo_on_two_processes_equal_one(tmp_path):
    two = tmp_path / "two"
    arguments = ["01", "02", "03", "05", "--scale", "smoke", "--run-dir", str(two)]
    for option in BATCH + TWO:
        arguments += ["--set", option]
    assert runner.main(arguments) == 0
    for name, keys in (
        ("sft_lora", ("loss", "grad_norm")),
        # TRL's `kl` is a mean over micro-batches of means over their tokens: where
        # replies differ in length it depends on the layout, which the loss does not.
        ("grpo_none", ("loss", "grad_norm", "reward")),
    ):
        state = io.read_json(two / name / "launch" / "rank-1.json")
        assert (state["state"], state["world_size"]) == ("finished", 2)
        assert state["distributed_type"] == "MULTI_CPU"
        by_one_process(two / name, tmp_path / name)
        logs = [io.read_jsonl(run / name / "metrics.jsonl") for run in (two, tmp_path)]
        first, second = ([row[key] for row in log for key in keys] for log in logs)
        assert first == pytest.approx(second, abs=1e-5), name
    assert logs[0][-1]["kl"] > 1e-6
    groups = [
        io.read_jsonl(run / "grpo_none" / "rollouts.jsonl") for run in (two, tmp_path)
    ]
    replies = [[(g["sample_id"], g["replies"]) for g in run] for run in groups]
    assert replies[0] == replies[1] and len(replies[0]) == 4
