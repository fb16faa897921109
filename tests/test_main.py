"""The command line: its commands, how they end, and what an import loads."""

import errno
import importlib
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from univg_nb import errors, io
from univg_nb.__main__ import COMMANDS, main
from univg_nb.errors import COURSE


def run(code, *, wait=True):
    """A Python process with this code."""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if wait:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        return out
    return process


# ---------------------------------------------------------------- commands


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert text.startswith(f"usage: python -m univg_nb {name} ")
    assert f"python -m univg_nb {name} " in text.partition("\nexample")[2]


def test_the_overview_names_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS)
    assert main([]) == 2
    assert capsys.readouterr().err == text
    assert main(["scor"]) == 2
    assert "error: there is no command 'scor'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "tny"], "unknown scale 'tny'; did you mean 'tiny'"),
        (["plan", "tiny", "--set", "sft.adaptr=lora"], "did you mean 'adapter'"),
        (["sft", "tiny", "--data", "nowhere.json"], "nowhere.json"),
        (["grpo", "tiny", "--sft-adapter", "x", "--data", "no.json"], "no.json"),
        (["audit", "nowhere.json"], "nowhere.json"),
        (["score", "--records", "no.json", "--predictions", "p"], "no.json"),
        (["run", "99"], "no notebook '99'"),
        (["figures", "nowhere"], "nowhere"),
        (["score"], "required: --records"),
        (["score", "--records", "a", "--predictions", "b", "--out", "."], "a folder"),
        (["ask", "a.png", "q", "--model", "tiny", "--out", "a.txt"], "name it .png"),
        (["audit", "file", "--out", "file/x/report.json"], "file is a file; name an"),
        (["merge", "--model", "tiny", "--scale", "tiny", "--adapter", "a"], "--out"),
    ],
)
def test_a_mistake_is_one_line_and_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    code, err = main(arguments), capsys.readouterr().err
    assert code == 2, err
    assert err.startswith("error: ") and message in err
    assert len(err.splitlines()) == 1


# ---------------------------------------------------------------- how commands end


@pytest.fixture
def command(monkeypatch):
    """Makes a command `x` that raises what it is given, as if it were this package."""

    def make(error):
        def fail(_):
            raise error

        fail = types.FunctionType(
            fail.__code__, {"__package__": "univg_nb"}, closure=fail.__closure__
        )
        monkeypatch.setitem(COMMANDS, "x", ("x", "fails"))
        module = types.SimpleNamespace(main=fail)
        monkeypatch.setitem(sys.modules, "univg_nb.x", module)

    return make


OutOfMemoryError = type("OutOfMemoryError", (RuntimeError,), {})
APIConnectionError = type("E", (Exception,), {"__module__": "openai._exceptions"})


