"""Scale files: reading, checking against a typed schema, overriding.

A scale (DESIGN sec. 6) is a mapping with the sections `model`, `data`, `sft`, `grpo`,
`evaluate`, and `launch` where training runs in processes of its own. Our own keys are
the TypedDicts below; in `sft` and `grpo` every field of TRL's SFTConfig and GRPOConfig
is allowed too, under the library's own name, and under `lora` every field of PEFT's
LoraConfig. An unknown key or a wrong type is a ValueError that names file and key: a
misspelt option must never train with a default.
"""

import argparse
import dataclasses
import difflib
import enum
import functools
import re
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypedDict

import yaml

SCALES = Path(__file__).parent / "scales"


class ModelSection(TypedDict, total=False):
    name_or_path: str  # "tiny", a local folder or a hub name
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"]
    dtype: Literal["float32", "bfloat16", "float16"]
    min_pixels: int  # pixels of an image after resizing, both ends inclusive
    max_pixels: int


class DataSection(TypedDict, total=False):
    source: Literal["minimig", "released"]
    seed: int
    stage1: int | None  # rows; None = all rows of the released file
    stage2: int | None
    single: int | None  # single-image referring rows among stage 2
    test_per_task: int | None
    zero_shot: int | None
    single_test: int | None
    image_root: str  # joined to relative image paths
    stage1_file: str
    stage2_file: str
    mig_bench_file: str
    single_test_file: str
    refcoco_dir: str  # refcoco_val.json, refcocop_testA.json, ... (paper.REFCOCO_FILES)
    lisa_file: str  # LISA val
    lisa_test_file: str
    llmseg_file: str
    reasonvos_file: str
    revos_file: str


class SftSection(TypedDict, total=False):
    adapter: Literal["lora", "qlora", "none"]
    lora: dict[str, Any]
    freeze_vision: bool


class GrpoSection(TypedDict, total=False):
    weight: Literal["none", "exp", "power", "log", "log_released", "peak", "constant"]
    power: float
    constant: float
    unit_mean: bool
    rescale: Literal["none", "mad", "drop_silent"]
    max_zero_updates: int
    shared_prefix: Literal["auto", "on", "off", True, False]  # YAML reads on as true
    row_tokens: int
    norm_learning_rate: float | None  # null: the last norm stays as it is
    freeze_vision: bool


class EvaluateSection(TypedDict, total=False):
    max_new_tokens: int
    batch_size: int


class LaunchSection(TypedDict, total=False):
    """How a training is spread; a scale without it trains in the notebook itself."""

    strategy: Literal["single", "ddp", "zero2", "zero3", "fsdp2"]
    processes: int  # one per GPU, over all nodes
    nodes: int
    written_for: int  # processes for which the scale's batch and accumulation hold
    port: int  # of the rendezvous; 0 takes a free one (one node only)


OWN_SECTIONS = {
    "model": ModelSection,
    "data": DataSection,
    "sft": SftSection,
    "grpo": GrpoSection,
    "evaluate": EvaluateSection,
    "launch": LaunchSection,
}
OPTIONAL = ("launch",)
# Options that transformers renamed in 5.23: a scale has the new name with any version.
FORMER_NAMES = {
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a number (YAML 1.1 takes it for a string) and
    refuses a key written twice, of which PyYAML would silently keep the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"key written twice: {', '.join(twice)}", node.start_mark
            )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def parse_value(text: str) -> Any:
    """One value as in a scale file: numbers, true/false, null, lists, else a string."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"cannot read the value {text!r}: {error}") from error


def suggestion(word: str, known: Iterable[str]) -> str:
    """' (did you mean ...?)' or the known names, to end an error message with."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    listed = f"known: {', '.join(names)}" if len(names) <= 20 else "see univg_nb/scales"
    return f"; {listed}"


