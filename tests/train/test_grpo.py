"""GRPO: weights in any layout, shared prompts, banned tokens, files, guards."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from interrupted import killed
from PIL import Image
from transformers import LogitsProcessorList, TrainerCallback

from univg_nb import io, models
from univg_nb.base_model import architecture
from univg_nb.data.sample import GroundingSample
from univg_nb.fast import (
    attention as attention_module,
)
from univg_nb.fast import (
    sampling,
)
from univg_nb.fast import (
    trainer as trainer_module,
)
from univg_nb.fast.attention import SEGMENTS
from univg_nb.fast.folded import folded
from univg_nb.fast.prompts import EncodedBatch
from univg_nb.fast.sampling import VISION_TOKENS
from univg_nb.train import grpo, grpo_trainer, rollouts
from univg_nb.train.difficulty import difficulty_weight
from univg_nb.train.final_norm import find_trained_norm, load_with_trained_norm

G = 4
COLOURS = ["red", "blue", "green", "black"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A Qwen2-VL far smaller than the shipped one, an SFT adapter, and images."""
    out = tmp_path_factory.mktemp("grpo")
    tokenizer = architecture.train_tokenizer(
        ["find the red cup 0123456789 <think></think>"] * 3
    )
    config = architecture.make_config(tokenizer)
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size = 64, 96
    text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads = 2, 2, 1
    text.layer_types = text.layer_types[:2]
    vision.depth, vision.embed_dim, vision.num_heads, vision.hidden_size = 1, 32, 2, 64
    torch.manual_seed(0)
    model = models.AutoModelForImageTextToText.from_config(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(out / "base")
    architecture.build_processor(tokenizer).save_pretrained(out / "base")
    lora = models.add_lora(model, {"r": 4, "lora_alpha": 8})
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    lora.save_pretrained(out / "sft")
    for number, colour in enumerate(COLOURS):
        picture = Image.new("RGB", (64, 64), colour)
        picture.paste("white", (8 * number, 8, 8 * number + 20, 40))
        picture.save(out / f"{number}.png")
    return out


def make_samples(folder: Path, count: int = 4) -> list[GroundingSample]:
    """Prompts of different lengths: 1 to 3 images, single-image mode every third."""
    return [
        GroundingSample(
            id=f"s{i}",
            task="refer" if i % 3 == 0 else "diff",
            images=tuple(str(folder / f"{(i + j) % 4}.png") for j in range(1 + i % 3)),
            question="find the red cup " * (1 + i % 2) + str(i),
            answer=(100, 100, 500, 500),
            cot=bool(i % 3),
        )
        for i in range(count)
    ]


def make_config(folder: Path, **grpo_options) -> dict:
    section = {
        "num_generations": G,
        "beta": 0.04,
        "max_completion_length": 6,
        "per_device_train_batch_size": 2 * G,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
    }
    return {
        "model": {"name_or_path": str(folder / "base")},
        "data": {},
        "sft": {"adapter": "lora"},
        "grpo": section | grpo_options,
        "evaluate": {},
    }


def make_trainer(folder: Path, out: Path, count: int = 4, keep=None, **options):
    """A trainer ready to train; `keep` are options of DifficultyGRPOTrainer."""
    return grpo.build_trainer(
        make_config(folder, **options),
        out,
        make_samples(folder, count),
        folder / "sft",
        **(keep or {}),
    )


def box_text(side: int) -> str:
    return f"<think>a</think><answer>(100,100),({side},{side})</answer>"


class Scripted(grpo_trainer.DifficultyGRPOTrainer):
    """Samples fixed replies, so that any layout sees the same ones."""

    def _generate_single_turn(self, prompt_ids, *_args, **_kwargs):
        first = self.accelerator.process_index * len(prompt_ids)
        texts = [
            # each group its own difficulty, by its prompt, and each reply its own box
            box_text((500, 400, 300, 150)[(first + row) % G] + sum(ids) % 7 * 10)
            for row, ids in enumerate(prompt_ids)
        ]
        ids = self._tokenizer(texts)["input_ids"]
        return [row + [self._tokenizer.eos_token_id] for row in ids], None


# ---------------------------------------------------------------- weights


def scripted_update(folder, out, per_device, accumulation):
    """(rollout rows, gradient of each adapter matrix) of one update, in float64."""
    config = make_config(
        folder,
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=1e9,
    )
    config["model"]["dtype"] = "float64"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "DifficultyGRPOTrainer", Scripted)
        log = out / "rollouts.jsonl"
        trainer = grpo.build_trainer(
            config, out, make_samples(folder), folder / "sft", log, weight="exp"
        )
    # The reference moves away from the policy: the KL has a gradient too.
    for name, parameter in trainer.model.named_parameters():
        if ".ref." in name:
            torch.manual_seed(len(name))
            parameter.data += 0.05 * torch.randn_like(parameter)
    gradients = {}

    class Catch(TrainerCallback):
        def on_pre_optimizer_step(self, *_args, model=None, **_kwargs):
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    gradients[name] = parameter.grad.clone()

    trainer.add_callback(Catch())
    trainer.train()
    return io.read_jsonl(log), gradients


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
    """PF sec. 9, T2: the released mean was over the micro-batch, not the group."""
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
def test_T2_nor_on_two_processes(folder, tmp_path, one_batch):
    """Also T11: both processes have replies, and one file has each of them once."""
    layouts = [(G, 1), (G // 2, 2)]
    script = tmp_path / "two.py"
    script.write_text(
        "import sys, torch\n"
        "from pathlib import Path\n"
        f"sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]\n"
        "import test_grpo\n"
        "folder, out = map(Path, sys.argv[1:])\n"
        f"for number, layout in enumerate({layouts}):\n"
        "    made = test_grpo.scripted_update(folder, out / str(number), *layout)\n"
        "    rank = torch.distributed.get_rank()\n"
        "    torch.save(made, out / f'{number}_{rank}.pt')\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    subprocess.run(
        [*launch, "--nproc_per_node", "2", str(script), str(folder), str(tmp_path)],
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(grpo.__file__).parents[2])},
    )
    for number in range(len(layouts)):
        made = [torch.load(tmp_path / f"{number}_{rank}.pt") for rank in (0, 1)]
        assert_same_update(made[0], one_batch)
        assert all(torch.equal(made[0][1][k], g) for k, g in made[1][1].items())