def disk_full_behind():
    error = RuntimeError("unexpected pos 64")
    error.__context__ = OSError(errno.ENOSPC, "No space left on device")
    return error


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("bad box"), 2, "error: bad box\n"),
        (ValueError("two\nlines"), 2, "error: two lines\n"),
        (RuntimeError("training stopped"), 1, "error: training stopped\n"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), 2, "error: 'utf-8' codec"),
        (FileNotFoundError(2, "No such file", "a.json"), 2, "'a.json'"),
        (IsADirectoryError(21, "Is a directory", "runs"), 2, "'runs'"),
        (NotADirectoryError(20, "Not a directory", "f/x"), 2, "'f/x'"),
        (PermissionError(13, "Permission denied", "/data/x"), 2, "'/data/x'"),
        (ModuleNotFoundError("no", name="papermill"), 2, "univg-nb[course]"),
        (OSError(errno.ENOSPC, "No space", "/disk/a"), 1, "disk of /disk/a; free some"),
        (disk_full_behind(), 1, "error: no space left"),
        (Exception("I/O error: File too large (os error 27)"), 1, "no space left"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "a" * 9), 2, "'aaaaaaaaa'"),
        (OSError(errno.EROFS, "Read-only file system", "/cd/a"), 2, "'/cd/a'"),
        (FloatingPointError("loss nan at step 3"), 1, "error: loss nan at step 3\n"),
        (ConnectionError("no route"), 1, "error: no route\n"),
        (APIConnectionError("no server"), 1, "error: no server\n"),
        (OutOfMemoryError("CUDA"), 1, "error: CUDA\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_errors_become_a_line_and_an_exit_code(command, error, code, message, capsys):
    command(error)
    assert main(["x"]) == code
    assert message in capsys.readouterr().err


def unpack():
    _, _ = (1, 2, 3)


DEFECTS = [
    lambda: int("x"),
    lambda: [].remove(1),
    unpack,
    lambda: list(zip([1], [], strict=True)),
    lambda: np.zeros(2) + np.zeros(3),
    lambda: {}["x"],
    lambda: None + 1,
    lambda: importlib.import_module("univg_nb.missing"),
]


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_keeps_its_traceback(defect, monkeypatch):
    module = types.SimpleNamespace(main=lambda _: defect())
    monkeypatch.setitem(COMMANDS, "x", ("x", "fails"))
    monkeypatch.setitem(sys.modules, "univg_nb.x", module)
    with pytest.raises((ValueError, TypeError, LookupError, ImportError)):
        main(["x"])


def test_a_library_that_checks_options_is_heard():
    from trl import GRPOConfig

    assert errors.run(lambda: GRPOConfig("x", num_generations=1, use_cpu=True)) == 2


WAITING = """
import signal, sys, time, types
from univg_nb.__main__ import COMMANDS, main
# A job that a shell starts in the background ignores Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
def wait(_):
    print("ready", flush=True)
    time.sleep(60)
COMMANDS["x"] = ("x", "")
sys.modules["univg_nb.x"] = types.SimpleNamespace(main=wait)
sys.argv = ["univg-nb", "x"]
sys.exit(main())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_a_command_without_a_traceback(number):
    process = run(WAITING, wait=False)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in err


def test_a_closed_pipe_is_silent():
    process = subprocess.Popen(
        [sys.executable, "-m", "univg_nb", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 128 + signal.SIGPIPE
    process.stderr.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_the_output_is_one_line():
    with open("/dev/full", "w") as full:  # noqa: PTH123
        ended = subprocess.run(
            [sys.executable, "-m", "univg_nb", "--help"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: no space left")
    assert len(ended.stderr.splitlines()) == 1


def test_what_is_no_file_is_written_to_and_not_replaced(tmp_path):
    io.write_text(os.devnull, "text")
    assert Path(os.devnull).is_char_device()
    with pytest.raises(IsADirectoryError):
        io.write_text(tmp_path, "text")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- what an import loads

CHANGES = """
import gc, logging, sys
before = gc.get_threshold(), dict(logging.root.manager.loggerDict)
import univg_nb.data.boxes
assert (gc.get_threshold(), dict(logging.root.manager.loggerDict)) == before
print(*{"torch", "transformers", "pandas", "PIL"} & set(sys.modules))
"""
HELP = """
import sys
from univg_nb.__main__ import main
try:
    main(["score", "--help"])
except SystemExit:
    print(*{"torch", "transformers"} & set(sys.modules))
"""
BLOCKED = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {(*COURSE, "jupyterlab", "ipykernel")!r}:
            raise ModuleNotFoundError(f"no {{name}}", name=name)
sys.meta_path.insert(0, Blocker())
import univg_nb.evaluate.generate, univg_nb.evaluate.score, univg_nb.figures.report
import univg_nb.launch.launcher, univg_nb.launch.plan, univg_nb.launch.download
import univg_nb.train.merge
"""


def test_importing_a_light_file_changes_nothing_and_loads_nothing_heavy():
    assert run(CHANGES).strip() == ""


def test_the_help_of_score_loads_neither_torch_nor_transformers():
    assert run(HELP).splitlines()[-1] == ""


def test_trainer_and_scorer_need_no_package_of_the_course():
    run(BLOCKED)
