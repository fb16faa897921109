"""With which settings, and in which version, vLLM can sample the replies of GRPO."""

from __future__ import annotations

import importlib.metadata
import json
import urllib.request
from collections.abc import Mapping
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

TRIED = SpecifierSet(">=0.32,<0.33")  # as in pyproject.toml


def conflict(config: Mapping[str, Any]) -> str:
    """Why TRL cannot hand this scale's policy to vLLM, and what to set; or ""."""
    if not config["grpo"].get("use_vllm"):
        return ""
    if config["grpo"].get("norm_learning_rate") is not None:
        return (
            "grpo.norm_learning_rate: TRL cannot hand a norm that PEFT trains beside "
            "LoRA to vLLM; set grpo.norm_learning_rate=null"
        )
    if config["sft"].get("adapter") == "qlora":
        return (
            "sft.adapter=qlora: TRL sends merged weights at full size to an engine "
            "that holds 4-bit ones, which refuses them (huggingface/trl, issue 4973); "
            "set sft.adapter=lora, or grpo.use_vllm=false"
        )
    return ""


def version_note(installed: str) -> str:
    """ "ok", or that this project was tried with another version of vLLM.

    TRL 1.16 recommends 0.22 to 0.31. Those want a transformers older than 5.18, which
    takes no finished image features, so the paths that need them do not work there.
    """
    base = Version(installed).base_version  # 0.32.0+cu129 counts as 0.32.0
    return "ok" if base in TRIED else f"{installed} found; tried with {TRIED}"


def server_address(grpo: Mapping[str, Any]) -> str:
    """Where TRL looks for the server of a scale's grpo section."""
    host = grpo.get("vllm_server_host", "0.0.0.0")
    port = grpo.get("vllm_server_port", 8000)
    return grpo.get("vllm_server_base_url") or f"http://{host}:{port}"


def served_by_trl() -> SpecifierSet:
    """The versions of vLLM whose server the installed TRL reads."""
    for text in importlib.metadata.requires("trl") or []:
        wanted = Requirement(text)
        if wanted.name == "vllm":
            return wanted.specifier
    raise AssertionError("TRL no longer names the versions of vLLM it works with")


def server_problem(grpo: Mapping[str, Any]) -> str:
    """Why the running server cannot sample for GRPO, and what to do; or "".

    A server of vLLM 0.32 answers with log-probs in a form that TRL 1.16 fails on. The
    server may be of another version than the vLLM beside the trainer. One that does not
    answer is no problem here: TRL waits for it.
    """
    if not grpo.get("use_vllm") or grpo.get("vllm_mode") != "server":
        return ""
    address = server_address(grpo)
    try:
        with urllib.request.urlopen(f"{address}/version", timeout=5) as answer:
            version = json.load(answer)["version"]
    except OSError:
        return ""
    except (ValueError, KeyError, TypeError):
        return f"{address} does not answer as a vLLM server; set grpo.vllm_server_port"
    wanted = served_by_trl()
    if Version(version).base_version in wanted:
        return ""
    return (
        f"{address} is vLLM {version}, whose replies TRL cannot read ({wanted}); serve "
        'with pip install "vllm<=0.31" in an environment of its own, or set '
        "grpo.vllm_mode=colocate"
    )
