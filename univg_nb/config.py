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
import math
import os
import re
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml

from univg_nb.io import read_text

SCALES = Path(__file__).parent / "scales"
WEIGHTS = (
    *("none", "exp", "power", "log", "log_released", "peak", "constant"),
    *("softmax", "box_size"),
)
OWN_WEIGHTS: set[str] = set()  # what train.difficulty.register_weight added
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
        "boxes": Literal["auto", "thousandths", "pixels"],  # families.box_convention
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
        "weight": str,  # of WEIGHTS or OWN_WEIGHTS, or FILE.py:FUNCTION
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
# The least values of options that the libraries check late, or not at all.
_LEAST: dict[str, int] = {
    **dict.fromkeys((*COUNTS, "learning_rate", "weight_decay", "beta"), 0),
    **dict.fromkeys(("epsilon", "constant", "max_grad_norm"), 0),
    **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps"), 1),
    **dict.fromkeys(("steps_per_generation", "num_iterations"), 1),
    **dict.fromkeys(("max_completion_length", "max_zero_updates", "max_new_tokens"), 1),
    **dict.fromkeys(("batch_size", "processes", "nodes", "written_for"), 1),
    "num_generations": 2,
}
_ABOVE_ZERO = ("temperature", "save_steps")
# Options that transformers renamed in 5.23: a scale has the new name with any version.
FORMER_NAMES = {
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}


class _Loader(yaml.SafeLoader):
    """A SafeLoader with the scalars of YAML 1.2 that refuses a key written twice.

    PyYAML's own are of YAML 1.1: 010 is 8, 1:30 is 90, 1e-3 a string, 2026-01-02 a
    date, and `no` is false. Of a key written twice it keeps the last silently.
    """

    yaml_implicit_resolvers: dict[Any, Any] = {}

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise yaml.constructor.ConstructorError(
                None, None, f"key written twice: {', '.join(twice)}", node.start_mark
            )
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: Any) -> int:
        based = node.value.lstrip("+-")[:2] in ("0x", "0o")
        return int(node.value, 0 if based else 10)


class _Dumper(yaml.SafeDumper):
    """Quotes every string that `_Loader` or another YAML reader takes for no string."""


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:merge", _Loader.construct_yaml_str)
for _tag, _pattern in {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?([0-9]+(_[0-9]+)*|0o[0-7]+|0x[0-9a-fA-F]+)",  # 1_000 as in Python
    "float": r"[-+]?([0-9]+(_[0-9]+)*(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?"
    r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    "merge": r"<<",
}.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), None
        )


def load_yaml(text: str, where: str) -> Any:
    """Parse YAML; ValueError names `where` and the problem in one line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ValueError(f"{where}{line}: not readable as YAML: {problem}") from error


def parse_value(text: str, wanted: Any = Any) -> Any:
    """Read one value from a command line, for an option of the type `wanted`.

    It is read as in a scale file: a number, true, null, a [list] or a {key: value}.
    Numbers are decimal, as typed: 010 is ten; 1:30, a date, inf and nan are texts. All
    else is text, whole and as typed, and so is everything where only text is wanted.
    A flag may also be yes, no, on or off. The caller checks the type.
    """
    if wanted is str:
        return text
    word = text.strip()
    value: Any = text
    if word[:1] not in ("[", "{"):
        loader = _Loader("")
        tag = loader.resolve(yaml.ScalarNode, word, (True, False))
        value = loader.construct_object(yaml.ScalarNode(tag, word))
    elif accepts(wanted, []) or accepts(wanted, {}):
        value = load_yaml(text, f"the value {text!r}")
    if isinstance(value, str) or not accepts(wanted, value):
        value = _as_flag(text if accepts(wanted, text) else value, wanted)
    return value


def _as_flag(value: Any, wanted: Any) -> Any:
    """Return true or false for yes, no, on and off where a type has no texts."""
    words = {"yes": True, "on": True, "no": False, "off": False}
    flag = words.get(value.lower()) if isinstance(value, str) else None
    fits = not accepts(wanted, value) and accepts(wanted, flag)
    return flag if flag is not None and fits else value


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return the end of an error message: "; did you mean ...?" or the known names."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    listed = f"known: {', '.join(names)}" if len(names) <= 20 else "see univg_nb/scales"
    return f"; {listed}"


# ---------------------------------------------------------------- checking


def accepts(annotation: Any, value: Any) -> bool:
    """Return whether a value fits a type; types that are not understood accept all.

    inf and nan fit none: they are no options, and JSON cannot hold them.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return False
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        parts = list(typing.get_args(annotation))
        if any(map(_is_enum, parts)):  # `| str` stands for the values of the enum
            parts = [part for part in parts if part is not str]
        return any(accepts(part, value) for part in parts)
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


