"""What a reader sees of a wrong answer."""

import math

import numpy as np
import pytest
import torch

from univg_nb.exercises import checker, expect


def outcome(answer, wanted, capsys, **options):
    @checker
    def check_1_2(function):
        expect(function(), wanted, **options)
        print("1.2 solved")

    check_1_2(answer)
    (line,) = capsys.readouterr().out.splitlines()
    return line


@pytest.mark.parametrize(
    ("got", "wanted"),
    [
        (0.5, 0.5),
        (1, 1.0),
        (np.float64(0.5), 0.5),
        (torch.tensor(3), 3),
        (np.True_, True),
        ([1, 2.0], [1.0, 2]),
        (torch.Size([4, 2]), (4, 2)),
        (None, None),
    ],
)
def test_right_answers(got, wanted, capsys):
    assert outcome(lambda: got, wanted, capsys) == "1.2 solved"
    assert outcome(lambda: got, 7.5, capsys).startswith("1.2 not solved: got ")


@pytest.mark.parametrize(
    ("got", "wanted", "said"),
    [
        (None, 0.5, "got None, expected 0.5; is the `return` missing?; hint"),
        ((1, 2), [1, 2], "(1, 2), expected [1, 2]; the values are right, but return a"),
        ([1, 2, 3], [1, 2], "expected [1, 2]; 3 values, not 2"),
        ((249, 0), (250, 0), "cut off instead of rounded?"),
        (50.0, 0.5, "got 50, expected 0.5; a share of 0 to 1 is wanted, not percent"),
        ("0.5", 0.5, "got '0.5', expected 0.5; this is of type str, not float; hint"),
        (torch.tensor(0.25), 0.5, "got 0.25, expected 0.5; hint"),
        (1, True, ""),
        (0, True, "got 0, expected True; this is of type int, not bool"),
    ],
)
def test_what_is_wrong_is_said(got, wanted, said, capsys):
    line = outcome(lambda: got, wanted, capsys, hint="hint")
    assert line == "1.2 solved" if not said else said in line
    assert "Error" not in line


def test_a_tolerance_is_of_the_difference(capsys):
    near = {"tolerance": 0.1}
    assert outcome(lambda: 0.45, 0.5, capsys, **near) == "1.2 solved"
    assert "not solved" in outcome(lambda: 0.39, 0.5, capsys, **near)
    assert "not solved" in outcome(lambda: math.nan, 0.5, capsys, **near)


def test_an_answer_that_fails_is_one_line(capsys):
    assert outcome(lambda: 1 / 0, 1, capsys).startswith(
        "1.2 not solved: ZeroDivisionError: division by zero"
    )

    def missing():
        raise NotImplementedError

    assert outcome(missing, 1, capsys) == "1.2 not solved yet"

    @checker
    def check_2_1(function):
        assert function().sum() == 1

    check_2_1(lambda: None)
    said = "2.1 not solved: the function returned None; is the `return` missing?\n"
    assert capsys.readouterr().out == said

    @checker
    def check_2_2(function):
        assert function() > 1, "above one"

    check_2_2(lambda: 0)
    assert capsys.readouterr().out.startswith("2.2 not solved: above one")


def test_what_interrupts_is_not_held_back(capsys):
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        outcome(stop, 1, capsys)
