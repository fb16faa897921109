"""Launched trainings: what is started, and that two gloo processes equal one."""

import importlib.util
import os
import shutil
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from launched import ROOT, losses, make_rows, scale

from univg_nb import config as config_module
from univg_nb import io
from univg_nb.config import SCALES
from univg_nb.launch import launcher, worker
from univg_nb.train import sft


@pytest.fixture(scope="module")
def rows(folder):
    return make_rows(folder)


# ---------------------------------------------------------------- without children


def test_the_batch_stays_whole_on_another_number_of_processes(model_cfg):
    config = {**scale(model_cfg, 4), "launch": {"processes": 4, "written_for": 8}}
    assert (
        config_module.spread(config, "sft")["sft"]["gradient_accumulation_steps"] == 4
    )
    assert config["sft"]["gradient_accumulation_steps"] == 2
    config["launch"]["processes"] = 3
    with pytest.raises(ValueError, match="do not divide over 3 processes"):
        config_module.spread(config, "sft")


def parsed(section, **environment):
    """What accelerate makes of our command line and configuration file."""
    arguments = launcher.command(
        section, True, ["-m", "univg_nb.launch.worker", "request"]
    )
    start = arguments.index("accelerate.commands.launch") + 1
    made = launch_command_parser().parse_args(arguments[start:])
    return arguments, _validate_launch_command(made)[0]


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "fsdp2"])
def test_accelerate_understands_the_shipped_configurations(strategy):
    section = {"strategy": strategy, "processes": 4}
    _, made = parsed(section)
    assert (made.num_processes, made.num_machines) == (4, 1)
    assert made.multi_gpu == (strategy == "ddp")
    assert made.use_deepspeed == strategy.startswith("zero")
    assert made.use_fsdp == (strategy == "fsdp2")
    assert made.mixed_precision == "bf16" and not made.use_cpu
    if made.use_deepspeed:
        assert made.zero_stage == int(strategy[-1])
    if made.use_fsdp:
        assert made.fsdp_version in (2, "2")


def test_the_configuration_for_one_gpu_is_for_accelerate_by_hand():
    path = str(SCALES / "accelerate" / "single.yaml")
    arguments = ["--config_file", path, "-m", "univg_nb", "sft", "small"]
    made = _validate_launch_command(launch_command_parser().parse_args(arguments))[0]
    assert (made.num_processes, made.mixed_precision) == (1, "bf16")
    assert not (made.multi_gpu or made.use_fsdp or made.use_deepspeed or made.use_cpu)
    assert launcher.command({"processes": 1}, True, ["-m", "x"])[1:] == ["-m", "x"]


def test_several_nodes_meet_at_the_first(monkeypatch):
    section = {"strategy": "ddp", "processes": 16, "nodes": 2, "port": 29511}
    with pytest.raises(ValueError, match="need MASTER_ADDR"):
        launcher.command(section, True, [])
    monkeypatch.setenv("MASTER_ADDR", "node-1")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    arguments, made = parsed(section)
    assert arguments[:3] == ["srun", "--ntasks-per-node=1", "--nodes=2"]
    assert (made.num_machines, made.main_process_ip) == (2, "node-1")
    assert (made.rdzv_backend, int(made.main_process_port)) == ("c10d", 29511)
    with pytest.raises(ValueError, match="do not divide over 2 nodes"):
        launcher.command({**section, "processes": 3}, True, [])


def test_what_is_said_when_the_number_of_processes_changes():
    assert launcher.resume_statement(2, 2, "zero3").endswith(": exact")
    assert "vLLM samples anew" in launcher.resume_statement(2, 2, "zero3", vllm=True)
    assert "Not exact: the order of sums" in launcher.resume_statement(2, 4, "fsdp2")
    with pytest.raises(ValueError, match="use 8 processes"):
        launcher.resume_statement(8, 4, "zero3")


def test_a_wrong_world_size_is_an_error_before_the_first_update(tmp_path):
    Accelerator()
    supervisor = worker.Supervisor(tmp_path, "ddp", 2)
    with pytest.raises(ValueError, match="2 processes were asked for, 1 train"):
        supervisor.on_train_begin(None, None, None)


def test_a_missing_gpu_package_is_named_before_anything_starts(
    model_cfg, rows, tmp_path
):
    if importlib.util.find_spec("deepspeed"):
        pytest.skip("deepspeed is installed here")
    config = scale(model_cfg, 2, strategy="zero3")
    with pytest.raises(ValueError, match=r"deepspeed not installed; .*fsdp2"):
        launcher.train("sft", config, tmp_path, rows)
    assert not list(tmp_path.iterdir())


