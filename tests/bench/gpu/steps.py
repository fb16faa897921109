"""The steps of run.sh, one function each.

    python tests/bench/gpu/steps.py STEP WORK [--dry]

A step writes WORK/steps/STEP.json after every measurement, so that a time limit costs
the running one only. A measurement that fails is an entry with its traceback, and the
next one is tried. --dry: shapes that a CPU computes in seconds.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest.mock import patch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
sys.path[:0] = [str(HERE.parent), str(ROOT)]

import grpo_update as bench  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from PIL import Image  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402
from transformers import TrainerCallback  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402
from trl.trainer.utils import add_fused_lm_head  # noqa: E402

from univg_nb import io, models, runs  # noqa: E402
from univg_nb.base_model import training as base_training  # noqa: E402
from univg_nb.base_model.architecture import build_model, train_tokenizer  # noqa: E402
from univg_nb.base_model.data import Plan, Views  # noqa: E402
from univg_nb.base_model.lessons import generate_corpus  # noqa: E402
from univg_nb.base_model.vision import (  # noqa: E402
    CellHeads,
    make_image_grid_thw,
    patchify,
)
from univg_nb.config import load_scale  # noqa: E402
from univg_nb.data import files, prompts  # noqa: E402
from univg_nb.data.images import open_image  # noqa: E402
from univg_nb.data.sample import GroundingSample  # noqa: E402
from univg_nb.fast import check, packed_rows  # noqa: E402
from univg_nb.fast.attention import FLEX, SEGMENTS, get_attention  # noqa: E402
from univg_nb.fast.prompts import Prompt, split_rows  # noqa: E402
from univg_nb.fast.vision_features import VisionCache  # noqa: E402
from univg_nb.launch import cost  # noqa: E402
from univg_nb.launch.cost import Layout  # noqa: E402
from univg_nb.train import checkpoints, grpo, sft  # noqa: E402

SMALL, LARGE = "Qwen2-VL-2B-Instruct", "Qwen2-VL-7B-Instruct"
NEWER = "Qwen3-VL-4B-Instruct"
# Six pictures of 22 x 22 tokens make a prompt of about 3,000.
REAL = {"images": 6, "side": 616, "completion": 256, "group": 8}
DRY = {"images": 2, "side": 56, "completion": 6, "group": 4}
TESTS_LIMIT = 115  # seconds
PACKAGES = (
    "torch", "torchvision", "triton", "transformers", "trl", "peft", "accelerate",
    "bitsandbytes", "datasets", "tokenizers", "huggingface-hub", "flash-attn",
)  # fmt: skip


class Record:
    """What a step has measured, written after every entry."""

    def __init__(self, step: str, work: Path, dry: bool) -> None:
        self.step, self.work, self.dry = step, work, dry
        self.path = work / "steps" / f"{step}.json"
        self.entries: list[dict[str, Any]] = []
        self.began = time.perf_counter()

    def add(self, name: str, show: tuple[str, ...] = (), **values: Any) -> None:
        """show: keys that the table prints."""
        self.entries.append({"name": name, **values, "show": list(show)})
        self.write()

    def write(self) -> None:
        seconds = round(time.perf_counter() - self.began, 1)
        made = {"seconds": seconds, "dry": self.dry, "entries": self.entries}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(made, indent=1, default=str))
        temporary.replace(self.path)

    @contextmanager
    def tried(self, name: str) -> Iterator[None]:
        """An error inside becomes an entry, whatever it is; memory is given back."""
        print(f"-- {name}", flush=True)
        try:
            yield
        except Exception:
            text = traceback.format_exc()
            print(text, flush=True)
            self.add(name, error=text[-6000:])
        finally:
            release()

    @property
    def failed(self) -> bool:
        return any("error" in entry for entry in self.entries)


def on_gpu() -> bool:
    return torch.cuda.is_available()


def now() -> float:
    return bench.now()


def release() -> None:
    gc.collect()
    if on_gpu():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peaks() -> dict[str, float]:
    """GB at most in tensors, and taken from the device (0 on a CPU)."""
    if not on_gpu():
        return {"allocated_gb": 0.0, "reserved_gb": 0.0, "device_gb": 0.0}
    free, total = torch.cuda.mem_get_info()
    return {
        "allocated_gb": round(torch.cuda.max_memory_allocated() / 1e9, 3),
        "reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 3),
        "device_gb": round((total - free) / 1e9, 3),
    }


def compiled() -> dict[str, int]:
    """What torch.compile did in this process."""
    counters = torch._dynamo.utils.counters
    found = {"graphs": counters["stats"].get("unique_graphs", 0)}
    return found | {"recompiled": sum(counters.get("recompiles", {}).values())}


def seconds_of(call: Callable[[], Any], repeats: int) -> list[float]:
    made = []
    for _ in range(repeats):
        began = now()
        call()
        made.append(now() - began)
    return made


# ---------------------------------------------------------------- a: environment


def environment(record: Record) -> None:
    """Versions, memory, and what the device reaches on plain work."""
    versions = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = ""
    head = {
        "device": runs.device(),
        "versions": versions,
        "commit": os.environ.get("COMMIT") or runs.git_hash(),
        "cuda": torch.version.cuda,
    }
    if on_gpu():
        free, total = torch.cuda.mem_get_info()
        properties = torch.cuda.get_device_properties(0)
        head["memory_gb"] = round(total / 1e9, 2)
        head["free_gb"] = round(free / 1e9, 2)
        head["multiprocessors"] = properties.multi_processor_count
    path = record.work / "steps" / "device.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(head))
    record.add("versions", ("versions",), versions=versions)
    device = models.get_device()
    size = 256 if record.dry else 8192
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        with record.tried(f"matmul {name}"):
            a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
            seconds_of(lambda a=a, b=b: a @ b, 3)
            best = statistics.median(seconds_of(lambda a=a, b=b: a @ b, 10))
            rate = 2 * size**3 / best / 1e12
            record.add(f"matmul {name}", ("tflops",), size=size, tflops=rate)
    with record.tried("copy"):
        source = torch.randn(2**20 if record.dry else 2**30, device=device)
        target = torch.empty_like(source)
        seconds_of(lambda: target.copy_(source), 2)
        best = statistics.median(seconds_of(lambda: target.copy_(source), 5))
        record.add("copy", ("gb_per_s",), gb_per_s=2 * source.nbytes / best / 1e9)
    with record.tried("attention"):
        shape = (1, 12, 128 if record.dry else 5048, 128)
        q, k, v = (torch.randn(shape, device=device).bfloat16() for _ in range(3))

        def attend() -> None:
            scaled_dot_product_attention(q, k, v, is_causal=True)

        seconds_of(attend, 2)
        best = statistics.median(seconds_of(attend, 10))
        rate = 2 * shape[1] * shape[2] ** 2 * shape[3] / best / 1e12
        record.add("causal attention", ("tflops",), shape=shape, tflops=rate)
    for name in ("flash_attn", "bitsandbytes", "kernels"):
        try:
            __import__(name)
            state = "imports"
        except Exception as error:  # whatever a broken build raises
            state = f"{type(error).__name__}: {error}"[:200]
        record.add(f"package {name}", ("state",), state=state)


def tests(record: Record) -> None:
    """`pytest -m gpu`: every test with its outcome and the errors that it measured."""
    report = record.work / "logs" / "tests.xml"
    report.parent.mkdir(parents=True, exist_ok=True)
    chosen = [str(ROOT / "tests" / "fast" / "test_gpu.py"), "-m", "gpu and not bench"]
    command = [sys.executable, "-m", "pytest", *chosen, "-p", "no:cacheprovider"]
    command += ["--junitxml", str(report), "-o", "junit_family=xunit1", "--tb=short"]
    command += ["--durations", "8", "-vv"]
    if record.dry:
        command += ["--collect-only"]
    running = subprocess.Popen(command, cwd=ROOT)
    try:
        code = running.wait(TESTS_LIMIT)
    except subprocess.TimeoutExpired:
        running.send_signal(signal.SIGINT)  # it then reports what it has done
        code = running.wait()
    found = {"passed": 0, "failed": 0, "skipped": 0}
    rows = []
    for case in ElementTree.parse(report).iter("testcase") if report.is_file() else ():
        kinds = {child.tag: child for child in case}
        bad = kinds.get("failure", kinds.get("error"))
        state = "skipped" if "skipped" in kinds else "passed"
        state = state if bad is None else "failed"
        found[state] += 1
        errors = {p.get("name"): p.get("value") for p in case.iter("property")}
        row = {"test": case.get("name"), "outcome": state}
        row |= {"seconds": float(case.get("time", 0)), **errors}
        if bad is not None:
            row["message"] = (bad.get("message") or "")[:1500]
        rows.append(row)
    show = ("exit_code", "passed", "failed", "skipped")
    record.add("pytest -m gpu", show, exit_code=code, **found, tests=rows)
    if found["failed"]:
        names = ", ".join(r["test"] for r in rows if r["outcome"] == "failed")
        record.add("failed tests", error=names)


# ---------------------------------------------------------------- b: GRPO


def measured_rate(record: Record) -> float:
    """FLOP/s of the bfloat16 product that `environment` measured; 0 if it did not."""
    path = record.work / "steps" / "environment.json"
    found = json.loads(path.read_text())["entries"] if path.is_file() else []
    rates = [e.get("tflops", 0.0) for e in found if e["name"] == "matmul bfloat16"]
    return 1e12 * rates[0] if rates else 0.0


def make_prompt(processor: Any, images: int, side: int, device: torch.device) -> Prompt:
    noise = np.random.default_rng(0)
    pictures = [
        Image.fromarray(noise.integers(0, 256, (side, side, 3), dtype=np.uint8))
        for _ in range(images)
    ]
    content: list[dict[str, Any]] = [
        {"type": "image", "image": picture} for picture in pictures
    ]
    question = "Find in the last image the thing that the first image does not show."
    content.append({"type": "text", "text": question})
    conversation = [{"role": "user", "content": content}]
    encoded = processor.apply_chat_template(
        conversation,
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    ).to(device)
    ((prompt, _),) = split_rows(groups=[0], num_images=[images], **encoded)
    return prompt


def pass_flops(
    model: Any, rows: list[tuple[int, int]], replies: int, patches: int
) -> tuple[float, float]:
    """FLOPs of a (reference, policy) pass with a frozen base and checkpointing.

    rows: (tokens, pairs of tokens that attend to each other) of each row; replies:
    tokens that are scored; patches: through the vision tower. LoRA is left out.
    """
    base = models.get_base_model(model)
    text = base.config.get_text_config()
    layers = base.model.language_model.layers
    weights = sum(p.numel() for n, p in layers.named_parameters() if "lora_" not in n)
    tokens = sum(count for count, _ in rows)
    pairs = sum(count for _, count in rows)
    layer = 2 * weights * tokens
    attention = 4 * text.hidden_size * len(layers) * pairs
    head = 2 * text.vocab_size * text.hidden_size * replies
    tower = 2 * sum(p.numel() for p in base.model.visual.parameters()) * patches
    reference = layer + attention + head + tower
    # forward, forward again, gradient of the inputs (attention: of both factors);
    # the head: forward, again, gradient of the states
    policy = 3 * layer + 4 * attention + 3 * head + tower
    return float(reference), float(policy)


def passes_of(record: Record, name: str, sizes: dict[str, int], repeats: int) -> None:
    """Reference and policy pass of one group: whole rows, and packed by attention."""
    device = models.get_device()
    side, group, length = sizes["side"], sizes["group"], sizes["completion"]
    model, processor = bench.random_model(name, side, record.dry)
    add_fused_lm_head(model, temperature=1.0, outputs=("log_probs", "entropy"))
    models.freeze_vision(model)
    with models.ignore_rename_warnings():
        options = {"use_reentrant": False}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model.enable_input_require_grads()
    torch.manual_seed(0)
    model = models.add_lora(model, {"r": 32, "lora_alpha": 64}).to(device).train()
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:  # else half of the gradients are zero
            torch.nn.init.normal_(parameter, std=0.01)
    backbone = models.get_base_model(model).model
    language = backbone.language_model
    prompt = make_prompt(processor, sizes["images"], side, device)
    words = torch.randint(20, 900, (group, length), device=device)
    size, total = len(prompt.ids), group * length
    patches = sum(len(pixels) for pixels, _ in prompt.images)
    row = size + length
    whole = [(row, row * (row + 1) // 2)] * group
    packed_pairs = size * (size + 1) // 2
    packed_pairs += group * (length * size + length * (length + 1) // 2)
    trained = [p for p in model.parameters() if p.requires_grad]
    rate = measured_rate(record)
    exact: torch.Tensor | None = None

    def whole_rows() -> torch.Tensor:
        return check.compute_whole_rows(model, prompt, words)

    def packed() -> torch.Tensor:
        rows = range(len(words))
        parts = packed_rows.compute_log_probs(
            model, backbone, [(prompt, rows)], words, VisionCache(backbone)
        )
        return torch.stack([parts[row][0] for row in rows])

    ways = {
        "whole rows, sdpa": ("sdpa", whole_rows),
        "packed, sdpa": ("sdpa", packed),
        "packed, flex": (FLEX, packed),
        "packed, segments": (SEGMENTS, packed),
    }
    for way, (attention, run) in ways.items():
        if attention == FLEX and not on_gpu():
            continue  # no backward pass on a CPU
        label = f"{name} G {group}: {way}"
        with record.tried(label):
            language.set_attn_implementation(attention)
            rows, seen = (whole, group * patches)
            if run is packed:
                rows, seen = [(size + total, packed_pairs)], patches
            flops = pass_flops(model, rows, total, seen)
            found: list[torch.Tensor] = []

            def reference(run: Callable = run, found: list = found) -> None:
                with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
                    found[:] = [run()]

            def policy(run: Callable = run) -> None:
                model.zero_grad(set_to_none=True)
                with torch.autocast(device.type, torch.bfloat16):
                    loss = -run().mean()
                loss.backward()

            first = seconds_of(reference, 1) + seconds_of(policy, 1)
            release()
            forward = seconds_of(reference, repeats)
            train = seconds_of(policy, repeats)
            gradient = torch.cat([p.grad.flatten().float() for p in trained])
            entry = {
                "model": name, "attention": attention, "prompt": size,
                "completion": length, "group": group,
                "reference_s": statistics.median(forward),
                "policy_s": statistics.median(train),
                "all_s": {"reference": forward, "policy": train}, "first_s": first,
                "reference_tflops": flops[0] / statistics.median(forward) / 1e12,
                "policy_tflops": flops[1] / statistics.median(train) / 1e12,
                "flops": flops, **peaks(), "compiled": compiled(),
            }  # fmt: skip
            if rate:
                share = flops[1] / statistics.median(train) / rate
                entry["policy_share_of_matmul"] = share
            if exact is None and run is whole_rows:
                exact, truth = gradient, found[0].clone()
            elif exact is not None:
                entry["gradient_cosine"] = float(
                    torch.cosine_similarity(gradient, exact, dim=0)
                )
                entry["log_prob_difference"] = float((found[0] - truth).abs().max())
            show = ("reference_s", "policy_s", "policy_tflops", "allocated_gb")
            show += ("gradient_cosine", "log_prob_difference", "first_s")
            record.add(label, show, **entry)
            model.zero_grad(set_to_none=True)


def passes(record: Record) -> None:
    """The passes alone, 2B and 7B: what sharing and each attention give."""
    sizes, repeats = (DRY, 1) if record.dry else (REAL, 2)
    with record.tried(f"{SMALL} passes"):
        passes_of(record, SMALL, sizes, repeats)
    with record.tried(f"{LARGE} passes"):
        passes_of(record, LARGE, sizes, repeats)
    if record.dry:
        return  # another group size shows a CPU nothing new
    with record.tried(f"{SMALL} passes, G 16"):
        passes_of(record, SMALL, sizes | {"group": 2 * sizes["group"]}, repeats)


def updates_of(record: Record, cases: list[dict[str, Any]]) -> None:
    """Whole updates, split into their parts."""
    sizes = DRY if record.dry else REAL
    for case in cases:
        made = bench.Case(
            prompts=1,
            warm_up=1,
            reduced=record.dry,
            **{**sizes, **case},
        )
        label = f"{made.model} G {made.group}: {made.way}"
        with record.tried(label):
            began = now()
            found = bench.measure(made)
            seconds = found["seconds"]
            sampled = made.group * made.completion
            entry = found | {
                "whole_s": round(now() - began, 2),
                "tokens_per_s": sampled / seconds["generate"],
                "tokens_per_s_of_update": sampled / seconds["update"],
                **peaks(),
                "compiled": compiled(),
            }
            show = ("attention", "prompt", "seconds", "updates_seconds")
            show += ("tokens_per_s", "allocated_gb")
            record.add(label, show, **entry)


def update(record: Record) -> None:
    """2B shape, G 8: stock TRL and the shared prefix, one update after a first one."""
    common = {"model": SMALL, "updates": 1}
    updates_of(record, [common | {"way": way} for way in ("stock", "shared")])


def qwen3(record: Record) -> None:
    """Qwen3-VL's shape: the passes, and whole updates."""
    sizes = (DRY | {"side": 64}) if record.dry else (REAL | {"side": 704})
    with record.tried(f"{NEWER} passes"):
        passes_of(record, NEWER, sizes, 1)
    common = {"model": NEWER, "updates": 1, "side": sizes["side"]}
    updates_of(record, [common | {"way": way} for way in ("stock", "shared")])


