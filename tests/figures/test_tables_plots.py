"""Tables and figures from artefacts of the shape a run writes."""

import dataclasses
import itertools
import json
import math
from collections import Counter

import matplotlib
import numpy as np
import pandas as pd
import pytest
from PIL import Image

matplotlib.use("Agg")

from matplotlib.figure import Figure

from univg_nb import paper
from univg_nb.data.sample import GroundingSample
from univg_nb.evaluate.intervals import wilson_interval
from univg_nb.evaluate.scoring import ItemScore, summarize_items
from univg_nb.figures import diagrams, drawing, plots, tables
from univg_nb.io import write_json
from univg_nb.minimig import export, items

HITS = {"sft_lora": 12, "base": 3, "grpo_none": 14, "grpo_exp": 20, "mine": 5}
N = 20
GROUPS = [
    {"step": step, "mean_iou": m}
    for step in range(1, 25)
    for m in (0.1, 0.5, 0.7 + step / 100, 0.3)
]


def scores_of(hits_of_tasks, missing=()):
    """scores.json of N items a task (diff: 2 N), of which so many are hits."""
    scored = []
    for task, hits in hits_of_tasks.items():
        for k in range(2 * N if task == "diff" else N):
            iou = float(k < hits)
            scored.append(ItemScore(len(scored), "", task, iou, "ok", None, False))
    return summarize_items(scored, Counter(missing))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    for model, hits in HITS.items():
        mig = dict.fromkeys(paper.TASK_COLUMN, hits) | {"diff": 0}
        # a task without a scored item
        scores = scores_of(mig, missing=["empty"])
        write_json(run / "eval" / model / "mig" / "scores.json", scores)
    single = scores_of({"refcoco": 7})
    write_json(run / "eval" / "base" / "single" / "scores.json", single)
    rollouts = run / "grpo_none" / "rollouts.jsonl"
    rollouts.parent.mkdir()
    rollouts.write_text("".join(json.dumps(row) + "\n" for row in GROUPS))
    return run


def test_result_table_holds_counts_intervals_and_both_averages(run_dir):
    table = tables.load_result_table(run_dir)
    order = list(dict.fromkeys(table["model"]))
    assert order == ["base", "sft_lora", "grpo_none", "grpo_exp", "mine"]
    base = table[table["model"] == "base"].set_index("column")
    assert list(base.index) == [*paper.TASK_COLUMN.values(), "AVG", "Pooled"]
    low, high = wilson_interval(3, N)
    robust = base.loc["Robust", ["n", "hits", "acc", "lo", "hi"]]
    assert robust.tolist() == pytest.approx([N, 3, 15.0, 100 * low, 100 * high])
    assert base.loc["AVG", "acc"] == pytest.approx(9 * 15 / 10)
    assert base.loc["Pooled", "acc"] == pytest.approx(100 * 27 / (11 * N))
    assert (table["lo"] <= table["acc"]).all()
    assert (table["acc"] <= table["hi"]).all()


def test_result_table_names_what_is_missing(run_dir):
    with pytest.raises(
        ValueError, match=r"eval/<model>/lisa/scores.json; run notebook"
    ):
        tables.load_result_table(run_dir, "lisa")


def test_wide_refuses_models_scored_on_different_items(run_dir):
    table = tables.load_result_table(run_dir)
    assert tables.pivot_results(table).loc["items", "Static"] == "n = 40"
    table.loc[0, "n"] = 7
    with pytest.raises(ValueError, match="different numbers of items"):
        tables.pivot_results(table)


def test_single_task_has_one_column_and_its_own_interval(run_dir):
    table = tables.load_result_table(run_dir, "single").set_index("column")
    assert table.loc["AVG", "lo"] == table.loc["refcoco", "lo"]
    shown = tables.pivot_results(tables.load_result_table(run_dir, "single"))
    assert list(shown.columns) == ["refcoco"]


