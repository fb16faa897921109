"""Replies: padding, ended rows; tests/fast/test_sampling.py has the sampler."""

import builders
import pytest
import torch

from univg_nb import models
from univg_nb.evaluate import replies


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


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_rows_that_have_ended_leave_the_batch(loaded, items, temperature, request):
    """...and the others go on as they would have: same cache, positions and noise."""
    model, processor = loaded
    ends = model.generation_config.eos_token_id
    request.addfinalizer(lambda: setattr(model.generation_config, "eos_token_id", ends))
    model.generation_config.eos_token_id = list(range(5, 1024, 6))
    rows = []  # of every decoding step

    def count(_module, _args, given):
        if given["input_ids"].shape[1] == 1:
            rows.append(len(given["input_ids"]))

    hook = model.model.register_forward_pre_hook(count, with_kwargs=True)
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
