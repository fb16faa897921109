"""ZeRO-2 and ZeRO-3 as shipped, on two CPU processes, through the launcher.

Skipped without deepspeed. On a CPU it is installed, into the environment of
`make install`, by

    DS_BUILD_OPS=0 DS_ACCELERATOR=cpu pip install --no-build-isolation deepspeed
"""

from importlib.util import find_spec

import pytest
import torch
from launched import GRPO, adapter, cut_off, losses, make_rows, scale

from univg_nb import io, models
from univg_nb.launch import launcher

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not find_spec("deepspeed"), reason="deepspeed is not installed"),
]
BF16 = {"bf16": True, "learning_rate": 1e-4, "num_train_epochs": 2}  # 8 updates


@pytest.fixture(scope="module")
def rows(folder):
    return make_rows(folder)


@pytest.fixture(scope="module", params=[("zero3", "none"), ("zero2", "lora")])
def trained(request, model_cfg, rows, tmp_path_factory):
    """(strategy, adapter, folder of its SFT): stage 1 of 8 updates."""
    strategy, kind = request.param
    out = tmp_path_factory.mktemp(strategy) / "sft"
    launcher.train(
        "sft", scale(model_cfg, 2, strategy, adapter=kind, **BF16), out, rows
    )
    return strategy, kind, out


def test_the_strategy_in_force_and_a_result_that_loads_by_itself(
    model_cfg, rows, trained
):
    _, _, out = trained
    state = io.read_json(out / "launch" / "rank-1.json")
    assert (state["distributed_type"], state["world_size"]) == ("DEEPSPEED", 2)
    assert losses(out)[-1] < losses(out)[0]
    parameters = io.read_json(out / "summary.json")["parameters"]
    assert 0 < parameters["total"]["trainable"] < parameters["total"]["parameters"]
    plain, _ = models.load_for_inference(model_cfg)
    whole, _ = models.load_for_inference(model_cfg, out / "adapter")
    same = dict(plain.named_parameters())
    changed = {
        name
        for name, parameter in whole.named_parameters()
        if not torch.equal(parameter.bfloat16(), same[name].bfloat16())
    }
    assert changed and not any("visual." in name for name in changed)


def test_grpo_resumes_exactly_after_sigterm(model_cfg, rows, trained, tmp_path):
    """Full fine-tuning has a reference of its own, cut over the processes too."""
    strategy, kind, start = trained
    config = {
        **scale(model_cfg, 2, strategy, adapter=kind),
        "grpo": GRPO | {"bf16": True, "learning_rate": 1e-4},
    }
    options = {"sft_adapter": start / "adapter", "weight": "exp"}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert launcher.train("grpo", config, whole, rows, **options)["steps"] == 8
    log = io.read_jsonl(whole / "metrics.jsonl")
    assert log[0]["kl"] == pytest.approx(0, abs=1e-6) and log[-1]["kl"] > 1e-5
    assert 2 <= cut_off(tmp_path, "grpo", config, cut, rows, **options) < 8
    launcher.train("grpo", config, cut, rows, **options)
    assert losses(cut) == losses(whole)
    if kind == "lora":
        assert adapter(cut) == adapter(whole)
    else:
        name = "adapter/model.safetensors"
        assert (cut / name).read_bytes() == (whole / name).read_bytes()


def test_other_processes_cannot_go_on_from_its_checkpoint(
    model_cfg, rows, trained, tmp_path
):
    strategy, kind, _ = trained
    launched = tmp_path / "launch"
    launched.mkdir()
    (tmp_path / "checkpoints" / "checkpoint-3").mkdir(parents=True)
    io.write_json(launched / "launched.json", {"processes": 4})
    config = scale(model_cfg, 2, strategy, adapter=kind, **BF16)
    with pytest.raises(ValueError, match="use 4 processes"):
        launcher.train("sft", config, tmp_path, rows)
