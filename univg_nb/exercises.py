"""Check the answer to an exercise: say what is wrong with it, and never raise.

    @checker
    def check_0_1(function) -> None:
        expect(function([0.2, 0.9]), 0.5, "count the hits")
        print("0.1 solved")

A wrong answer is an everyday event of a course. So it ends neither the cell with a
traceback nor `make run`: a line says what was got, what was expected and, where it can
be told, what kind of mistake it is.
"""

import functools
import linecache
import math
from collections.abc import Callable
from typing import Any


class WrongAnswerError(Exception):
    """An answer is not the expected one; the message says how."""


def expect(got: Any, wanted: Any, hint: str = "", tolerance: float = 0.0) -> None:
    """Compare an answer with the right one; two numbers may differ by `tolerance`.

    Raises WrongAnswerError with the hint if they differ; `checker` prints it.
    """
    if isinstance(wanted, bool):  # a truth value of numpy or torch will do
        right = got is not None and bool(got) == wanted
    elif _is_number(got) and _is_number(wanted):
        right = abs(float(got) - float(wanted)) <= tolerance
    else:
        right = isinstance(got, type(wanted)) and got == wanted
    if right:
        return
    kind = _describe_mistake(got, wanted)
    said = [f"got {_show(got)}, expected {_show(wanted)}", kind, hint]
    raise WrongAnswerError("; ".join(filter(None, said)))


def checker(check: Callable[..., None]) -> Callable[..., None]:
    """Make a check named `check_N_M` print the outcome of exercise N.M.

    What the check itself prints stays. Any error in the answer is shown as one line.
    """
    name = check.__name__.removeprefix("check_").replace("_", ".")

    @functools.wraps(check)
    def print_outcome(*answers: Any) -> None:
        returned: list[Any] = []  # by the answers that are functions
        watched = [_watch(answer, returned) for answer in answers]
        try:
            check(*watched)
        except NotImplementedError:
            print(f"{name} not solved yet")
        except (WrongAnswerError, AssertionError) as error:
            text = " ".join(str(error).split()) or _find_line(error)
            print(f"{name} not solved: {text}")
        except Exception as error:  # of the answer, whatever it is
            text = f"{type(error).__name__}: {error}".rstrip(": ")
            text += f", in the line: {_find_line(error)}"
            if returned and returned[-1] is None:
                text = "the function returned None; is the `return` missing?"
            print(f"{name} not solved: {text}")

    return print_outcome


def _watch(answer: Any, returned: list[Any]) -> Any:
    """Return an answer, which appends to `returned` what it returns if it is called."""
    if not callable(answer):
        return answer

    @functools.wraps(answer)
    def call(*args: Any, **options: Any) -> Any:
        returned.append(answer(*args, **options))
        return returned[-1]

    return call


def _is_number(value: Any) -> bool:
    """Return whether a value is one number, of Python, numpy or torch."""
    if isinstance(value, bool | str):
        return False
    try:
        return float(value) is not None
    except (TypeError, ValueError, RuntimeError):
        return False


def _describe_mistake(got: Any, wanted: Any) -> str:
    """Return what kind of mistake this is, "" where it cannot be told."""
    if got is None and wanted is not None:
        return "is the `return` missing?"
    pairs = (list, tuple)
    if isinstance(got, pairs) and isinstance(wanted, pairs):
        if list(got) == list(wanted):
            return f"the values are right, but return a {type(wanted).__name__}"
        if len(got) != len(wanted):
            return f"{len(got)} values, not {len(wanted)}"
        return _describe_rounding(got, wanted)
    if _is_number(got) and _is_number(wanted):
        return _describe_rounding((got,), (wanted,))
    if type(got) is not type(wanted):
        return f"this is of type {type(got).__name__}, not {type(wanted).__name__}"
    return ""


def _describe_rounding(got: Any, wanted: Any) -> str:
    """Return a remark on whole numbers that are at most one off, or on percents."""
    if not all(map(_is_number, (*got, *wanted))):
        return ""
    pairs = list(zip(map(float, got), map(float, wanted), strict=True))
    whole = all(value.is_integer() for pair in pairs for value in pair)
    if whole and all(0 <= b - a <= 1 for a, b in pairs) and abs(pairs[0][1]) > 1:
        return "cut off instead of rounded? int() and // cut off, round() rounds"
    if all(not math.isclose(a, b) and math.isclose(a, 100 * b) for a, b in pairs):
        return "a share of 0 to 1 is wanted, not percent"
    return ""


def _show(value: Any) -> str:
    """Return a value as text that fits on a line; tensors and arrays as numbers."""
    if _is_number(value) and not isinstance(value, int):
        return f"{float(value):.6g}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 120 else f"{text[:117]}..."


def _find_line(error: BaseException) -> str:
    """Return the innermost line of the notebook that an error came through."""
    trace, line = error.__traceback__, ""
    while trace:
        names, file = trace.tb_frame.f_globals, trace.tb_frame.f_code.co_filename
        if names.get("__name__") == "__main__":
            line = linecache.getline(file, trace.tb_lineno).strip() or line
        trace = trace.tb_next
    return line