def test_published_beside_ours_and_gains(run_dir):
    frame = tables.load_paper_comparison(run_dir)
    assert frame.loc[("grpo_exp", "paper"), "Robust"] == 58.51
    assert frame.loc[("grpo_exp", "ours"), "Robust"] == 100.0
    assert ("mine", "ours") in frame.index
    assert ("mine", "paper") not in frame.index
    gains = tables.load_gains(run_dir)
    # neither sft_nocot nor shipped was scored, so nothing is counted against them
    assert list(gains.index) == ["grpo_exp"]
    assert gains.loc["grpo_exp", "paper"] == pytest.approx(1.99)
    assert gains.loc["grpo_exp", "ours"] == pytest.approx(0.9 * 30)


def test_difficulty_shares():
    shares = tables.compute_difficulty_shares(GROUPS)
    assert shares.index.tolist() == list(range(1, 25))
    assert shares.loc[1].tolist() == [0.25, 0.5, 0.25, 4]  # 0.71, (0.5, 0.3), 0.1
    only_easy = tables.compute_difficulty_shares([{"step": 5, "mean_iou": 1.0}])
    assert only_easy.loc[5].tolist() == [1.0, 0.0, 0.0, 1]


def test_adjusted_shares_leave_out_which_tasks_an_update_drew():
    drawn = {1: "aab", 2: "abb", 3: "abb"}  # a is always easy, b never
    rows = [
        {"step": step, "task": task, "mean_iou": float(task == "a")}
        for step, tasks in drawn.items()
        for task in tasks
    ]
    assert tables.compute_difficulty_shares(rows)["easy"].nunique() == 2
    adjusted = tables.compute_difficulty_shares(rows, adjusted=True)
    assert adjusted["easy"].to_numpy() == pytest.approx([4 / 9] * 3)
    rows[0]["mean_iou"] = 0.5  # as often as it happens, it counts
    adjusted = tables.compute_difficulty_shares(rows, adjusted=True)
    assert adjusted["easy"].iloc[0] < adjusted["easy"].iloc[1]


def test_adjusted_shares_know_the_levels_that_ids_tell():
    draws = {1: "easy hard hard", 2: "easy easy hard", 3: "easy easy hard"}
    rows = [
        {
            "step": step,
            "task": "diff",
            "sample_id": f"minimig-diff-train-{level}-{step:06d}",
            "mean_iou": float(level == "easy"),
        }
        for step, levels in draws.items()
        for level in levels.split()
    ]
    adjusted = tables.compute_difficulty_shares(rows, adjusted=True)
    assert adjusted["easy"].to_numpy() == pytest.approx([5 / 9] * 3)
    other = [row | {"sample_id": f"row {k}"} for k, row in enumerate(rows)]
    plain = tables.compute_difficulty_shares(other)
    adjusted = tables.compute_difficulty_shares(other, adjusted=True)
    assert adjusted.to_numpy() == pytest.approx(plain.to_numpy())


def test_the_line_through_adjusted_shares_is_that_of_one_fit_of_kinds_and_line():
    """A kind drawn late must not explain away that all groups become easier."""
    drawn = ["aaab"] * 10 + ["aabb"] * 10 + ["abbb"] * 10
    rows = [
        {"step": step, "task": task, "mean_iou": float(step > 6 * k + 6)}
        for step, tasks in enumerate(drawn)
        for k, task in enumerate(tasks)
    ]
    terms = [(1, row["step"], row["task"] == "b") for row in rows]
    hits = [row["mean_iou"] for row in rows]
    wanted = np.linalg.lstsq(np.array(terms, float), hits)[0][1]
    easy = tables.compute_difficulty_shares(rows, adjusted=True)["easy"]
    assert np.polyfit(easy.index, easy, 1)[0] == pytest.approx(wanted)


def test_markdown():
    frame = pd.DataFrame(
        {"name": ["a|b", "two\nlines"], "x": [1.25, math.nan], "n": [3, 4]}
    )
    assert tables.format_markdown(frame.set_index("name"), digits=2) == (
        "| name | x | n |\n"
        "| --- | ---: | ---: |\n"
        "| a\\|b | 1.25 | 3 |\n"
        "| two lines | – | 4 |\n"
    )