def accepts(annotation: Any, value: Any) -> bool:
    """Whether `value` fits a type annotation; annotations we cannot read accept all."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        parts = typing.get_args(annotation)
        if any(map(is_enum, parts)):  # `| str` stands for the values of the enum
            parts = [part for part in parts if part is not str]
        return any(accepts(part, value) for part in parts)
    if is_enum(annotation):
        return value in [member.value for member in annotation]
    if origin is Literal:
        return value in typing.get_args(annotation)
    if origin is not None:
        annotation = origin
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation in (str, bool, dict, list, type(None)):
        return isinstance(value, annotation)
    return True  # sets, Any: the library checks those itself


def is_enum(annotation: Any) -> bool:
    """Whether an annotation is a class of named values."""
    return isinstance(annotation, type) and issubclass(annotation, enum.Enum)


def describe(annotation: Any) -> str:
    """A type annotation in words for an error message."""
    for part in (annotation, *typing.get_args(annotation)):
        if is_enum(part):
            return f"one of {', '.join(repr(member.value) for member in part)}"
    if isinstance(annotation, type) and typing.get_origin(annotation) is None:
        return annotation.__name__
    return str(annotation).replace("typing.", "").replace("NoneType", "None")


def _fields(config_class: type) -> dict[str, Any]:
    hints = typing.get_type_hints(config_class)
    found = {f.name: hints[f.name] for f in dataclasses.fields(config_class) if f.init}
    renamed = {new: old for new, old in FORMER_NAMES.items() if old in found}
    return {new: found[old] for new, old in renamed.items()} | found


@functools.cache
def schema(section: str) -> dict[str, Any]:
    """Allowed keys of a section and their types; "sft.lora" is PEFT's LoraConfig.

    TRL and PEFT are imported only here and only for their sections: it takes seconds.
    """
    if section == "sft.lora":
        from peft import LoraConfig

        return _fields(LoraConfig)
    allowed = dict(typing.get_type_hints(OWN_SECTIONS[section]))
    if section == "sft":
        from trl import SFTConfig

        allowed = _fields(SFTConfig) | allowed
    if section == "grpo":
        from trl import GRPOConfig

        allowed = _fields(GRPOConfig) | allowed
    return allowed


def check_section(section: str, values: Any, where: str) -> None:
    """Check one section; ValueError naming `where`, the key and the way out."""
    if not isinstance(values, dict):
        raise ValueError(
            f"{where}: section {section!r} must be a mapping of options, "
            f"not {values!r}; write 'key: value' lines under it"
        )
    allowed = schema(section)
    for key, value in values.items():
        if key not in allowed:
            raise ValueError(
                f"{where}: unknown key {section}.{key}{suggestion(str(key), allowed)}"
            )
        if not accepts(allowed[key], value):
            raise ValueError(
                f"{where}: {section}.{key} = {value!r} has the wrong type or value; "
                f"expected {describe(allowed[key])}"
            )
    if section == "sft" and "lora" in values:
        check_section("sft.lora", values["lora"], where)


def check(config: Any, where: str) -> dict[str, Any]:
    """Check a whole scale and return it; every section but `launch` must be there."""
    if not isinstance(config, dict):
        raise ValueError(f"{where}: not a scale file (no 'section:' lines)")
    for section in config:
        if section not in OWN_SECTIONS:
            hint = suggestion(str(section), OWN_SECTIONS)
            raise ValueError(f"{where}: unknown section {section!r}{hint}")
    missing = [name for name in OWN_SECTIONS if name not in (*config, *OPTIONAL)]
    if missing:
        raise ValueError(f"{where}: section missing: {', '.join(missing)}; add it")
    for section, values in config.items():
        check_section(section, values, where)
    return config


def scale_names() -> list[str]:
    """Names of the shipped scales."""
    return sorted(path.stem for path in SCALES.glob("*.yaml"))


def scale_path(name_or_path: str | Path) -> Path:
    """The file of a shipped scale, or the given .yaml file; ValueError if none."""
    text = str(name_or_path)
    path = Path(text) if text.endswith((".yaml", ".yml")) else SCALES / f"{text}.yaml"
    if not path.is_file():
        raise ValueError(
            f"unknown scale {text!r}{suggestion(text, scale_names())} "
            f"(shipped: {', '.join(scale_names())}; or the path of a .yaml file)"
        )
    return path


def load_scale(
    name_or_path: str | Path, overrides: Iterable[str] = ()
) -> dict[str, Any]:
    """Read and check a scale file.

    Args:
        name_or_path: name of a shipped scale, or a .yaml file with the same sections.
        overrides: options to set afterwards, each as "SECTION.KEY=VALUE".

    Raises:
        ValueError: for an unknown scale, unreadable YAML, unknown keys or wrong types.
    """
    path = scale_path(name_or_path)
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not readable as YAML: {error}") from error
    config = check(config, str(path))
    for assignment in overrides:
        config = override(config, assignment)
    return config


def add_scale_arguments(
    parser: argparse.ArgumentParser, default: str | None = None
) -> None:
    """Add the scale and `--set` to a command's parser; `load_config` reads them.

    Args:
        parser: the parser of the command.
        default: the scale of an optional `--scale`; None makes it a required positional
            argument instead. Either way it is found as `options.scale`.
    """
    shown = "name of a shipped scale or a .yaml file"
    if default is None:
        parser.add_argument("scale", help=shown)
    else:
        parser.add_argument(
            "--scale", default=default, help=f"{shown} (default: {default})"
        )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="set an option of the scale; may be repeated",
    )


def load_config(options: argparse.Namespace) -> dict[str, Any]:
    """Load the scale that a command line names, with its `--set` options applied.

    Raises:
        ValueError: as `load_scale`.
    """
    return load_scale(options.scale, options.set)


def override(config: dict[str, Any], assignment: str) -> dict[str, Any]:
    """A checked copy of `config` with one option set, e.g. "sft.learning_rate=1e-3".

    "sft.lora.r=8" reaches into the LoRA options. Raises ValueError as load_scale does.
    """
    key, equals, text = assignment.partition("=")
    path = key.strip().split(".")
    if not equals or len(path) not in (2, 3) or (len(path) == 3 and path[1] != "lora"):
        raise ValueError(
            f"--set {assignment!r}: write SECTION.KEY=VALUE, as sft.learning_rate=1e-3"
        )
    if path[0] not in OWN_SECTIONS:
        hint = suggestion(path[0], OWN_SECTIONS)
        raise ValueError(f"--set {assignment!r}: unknown section {path[0]!r}{hint}")
    changed = {section: dict(values) for section, values in config.items()}
    target = changed.setdefault(path[0], {})
    if len(path) == 3:
        target["lora"] = target = dict(target.get("lora", {}))
    target[path[-1]] = value = parse_value(text)
    allowed = schema("sft.lora" if len(path) == 3 else path[0])
    wanted = allowed.get(path[-1])
    if wanted and not accepts(wanted, value) and accepts(wanted, text):
        target[path[-1]] = text  # "no", a word that YAML reads as false
    check_section(path[0], changed[path[0]], f"--set {assignment!r}")
    return changed


def dump(config: dict[str, Any]) -> str:
    """A configuration as YAML text that load_scale reads back equal."""
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


def spread(
    config: dict[str, Any], stage: str, processes: int | None = None
) -> dict[str, Any]:
    """The scale with the batch of `stage` ("sft" or "grpo") kept whole on another
    number of processes (default: launch.processes): its accumulation holds for
    `launch.written_for` of them.

    Raises ValueError if the batch cannot be divided so.
    """
    launch, section = config.get("launch", {}), dict(config[stage])
    wanted = processes or launch.get("processes", 1)
    written = launch.get("written_for", wanted)
    steps = section.get("gradient_accumulation_steps", 1) * written
    if steps % wanted:
        raise ValueError(
            f"the {stage} batch is {steps} micro-batches an update, which do not "
            f"divide over {wanted} processes; take a divisor of {steps}, or set "
            f"{stage}.gradient_accumulation_steps and launch.written_for"
        )
    section["gradient_accumulation_steps"] = steps // wanted
    return {**config, stage: section}


def whole_batch(section: dict[str, Any], processes: int) -> dict[str, Any]:
    """A section with the accumulation of all processes together: the same for every
    way to spread one batch, so that a checkpoint is known again on another number."""
    steps = section.get("gradient_accumulation_steps", 1) * processes
    return {**section, "gradient_accumulation_steps": steps}
