"""Replies of a served model: those of the same model in this process."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import builders
import pytest
from PIL import Image

from univg_nb import models
from univg_nb.data import files
from univg_nb.data.sample import GroundingSample
from univg_nb.evaluate import replies
from univg_nb.evaluate.generate import (
    GenerationOptions,
    SettingsMismatchError,
    generate,
    main,
)
from univg_nb.evaluate.served import ServedModel
from univg_nb.fast import vllm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return builders.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    return builders.questions(tmp_path_factory.mktemp("images"), 20)


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
        message = {"role": "assistant", "content": made.text}
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
    model, processor = models.load_for_inference({"name_or_path": str(folder)})
    options = GenerationOptions(max_new_tokens=6, batch_size=4)
    here, out = tmp_path / "here.jsonl", tmp_path / "served.jsonl"
    generate(model, processor, items[:6], here, options)
    with Endpoint((model, processor), tmp_path) as endpoint:
        served = ServedModel(endpoint.url, "here")
        generate(served, processor, items[:6], out, options)
        assert out.read_bytes() == here.read_bytes()
        # resumed like any other run, and never under another model's name
        out.write_bytes(out.read_bytes()[:-9])
        assert generate(served, processor, items[:6], out, options)["new"] == 1
        with pytest.raises(SettingsMismatchError, match="weights_hash"):
            generate(ServedModel(endpoint.url, "b"), processor, items[:6], out, options)
        with pytest.raises(ValueError, match=r"model 'b'.*vllm serve b"):
            generate(
                ServedModel(endpoint.url, "b"),
                processor,
                items,
                tmp_path / "b",
                options,
            )
        asked = endpoint.requests[0]
        endpoint.shutdown()
    # vLLM refuses pixel limits in a request: what is sent has the right size already
    assert "mm_processor_kwargs" not in asked
    sent = Image.open(tmp_path / "0_0.png")
    assert vllm.resize_image(sent, processor.image_processor).size == sent.size
    assert asked["temperature"] == 0
    banned = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert asked["logit_bias"][str(banned)] == -100


def test_a_served_model_takes_no_adapter_and_shrinks_no_images(folder, items, tmp_path):
    files.write(items[:1], tmp_path / "r.json", "mig_bench")
    arguments = ["--records", str(tmp_path / "r.json"), "--scale", "tiny"]
    arguments += ["--model", str(folder), "--out", str(tmp_path / "p.jsonl")]
    arguments += ["--server", "http://127.0.0.1:9/v1"]
    with pytest.raises(ValueError, match="merge the adapter"):
        main([*arguments, "--adapter", "a"])
    # its server would shrink the pictures again, and nobody would see it
    with pytest.raises(ValueError, match="shrinks images to 4096 pixels"):
        main([*arguments, "--set", "model.max_pixels=100000"])