def test_write_tables(run_dir):
    written = tables.write_tables(run_dir)
    names = {path.stem for path in written}
    assert names == {
        *("results_mig", "results_single", "published_beside_ours", "gains"),
        *("difficulty_shares_grpo_none", "paper_table1", "paper_table2"),
        *("paper_table3", "paper_table4"),
    }
    first = run_dir / "tables" / "results_mig.csv"
    pd.testing.assert_frame_equal(pd.read_csv(first), tables.load_result_table(run_dir))
    write_json(
        run_dir / "eval" / "base" / "refcoco_val" / "scores.json",
        scores_of({"refcoco_val": 7}),
    )
    more = {path.stem for path in tables.write_tables(run_dir)} - names
    assert more == {"results_refcoco_val"}
    shares = (run_dir / "tables" / "difficulty_shares_grpo_none.md").read_text()
    assert shares.count("\n") == 2 + len({row["step"] for row in GROUPS})


def drawn(figure):
    figure.set_dpi(40)  # quicker
    figure.canvas.draw()
    assert not matplotlib.pyplot.get_fignums()  # closed: shown once in a notebook
    return figure


def test_every_plot_draws_from_artefacts(run_dir, tmp_path):
    results = tables.load_result_table(run_dir)
    rows = [{"step": i, "loss": 1 / i, "reward": i / 9} for i in range(1, 9)]
    rows.append({"step": 9, "loss": 0.1})  # no reward logged at this step
    runs = {"grpo_none": rows, "grpo_exp": rows}
    figures = [
        plots.plot_training_curves(runs),
        plots.plot_training_curves({"only": rows}, ["reward"]),
        plots.plot_difficulty_shares(tables.compute_difficulty_shares(GROUPS)),
        plots.plot_difficulty_shares(tables.compute_difficulty_shares(GROUPS[:4])),
        plots.plot_weight_functions(),
        plots.plot_accuracy_bars(results),
        plots.plot_group_bars([0.9, 0.8, 0.0], title="three replies"),
        plots.plot_memory_bars(
            {"LoRA": {"peak": 90}, "QLoRA": {"peak": 60, "swap": 3}}
        ),
        plots.plot_iou_curve({"base": [0.0, 0.4, 0.9], "b": [1.0]}),
        diagrams.plot_average_bars(results, published=0),
        diagrams.draw_pipeline(),
    ]
    assert all(type(drawn(figure)) is Figure for figure in figures)
    saved = tmp_path / "figures" / "curves.png"
    plots.save_figure(figures[0], saved)
    with Image.open(saved) as picture:
        assert min(picture.size) > 300
    assert [path.name for path in saved.parent.iterdir()] == ["curves.png"]


def test_plots_draw_into_given_axes():
    ax = Figure().add_subplot()
    assert plots.plot_group_bars([0.9, 0.0], ax=ax) is ax.figure
    assert "mean IoU 0.45" in ax.get_title()


def test_weight_functions_are_named():
    (ax,) = plots.plot_weight_functions().axes
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["exp", "power", "log", "log_released"]


def test_memory_is_shown_in_gigabytes():
    parts = {"full": {"weights": 15_000, "optimizer": 45_200}}
    (ax,) = plots.plot_memory_bars(parts).axes
    assert [text.get_text().strip() for text in ax.texts] == ["60.2 GB"]
    assert ax.get_xlabel() == "GB"


def test_the_axis_of_accuracies_ends_above_the_highest_interval():
    row = {"model": "base", "column": "AVG", "acc": 31.0, "lo": 25.0}
    for highest, top in ((38.4, 40), (40.0, 50), (79.9, 80), (85.0, 100)):
        (ax,) = plots.plot_accuracy_bars(pd.DataFrame([row | {"hi": highest}])).axes
        assert ax.get_ylim() == (0, top)
        assert (f"axis to {top}" in ax.get_ylabel()) == (top < 100)


def test_training_curve_names_what_was_logged():
    with pytest.raises(ValueError, match="a: no row has 'los'; logged: kl, loss"):
        plots.plot_training_curves(
            {"a": [{"step": 1, "loss": 1.0, "kl": 0.0}]}, ["los"]
        )