def test_a_scale_without_launch_trains_here(model_cfg, rows, tmp_path):
    config = scale(model_cfg, 0, max_steps=1)
    summary = launcher.train("sft", config, tmp_path, rows, adapter="lora")
    assert summary["steps"] == 1 and not (tmp_path / "launch").exists()


# ---------------------------------------------------------------- two processes


@pytest.mark.slow
def test_two_processes_equal_one_and_their_checkpoint_goes_on_with_one(
    model_cfg, rows, tmp_path, capfd
):
    """Weights, optimizer, schedule and samples carry over; sums are ordered anew."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    options = {"save_strategy": "steps", "save_steps": 5, "save_total_limit": 9}
    sft.train(scale(model_cfg, 0), whole, rows)
    assert (
        launcher.train("sft", scale(model_cfg, 2, **options), part, rows)["steps"] == 16
    )
    state = io.read_json(part / "launch" / "rank-1.json")
    assert (state["state"], state["world_size"]) == ("finished", 2)
    assert state["distributed_type"] == "MULTI_CPU" and state["peak_bytes"] > 0
    assert state["longest_row"] > 0
    assert losses(part) == pytest.approx(losses(whole), abs=1e-5)
    shutil.rmtree(part / "checkpoints" / "checkpoint-15")
    shutil.rmtree(part / "checkpoints" / "checkpoint-16", ignore_errors=True)
    with pytest.raises(ValueError, match=r"part holds a finished training .*now lear"):
        launcher.train("sft", scale(model_cfg, 2, learning_rate=1.0), part, rows)
    (part / "summary.json").unlink()  # as if it had been killed
    launcher.train("sft", scale(model_cfg, 1, strategy="single", **options), part, rows)
    assert "goes on with 1 process(es) after 2" in capfd.readouterr().out
    assert io.read_json(part / "launch" / "rank-0.json")["first_step"] == 10
    assert losses(part) == pytest.approx(losses(whole), abs=1e-5)


@pytest.mark.slow
def test_sharding_asked_for_but_not_in_force_is_an_error(model_cfg, rows, tmp_path):
    """accelerate turns FSDP on CPUs into DDP without a word."""
    config = scale(model_cfg, 2, strategy="fsdp2")
    with pytest.raises(ValueError, match="fsdp2 was asked for, but accelerate runs"):
        launcher.train("sft", config, tmp_path, rows)
    assert not (tmp_path / "metrics.jsonl").exists() or losses(tmp_path) == []


# ---------------------------------------------------------------- sharded by torch


SHARDED = """
import sys, torch
from torch.distributed.checkpoint.state_dict import StateDictOptions
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import fully_shard
from univg_nb import models
source, out = sys.argv[1:]
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
model, processor = models.load_for_training({"name_or_path": source})
models.freeze_vision(model)
for layer in model.model.language_model.layers:
    fully_shard(layer)
fully_shard(model)
part = model.lm_head.weight.to_local().numel()
assert part < model.lm_head.weight.numel(), "not sharded"
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
rows = torch.arange(32).view(2, 16) + 5
for _ in range(3):
    mine = rows[rank : rank + 1]
    loss = model(input_ids=mine, labels=mine).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
options = StateDictOptions(full_state_dict=True, cpu_offload=True)
state = get_model_state_dict(model, options=options)
if rank == 0:
    plain, _ = models.load_for_inference({"name_or_path": source})
    plain.load_state_dict(state)
    plain.save_pretrained(out)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_fully_shard_on_two_processes_saves_what_plain_transformers_loads(
    model_cfg, tmp_path
):
    from transformers import Qwen2VLForConditionalGeneration

    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    out = tmp_path / "saved"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    source = model_cfg["name_or_path"]
    subprocess.run(
        [sys.executable, *torchrun, str(script), source, str(out)],
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    loaded = Qwen2VLForConditionalGeneration.from_pretrained(out)
    # The same by one process: the gradient of DDP and FSDP is the mean over processes.
    model = Qwen2VLForConditionalGeneration.from_pretrained(source).train()
    trained = [p for n, p in model.named_parameters() if "visual." not in n]
    optimizer = torch.optim.AdamW(trained, 1e-3)
    rows = torch.arange(32).view(2, 16) + 5
    for _ in range(3):
        sum(model(input_ids=r[None], labels=r[None]).loss / 2 for r in rows).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        expected, found = (m.eval()(input_ids=rows).logits for m in (model, loaded))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
