"""With which settings, and in which version, vLLM can sample the replies of GRPO."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