@pytest.mark.parametrize(
    ("last", "scale"), [(0.5, "log"), (2.0, "linear"), (-0.1, "linear")]
)
def test_a_loss_that_falls_far_has_a_log_axis(last, scale):
    rows = [{"step": 1, "loss": 5.0}, {"step": 2, "loss": last}]
    (ax,) = plots.plot_training_curves({"a": rows}, ["loss"]).axes
    assert ax.get_yscale() == scale
    assert ("log axis" in ax.get_ylabel()) == (scale == "log")


def test_the_label_of_a_panel_stays_off_the_one_at_its_left():
    rows = [{"step": step, "loss": 1.0, "kl": 0.1, "reward": 1.5} for step in (1, 2)]
    figure = plots.plot_training_curves({"a": rows}, ["loss", "reward", "kl"])
    figure.draw_without_rendering()
    for left, right in itertools.pairwise(figure.axes):
        label = right.yaxis.label.get_window_extent()
        assert label.x0 - left.get_window_extent().x1 > label.width


@pytest.mark.parametrize(
    ("entries", "most", "columns"), [(8, 6, 4), (7, 6, 4), (4, 3, 2), (5, 3, 3)]
)
def test_the_rows_of_a_legend_are_even(entries, most, columns):
    assert plots.spread_columns(entries, most) == columns


def test_smooth_and_iou_curve_values():
    assert plots.smooth([0, 3, 6, 9], 3).tolist() == [1.5, 3.0, 6.0, 7.5]
    (ax,) = plots.plot_iou_curve({"m": [0.5, 0.49, 1.0, 0.0]}).axes
    (curve,) = (line for line in ax.lines if line.get_label() == "m")
    x, y = curve.get_data()
    assert y[x == 0.5] == 50.0  # a hit is IoU >= 0.5
    assert y[x == 1.0] == 25.0


# ---------------------------------------------------------------- pictures


def sample(tmp_path, task, count, question, chain=None):
    paths = []
    for index in range(count):
        path = tmp_path / f"{index}.png"
        Image.new("RGB", (64, 48), (200, 200, 200)).save(path)
        paths.append(str(path))
    return GroundingSample(
        "s", task, tuple(paths), question, (250, 250, 750, 750), chain=chain
    )


def test_draw_boxes_enlarges_and_puts_the_box_where_it_is():
    picture = drawing.draw_boxes(
        Image.new("RGB", (64, 32)), [((250, 250, 750, 750), "#00ff00", "")], 640
    )
    assert picture.size == (640, 320)
    green = np.argwhere((np.asarray(picture) == (0, 255, 0)).all(axis=-1))
    assert green.min(axis=0).tolist() == [80, 160]
    assert green.max(axis=0).tolist() == [240, 480]


@pytest.mark.parametrize("moved", [0, 2, -3])
def test_a_box_at_the_place_of_others_covers_no_line_of_theirs(moved):
    ground = Image.new("RGB", (256, 256), "white")
    drawn = [((400, 400, 900, 900), "lime", ""), ((0, 410, 905, 900), "red", "")]

    def count(boxes, color):
        pixels = np.asarray(drawing.draw_boxes(ground, boxes, 256))
        return int((pixels == color).all(axis=2).sum())

    before = [count(drawn[:1], (0, 255, 0)), count(drawn, (255, 0, 0))]
    drawn.append(((400 + moved, 400, 900, 900 + moved), "blue", ""))
    after = [count(drawn, color) for color in ((0, 255, 0), (255, 0, 0))]
    # a line that crosses another takes no more of it than its own width
    assert all(left > 0.93 * whole for left, whole in zip(after, before, strict=True))
    assert count(drawn, (0, 0, 255)) > 1000


