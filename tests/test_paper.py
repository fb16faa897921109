"""The published numbers agree with each other, except for the recorded misprints."""

import pytest

from univg_nb import paper

BY_TASK = {task.column: task for task in paper.MIG_TASKS}


def misprinted(table, row, column):
    return any((m.row, m.column) == (row, column) for m in table.misprints)


@pytest.mark.parametrize("table", paper.TABLES, ids=lambda t: f"table{t.number}")
def test_averages_are_the_mean_of_their_cells(table):
    for row, cells in table.rows.items():
        assert len(cells) == len(table.columns) + 1
        assert set(map(type, cells)) == {float}
        off = abs(table.compute_average(row) - cells[-1])
        # cells are rounded, and so is the average of the unrounded ones
        assert (off > 0.0101) == misprinted(table, row, "AVG"), (row, off)


def test_misprints_record_what_is_printed():
    for table in paper.TABLES:
        frame = table.to_frame()
        for misprint in table.misprints:
            assert frame.loc[misprint.row, misprint.column] == misprint.printed
            if misprint.column == "AVG":
                assert table.compute_average(misprint.row) == misprint.likely
            else:
                n = BY_TASK[misprint.column].revised
                assert paper.find_hits(misprint.printed, n) is None
                assert paper.find_hits(misprint.likely, n) is not None


def test_item_counts():
    assert sum(task.original for task in paper.MIG_TASKS) == 4295
    assert sum(task.revised for task in paper.MIG_TASKS) == 4276
    assert sum(task.hits for task in paper.MIG_TASKS) == 3410
    assert round(100 * 3410 / 4276, 2) == 79.75
    cells = dict(
        zip(paper.TABLE_1.columns, paper.TABLE_1.rows["UniVG-R1"], strict=False)
    )
    for column, task in BY_TASK.items():
        assert paper.find_hits(cells[column], task.revised) == task.hits


def test_cells_are_exact_fractions_of_the_revised_benchmark():
    re_run = {
        1: ("InternVL2-8B", "Qwen2-VL-7B", "Migician", "UniVG-R1"),
        4: tuple(paper.TABLE_4.rows),
    }
    for table in (paper.TABLE_1, paper.TABLE_4):
        for row in re_run[table.number]:
            for column, percent in zip(table.columns, table.rows[row], strict=False):
                fits = paper.find_hits(percent, BY_TASK[column].revised) is not None
                assert fits != misprinted(table, row, column), (row, column)


def test_copied_rows_fit_only_the_original_benchmark():
    group, reason = BY_TASK["GG"], BY_TASK["Reason"]
    for row in paper.ROWS_ON_ORIGINAL_BENCH:
        cells = paper.TABLE_1.to_frame().loc[row]
        assert paper.find_hits(cells["GG"], group.original) is not None
        assert paper.find_hits(cells["GG"], group.revised) is None
        fits = [
            paper.find_hits(cells["Reason"], n) is not None
            for n in (reason.original, reason.revised)
        ]
        expected = {"mPLUG-Owl3": [False, False]}.get(row, [True, False])
        assert fits == (expected if cells["Reason"] else [True, True])


def test_zero_shot_sizes():
    ours = paper.TABLE_2.to_frame().loc["UniVG-R1"]
    assert paper.find_hits(ours["LISA test"], 779) == 465
    assert paper.find_hits(ours["ReasonVOS"], 458) == 269


def test_headlines():
    one, two = paper.TABLE_1.to_frame()["AVG"], paper.TABLE_2.to_frame()["AVG"]
    assert round(one["UniVG-R1"] - one["Migician"], 1) == 9.1
    assert round(two["UniVG-R1"] - two["Migician"], 1) == 23.4
    stages = paper.TABLE_4.to_frame()["AVG"]
    gains = [
        ("CoT-SFT 90k", "SFT 90k", 1.70),
        ("+ GRPO 10k", "CoT-SFT 90k", 1.65),
        ("+ GRPO-Difficulty 10k", "+ GRPO 10k", 1.99),
        ("+ CoT-SFT 10k", "CoT-SFT 90k", -0.23),
    ]
    for better, worse, gain in gains:
        assert round(stages[better] - stages[worse], 2) == gain
    assert set(paper.STAGE_OF_MODEL.values()) <= set(stages.index)
    assert paper.FIGURE_1["UniVG-R1"] == (72.64, 58.61)


def test_figure_3_shares_add_up():
    figure = paper.FIGURE_3
    for shares in zip(figure.easy, figure.medium, figure.hard, strict=True):
        assert sum(shares) == pytest.approx(1.0, abs=0.0451)  # three read-offs
    assert len(figure.iteration) == len(figure.easy)
