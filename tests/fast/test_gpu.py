"""What only a GPU shows: the shared prefix under its kernels and in half precision.

The numbers that were measured are recorded as properties of the tests
(`pytest -m gpu --junitxml FILE`). The same checks run on the CPU in float32.
"""

import importlib.util

import pytest
import torch
from test_shared_prefix import as_batch, gradient_of, shared_rows, whole_rows
from tiny_models import END, TOKENS, WORDS, make_prompt
from tiny_models import TEXT as NARROW
from tiny_models import build as build_tiny
from transformers import GenerationConfig

from univg_nb import models
from univg_nb.fast import check, packed_rows
from univg_nb.fast.attention import FLEX
from univg_nb.fast.prompts import Prompt
from univg_nb.fast.sampling import sample_replies
from univg_nb.fast.vision_features import VisionCache, make_vision_inputs

GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not GPU, reason="needs an NVIDIA GPU: none is visible")
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed",
)

FAMILIES = ("qwen2", "qwen2_5", "qwen3")
VISION = sorted(TOKENS.values())  # never sampled
ATTENTION = ("sdpa", FLEX)  # that take our masks on a GPU
# FlexAttention takes heads of at least 16 dimensions.
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "rope_parameters": NARROW["rope_parameters"] | {"mrope_section": [4, 6, 6]},
}
PICTURES = [(4, 6), (3, 3), (5, 4), (2, 7), (4, 4), (6, 3)]  # height, width in tokens
# float32: rounding. Half precision: against a float32 model of the same weights the
# shared way may be off by twice what whole rows are, and by a little where they are
# right by chance.
ATOL, GRADIENT = 1e-4, 1e-3

HALF_ATOL, HALF_GRADIENT = 0.02, 0.02
LAST: dict[str, tuple] = {}  # the test and dtype that were compiled last


@pytest.fixture(autouse=True)
def compile_anew(request):
    """torch.compile falls back to eager code after eight variants of a function, which
    one test's shapes and dtypes need less than."""
    params = getattr(request.node, "callspec", None)
    key = (request.function, params and str(params.params.get("dtype")))
    if key != LAST.get("test"):
        torch._dynamo.reset()
    LAST["test"] = key