def test_loss_is_the_weighted_surrogate_plus_an_unweighted_kl(folder, tmp_path):
    trainer = make_trainer(folder, tmp_path, keep={"weight": "power"})
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    batch = trainer._prepare_inputs(
        next(iter(trainer.get_train_dataloader()))
    )  # 2G rows
    generator = torch.Generator().manual_seed(0)
    shape = batch["completion_ids"].shape
    advantages = torch.randn(shape[0], generator=generator)
    phi = difficulty_weight(torch.tensor([0.1, 0.9]), "power").repeat_interleave(G)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    seen = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    fields = ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")
    with torch.no_grad():
        logps, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, seen, shape[1], **{f: batch[f] for f in fields}
        )
        old = logps + 0.5 * torch.randn(shape, generator=generator)  # the clip bites
        ref = logps + 0.3 * torch.randn(shape, generator=generator)
        made = trainer.compute_loss(
            trainer.model,
            batch
            | {"advantages": phi * advantages}
            | {"old_per_token_logps": old, "ref_per_token_logps": ref},
        )
        ratio, a = torch.exp(logps - old), advantages[:, None]
        surrogate = torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a)
        kl = torch.exp(ref - logps) - (ref - logps) - 1
        mask = batch["completion_mask"]
        token = -phi[:, None] * surrogate + 0.04 * kl
        expected = ((token * mask).sum(1) / mask.sum(1)).mean()
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-6)


def test_unknown_weight_fails_before_any_rollout(folder, tmp_path):
    with pytest.raises(ValueError, match="did you mean 'exp'"):
        make_trainer(folder, tmp_path, keep={"weight": "expo"})


