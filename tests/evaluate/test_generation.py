"""Generation under kill -9, and shared between processes (issue 7)."""

import base64
import json
import multiprocessing
import random
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import builders
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

from univg_nb import models
from univg_nb.data.sample import GroundingSample
from univg_nb.evaluate import commands, replies
from univg_nb.evaluate.generate import OtherSettings, generate, part_path
from univg_nb.evaluate.predictions import settings_path
from univg_nb.evaluate.served import Served
from univg_nb.fast import vllm
from univg_nb.train import merge

KILLS = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return builders.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    return builders.questions(tmp_path_factory.mktemp("images"), 20)


@pytest.mark.slow
def test_kill_9_at_ten_random_moments_changes_nothing(folder, items, tmp_path):
    builders.make_replies(folder, items, tmp_path / "whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_bytes()
    # A forkserver: libraries are imported once, and no thread of this one is forked.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["builders", "univg_nb.evaluate.replies", "univg_nb.train.collator"]
    )
    out, rng = tmp_path / "cut.jsonl", random.Random(0)
    killed, cuts = 0, set()
    while killed < KILLS:
        child = context.Process(target=builders.make_replies, args=(folder, items, out))
        child.start()
        # At a random place of the file, then a random moment later: some kills hit a
        # row half written, some a batch half made, some a model half loaded.
        already = out.stat().st_size if out.exists() else 0
        place = already + rng.randrange(len(whole) // 8)
        while child.is_alive() and (not out.exists() or out.stat().st_size < place):
            time.sleep(0.0005)
        time.sleep(0.03 * rng.random())
        child.kill()
        child.join()
        assert child.exitcode in (0, -signal.SIGKILL)
        killed += child.exitcode != 0
        cuts.add(out.stat().st_size if out.exists() else 0)
        if child.exitcode == 0:  # it was done: begin again
            assert out.read_bytes() == whole
            out.unlink()
            settings_path(out).unlink()
    assert len(cuts) > 3, "the kills did not fall at different places"
    builders.make_replies(folder, items, out)
    assert out.read_bytes() == whole


def test_shards_make_the_file_that_one_process_makes(folder, items, tmp_path):
    loaded = models.load({"name_or_path": str(folder)})
    items = items[:7]
    options = {"max_new_tokens": 3, "batch_size": 2, "progress": False}
    alone, out = tmp_path / "alone.jsonl", tmp_path / "shared.jsonl"
    generate(*loaded, items, alone, **options)
    first = generate(*loaded, items, out, shard=(0, 2), **options)
    assert not out.exists()
    second = generate(*loaded, items, out, shard=(1, 2), **options)
    assert (first["replies"], second["replies"]) == (4, 3)
    assert out.read_bytes() == alone.read_bytes()
    settings = [settings_path(path).read_text() for path in (out, alone)]
    assert settings[0] == settings[1]
    again = generate(*loaded, items, out, shard=(1, 2), **options)
    assert (again["new"], again["replies"]) == (0, 3)
    # a stopped process is continued, whoever finished before
    part = part_path(out, 0, 2)
    part.write_bytes(part.read_bytes()[:-9])
    out.unlink()
    assert generate(*loaded, items, out, shard=(0, 2), **options)["new"] == 1
    assert out.read_bytes() == alone.read_bytes()
    with pytest.raises(OtherSettings, match="max_new_tokens"):
        generate(*loaded, items, out, shard=(0, 2), **options | {"max_new_tokens": 4})
    with pytest.raises(ValueError, match="shard 2 of 2: count from 0"):
        generate(*loaded, items, out, shard=(2, 2), **options)


def test_shard_comes_from_the_launcher_or_the_option(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert commands._shard(None) == (0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert commands._shard(None) == (3, 8)
    assert commands._shard("1/4") == (1, 4)
    with pytest.raises(ValueError, match="write K/N"):
        commands._shard("first")


class Endpoint(ThreadingHTTPServer):
    """A server of vLLM's protocol around a model of this process."""

    daemon_threads = True

    def __init__(self, loaded, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.loaded, self.folder, self.requests = loaded, folder, []
        self.lock = threading.Lock()  # the model answers one at a time
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def answer(self, request):
        *pictures, text = request["messages"][0]["content"]
        paths = []
        for k, part in enumerate(pictures):
            paths.append(self.folder / f"{len(self.requests)}_{k}.png")
            _, data = part["image_url"]["url"].split(",")
            paths[-1].write_bytes(base64.b64decode(data))
        images = tuple(map(str, paths))
        sample = GroundingSample("", "", images, text["text"], (0, 0, 9, 9))
        options = {"style": "plain", "max_new_tokens": request["max_tokens"]}
        (made,) = replies.reply(*self.loaded, [sample], **options)
        self.requests.append(request)
        reason = "length" if made.truncated else "stop"
        message = {"role": "assistant", "content": made.response}
        usage = {"prompt_tokens": 1, "completion_tokens": made.tokens}
        return {
            **{"id": "0", "object": "chat.completion", "created": 0, "model": "m"},
            "choices": [{"index": 0, "message": message, "finish_reason": reason}],
            "usage": usage | {"total_tokens": made.tokens + 1},
        }


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            known = request["model"] == "here"
            made = self.server.answer(request) if known else {"error": "no such model"}
        body = json.dumps(made).encode()
        self.send_response(200 if known else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_a_served_model_gives_the_replies_of_the_same_model_here(
    folder, items, tmp_path
):
    model, processor = models.load({"name_or_path": str(folder)})
    options = {"max_new_tokens": 6, "batch_size": 4, "progress": False}
    here, out = tmp_path / "here.jsonl", tmp_path / "served.jsonl"
    generate(model, processor, items[:6], here, **options)
    with Endpoint((model, processor), tmp_path) as endpoint:
        served = Served(endpoint.url, "here")
        generate(served, processor, items[:6], out, **options)
        assert out.read_bytes() == here.read_bytes()
        # resumed like any other run, and never under another model's name
        out.write_bytes(out.read_bytes()[:-9])
        assert generate(served, processor, items[:6], out, **options)["new"] == 1
        with pytest.raises(OtherSettings, match="weights_hash"):
            generate(Served(endpoint.url, "b"), processor, items[:6], out, **options)
        with pytest.raises(ValueError, match=r"model 'b'.*vllm serve b"):
            generate(
                Served(endpoint.url, "b"), processor, items, tmp_path / "b", **options
            )
        asked = endpoint.requests[0]
        endpoint.shutdown()
    # vLLM refuses pixel limits in a request: what is sent has the right size already
    assert "mm_processor_kwargs" not in asked
    sent = Image.open(tmp_path / "0_0.png")
    assert vllm.resized(sent, processor.image_processor).size == sent.size
    assert asked["temperature"] == 0
    banned = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert asked["logit_bias"][str(banned)] == -100


def test_a_merged_folder_is_the_model_with_its_adapter(tmp_path, capsys):
    model, _ = models.load({"name_or_path": "tiny"})
    kept = {name: weight.clone() for name, weight in model.named_parameters()}
    lora = LoraConfig(
        r=2, target_modules=models.LANGUAGE_LINEARS, init_lora_weights=False
    )
    get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    out = tmp_path / "merged"
    arguments = ["--model", "tiny", "--scale", "tiny", "--out", str(out)]
    arguments += ["--adapter", str(tmp_path / "adapter")]
    assert merge.main(arguments) == 0
    expected, _ = models.load({"name_or_path": "tiny"}, tmp_path / "adapter")
    expected = expected.merge_and_unload()
    found, processor = models.load({"name_or_path": str(out)})
    weights = dict(expected.named_parameters())
    changed = 0
    for name, weight in found.named_parameters():
        assert torch.equal(weight, weights[name]), name
        changed += not torch.equal(weight, kept[name])
    assert changed == 4 * 7  # the linear layers of four blocks
    assert processor.image_processor.size["longest_edge"] == 4096
    assert merge.main(arguments) == 2 and "exists" in capsys.readouterr().err
    # a fully trained model, whose processor has the limits it was trained under
    processor.image_processor.size["longest_edge"] = 1024
    processor.save_pretrained(out)
    saved = models.load_processor({"name_or_path": str(out)}).image_processor
    assert saved.size["longest_edge"] == 1024
    again = merge.write({"name_or_path": "tiny"}, [out], tmp_path / "again")
    copy, processor = models.load({"name_or_path": str(again)})
    assert processor.image_processor.size["longest_edge"] == 4096
    for name, weight in copy.named_parameters():
        assert torch.equal(weight, weights[name]), name
    assert [path.name for path in tmp_path.iterdir()].count("merged") == 1


def test_a_served_model_takes_no_adapter_and_shrinks_no_images(
    folder, items, tmp_path, capsys
):
    from univg_nb.data import files

    files.write(items[:1], tmp_path / "r.json", "mig_bench")
    arguments = ["generate", "--records", str(tmp_path / "r.json"), "--scale", "tiny"]
    arguments += ["--model", str(folder), "--out", str(tmp_path / "p.jsonl")]
    arguments += ["--server", "http://127.0.0.1:9/v1"]
    assert commands.main([*arguments, "--adapter", "a"]) == 2
    assert "merge the adapter" in capsys.readouterr().err
    # its server would shrink the pictures again, and nobody would see it
    assert commands.main([*arguments, "--set", "model.max_pixels=100000"]) == 2
    assert "shrinks images to 4096 pixels" in capsys.readouterr().err