_EXAMPLES = {bool: " (true or false)", list: ", as [a, b]", dict: ", as {a: 1}"}


def describe(annotation: Any) -> str:
    """Return a type in words for an error message."""
    for part in (annotation, *typing.get_args(annotation)):
        if _is_enum(part):
            return f"one of {', '.join(repr(member.value) for member in part)}"
    if isinstance(annotation, type) and typing.get_origin(annotation) is None:
        return annotation.__name__ + _EXAMPLES.get(annotation, "")
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
    for key, found in values.items():
        if key not in allowed:
            raise ValueError(
                f"{where}: unknown key {section}.{key}{suggestion(str(key), allowed)}"
            )
        values[key] = value = _as_flag(found, allowed[key])
        if not accepts(allowed[key], value):
            raise ValueError(
                f"{where}: {section}.{key} = {value!r} has the wrong type or value; "
                f"expected {describe(allowed[key])}"
            )
        if (section, key) == ("grpo", "weight"):
            known = (*WEIGHTS, *OWN_WEIGHTS)
            if value not in known and ":" not in value:
                raise ValueError(
                    f"{where}: grpo.weight = {value!r}{suggestion(value, known)} (one "
                    "of yours: FILE.py:FUNCTION)"
                )
        if isinstance(value, int | float):
            if value < _LEAST.get(key, value):
                problem = f"expected {_LEAST[key]} or more"
            elif key in _ABOVE_ZERO and value <= 0:
                problem = "expected more than 0"
            else:
                continue
            raise ValueError(f"{where}: {section}.{key} = {value}; {problem}")
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
    config = _check(load_yaml(read_text(path), str(path)), str(path))
    for assignment in overrides:
        config = override(config, assignment)
    return config


# ---------------------------------------------------------------- command lines


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise ValueError: all errors of a command are shown in the same way."""
        raise ValueError(f"{message}; see {self.prog} --help")


class UnfitError(argparse.ArgumentTypeError, ValueError):
    """An argument is wrong; argparse shows the text of this exception."""


class AppendOnce(argparse.Action):
    """Append KEY VALUE, or KEY=VALUE; a key that was given before is an error."""

    def __call__(self, parser: Any, namespace: Any, values: Any, _: Any = None) -> None:
        """Do so for one occurrence of the option."""
        given = [*getattr(namespace, self.dest), values]
        keys = [
            v.partition("=")[0].strip() if isinstance(v, str) else v[0] for v in given
        ]
        if keys[-1] in keys[:-1]:
            raise argparse.ArgumentError(self, f"{keys[-1]} is given twice")
        setattr(namespace, self.dest, given)


def within(kind: type, least: float, most: float = math.inf) -> Callable[[str], Any]:
    """Return the `type` of an argument that is an int or a float within limits."""

    def read(text: str) -> Any:
        value = parse_value(text, kind)
        if not accepts(kind, value) or not least <= value <= most:
            limits = (
                f"{least:g} or more" if most == math.inf else f"{least:g}..{most:g}"
            )
            raise UnfitError(f"{text!r} is wrong; expected {kind.__name__}, {limits}")
        return kind(value)

    return read


def output_file(text: str) -> str:
    """Return the name of a file to write, or raise UnfitError before any work."""
    if Path(text).is_dir():
        raise UnfitError(f"{text} is a folder; name a file")
    output_folder(Path(text).absolute().parent)
    return text


def output_folder(path: str | Path) -> Path:
    """Return a folder to write into, or raise UnfitError before any work."""
    path = Path(path)
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not there.is_dir():
        raise UnfitError(
            f"{path} cannot be made: {there} is a file; name another folder"
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise UnfitError(f"{path} cannot be written: no permission for {there}")
    return path


def make_parser(
    command: str, description: str, example: str
) -> argparse.ArgumentParser:
    """Return the parser of a command, whose help ends with an example.

    `example` holds the arguments of `python -m univg_nb COMMAND`.
    """
    prog = f"python -m univg_nb {command}"
    parser = _Parser(
        prog=prog,
        description=description,
        epilog=f"example: {prog} {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # What is a value and no option: as from Python 3.14 on, -1e-3 too.
    parser._negative_number_matcher = re.compile(r"-\.?\d")
    return parser


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
        action=AppendOnce,
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
    wanted = schema("sft.lora" if len(keys) == 2 else section).get(keys[-1], Any)
    try:
        target[keys[-1]] = parse_value(text, wanted)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    _check_section(section, changed[section], where)
    return changed


def dump(config: dict[str, Any]) -> str:
    """Return a scale as YAML text that `load_scale` reads back equal."""
    return yaml.dump(config, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


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
