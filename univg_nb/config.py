"""Scale files: reading, checking against a typed schema, overriding.

`OWN_SECTIONS` has the sections of a scale and our own keys; in `sft` and `grpo` every
field of TRL's SFTConfig and GRPOConfig is allowed too, under the library's own name,
and under `lora` every field of PEFT's LoraConfig. An unknown key or a wrong type is a
ValueError that names file and key: a misspelt option must never train with a default.
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
from typing import Any, Literal

import yaml

SCALES = Path(__file__).parent / "scales"
WEIGHTS = ("none", "exp", "power", "log", "log_released", "peak", "constant")
# Rows to take of a data set, None = all; files, and the folder that images lie in.
COUNTS = ("stage1", "stage2", "single", "test_per_task", "zero_shot", "single_test")
FILES = (
    *("stage1_file", "stage2_file", "mig_bench_file", "single_test_file"),
    *("lisa_file", "lisa_test_file", "llmseg_file", "reasonvos_file", "revos_file"),
)
FOLDERS = ("image_root", "refcoco_dir")  # the latter: see paper.REFCOCO_FILES
# Our own keys by section, with their types.
OWN_SECTIONS: dict[str, dict[str, Any]] = {
    "model": {
        "name_or_path": str,  # "tiny", a local folder or a hub name
        "attn_implementation": Literal["sdpa", "eager", "flash_attention_2"],
        "dtype": Literal["float32", "bfloat16", "float16"],
        "min_pixels": int,  # pixels of an image after resizing, both ends inclusive
        "max_pixels": int,
    },
    "data": {
        "source": Literal["minimig", "released"],
        "seed": int,
        **dict.fromkeys(COUNTS, int | None),
        **dict.fromkeys(FILES + FOLDERS, str),
    },
    "sft": {
        "adapter": Literal["lora", "qlora", "none"],
        "lora": dict[str, Any],
        "freeze_vision": bool,
    },
    "grpo": {
        "weight": Literal[WEIGHTS],
        "power": float,
        "constant": float,
        "unit_mean": bool,
        "rescale": Literal["none", "mad", "drop_silent"],
        "max_zero_updates": int,
        "shared_prefix": bool,
        "row_tokens": int,
        "freeze_vision": bool,
    },
    "evaluate": {"max_new_tokens": int, "batch_size": int},
    "launch": {  # without it a training runs in the calling process
        "strategy": Literal["single", "ddp", "zero2", "zero3", "fsdp2"],
        "processes": int,  # one per GPU, over all nodes
        "nodes": int,
        "written_for": int,  # processes that the batch and accumulation are for
        "port": int,  # of the rendezvous; 0 takes a free one (one node only)
    },
}
# Options that transformers renamed in 5.23: a scale has the new name with any version.
FORMER_NAMES = {
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}


class _Loader(yaml.SafeLoader):
    """A SafeLoader that reads 1e-3 as a number and refuses a key written twice.

    YAML 1.1 takes the one for a string; of the other PyYAML keeps the last silently.
    """

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
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
    """Read one value as in a scale file: a number, true, null, a list, or a string."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"cannot read the value {text!r}: {error}") from error


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return the end of an error message: "; did you mean ...?" or the known names."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    listed = f"known: {', '.join(names)}" if len(names) <= 20 else "see univg_nb/scales"
    return f"; {listed}"


# ---------------------------------------------------------------- checking


