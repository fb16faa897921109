"""The measured tables of README are what the committed files say."""

import pytest

from univg_nb import runs
from univg_nb.study import readme

TEXT = (runs.repo_root() / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("part", "table"),
    [
        ("base", readme.format_base),
        ("bench", readme.format_bench),
        ("reference", readme.format_reference),
    ],
)
def test_a_table_is_not_older_than_its_file(part, table):
    assert readme.fill(TEXT, part, table()) == TEXT, (
        "python -m univg_nb.study.readme RUN_DIR"
    )


def test_a_part_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match="<!-- prices -->"):
        readme.fill(TEXT, "prices", "none")


def test_what_a_difference_looks_like():
    found = {"mean_diff": 0.0512, "items_95": [0.0374, 0.065], "seeds_95": None}
    cells = readme.format_difference(found, ("items_95", "seeds_95"), 100, "+.1f")
    assert cells == ["+5.1", "+3.7 to +6.5", "one seed"]