# ---------------------------------------------------------------- shared prompts


def scored_batch(trainer):
    """One rollout's tensors, as `_get_per_token_logps_and_entropies` takes them."""
    trainer.model.train()
    rows = next(iter(trainer.get_train_dataloader()))
    batch = trainer._generate_and_score_completions(rows)
    fields = ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")
    return {
        "input_ids": torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
        "attention_mask": torch.cat(
            [batch["prompt_mask"], batch["completion_mask"]], 1
        ),
        "logits_to_keep": batch["completion_ids"].size(1),
        **{name: batch[name] for name in fields},
    }, batch["completion_mask"]


@pytest.mark.parametrize("batch_size", [2 * G, 3])
def test_shared_rows_equal_trl_in_value_and_gradient(folder, tmp_path, batch_size):
    trainer = make_trainer(folder, tmp_path)
    assert trainer.shared_forward and trainer.shared_rollout
    inputs, mask = scored_batch(trainer)
    made = {}
    for shared in (True, False):
        trainer.shared_forward = shared
        trainer.model.zero_grad()
        logps, entropy, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, **inputs, batch_size=batch_size, compute_entropy=True
        )
        (logps * mask).pow(2).sum().backward()
        gradient = torch.cat(
            [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
        )
        made[shared] = (logps * mask).detach(), (entropy * mask).detach(), gradient
    *ours, gradient = made[True]
    *theirs, expected = made[False]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (gradient - expected).norm() < 1e-4 * expected.norm()


class Greedy:
    """Puts all probability on the most likely token."""

    def __call__(self, _ids, scores):
        best = torch.full_like(scores, -torch.inf)
        return best.scatter(1, scores.argmax(1, keepdim=True), 0.0)


def test_shared_rollout_follows_generate(folder, tmp_path):
    trainer = make_trainer(folder, tmp_path, count=5)
    conversations = [
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": i} for i in sample.images]
                + [{"type": "text", "text": sample.question}],
            }
        ]
        for sample in make_samples(folder, 5)
    ]
    batch = EncodedBatch.encode(
        trainer.processing_class, conversations, G, torch.device("cpu")
    )
    base = models.get_base_model(trainer.model)
    # An end token that some greedy replies reach, so that rows leave the batch.
    options = {"max_new_tokens": 10, "do_sample": False}
    full = [
        base.generate(
            input_ids=p.ids[None],
            attention_mask=torch.ones_like(p.ids)[None],
            mm_token_type_ids=p.token_types[None],
            pixel_values=p.pixel_values,
            image_grid_thw=p.grid,
            eos_token_id=10**6,
            pad_token_id=0,
            **options,
        )[0, len(p.ids) :].tolist()
        for p in batch.prompts
    ]
    end = full[0][3]
    expected = [
        reply[: reply.index(end) + 1] if end in reply else reply for reply in full
    ]
    made = sampling.sample_replies(
        base,
        base.model,
        batch.prompts,
        3,
        max_new_tokens=10,
        eos_token_ids=[end],
        warp=LogitsProcessorList([Greedy()]),
        seeds=range(15),
    )
    assert made == [[reply] * 3 for reply in expected]