def _accepts(annotation: Any, value: Any) -> bool:
    """Return whether a value fits a type; types that are not understood accept all."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        parts = list(typing.get_args(annotation))
        if any(map(_is_enum, parts)):  # `| str` stands for the values of the enum
            parts = [part for part in parts if part is not str]
        return any(_accepts(part, value) for part in parts)
    if _is_enum(annotation):
        return value in [member.value for member in annotation]
    if origin is Literal:
        return value in typing.get_args(annotation)
    kind = origin or annotation
    if kind in (int, float):
        numbers = (int, float) if kind is float else int
        return isinstance(value, numbers) and not isinstance(value, bool)
    if kind in (str, bool, dict, list, type(None)):
        return isinstance(value, kind)
    return True  # sets, Any: the library checks those itself


def _is_enum(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, enum.Enum)


def _describe(annotation: Any) -> str:
    """Return a type in words for an error message."""
    for part in (annotation, *typing.get_args(annotation)):
        if _is_enum(part):
            return f"one of {', '.join(repr(member.value) for member in part)}"
    if isinstance(annotation, type) and typing.get_origin(annotation) is None:
        return annotation.__name__
    return str(annotation).replace("typing.", "").replace("NoneType", "None")


def _fields(config_class: type) -> dict[str, Any]:
    hints = typing.get_type_hints(config_class)
    found = {f.name: hints[f.name] for f in dataclasses.fields(config_class) if f.init}
    renamed = {new: found[old] for new, old in FORMER_NAMES.items() if old in found}
    return renamed | found


@functools.cache
def schema(section: str) -> dict[str, Any]:
    """Return the allowed keys of a section, or of "sft.lora", and their types.

    TRL and PEFT are imported only for their sections, because that takes seconds.
    """
    if section == "sft.lora":
        from peft import LoraConfig

        return _fields(LoraConfig)
    allowed = OWN_SECTIONS[section]
    if section in ("sft", "grpo"):
        import trl

        library = trl.SFTConfig if section == "sft" else trl.GRPOConfig
        allowed = _fields(library) | allowed
    return allowed


def _check_section(section: str, values: Any, where: str) -> None:
    """Raise ValueError, naming `where`, the key and the way out, for a wrong option."""
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
        if not _accepts(allowed[key], value):
            raise ValueError(
                f"{where}: {section}.{key} = {value!r} has the wrong type or value; "
                f"expected {_describe(allowed[key])}"
            )
    if section == "sft" and "lora" in values:
        _check_section("sft.lora", values["lora"], where)


def _check(config: Any, where: str) -> dict[str, Any]:
    """Check a whole scale and return it; every section but `launch` must be there."""
    if not isinstance(config, dict):
        raise ValueError(f"{where}: not a scale file (no 'section:' lines)")
    for section in config:
        if section not in OWN_SECTIONS:
            hint = suggestion(str(section), OWN_SECTIONS)
            raise ValueError(f"{where}: unknown section {section!r}{hint}")
    missing = [name for name in OWN_SECTIONS if name not in (*config, "launch")]
    if missing:
        raise ValueError(f"{where}: section missing: {', '.join(missing)}; add it")
    for section, values in config.items():
        _check_section(section, values, where)
    return config


# ---------------------------------------------------------------- reading


def scale_path(name_or_path: str | Path) -> Path:
    """Return the file of a shipped scale, or the given .yaml file; it must exist."""
    text = str(name_or_path)
    path = Path(text) if text.endswith((".yaml", ".yml")) else SCALES / f"{text}.yaml"
    if not path.is_file():
        shipped = sorted(path.stem for path in SCALES.glob("*.yaml"))
        raise ValueError(
            f"unknown scale {text!r}{suggestion(text, shipped)} "
            f"(shipped: {', '.join(shipped)}; or the path of a .yaml file)"
        )
    return path


def load_scale(
    name_or_path: str | Path, overrides: Iterable[str] = ()
) -> dict[str, Any]:
    """Read and check a scale file, and set options of it as `override` does.

    Raises:
        ValueError: for an unknown scale, unreadable YAML, unknown keys or wrong types.
    """
    path = scale_path(name_or_path)
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not readable as YAML: {error}") from error
    config = _check(config, str(path))
    for assignment in overrides:
        config = override(config, assignment)
    return config


def make_parser(
    command: str, description: str, example: str
) -> argparse.ArgumentParser:
    """Return the parser of a command, whose help ends with an example.

    `example` holds the arguments of `python -m univg_nb COMMAND`.
    """
    prog = f"python -m univg_nb {command}"
    return argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=f"example: {prog} {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_scale_arguments(
    parser: argparse.ArgumentParser, default: str | None = None
) -> None:
    """Add to a command's parser what `load_scale` takes: `scale` and `set`.

    The scale is a required positional argument or, with a default, an option `--scale`.
    """
    shown = "name of a shipped scale or a .yaml file"
    if default is None:
        parser.add_argument("scale", help=shown)
    else:
        shown += f" (default: {default})"
        parser.add_argument("--scale", default=default, help=shown)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="set an option of the scale; may be repeated",
    )


def override(config: dict[str, Any], assignment: str) -> dict[str, Any]:
    """Return a checked copy of a whole scale with one option set.

    The assignment is as "sft.learning_rate=1e-3"; "sft.lora.r=8" sets one of LoRA.
    """
    where = f"--set {assignment!r}"
    key, equals, text = assignment.partition("=")
    section, *keys = key.strip().split(".")
    if not equals or len(keys) not in (1, 2) or (len(keys) == 2 and keys[0] != "lora"):
        raise ValueError(f"{where}: write SECTION.KEY=VALUE, as sft.learning_rate=1e-3")
    if section not in OWN_SECTIONS:
        hint = suggestion(section, OWN_SECTIONS)
        raise ValueError(f"{where}: unknown section {section!r}{hint}")
    changed = {name: dict(values) for name, values in config.items()}
    target = changed.setdefault(section, {})
    if len(keys) == 2:
        target["lora"] = target = dict(target.get("lora", {}))
    value = parse_value(text)
    wanted = schema("sft.lora" if len(keys) == 2 else section).get(keys[-1])
    if wanted and not _accepts(wanted, value) and _accepts(wanted, text):
        value = text  # "no", a word that YAML reads as false
    target[keys[-1]] = value
    _check_section(section, changed[section], where)
    return changed


def dump(config: dict[str, Any]) -> str:
    """Return a scale as YAML text that `load_scale` reads back equal."""
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)


# ---------------------------------------------------------------- several processes


def spread(
    config: dict[str, Any], stage: str, processes: int | None = None
) -> dict[str, Any]:
    """Return the scale with the batch of a stage kept whole on so many processes.

    Its accumulation in the file holds for `launch.written_for` processes. By default
    there are `launch.processes`. Raises ValueError if the batch cannot be divided so.
    """
    launch = config.get("launch", {})
    wanted = processes or launch.get("processes", 1)
    section = whole_batch(config[stage], launch.get("written_for", wanted))
    steps = section["gradient_accumulation_steps"]
    if steps % wanted:
        raise ValueError(
            f"the {stage} batch is {steps} micro-batches an update, which do not "
            f"divide over {wanted} processes; take a divisor of {steps}, or set "
            f"{stage}.gradient_accumulation_steps and launch.written_for"
        )
    section["gradient_accumulation_steps"] = steps // wanted
    return {**config, stage: section}


def whole_batch(section: dict[str, Any], processes: int) -> dict[str, Any]:
    """Return a section with the accumulation of all processes together.

    It does not depend on how a batch is spread, so a checkpoint is recognized on
    another number of processes.
    """
    steps = section.get("gradient_accumulation_steps", 1) * processes
    return {**section, "gradient_accumulation_steps": steps}