def update_more(record: Record) -> None:
    """G 16, then the 7B shape."""
    double = 2 * (DRY if record.dry else REAL)["group"]
    cases: list[dict[str, Any]] = [
        {"model": SMALL, "group": double, "way": "shared"},
        {"model": SMALL, "group": double, "way": "stock"},
        {"model": LARGE, "way": "shared"},
        {"model": LARGE, "way": "stock"},
    ]
    if record.dry:  # each model and each way once
        cases = [cases[0], cases[-1]]
    updates_of(record, [case | {"updates": 1} for case in cases])
    memory_of_updates(record, record.entries[:])


# ---------------------------------------------------------------- d: SFT


class StepTimes(TrainerCallback):
    """Seconds of every optimizer step, and the memory before the first."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_args: Any, **_kwargs: Any) -> None:
        self.began = now()

    def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
        self.seconds.append(now() - self.began)


def question_rows(folder: Path, count: int, side: int) -> list[GroundingSample]:
    """Questions of 1 to 4 pictures of noise, with replies of different lengths."""
    noise = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(12):
        pixels = noise.integers(0, 256, (side, side, 3), dtype=np.uint8)
        path = folder / f"{number}.png"
        Image.fromarray(pixels).save(path, compress_level=1)
        paths.append(str(path))
    rows = []
    for i in range(count):
        images = tuple(paths[(i + j) % 12] for j in range(1 + i * 5 % 4))
        chain = "The first image shows a thing that the last image lacks. " * 8
        words = chain[: 120 + 53 * i % 300]
        rows.append(
            GroundingSample(
                f"s{i}",
                "diff",
                images,
                "Find the thing.",
                (100, 100, 300, 400),
                chain=words,
            )
        )
    return rows


def sft_config(adapter: str, batch: int, updates: int, side: int) -> dict[str, Any]:
    config = load_scale("small")
    config["model"] |= {"min_pixels": side**2, "max_pixels": side**2}
    config["sft"] |= {
        "adapter": adapter,
        "lora": {"r": 32, "lora_alpha": 64},
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": 1,
        "max_steps": updates,
        "save_strategy": "no",
        "disable_tqdm": True,
        "warmup_steps": 0,
    }
    return config


def plain_trainer(
    config: dict[str, Any], rows: list[GroundingSample], out: Path, adapter: str
) -> SFTTrainer:
    """SFTTrainer as its documentation has it: prompt, completion and images."""
    section = config["sft"]
    model, processor = models.load_for_training(config["model"])
    models.freeze_vision(model)
    if adapter != "none":
        model = models.add_lora(model, section["lora"])
    data = Dataset.from_list(
        [
            {
                "prompt": prompts.messages(row),
                "completion": [
                    {"role": "assistant", "content": prompts.reply_text(row)}
                ],
                "images": list(row.images),
            }
            for row in rows
        ]
    ).with_transform(
        lambda batch: {
            **batch,
            "images": [[open_image(path) for path in row] for row in batch["images"]],
        }
    )
    options = checkpoints.make_trainer_options(config, "sft", out)
    arguments = SFTConfig(**options | {"max_length": None, "save_strategy": "no"})
    return SFTTrainer(
        model=model, args=arguments, train_dataset=data, processing_class=processor
    )


def sft_steps(record: Record) -> None:
    """Stage 1's step, LoRA and all language weights, ours and plain SFTTrainer."""
    side, batch, updates = (56, 2, 3) if record.dry else (448, 8, 6)

    longest = 0
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        rows = question_rows(folder / "images", batch * updates, side)
        for adapter in ("lora", "none"):
            for way in ("ours", "plain"):
                label = f"SFT {SMALL} {adapter}: {way}"
                with record.tried(label), models.ignore_rename_warnings():
                    config = sft_config(adapter, batch, updates, side)
                    out = folder / f"{adapter}_{way}"
                    model, processor = bench.random_model(SMALL, side, record.dry)
                    loaded = model.requires_grad_(True).train(), processor
                    began = now()
                    with patch.object(models, "load_for_training", return_value=loaded):
                        if way == "ours":
                            trainer = sft.build_trainer(config, out, rows)
                            longest = max(trainer.train_dataset["length"])
                        else:
                            trainer = plain_trainer(config, rows, out, adapter)
                    times = StepTimes()
                    trainer.add_callback(times)
                    prepared = now() - began
                    trainer.train()
                    seconds = statistics.median(times.seconds[1:])
                    losses = [
                        r["loss"] for r in trainer.state.log_history if "loss" in r
                    ]
                    entry = {
                        "adapter": adapter, "batch": batch, "step_s": seconds,
                        "samples_per_s": batch / seconds, "prepare_s": prepared,
                        "steps_s": times.seconds, "losses": losses,
                        "longest_row": longest, "side": side, **peaks(),
                    }  # fmt: skip
                    show = ("samples_per_s", "step_s", "prepare_s", "allocated_gb")
                    record.add(label, show, **entry)
                    del trainer, model, loaded


