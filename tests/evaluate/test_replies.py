"""Replies: padding, sampling, ended rows, banned tokens."""

import builders
import pytest
import torch

from univg_nb import models
from univg_nb.evaluate import replies
from univg_nb.fast import sampling


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = builders.save_model(tmp_path_factory.mktemp("model"))
    return models.load_for_inference({"name_or_path": str(folder)})


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    return builders.questions(tmp_path_factory.mktemp("images"))


def test_left_padding_gives_the_logits_of_each_prompt_alone(loaded, items):
    model, processor = loaded
    together = replies.encode(processor, items)
    assert (together["attention_mask"][:, -1] == 1).all()
    assert (together["attention_mask"][:, 0] == 0).any()
    with torch.no_grad():
        batch = model(**together).logits[:, -1]  # (B, V)
        for row, sample in zip(batch, items, strict=True):
            alone = model(**replies.encode(processor, [sample])).logits[0, -1]
            torch.testing.assert_close(row, alone, atol=1e-4, rtol=1e-4)


def test_noise_samples_the_softmax():
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])
    seeded = sampling.SeededNoise(range(5_000), temperature=2.0)
    drawn = seeded(None, logits.expand(5_000, 4)).argmax(-1)
    shares = torch.bincount(drawn, minlength=4) / 5_000
    torch.testing.assert_close(shares, (logits / 2).softmax(-1), atol=0.025, rtol=0)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_rows_that_have_ended_leave_the_batch(loaded, items, temperature, request):
    """...and the others go on as they would have: same cache, positions and noise."""
    model, processor = loaded
    ends = model.generation_config.eos_token_id
    request.addfinalizer(lambda: setattr(model.generation_config, "eos_token_id", ends))
    model.generation_config.eos_token_id = list(range(5, 1024, 6))
    rows = []
    hook = model.register_forward_pre_hook(
        lambda _, __, given: rows.append(len(given["input_ids"])), with_kwargs=True
    )
    request.addfinalizer(hook.remove)
    options = {"max_new_tokens": 24, "temperature": temperature}
    together = replies.reply(model, processor, items, seeds=range(9), **options)
    batched, rows[:] = rows[:], []
    for k, (sample, made) in enumerate(zip(items, together, strict=True)):
        (alone,) = replies.reply(model, processor, [sample], seeds=[k], **options)
        assert alone == made, k
    assert len({made.tokens for made in together}) > 2
    assert batched[0] == 9 and batched[-1] < 5
    # without leaving, every row would be computed until the longest ends
    assert sum(batched) < 9 * len(batched)
    assert sum(rows) == sum(made.tokens for made in together)


def test_vision_tokens_are_never_sampled(loaded, items):
    model, processor = loaded
    inputs = replies.encode(processor, items[:2])
    banned = processor.tokenizer.convert_tokens_to_ids(list(replies.VISION_TOKENS))
    config = replies.generation_config(model, processor, 3)

    def wish(_, scores):
        """A model that wants nothing but vision tokens."""
        scores[:, banned] += 1000.0
        return scores

    def new_tokens():
        out = model.generate(
            **inputs, generation_config=config, logits_processor=[wish]
        )
        return out[:, inputs["input_ids"].shape[1] :].flatten().tolist()

    assert not set(new_tokens()) & set(banned)
    config.suppress_tokens = None
    assert set(new_tokens()) <= set(banned)