def test_tags_of_boxes_at_one_place_do_not_cover_each_other(monkeypatch):
    tags, draw_label = [], drawing._draw_label
    monkeypatch.setattr(
        drawing, "_draw_label", lambda *all: tags.append(draw_label(*all)) or tags[-1]
    )
    ground = Image.new("RGB", (256, 256), "white")
    for box in ((400, 400, 600, 600), (0, 0, 300, 300), (700, 800, 1000, 1000)):
        tags.clear()
        drawing.draw_boxes(ground, [(box, "#FF00FF", "8")] * 9, 256)
        assert len(tags) == 9
        for a, b in itertools.combinations(tags, 2):
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_a_tag_does_not_sit_on_a_box_elsewhere():
    """Above a box near the bottom is another one: the tag goes beside its own."""
    ground = Image.new("RGB", (448, 448), "white")
    boxes = [
        ((550, 250, 850, 500), "#0000FF", ""),
        ((550, 560, 900, 970), "#FF00FF", ""),
    ]
    bare = np.asarray(drawing.draw_boxes(ground, boxes))
    tagged = np.asarray(
        drawing.draw_boxes(ground, [boxes[0], (*boxes[1][:2], "model")])
    )
    changed = np.argwhere((bare != tagged).any(axis=2))
    assert len(changed)
    inside = (changed[:, 0] < 226) & (changed[:, 1] > 246)  # of the first box
    assert not inside.any()


def test_draw_boxes_takes_any_box_a_model_writes():
    awkward = [(0, 0, 1000, 1000), (900, 900, 100, 100), (5, 5, 5, 5), (0, 0, 9000, 9)]
    boxes = [(box, "red", f"a long label {i}") for i, box in enumerate(awkward * 3)]
    picture = drawing.draw_boxes(Image.new("RGB", (500, 300)), boxes, 120)
    assert picture.size == (120, 72)
    with pytest.raises(ValueError, match="color-of-mud"):
        drawing.draw_boxes(picture, [(awkward[0], "color-of-mud", "")])


@pytest.mark.parametrize("task", list(paper.TASK_COLUMN))
def test_the_box_is_drawn_on_the_image_that_holds_the_target(tmp_path, task):
    """For each task of MiniMIG, which knows where the target is."""
    green = tuple(int(drawing.TARGET_COLOR[i : i + 2], 16) for i in (1, 3, 5))
    for index in range(4):
        item = items.make(task, 0, "val", index)
        export.save_images(item, tmp_path)
        paths = tuple(str(tmp_path / path) for path in item.sample.images)
        shown = drawing.show_sample(dataclasses.replace(item.sample, images=paths))
        marked = [
            number
            for number, axes in enumerate(shown.axes, start=1)
            if (axes.images[0].get_array() == green).all(axis=-1).sum() > 50
        ]
        assert marked == [item.draft.target_image], index


def test_show_sample_and_teaser(run_dir, tmp_path):
    item = sample(tmp_path, "reasoning", 2, "It costs $5 or $6. Which one?")
    predictions = {"base": None, "grpo_exp": (250, 250, 750, 700)}
    figure = drawn(drawing.show_sample(item, predictions))
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend[1:] == ["base: no box", "grpo_exp: IoU 0.90"]
    assert [axes.get_title() for axes in figure.axes] == ["image 1", "image 2 (target)"]
    several = sample(tmp_path, "group_grounding", 4, "Find it.")
    figure = drawn(drawing.show_sample(several))
    assert "not recorded" in figure.legends[0].get_texts()[-1].get_text()
    results = tables.load_result_table(run_dir)
    drawn(diagrams.draw_teaser([item, several], results, {"single": results}))


def test_a_forest_of_zeros_has_an_axis_of_points_and_no_empty_legend():
    columns = {"ours": 0.0, "lo": -0.04, "hi": 0.04, "paper": float("nan")}
    figure = plots.plot_forest(pd.DataFrame(columns, index=["Static", "AVG"]))
    (ax,) = figure.axes
    assert ax.get_xlim() == (-2, 2)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["ours, 95 % interval"]


def test_colors_have_one_meaning_and_coinciding_models_are_seen():
    models = set(plots.MODEL_COLORS.values())
    assert len(models) == len(plots.MODEL_COLORS)
    assert not models & set(plots.BIN_COLORS.values())
    for form in ("none", "exp"):
        assert plots.FORM_COLORS[form] == plots.MODEL_COLORS[f"grpo_{form}"]
    for earlier, later in (("grpo_none", "grpo_exp"), ("sft_lora", "sft_qlora")):
        assert (plots.line_of(0, earlier), plots.line_of(0, later)) == ("-", "--")
    for word, name in drawing.MODEL_OF_WORD.items():
        assert plots.color_of(word, 0) == plots.MODEL_COLORS[name]
        assert plots.line_of(3, word) == plots.line_of(3, name)