# ---------------------------------------------------------------- e: the tiny model


class Curve(TrainerCallback):
    """Writes the curve so far every few updates."""

    def __init__(self, record: Record, entry: dict[str, Any], metrics: Path) -> None:
        self.record, self.entry, self.metrics = record, entry, metrics

    def on_step_end(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step % 5 == 0:
            self.update()

    def update(self) -> None:
        rows = io.read_jsonl(self.metrics) if self.metrics.is_file() else []
        keys = {
            "reward": "reward", "mean_iou": "groups/mean_iou", "seconds": "seconds",
            "length": "completions/mean_length", "generate_s": "seconds/generate",
            "reference_s": "seconds/reference", "kl": "kl", "loss": "loss",
        }  # fmt: skip
        for name, key in keys.items():
            self.entry[name] = [row[key] for row in rows if key in row]
        self.entry["updates"] = len(rows)
        self.record.write()


def tiny(record: Record) -> None:
    """GRPO of the shipped model from its stage 1: the reward curve and the seconds."""
    folder, out = record.work / "minimig", record.work / "tiny"
    config = load_scale("tiny")
    config["grpo"] |= {"disable_tqdm": True, "max_steps": 200}
    if record.dry:
        config["grpo"] |= {
            "max_steps": 2, "per_device_train_batch_size": 8,
            "num_generations": 4, "max_completion_length": 12,
        }  # fmt: skip
    with record.tried("tiny GRPO"):
        rows = files.read(folder / "stage2_rl.json", image_root=folder)
        entry: dict[str, Any] = {"name": "tiny GRPO", "show": ["updates", "seconds"]}
        record.entries.append(entry)
        curve = Curve(record, entry, out / "grpo" / "metrics.jsonl")
        build, built = grpo.build_trainer, []

        def watched(*args: Any, **kwargs: Any) -> Any:
            trainer = build(*args, **kwargs)
            trainer.add_callback(curve)
            built.append(trainer)
            return trainer

        try:
            with patch.object(grpo, "build_trainer", watched):
                summary = grpo.train(
                    config, out / "grpo", rows, sft_adapter=models.STAGE1
                )
            entry |= {
                key: summary[key]
                for key in ("reward_first", "reward_last", "mean_iou_first",
                            "mean_iou_last", "seconds_per_update")
            }  # fmt: skip
        finally:
            curve.update()
            for trainer in built:
                language = models.get_base_model(trainer.model).model
                entry["attention"] = get_attention(language)
                entry["shared"] = trainer.shared_forward
        entry |= {"compiled": compiled(), **peaks()}
        entry["last_seconds"] = entry["seconds"][-1:]
        entry["show"] = ["updates", "last_seconds", "seconds_per_update", "attention",
                         "reward_first", "reward_last", "compiled"]  # fmt: skip
        record.write()


def base(record: Record) -> None:
    """The base model's first stage: the recipe's loop, then the device alone."""
    device = models.get_device()
    limit = 1.0 if record.dry else 60.0
    batch = 4 if record.dry else 64
    plan = Plan(vision_batch=batch)
    tokenizer = train_tokenizer(generate_corpus())
    visual = build_model(tokenizer, 0).model.visual.to(device)
    width = visual.config.hidden_size
    heads = CellHeads(width).to(device)

    def losses(items: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        pictures, targets, place = items
        values = patchify(pictures).to(device)
        grids = make_image_grid_thw(len(pictures)).to(device)
        tokens = visual(values, grid_thw=grids).pooler_output
        tokens = tokens.view(len(pictures), -1, width)
        return heads.loss(tokens, targets.to(device), place.to(device))

    class OutOfTimeError(Exception):
        """Raised to leave the stage's loop when the time is over."""

    steps = 0

    def timed(items: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        nonlocal steps, start
        if steps == 2:  # warm
            start = now()
        if steps > 3 and time.perf_counter() - start > limit:
            raise OutOfTimeError
        steps += 1
        return losses(items)

    with record.tried("base, first stage"), tempfile.TemporaryDirectory() as out:
        modules = {"visual": visual, "heads": heads}
        rates = (plan.vision_lr, plan.matrix_lr)
        stage = base_training.Stage("vision", Path(out), modules, *rates)
        start = now()
        with suppress(OutOfTimeError):
            stage.run(Views(plan), batch, plan.vision_steps, timed, 10**6)
        speed = (steps - 2) * batch / (now() - start)
        record.add("base, first stage", ("samples_per_s",), samples_per_s=speed,
                   steps=steps, batch=batch)  # fmt: skip
    with record.tried("base, device alone"):
        views = Views(plan)
        items = torch.utils.data.default_collate([views[i] for i in range(batch)])
        optimizers = base_training.make_optimizers([visual, heads], *rates)

        def step() -> None:
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            sum(losses(items).values()).backward()
            for optimizer in optimizers:
                optimizer.step()

        seconds_of(step, 2)
        best = statistics.median(seconds_of(step, 2 if record.dry else 20))
        record.add("base, device alone", ("samples_per_s", "step_s"), step_s=best,
                   samples_per_s=batch / best, batch=batch)  # fmt: skip


# ---------------------------------------------------------------- f: the plan's memory


def predicted(config: dict[str, Any], stage: str, layout: Any) -> Any:
    name = "H100-80G"
    return cost.Plan(config, stage, layout, cost.find_gpu(name), 1000)


def read_entries(record: Record, *steps: str) -> list[dict[str, Any]]:
    found = []
    for step in steps:
        path = record.work / "steps" / f"{step}.json"
        if path.is_file():
            found += json.loads(path.read_text())["entries"]
    return [entry for entry in found if "error" not in entry]


def memory_of_updates(record: Record, entries: list[dict[str, Any]]) -> None:
    for entry in entries:
        if "updates_seconds" not in entry:  # the passes alone, or an error
            continue
        label = f"memory of {entry['name']}"
        with record.tried(label):
            config = load_scale("small")
            config["model"] |= {"name_or_path": f"Qwen/{entry['model']}"}
            config["sft"] |= {"adapter": "lora", "lora": {"r": 32, "lora_alpha": 64}}
            config["grpo"] |= {
                "shared_prefix": entry["way"] == "shared",
                "per_device_train_batch_size": entry["group"],
                "gradient_accumulation_steps": 1,
                "num_generations": entry["group"],
                "max_completion_length": entry["completion"],
            }
            row = entry["prompt"] + entry["completion"]
            vision = cost.load_architecture(entry["model"]).vision_config
            token = vision.patch_size * vision.spatial_merge_size
            pictures = entry["images"] * (entry["side"] // token) ** 2
            layout = Layout("single", 1, row, entry["completion"], pictures, row)
            compare(record, label, predicted(config, "grpo", layout), entry)


def memory(record: Record) -> None:
    """What `plan` predicts for `update` and `sft`, beside what they took."""
    memory_of_updates(record, read_entries(record, "update", "qwen3"))
    for entry in read_entries(record, "sft"):
        label = f"memory of {entry['name']}"
        with record.tried(label):
            side = entry["side"]
            config = sft_config(entry["adapter"], entry["batch"], 1, side)
            longest = entry["longest_row"]
            pictures = min(4 * (side // 28) ** 2, longest - 1)
            reply = min(120, longest - pictures)
            layout = Layout("single", 1, longest, reply, pictures, longest)
            compare(record, label, predicted(config, "sft", layout), entry)


def compare(record: Record, label: str, plan: Any, entry: dict[str, Any]) -> None:
    """The plan's peak holds the CUDA context; tensors alone are compared without."""
    tensors = (plan.peak - plan.memory.get("runtime", 0.0)) / 1e9
    found = {"predicted_gb": tensors, "measured_gb": entry["allocated_gb"]}
    if entry["allocated_gb"]:
        found["predicted_over_measured"] = tensors / entry["allocated_gb"]
        found["within_25_percent"] = abs(found["predicted_over_measured"] - 1) <= 0.25
    parts = {key: round(value / 1e9, 3) for key, value in plan.memory.items()}
    seconds = {key: round(value, 3) for key, value in plan.seconds.items()}
    more = {"with_runtime_gb": plan.peak / 1e9, "device_gb": entry["device_gb"]}
    record.add(label, tuple(found), **found, **more, parts=parts,
               predicted_seconds=seconds, layout=asdict(plan.layout))  # fmt: skip


STEPS: dict[str, Callable[[Record], None]] = {
    "environment": environment,
    "tests": tests,
    "passes": passes,
    "update": update,
    "qwen3": qwen3,
    "update_more": update_more,
    "sft": sft_steps,
    "tiny": tiny,
    "base": base,
    "memory": memory,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("work", type=Path)
    parser.add_argument("--dry", action="store_true", help="tiny shapes")
    options = parser.parse_args()
    record = Record(options.step, options.work, options.dry)
    with record.tried(options.step):
        STEPS[options.step](record)
    record.write()
    return int(record.failed)


if __name__ == "__main__":
    sys.exit(main())
