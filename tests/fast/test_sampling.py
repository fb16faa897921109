"""The sampler of rollouts and evaluation: as generate, one noise stream for a reply."""

import pytest
import torch
from grpo_builders import make_samples, make_trainer, scored_batch
from tiny_models import END, WORDS, build, make_prompt
from transformers import GenerationConfig

from univg_nb import models
from univg_nb.evaluate import replies
from univg_nb.fast import sampling
from univg_nb.fast.folded import fold_adapter
from univg_nb.fast.vision_features import make_vision_inputs

KINDS = ("qwen2", "qwen2_full", "qwen2_5", "qwen3")


@pytest.fixture(scope="module")
def built():
    return {kind: build(kind).eval() for kind in KINDS}


@pytest.fixture(scope="module")
def folder(grpo_folder):
    return grpo_folder


LAYOUTS = [
    make_prompt(sizes, before, after, seed)
    for seed, (sizes, before, after) in enumerate(
        [
            ([(2, 2)], 3, 4),
            ([], 2, 9),
            ([(1, 2), (2, 1), (2, 2)], 1, 2),
            ([(2, 1)], 5, 1),
        ]
    )
]


def generate(base, prompt, count):
    made = base.generate(
        input_ids=prompt.ids[None],
        attention_mask=torch.ones_like(prompt.ids)[None],
        mm_token_type_ids=prompt.token_types[None],
        eos_token_id=10**6,
        pad_token_id=0,
        max_new_tokens=count,
        do_sample=False,
        **make_vision_inputs(prompt.images),
    )
    return made[0, len(prompt.ids) :].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_replies_are_those_of_generate(built, kind):
    """Left padding, images, an end token that some replies reach: their rows leave."""
    base = models.get_base_model(built[kind])
    full = [generate(base, prompt, 10) for prompt in LAYOUTS]
    end = full[0][3]
    expected = [
        reply[: reply.index(end) + 1] if end in reply else reply for reply in full
    ]
    assert any(len(reply) < 10 for reply in expected)
    config = GenerationConfig(max_new_tokens=10, eos_token_id=end)
    one = sampling.sample_replies(built[kind], LAYOUTS, 1, config)
    assert one == [[reply] for reply in expected]
    three = sampling.sample_replies(built[kind], LAYOUTS, 3, config)
    assert three == [[reply] * 3 for reply in expected]


def test_a_sampled_reply_depends_on_its_seed_only(built):
    config = GenerationConfig(
        max_new_tokens=12,
        eos_token_id=list(range(END, WORDS, 5)),
        do_sample=True,
        temperature=1.5,
    )

    def sample(prompts, count, seeds):
        return sampling.sample_replies(
            built["qwen2_full"], prompts, count, config, seeds
        )

    together = [reply for group in sample(LAYOUTS, 3, range(12)) for reply in group]
    assert len({len(reply) for reply in together}) > 2
    for seed, reply in enumerate(together):
        assert sample([LAYOUTS[seed // 3]], 1, [seed]) == [[reply]]
    assert sample(LAYOUTS[:1], 1, [99]) != [[together[0]]]


def test_noise_samples_the_softmax():
    probs = torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3, 0.0])
    noise = sampling.draw_noise(range(5_000), 3)
    for column in noise.T:
        drawn = sampling.sample_tokens(probs.expand(5_000, 6), column)
        shares = torch.bincount(drawn, minlength=6) / 5_000
        torch.testing.assert_close(shares, probs, atol=0.025, rtol=0)
    ends = torch.tensor([0.0, 1 - 2**-24])
    assert sampling.sample_tokens(probs.expand(2, 6), ends).tolist() == [1, 4]
    assert torch.equal(sampling.draw_noise([7], 9)[0, :3], noise[7])


def test_a_sampled_token_is_one_that_generate_could_sample(built):
    """Ban, top-k and min-p; without seeds the most likely of what is left."""
    base = models.get_base_model(built["qwen2_full"])
    plain = GenerationConfig(max_new_tokens=1)
    ((first,),) = sampling.sample_replies(base, LAYOUTS[:1], 1, plain)
    options = {"do_sample": True, "suppress_tokens": first, "max_new_tokens": 1}
    likely, narrow = (
        sampling.sample_replies(base, LAYOUTS[:1], 8, GenerationConfig(**options, **o))
        for o in ({"top_k": 1}, {"min_p": 0.999})
    )
    assert likely == narrow == [[likely[0][0]] * 8] and likely[0][0] != first


@pytest.mark.parametrize("shared", [True, False])
def test_vision_tokens_are_never_sampled(folder, tmp_path, shared):
    """By GRPO in either way, nor by evaluation: the next forward pass would fail."""
    trainer = make_trainer(folder, tmp_path, keep={"shared_prefix": shared})
    assert trainer.shared_rollout is shared
    ids = trainer._tokenizer.convert_tokens_to_ids(list(sampling.VISION_TOKENS))
    assert len(set(ids)) == 5 and None not in ids

    def favor(_module, _args, logits):
        logits[..., ids] += 1e4
        return logits

    base = models.get_base_model(trainer.model)
    hook = base.lm_head.register_forward_hook(favor)
    inputs, mask = scored_batch(trainer)
    seen = []
    sample = sampling.sample_replies

    def watch(model, prompts, count, config, *others):
        seen.append(config.suppress_tokens)
        return sample(model, prompts, count, config, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "sample_replies", watch)
        processor, samples = trainer.processing_class, make_samples(folder, 2)
        replies.reply(base, processor, samples, max_new_tokens=4)
    hook.remove()
    sampled = inputs["input_ids"][:, -inputs["logits_to_keep"] :]
    assert not torch.isin(sampled[mask.bool()], torch.tensor(ids)).any()
    assert seen == [sorted(ids)] == [trainer.banned_tokens]


def test_folding_gives_the_same_logits_and_the_weights_back(folder):
    section = {"name_or_path": str(folder / "base")}
    model, _ = models.load_for_training(section, folder / "sft")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ids = torch.arange(20, 40)[None]
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with fold_adapter(model):
            assert not torch.equal(
                model.state_dict()[next(k for k in before if "base_layer" in k)],
                before[next(k for k in before if "base_layer" in k)],
            )
            inside = model(input_ids=ids).logits
    torch.testing.assert_close(inside, plain, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert any("lora_A" in n for n in trained)