def build(family: str, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """A small random model with LoRA and TRL's fused head; the tower is frozen."""
    return build_tiny(family, **TEXT).to(device, dtype)


def on_device(prompt: Prompt, device: str) -> Prompt:
    images = [(pixels.to(device), grid.to(device)) for pixels, grid in prompt.images]
    return Prompt(prompt.ids.to(device), prompt.token_types.to(device), images)


def make_groups(images: int, device: str):
    """Two groups: `images` pictures with five replies, one less with three."""
    groups = []
    lengths = [(40, 7, 1, 33, 16), (25, 40, 12)]
    for number, (count, group) in enumerate(
        zip((images, images - 1), lengths, strict=True)
    ):
        generator = torch.Generator().manual_seed(100 + number)
        prompt = make_prompt(PICTURES[:count], 7, 20 - 9 * number, number)
        replies = [
            torch.cat([torch.randint(2, WORDS, (n - 1,), generator=generator), end])
            for n, end in ((n, torch.tensor([END])) for n in group)
        ]
        replies = [reply.to(device) for reply in replies]
        groups.append((on_device(prompt, device), replies))
    return groups


def attend_with(model: torch.nn.Module, name: str) -> None:
    models.get_base_model(model).model.language_model.set_attn_implementation(name)


def cache_of(model: torch.nn.Module) -> VisionCache:
    return VisionCache(models.get_base_model(model).model)


def log_probs_and_gradient(model, made, factor):
    value = (made[0].float().exp() * factor).sum()
    gradient = gradient_of(model, value).float()
    return made[0].detach().float(), gradient


def measure_errors(
    family: str, images: int, dtype: torch.dtype, attention: str, device: str
):
    """Errors of whole rows and of shared ones, both against whole rows in float32."""
    groups = make_groups(images, device)
    batch = as_batch(groups)
    exact = build(family, device, torch.float32)
    expected = whole_rows(exact, batch)
    factor = torch.randn(expected[0].shape, generator=torch.Generator().manual_seed(0))
    factor = factor.to(device) * (expected[0] != 0)
    truth, true = log_probs_and_gradient(exact, expected, factor)
    # the same weights, rounded
    model = exact if dtype == torch.float32 else build(family, device, dtype)
    found = {}
    if dtype != torch.float32:
        made = whole_rows(model, batch)
        found["whole"] = log_probs_and_gradient(model, made, factor)
    attend_with(model, attention)
    made = shared_rows(model, batch, packed_rows.UNLIMITED, cache_of(model))
    found["shared"] = log_probs_and_gradient(model, made, factor)
    assert true.norm() > 0
    return {
        way: {
            "log_prob": float((ours - truth).abs().max()),
            "gradient": float((gradient - true).norm() / true.norm()),
        }
        for way, (ours, gradient) in found.items()
    }


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("images", (1, 2, 6))
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_shared_rows_equal_whole_rows(
    family, images, dtype, attention, record_property
):
    errors = measure_errors(family, images, dtype, attention, "cuda")
    record_property("errors", errors)
    shared = errors["shared"]
    if dtype == torch.float32:
        assert shared["log_prob"] <= ATOL and shared["gradient"] <= GRADIENT
        return
    whole = errors["whole"]
    assert shared["log_prob"] <= 2 * whole["log_prob"] + HALF_ATOL
    assert shared["gradient"] <= 2 * whole["gradient"] + HALF_GRADIENT


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_check_on_the_cpu(family):
    errors = measure_errors(family, 2, torch.float32, "sdpa", "cpu")["shared"]
    assert errors["log_prob"] <= ATOL and errors["gradient"] <= GRADIENT


@pytest.mark.parametrize("family", FAMILIES)
def test_flex_attention_takes_packed_rows_on_the_cpu(family):
    # its own code, not compiled: FlexAttention has no backward pass on a CPU
    batch = as_batch(make_groups(2, "cpu"))
    model = build(family, "cpu", torch.float32)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        expected = whole_rows(model, batch)
        attend_with(model, FLEX)  # transformers' own name refuses Qwen2-VL
        made = shared_rows(model, batch, packed_rows.UNLIMITED, cache_of(model))
        again = whole_rows(model, batch)
    torch.testing.assert_close(made[0], expected[0], rtol=0, atol=1e-5)
    assert torch.equal(again[0], expected[0])  # other masks: as sdpa


def sampled(family: str, images: int, device: str) -> tuple[list[int], list[int]]:
    """Greedy tokens of the shared rollout and of the model's own `generate`."""
    model = build(family, device, torch.float32).eval()
    prompt = make_groups(images, device)[0][0]
    config = GenerationConfig(
        max_new_tokens=24, suppress_tokens=VISION, do_sample=True, top_k=1
    )
    (replies,) = sample_replies(
        model, [prompt], 3, config, range(3), vision=cache_of(model)
    )
    assert replies[0] == replies[1] == replies[2]
    with torch.no_grad():
        whole = model.generate(
            input_ids=prompt.ids[None],
            attention_mask=torch.ones_like(prompt.ids[None]),
            mm_token_type_ids=prompt.token_types[None],
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
            suppress_tokens=VISION,
            **make_vision_inputs(prompt.images),
        )
    return replies[0], whole[0, len(prompt.ids) :].tolist()


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("images", (1, 2, 6))
@pytest.mark.parametrize("family", FAMILIES)
def test_the_shared_rollout_samples_what_generate_does(family, images):
    ours, theirs = sampled(family, images, "cuda")
    assert ours == theirs


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_rollout_on_the_cpu(family):
    ours, theirs = sampled(family, 2, "cpu")
    assert ours == theirs


def difference(model, prompt, attention: str) -> tuple[float, float]:
    """What the trainer's own check finds, and what it allows."""
    backbone = models.get_base_model(model).model
    attend_with(model, attention)
    worst = check.compare_log_probs(model, prompt, VISION, 0.8, cache_of(model))
    return worst, check.get_tolerance(backbone)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_trainers_own_check_passes(family, dtype, attention, record_property):
    model = build(family, "cuda", dtype)
    prompt = make_groups(6, "cuda")[0][0]
    worst, allowed = difference(model, prompt, attention)
    record_property("errors", {"difference": worst, "allowed": allowed})
    assert worst <= allowed


@needs_gpu
@pytest.mark.gpu
def test_the_trainer_prefers_flex_attention_on_a_gpu():
    backbone = models.get_base_model(build("qwen2", "cuda", torch.float32)).model
    assert check.list_attention(backbone)[0] == FLEX


@needs_gpu
@needs_bitsandbytes
@pytest.mark.gpu
def test_four_bit_weights_are_close_and_train(record_property):
    config = {"name_or_path": "tiny", "dtype": "bfloat16"}
    exact, _ = models.load_for_inference(config)
    model, _ = models.load_for_inference(config, quantize="nf4")
    prompt = torch.arange(20, 60, device="cuda")[None]
    with torch.no_grad():
        expected = exact.to("cuda")(input_ids=prompt).logits.float().log_softmax(-1)
        made = model(input_ids=prompt).logits.float().log_softmax(-1)
    error = float((made - expected).abs().mean())
    record_property("errors", {"mean_log_prob": error})
    assert 0 < error < 0.5
    model = models.add_lora(model, {"r": 4, "lora_alpha": 8}).train()
    model(input_ids=prompt, labels=prompt).loss.backward()
    gradients = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    assert gradients and all(g.isfinite().all() and g.any() for g in gradients)