def test_the_whole_model_trains_against_a_reference_of_its_own(
    folder, tmp_path, monkeypatch
):
    """As at full scale: no adapter, so the reference is a second model, which attends
    as the policy does. Shared prompts and whole rows give the same updates."""
    monkeypatch.setattr(grpo, "DifficultyGRPOTrainer", Scripted)
    logged = {}
    for shared in (True, False):
        out = tmp_path / str(shared)
        config = make_config(folder, max_steps=2)
        config["model"]["dtype"] = "float64"
        config["sft"]["adapter"] = "none"
        samples, start = make_samples(folder), folder / "base"
        trainer = grpo.build_trainer(
            config, out, samples, start, out / "r.jsonl", shared_prefix=shared
        )
        attention = [
            attention_module.attention_of(model.model)
            for model in (trainer.model, trainer.ref_model)
        ]
        assert attention == [SEGMENTS if shared else "sdpa"] * 2
        trainer.train()
        logged[shared] = [
            [row[key] for key in ("loss", "kl", "grad_norm", "entropy")]
            for row in trainer.state.log_history[:2]
        ]
    first, second = logged[True]
    assert abs(first[1]) < 1e-9 and second[1] > 1e-6  # the policy leaves its reference
    for shared, whole in zip(logged[True], logged[False], strict=True):
        assert shared == pytest.approx(whole, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("shared", [True, False])
def test_vision_tokens_are_never_sampled(folder, tmp_path, shared):
    """A sampled image token has no image: the next forward pass would fail."""
    trainer = make_trainer(folder, tmp_path, keep={"shared_prefix": shared})
    assert trainer.shared_rollout is shared
    ids = trainer._tokenizer.convert_tokens_to_ids(list(VISION_TOKENS))

    def favour(_module, _args, logits):
        logits[..., ids] += 1e4
        return logits

    hook = models.get_base_model(trainer.model).lm_head.register_forward_hook(favour)
    inputs, mask = scored_batch(trainer)
    hook.remove()
    sampled = inputs["input_ids"][:, -inputs["logits_to_keep"] :]
    assert not torch.isin(sampled[mask.bool()], torch.tensor(ids)).any()


@pytest.mark.parametrize("norm", [False, True])
def test_folding_gives_the_same_logits_and_the_weights_back(folder, norm):
    load = load_with_trained_norm if norm else models.load_for_training
    model, _ = load({"name_or_path": str(folder / "base")}, folder / "sft")
    if norm:
        find_trained_norm(model).data *= 1.5
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with folded(model):
            assert not torch.equal(
                model.state_dict()[next(k for k in before if "base_layer" in k)],
                before[next(k for k in before if "base_layer" in k)],
            )
            inside = model(input_ids=ids).logits
    torch.testing.assert_close(inside, plain, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert any("lora_A" in n for n in trained)


def test_T8_temperature_and_reward_weights_take_effect(folder, tmp_path):
    """PF sec. 9, T8: the released trainer fixed the one and ignored the other."""
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
    """PF sec. 9, T12: five prompts, two an update, make two updates, not three."""
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
    assert metrics[0]["kl_clamped"] == 0
    rows = io.read_jsonl(out / "rollouts.jsonl")
    assert [row["step"] for row in rows] == [1, 1, 2, 2]
    wide = ("replies", "boxes", "status", "iou", "format", "rewards", "advantages")
    for row in rows:
        assert all(len(row[name]) == G for name in (*wide, "length", "truncated"))
        assert set(row) == {
            *wide, "step", "sample_id", "task", "mean_iou", "weight", "length",
            "truncated",
        }  # fmt: skip
        # -ln(0.02 + m) of the group, whatever the untrained model said
        expected = max(0.0, -math.log(0.02 + row["mean_iou"]))
        assert row["weight"] == pytest.approx(expected, abs=1e-4)
    assert io.read_json(out / "adapter" / "adapter_config.json")["r"] == 4
    assert not (out / "adapter" / "ref").exists()
    model, _ = models.load_for_training(config["model"], out / "adapter")
    sft, _ = models.load_for_training(config["model"], folder / "sft")
    assert models.hash_weights(model) == models.hash_weights(sft)


def test_the_last_norm_learns_at_its_own_rate(folder, tmp_path):
    """And is part of the adapter: saved and merged; the reference keeps its own."""
    out = tmp_path / "grpo"
    config = make_config(
        folder, max_steps=3, norm_learning_rate=0.5, learning_rate=1e-9
    )
    grpo.train(config, out, make_samples(folder), sft_adapter=folder / "sft")
    metrics = io.read_jsonl(out / "metrics.jsonl")
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert metrics[-1]["kl"] > 1e-4
    section = config["model"]
    base, _ = models.load_for_inference(section)
    norm = base.model.language_model.norm.weight
    tuned, _ = models.load_for_training(section, out / "adapter")
    moved = tuned.model.model.language_model.norm.weight - norm
    assert 0.01 < moved.abs().max() < 2  # at LoRA's rate: 3e-9
    torch.testing.assert_close(moved, moved.mean().expand_as(moved))  # all together
    sft, _ = models.load_for_training(section, folder / "sft")
    assert models.hash_weights(tuned) == models.hash_weights(sft)
    assert models.hash_weights(tuned, True) != models.hash_weights(sft, True)
    merged, _ = models.load_for_inference(section, out / "adapter")
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            merged(input_ids=ids).logits, tuned(input_ids=ids).logits
        )
        plain = sft(input_ids=ids).logits
    assert not torch.allclose(merged(input_ids=ids).logits, plain, rtol=1e-2)
    # An adapter that has the norm goes on from it.
    again, _ = load_with_trained_norm(section, out / "adapter")
    assert torch.equal(
        find_trained_norm(again), tuned.model.model.language_model.norm.weight
    )


def test_without_a_rate_the_last_norm_stays(folder, tmp_path):
    trainer = make_trainer(folder, tmp_path)
    trained = [n for n, p in trainer.model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)


UNTIMED = ("seconds", "step_time", "train_runtime")


def what_was_learned(out: Path):
    """(metrics but for times, rollouts, adapter) of a finished training."""
    metrics = [
        {k: v for k, v in row.items() if not k.startswith(UNTIMED)}
        for row in io.read_jsonl(out / "metrics.jsonl")
    ]
    weights = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    return metrics, io.read_jsonl(out / "rollouts.jsonl"), weights


class Interrupt(TrainerCallback):
    """Ends the training as Ctrl-C would, after an update and before its log."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "options",
    [
        {},  # a generation for every update, two updates an epoch
        # Checkpoints fall between the updates that use the same replies.
        {"gradient_accumulation_steps": 2, "steps_per_generation": 4}
        | {"per_device_train_batch_size": G, "num_iterations": 2}
        | {"norm_learning_rate": 0.1},
    ],
)
def test_resume_is_exact(folder, tmp_path, options):
    """Sampler, generators, replies to be used again, optimiser, metrics."""
    config = make_config(folder, max_steps=6, **options)
    job = {"sft_adapter": folder / "sft"}
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
def test_sigterm_in_the_middle_of_an_update_resumes_exactly(folder, tmp_path):
    """Update 3 has sampled, logged its groups and taken its gradient."""
    config = make_config(folder, max_steps=4, save_strategy="steps", save_steps=2)
    job = {"sft_adapter": str(folder / "sft")}
    rows = make_samples(folder)
    grpo.train(config, tmp_path / "whole", rows, **job)
    where = {"signal": "SIGTERM", "method": "_get_grad_norm", "at": 3}
    out = tmp_path / "cut"
    code = killed(tmp_path, "grpo", config, rows, out, options=job, **where)
    assert code == -signal.SIGTERM
    assert {row["step"] for row in io.read_jsonl(out / "rollouts.jsonl")} == {1, 2, 3}
    grpo.train(config, out, rows, **job)
    assert what_was_learned(out) == what_was_learned(tmp_path / "whole")


def test_rollout_rows_hold_boxes_as_scoring_reads_them():
    replies = [
        rollouts.Reply("a", "diff", text, 9, truncated)
        for text, truncated in [(box_text(500), False), ("<think>on and on", True)]
    ]
    ones, zeros = torch.tensor([1.0, 0.0]), torch.tensor([0.7, -0.7])
    row = rollouts.group_rows(
        3, replies, ones, ones, 2 * ones, zeros, torch.tensor([1.6487])
    )[0]
    assert row["boxes"] == [[100, 100, 500, 500], None]
    assert row["status"] == ["ok", "no_answer"]
    assert row["mean_iou"] == 0.5 and row["weight"] == pytest.approx(1.6487)
    assert row["advantages"] == [0.7, -0.7] and row["truncated"] == [False, True]


@pytest.mark.parametrize(
    ("options", "count", "message"),
    [
        ({"num_generations": 1}, 4, "at least 2"),
        ({"per_device_train_batch_size": 6}, 4, "groups of 4"),
        ({}, 1, "1 training samples, but one generation takes 2 prompts"),
    ],
)
def test_impossible_layouts_say_what_to_change(
    folder, tmp_path, options, count, message
):
    section = make_config(folder, **options)["grpo"]
    with pytest.raises(ValueError, match=message):
        grpo.grpo_config(section, tmp_path, count)


def test_a_loss_that_is_not_finite_stops_with_advice(folder, tmp_path):
    trainer = make_trainer(folder, tmp_path)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
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


def ready_batch(trainer):
    """The micro-batch of an update, as compute_loss takes it."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def test_an_exploding_kl_is_bounded_counted_and_stopped(folder, tmp_path):
    trainer = make_trainer(folder, tmp_path)
    batch = ready_batch(trainer)
    ref = batch["ref_per_token_logps"]
    far = ref.clone()
    far[0, 0] += 200.0  # e^200 is infinite in float32
    loss = trainer.compute_loss(trainer.model, batch | {"ref_per_token_logps": far})
    tokens = int(batch["completion_mask"].sum())
    bounded = math.exp(10) - 11  # k3 at the limit
    share = 0.04 * bounded / (2 * G * int(batch["completion_mask"][0].sum()))
    plain = trainer.compute_loss(trainer.model, batch)
    assert loss.item() - plain.item() == pytest.approx(share, rel=1e-3)
    assert trainer._metrics["train"]["kl_clamped"] == [1.0, 0.0]
    assert far[0, 0] == ref[0, 0] + 200.0  # the batch is used again: left alone
    with pytest.raises(FloatingPointError, match=f"{tokens} of {tokens} tokens.*beta"):
        trainer.compute_loss(
            trainer.model, batch | {"ref_per_token_logps": ref + 200.0}
        )


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
    centred = rewards - rewards.mean(1, keepdim=True)
    std = centred[0] / (1.0 + 1e-4)
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(advantages["std"][0], std, **close)
    torch.testing.assert_close(advantages["std_free"][0], centred[0], **close)
    # TRL's 1e-4 stands beside a rescaled deviation here
    mad = {"rtol": 5e-4, "atol": 1e-5}
    torch.testing.assert_close(advantages["mad"][0], centred[0] / 0.75, **mad)
    torch.testing.assert_close(advantages["drop"][0], 2 * std, **close)
    assert all(not made[1].any() for made in advantages.values())


def scripted_rewards(trainer, totals):
    """A _calculate_rewards that gives these totals, all as format reward."""

    def rewards(inputs, prompts, completions, ids):
        trainer.local_replies = []
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
    """PF sec. 4 and 5, written out for each group of a batch of three: value and
    gradient of the trainer's own loss on random log-probs, advantages and IoUs."""
    trainer, steps = loss_trainer, 12
    monkeypatch.setitem(trainer.weight_options, "form", form)
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
        weights = trainer._group_weights(iou.view(3, G))
        batch = {
            "prompt_ids": torch.zeros(3 * G, 1, dtype=torch.long),
            "prompt_mask": torch.ones(3 * G, 1, dtype=torch.long),
            "completion_ids": torch.zeros(3 * G, steps, dtype=torch.long),
            "completion_mask": mask,
            "advantages": advantages * trainer._my_rows(weights),
            "mean_iou": trainer._my_rows(trainer.mean_iou),
            "old_per_token_logps": old,
            "ref_per_token_logps": ref,
        }
        monkeypatch.setattr(
            trainer_module.SharedPrefixGRPOTrainer,
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
    made = rollouts.logit_gradient(logps.detach(), old, advantages, mask, (0.2, 0.2))
    torch.testing.assert_close(made, expected)
    assert made[2] == 0
