"""GRPO: weights in any layout, files, exact resume, guards, the released loss."""

import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from grpo_builders import (
    G,
    Interrupt,
    box_text,
    make_config,
    make_samples,
    make_trainer,
    ready_batch,
    sampled_updates,
    scored_batch,
    scripted_update,
    what_was_learned,
)
from interrupted import killed

from univg_nb import io, models
from univg_nb.config import dump
from univg_nb.data import files
from univg_nb.fast.trainer import SharedPrefixGRPOTrainer
from univg_nb.train import grpo, rollouts
from univg_nb.train.difficulty import FORMS


@pytest.fixture(scope="module")
def folder(grpo_folder):
    return grpo_folder


# ---------------------------------------------------------------- weights

TWO = [(G, 1), (G // 2, 2)]  # batch and accumulation of each of two processes


def assert_same_update(made, expected):
    assert made[0] == expected[0]  # weights, advantages, rewards, replies
    assert made[1].keys() == expected[1].keys()
    for key, gradient in expected[1].items():
        error = (made[1][key] - gradient).norm() / gradient.norm()
        assert error < 1e-6, (key, error)


@pytest.fixture(scope="module")
def one_batch(folder, tmp_path_factory):
    """The update of two groups in one batch of one process."""
    return scripted_update(folder, tmp_path_factory.mktemp("2G"), 2 * G, 1)


@pytest.mark.parametrize(("per_device", "accumulation"), [(G, 2), (G // 2, 4)])
def test_T2_weights_and_gradient_do_not_depend_on_the_layout(
    folder, tmp_path, one_batch, per_device, accumulation
):
    """The released mean was over the micro-batch (docs/paper_facts.md#t2)."""
    rows, gradients = one_batch
    assert len({row["weight"] for row in rows}) == len(rows) == 2
    assert gradients
    assert all(g.abs().max() > 0 for n, g in gradients.items() if "default" in n)
    for row in rows:
        expected = math.exp(1 - sum(row["iou"]) / G)
        assert row["weight"] == pytest.approx(expected, abs=1e-5)
    assert_same_update(
        scripted_update(folder, tmp_path, per_device, accumulation), one_batch
    )


@pytest.mark.slow
def test_T2_nor_on_two_processes(family_folders, tmp_path, one_batch):
    """Both processes have replies, and one file has each of them once
    (docs/paper_facts.md#t11). With every family, and with sampled replies too: random
    numbers do not depend on who draws them."""
    script = tmp_path / "two.py"
    script.write_text(
        "import sys, torch\n"
        "from pathlib import Path\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "import grpo_builders as builders\n"
        "for folder in map(Path, sys.argv[2:]):\n"
        "    out = Path(sys.argv[1]) / folder.name\n"
        "    out.mkdir(exist_ok=True)\n"
        f"    for number, layout in enumerate({TWO}):\n"
        "        place = out / str(number)\n"
        "        made = builders.scripted_update(folder, place, *layout)\n"
        "        rank = torch.distributed.get_rank()\n"
        "        torch.save(made, out / f'{number}_{rank}.pt')\n"
        f"    builders.sampled_updates(folder, out / 'sampled', {G})\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += ["--nproc_per_node", "2", str(script), str(tmp_path)]
    subprocess.run(
        [*launch, *map(str, family_folders.values())],
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(grpo.__file__).parents[2])},
    )
    for name, folder in family_folders.items():
        out, expected = tmp_path / folder.name, one_batch
        if name != "qwen2":
            expected = scripted_update(folder, tmp_path / name / "one", 2 * G, 1)
        for number in range(len(TWO)):
            made = [torch.load(out / f"{number}_{rank}.pt") for rank in (0, 1)]
            assert_same_update(made[0], expected)
            assert all(torch.equal(made[0][1][k], g) for k, g in made[1][1].items())
        sampled_updates(folder, tmp_path / name / "alone", 2 * G)
        made = [
            what_was_learned(path)
            for path in (out / "sampled", tmp_path / name / "alone")
        ]
        logs, rollout_rows, _ = zip(*made, strict=True)
        assert rollout_rows[0] == rollout_rows[1] and len(rollout_rows[0]) == 3 * 2
        assert any(len(set(row["replies"])) > 1 for row in rollout_rows[0])
        assert logs[0][-1]["kl"] > 1e-6 and logs[0][-1]["grad_norm"] > 1e-6
        keys = ("reward", "loss", "kl", "grad_norm", "groups/mean_iou")
        values = [[row[key] for row in log for key in keys] for log in logs]
        assert values[0] == pytest.approx(values[1], abs=1e-5), name


def test_unknown_weight_fails_before_any_rollout(folder, tmp_path):
    with pytest.raises(ValueError, match="did you mean 'exp'"):
        make_trainer(folder, tmp_path, keep={"weight": "expo"})


def test_a_weight_of_a_file_trains_from_the_command_line(folder, tmp_path):
    """The paths of a scale count from the repository, an absolute one as it is."""
    path, out = tmp_path / "my_weights.py", tmp_path / "out"
    path.write_text(
        "from univg_nb.train.difficulty import register_weight\n"
        "@register_weight('mine_of_a_file')\n"
        "def phi(m, power):\n    return power + m\n"
    )
    (tmp_path / "scale.yaml").write_text(dump(make_config(folder, power=3.0)))
    files.write(make_samples(folder), tmp_path / "data.json", "stage2_rl")
    command = [str(tmp_path / "scale.yaml"), "--sft-adapter", str(folder / "sft")]
    command += ["--out", str(out), "--data", str(tmp_path / "data.json")]
    command += ["--set", f"grpo.weight={path}:mine_of_a_file"]
    grpo.main(command)
    for row in io.read_jsonl(out / "rollouts.jsonl"):
        assert row["weight"] == pytest.approx(3 + row["mean_iou"], abs=1e-4)
    grpo.main(command)  # it is finished
    path.write_text(path.read_text().replace("power + m", "power - m"))
    with pytest.raises(ValueError, match="a finished training of other settings"):
        grpo.main(command)


def test_T8_temperature_and_reward_weights_take_effect(folder, tmp_path):
    """The released trainer fixed the one and ignored the other
    (docs/paper_facts.md#t8)."""
    cold = make_trainer(folder, tmp_path, temperature=0.01, reward_weights=[1.0, 0.0])
    inputs, mask = scored_batch(cold)
    _, entropy, _ = cold._get_per_token_logps_and_entropies(
        cold.model, **inputs, compute_entropy=True
    )
    assert (entropy * mask).sum() / mask.sum() < 0.5  # at temperature 1: above 5
    text = [[{"role": "assistant", "content": box_text(500)}]] * 2
    row = {"answer": [100, 100, 500, 500], "cot": True, "sample_id": "a", "task": "t"}
    rewards = cold._calculate_rewards([row] * 2, [[]] * 2, text, [[1]] * 2)
    totals = (rewards * cold.reward_weights).sum(1)
    assert rewards.tolist() == [[1.0, 1.0]] * 2 and totals.tolist() == [1.0, 1.0]


def test_T12_the_length_of_an_epoch_counts_no_dropped_prompts(folder, tmp_path):
    """Five prompts, two an update, make two updates, not three
    (docs/paper_facts.md#t12)."""
    trainer = make_trainer(folder, tmp_path, count=5, max_steps=-1, num_train_epochs=1)
    sampler = trainer._get_train_sampler()
    assert len(list(sampler)) == len(sampler) == 4 * G
    assert len(trainer.get_train_dataloader()) == 2


# ---------------------------------------------------------------- the stage


def test_train_writes_what_the_course_reads(folder, tmp_path):
    out = tmp_path / "grpo"
    config = make_config(folder, max_steps=2, beta=0.1)
    summary = grpo.train(
        config, out, make_samples(folder), sft_adapter=folder / "sft", weight="log"
    )
    assert summary["steps"] == 2 and summary == io.read_json(out / "summary.json")
    metrics = io.read_jsonl(out / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2]
    # The reference is the SFT adapter, where the policy starts; then they part.
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-6)
    shares = [metrics[0][f"groups/{name}"] for name in ("hard", "medium", "easy")]
    assert sum(shares) == pytest.approx(1)
    bins = [n for n in ("hard", "medium", "easy") if metrics[0][f"groups/{n}"]]
    for name in bins:
        assert 0 <= metrics[0][f"zero_variance/{name}"] <= 1
        assert metrics[0][f"gradient/{name}"] >= 0
    rows = io.read_jsonl(out / "rollouts.jsonl")
    assert [row["step"] for row in rows] == [1, 1, 2, 2]
    wide = ("replies", "boxes", "status", "iou", "format", "rewards", "advantages")
    for row in rows:
        assert all(len(row[name]) == G for name in wide)
        assert set(row) == {*wide, "step", "sample_id", "task", "mean_iou", "weight"}
        # -ln(0.02 + m) of the group, whatever the untrained model said
        expected = max(0.0, -math.log(0.02 + row["mean_iou"]))
        assert row["weight"] == pytest.approx(expected, abs=1e-4)
    assert io.read_json(out / "adapter" / "adapter_config.json")["r"] == 4
    assert not (out / "adapter" / "ref").exists()
    model, _ = models.load_for_training(config["model"], out / "adapter")
    sft, _ = models.load_for_training(config["model"], folder / "sft")
    assert models.hash_weights(model) == models.hash_weights(sft)
    # Both are of the base alone: one on top of the other would count stage 1 twice.
    assert io.read_json(out / "adapter" / models.BASE_FILE) == models.sample_base(sft)
    with pytest.raises(ValueError, match="An adapter of stage 2 contains stage 1"):
        models.load_for_inference(config["model"], [folder / "sft", out / "adapter"])


def test_the_last_update_is_logged_whatever_logging_steps_is(folder, tmp_path):
    """The summary is made from what is logged."""
    config = make_config(folder, max_steps=2, logging_steps=5)
    job = {"sft_adapter": folder / "sft"}
    summary = grpo.train(config, tmp_path, make_samples(folder), **job)
    assert [row["step"] for row in io.read_jsonl(tmp_path / "metrics.jsonl")] == [2]
    assert summary["reward_first"] == summary["reward_last"]


def test_only_the_adapter_trains(folder, tmp_path):
    trainer = make_trainer(folder, tmp_path)
    trained = [n for n, p in trainer.model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)


@pytest.mark.parametrize(
    ("options", "start"),
    [
        ({}, "sft"),  # a generation for every update, two updates an epoch
        # All language weights, as from the shipped stage 1. Groups without a box are
        # silent: the weight decay is what moves them.
        ({"weight_decay": 0.1}, "base"),
        # Checkpoints fall between the updates that use the same replies.
        (
            {"gradient_accumulation_steps": 2, "steps_per_generation": 4}
            | {"per_device_train_batch_size": G, "num_iterations": 2},
            "sft",
        ),
    ],
)
def test_resume_is_exact(folder, tmp_path, options, start):
    """Weights, sampler, generators, replies to be used again, optimizer, metrics."""
    config = make_config(folder, max_steps=6, **options)
    job = {"sft_adapter": folder / start}
    rows = make_samples(folder)
    grpo.train(config, tmp_path / "whole", rows, **job)
    expected = what_was_learned(tmp_path / "whole")
    config["grpo"] |= {"save_strategy": "steps", "save_steps": 1}
    for last in (3, 4, 5):
        with pytest.MonkeyPatch.context() as patch:
            build = grpo.build_trainer

            def interrupted(*args, build=build, last=last, **kwargs):
                trainer = build(*args, **kwargs)
                trainer.add_callback(Interrupt(last))
                return trainer

            patch.setattr(grpo, "build_trainer", interrupted)
            with pytest.raises(KeyboardInterrupt):
                grpo.train(config, tmp_path / "cut", rows, **job)
    grpo.train(config, tmp_path / "cut", rows, **job)
    made = what_was_learned(tmp_path / "cut")
    for ours, theirs in zip(made, expected, strict=True):
        assert ours == theirs


@pytest.mark.slow
def test_a_kill_in_the_middle_of_an_update_resumes_exactly(folder, tmp_path):
    """Update 3 has sampled, logged its groups and taken its gradient."""
    config = make_config(folder, max_steps=4, save_strategy="steps", save_steps=2)
    job = {"sft_adapter": str(folder / "sft")}
    rows = make_samples(folder)
    grpo.train(config, tmp_path / "whole", rows, **job)
    where = {"signal": "SIGKILL", "method": "_get_grad_norm", "at": 3}
    out = tmp_path / "cut"
    code = killed(tmp_path, "grpo", config, rows, out, options=job, **where)
    assert code == -signal.SIGKILL
    assert {row["step"] for row in io.read_jsonl(out / "rollouts.jsonl")} == {1, 2, 3}
    grpo.train(config, out, rows, **job)
    assert what_was_learned(out) == what_was_learned(tmp_path / "whole")


def test_rollout_rows_hold_boxes_as_scoring_reads_them():
    replies = [box_text(500), "<think>on and on"]
    ones = torch.tensor([1.0, 0.0])
    columns = {"iou": ones, "format": ones, "rewards": 2 * ones}
    columns["advantages"] = torch.tensor([0.7, -0.7])
    weights = torch.tensor([1.6487])
    (row,) = rollouts.make_group_rows(3, [("a", "diff")], weights, replies, columns)
    assert row["boxes"] == [[100, 100, 500, 500], None]
    assert row["status"] == ["ok", "no_answer"]
    assert row["mean_iou"] == 0.5 and row["weight"] == pytest.approx(1.6487)
    assert row["advantages"] == [0.7, -0.7] and row["task"] == "diff"


@pytest.mark.parametrize(
    ("options", "count", "message"),
    [
        ({"num_generations": 1}, 4, "at least 2"),
        (
            {"per_device_train_batch_size": 6},
            4,
            "divisible by num_generations .4..*grpo.per_device_train_b",
        ),
        ({}, 1, "1 training samples, but one generation takes 2 prompts"),
    ],
)
def test_impossible_layouts_say_what_to_change(
    folder, tmp_path, options, count, message
):
    with pytest.raises(ValueError, match=message):
        grpo.grpo_config(make_config(folder, **options), tmp_path, count)


def test_a_missing_picture_of_the_last_row_is_named_before_the_training(
    folder, tmp_path, monkeypatch
):
    rows = make_samples(folder)
    rows[-1] = replace(rows[-1], images=(str(tmp_path / "gone.png"),))
    monkeypatch.setattr(models, "load_for_training", None)
    with pytest.raises(ValueError, match=r"sample 's3' .*gone\.png does not exist"):
        grpo.train(make_config(folder), tmp_path, rows, sft_adapter=folder / "sft")
    assert not list(tmp_path.iterdir())


def test_a_training_is_never_replaced_unless_asked(folder, tmp_path):
    config, rows, out = make_config(folder), make_samples(folder), tmp_path / "grpo"
    job = {"sft_adapter": folder / "sft"}
    summary = grpo.train(config, out, rows, **job)
    assert grpo.train(config, out, rows, **job) == summary
    with pytest.raises(ValueError, match=r"finished training .*now weight: log"):
        grpo.train(config, out, rows, weight="log", **job)
    with pytest.raises(ValueError, match="its samples, or what it starts from"):
        grpo.train(config, out, rows, sft_adapter=folder / "base")
    grpo.train(config, out, rows, weight="log", fresh=True, **job)
    assert (tmp_path / "replaced" / "grpo" / "rollouts.jsonl").is_file()


def test_a_loss_that_is_not_finite_stops_with_advice(folder, tmp_path):
    trainer = make_trainer(folder, tmp_path)
    batch = ready_batch(trainer)
    batch["advantages"] = batch["advantages"] * torch.nan
    with pytest.raises(FloatingPointError, match="learning_rate"):
        trainer.compute_loss(trainer.model, batch)
    weight = next(p for p in trainer.model.parameters() if p.requires_grad)
    weight.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="diverged"):
        scored_batch(trainer)


def test_no_reward_at_all_stops_with_advice(folder, tmp_path):
    trainer = make_trainer(
        folder, tmp_path, max_steps=9, keep={"max_zero_updates": 3}
    )  # an untrained model: nothing it writes is a box
    with pytest.raises(ValueError, match=r"last 3 generations.*stage 1 longer"):
        trainer.train()
    assert trainer.state.global_step == 2


def test_an_exploding_kl_is_stopped(folder, tmp_path):
    trainer = make_trainer(folder, tmp_path)
    batch = ready_batch(trainer)
    ref = batch["ref_per_token_logps"]
    one = ref.clone()
    one[0, 0] += 11.0
    trainer.compute_loss(trainer.model, batch | {"ref_per_token_logps": one})
    far = {"ref_per_token_logps": ref + 11.0}
    with pytest.raises(FloatingPointError, match="KL explodes"):
        trainer.compute_loss(trainer.model, batch | far)
    assert torch.equal(batch["ref_per_token_logps"], ref)  # used again: left alone


def test_the_module_is_a_command_with_the_same_exit_codes(tmp_path):
    command = [sys.executable, "-m", "univg_nb.train.grpo", "no-such-scale"]
    done = subprocess.run(
        [*command, "--sft-adapter", "a"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    said = done.stderr.splitlines()[-1]  # bitsandbytes may say something before
    assert said.startswith("error: ") and "no-such-scale" in said


# ---------------------------------------------------------------- comparison forms


def test_comparison_forms_are_one_option_each(folder, tmp_path):
    rewards = torch.tensor([[0.0, 0.0, 0.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    advantages = {}
    for name, options in {
        "std": {},
        "std_free": {"scale_rewards": "none"},
        "mad": {"rescale": "mad"},
        "drop": {"rescale": "drop_silent"},
    }.items():
        config = make_config(folder, weight="none", **options)
        trainer = grpo.build_trainer(
            config, tmp_path, make_samples(folder), folder / "sft"
        )
        trainer.model.train()
        trainer._calculate_rewards = scripted_rewards(trainer, rewards)
        made = trainer._generate_and_score_completions(
            next(iter(trainer.get_train_dataloader()))
        )
        advantages[name] = made["advantages"].view(2, G)
    centered = rewards - rewards.mean(1, keepdim=True)
    std = centered[0] / (1.0 + 1e-4)
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(advantages["std"][0], std, **close)
    torch.testing.assert_close(advantages["std_free"][0], centered[0], **close)
    # TRL's 1e-4 stands beside a rescaled deviation here
    mad = {"rtol": 5e-4, "atol": 1e-5}
    torch.testing.assert_close(advantages["mad"][0], centered[0] / 0.75, **mad)
    torch.testing.assert_close(advantages["drop"][0], 2 * std, **close)
    assert all(not made[1].any() for made in advantages.values())


def scripted_rewards(trainer, totals):
    """A _calculate_rewards that gives these totals, all as format reward."""

    def rewards(inputs, prompts, completions, ids):
        values = totals.flatten()
        trainer.gathered_rewards = torch.stack([torch.zeros_like(values), values], 1)
        return trainer.gathered_rewards

    return rewards


# ---------------------------------------------------------------- the released loss

RELEASED = {
    "exp": lambda m: math.exp(1 - m),
    "power": lambda m: 1.05 - m,
    "log_released": lambda m: -math.log(0.02 + m),
}


@pytest.fixture(scope="module")
def loss_trainer(folder, tmp_path_factory):
    trainer = make_trainer(folder, tmp_path_factory.mktemp("loss"))
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("form", RELEASED)
def test_the_trainers_loss_is_the_released_formula(
    loss_trainer, monkeypatch, form, on_policy
):
    """The objective (docs/paper_facts.md#weight) written out for each group of a batch
    of three: value and gradient of the trainer's own loss on random log-probs,
    advantages and IoUs."""
    trainer, steps = loss_trainer, 12
    monkeypatch.setattr(trainer, "form", FORMS[form])
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)

        def random(*shape, generator=generator):
            return torch.rand(*shape, generator=generator, dtype=torch.float64)

        logps = (-3 * random(3 * G, steps)).requires_grad_()
        old = logps.detach() + (0 if on_policy else random(3 * G, steps) - 0.5)
        ref = logps.detach() + random(3 * G, steps) - 0.5
        lengths = torch.randint(1, steps + 1, (3 * G,), generator=generator)
        mask = (torch.arange(steps) < lengths[:, None]).long()
        # up to 0.9: the released log weight is negative above 0.98 (T3)
        iou, advantages = 0.9 * random(3 * G), 2 * random(3 * G) - 1
        trainer.gathered_rewards = torch.stack([iou, iou], 1)
        rows = [{"answer": [0.0, 0.0, 500.0, 500.0]}] * (3 * G)
        weights = trainer._compute_weights(rows, iou.view(3, G))
        batch = {
            "prompt_ids": torch.zeros(3 * G, 1, dtype=torch.long),
            "prompt_mask": torch.ones(3 * G, 1, dtype=torch.long),
            "completion_ids": torch.zeros(3 * G, steps, dtype=torch.long),
            "completion_mask": mask,
            "group": torch.arange(3).repeat_interleave(G),
            "advantages": advantages * trainer._take_rows(weights),
            "mean_iou": trainer._take_rows(trainer.mean_iou),
            "old_per_token_logps": old,
            "ref_per_token_logps": ref,
        }
        monkeypatch.setattr(
            SharedPrefixGRPOTrainer,
            "_get_per_token_logps_and_entropies",
            lambda *_args, logps=logps, **_kwargs: (logps, logps.detach(), None),
        )
        ours = trainer.compute_loss(trainer.model, batch)
        theirs = 0.0
        for group in torch.arange(3 * G).view(3, G):
            phi = RELEASED[form](iou[group].mean().item())
            for row in group.tolist():
                token = 0.0
                for t in range(lengths[row]):
                    rho = torch.exp(logps[row, t] - old[row, t])
                    a = advantages[row]
                    d = ref[row, t] - logps[row, t]
                    k3 = torch.exp(d) - d - 1
                    clipped = rho.clamp(0.8, 1.2)
                    token += -torch.minimum(rho * a, clipped * a) * phi + 0.04 * k3
                theirs += token / lengths[row] / (3 * G)
        assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)
        gradients = [torch.autograd.grad(x, logps)[0] for x in (ours, theirs)]
        torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)


def test_gradient_by_bin_is_the_logits_gradient(folder, tmp_path):
    """The closed form against autograd, where old log-probs clip some tokens."""
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 7, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(5) < torch.tensor([5, 3, 1])[:, None]
    logps = logits.log_softmax(-1)[..., 2]
    old = logps.detach() + 0.4 * torch.randn(3, 5, dtype=torch.float64)
    advantages = torch.tensor([1.5, -0.7, 0.0], dtype=torch.float64)
    ratio, a = torch.exp(logps - old), advantages[:, None]
    value = torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
    (gradient,) = torch.autograd.grad((value * mask).sum(), logits)
    expected = gradient.abs().sum(-1).sum(1) / mask.sum(1)
    made = rollouts.compute_logit_gradient(
        logps.detach(), old, advantages, mask, (0.2, 0.2)
    )
    torch.testing.assert_close(made, expected)
    assert made[2] == 0


def test_rewards_and_log_read_replies_in_the_models_own_unit(folder, tmp_path):
    """Images of 64 x 64 pixels: the box is (6,6),(32,32) in a pixel model's targets."""
    section = {"name_or_path": str(folder / "base"), "boxes": "pixels"}
    config = make_config(folder) | {"model": section}
    log = tmp_path / "rollouts.jsonl"
    samples = [
        replace(one, question=f"{one.question} like (0,0),(250,250) in image 1")
        for one in make_samples(folder)
    ]
    trainer = grpo.build_trainer(config, tmp_path, samples, folder / "sft", log)
    rows = [trainer.train_dataset[0]] * 2
    assert rows[0]["answer"] == [100, 100, 500, 500]
    assert "like (0,0),(16,16) in image 1" in rows[0]["prompt"][0]["content"]
    texts = ["(6,6),(32,32)", "(100,100),(500,500)"]
    replies = [[{"role": "assistant", "content": text}] for text in texts]
    right, wrong = trainer._calculate_rewards(rows, [[]] * 2, replies, [[1]] * 2)
    assert right.tolist() == [pytest.approx(0.97, abs=0.02), 1.0]
    assert wrong.tolist() == [0.0, 1.0]
    trainer.train()
    for row in io.read_jsonl(log):
        assert "pictures" not in row and len(row["replies"]) == len(row["boxes"])
