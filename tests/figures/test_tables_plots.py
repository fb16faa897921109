"""Tables and figures from artefacts of the shape a run writes."""

import json
import math

import matplotlib
import numpy as np
import pandas as pd
import pytest
from PIL import Image

matplotlib.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from univg_nb import paper
from univg_nb.data.sample import GroundingSample
from univg_nb.evaluate.intervals import wilson
from univg_nb.figures import diagrams, drawing, plots, tables
from univg_nb.io import write_json

HITS = {"sft_lora": 12, "base": 3, "grpo_none": 14, "grpo_exp": 20, "mine": 5}
N = 20
GROUPS = [
    {"step": step, "mean_iou": m}
    for step in range(1, 25)
    for m in (0.1, 0.5, 0.7 + step / 100, 0.3)
]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    for model, hits in HITS.items():
        mig = {task: {"n": N, "hit_05": hits} for task in paper.TASK_COLUMN}
        mig["diff"] = {"n": 2 * N, "hit_05": 0}
        # written in another order than the paper's, with an empty task
        mig = dict(reversed(mig.items())) | {"empty": {"n": 0, "hit_05": 0}}
        write_json(run / "eval" / model / "mig" / "scores.json", {"tasks": mig})
    single = {"tasks": {"refcoco": {"n": N, "hit_05": 7}}}
    write_json(run / "eval" / "base" / "single" / "scores.json", single)
    rollouts = run / "grpo_none" / "rollouts.jsonl"
    rollouts.parent.mkdir()
    rollouts.write_text("".join(json.dumps(row) + "\n" for row in GROUPS))
    return run


def test_result_table_holds_counts_intervals_and_both_averages(run_dir):
    table = tables.result_table(run_dir)
    order = list(dict.fromkeys(table["model"]))
    assert order == ["base", "sft_lora", "grpo_none", "grpo_exp", "mine"]
    base = table[table["model"] == "base"].set_index("column")
    assert list(base.index) == [*paper.TASK_COLUMN.values(), "AVG", "Pooled"]
    low, high = wilson(3, N)
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
        tables.result_table(run_dir, "lisa")


def test_wide_refuses_models_scored_on_different_items(run_dir):
    table = tables.result_table(run_dir)
    assert tables.wide(table).loc["items", "Static"] == "n = 40"
    table.loc[0, "n"] = 7
    with pytest.raises(ValueError, match="different numbers of items"):
        tables.wide(table)


def test_single_task_has_one_column_and_its_own_interval(run_dir):
    table = tables.result_table(run_dir, "single").set_index("column")
    assert table.loc["AVG", "lo"] == table.loc["refcoco", "lo"]
    shown = tables.wide(tables.result_table(run_dir, "single"))
    assert list(shown.columns) == ["refcoco"]


def test_published_beside_ours_and_gains(run_dir):
    frame = tables.published_beside_ours(run_dir)
    assert frame.loc[("grpo_exp", "paper"), "Robust"] == 58.51
    assert frame.loc[("grpo_exp", "ours"), "Robust"] == 100.0
    assert ("mine", "ours") in frame.index
    assert ("mine", "paper") not in frame.index
    gains = tables.gains(run_dir)
    # sft_nocot was not scored, so nothing is counted against it
    assert list(gains.index) == ["grpo_none", "grpo_exp"]
    assert gains.loc["grpo_exp", "paper"] == pytest.approx(1.99)
    assert gains.loc["grpo_exp", "ours"] == pytest.approx(0.9 * 30)


def test_difficulty_shares():
    shares = tables.difficulty_shares(GROUPS)
    assert shares.index.tolist() == list(range(1, 25))
    assert shares.loc[1].tolist() == [0.25, 0.5, 0.25, 4]  # 0.71, (0.5, 0.3), 0.1
    only_easy = tables.difficulty_shares([{"step": 5, "mean_iou": 1.0}])
    assert only_easy.loc[5].tolist() == [1.0, 0.0, 0.0, 1]


def test_markdown():
    frame = pd.DataFrame(
        {"name": ["a|b", "two\nlines"], "x": [1.25, math.nan], "n": [3, 4]}
    )
    assert tables.to_markdown(frame, index=False, digits=2) == (
        "| name | x | n |\n"
        "| --- | ---: | ---: |\n"
        "| a\\|b | 1.25 | 3 |\n"
        "| two lines | – | 4 |\n"
    )
    indexed = tables.to_markdown(frame.set_index("name")[["n"]])
    assert indexed.startswith("| name | n |\n")


def test_write_tables(run_dir):
    written = tables.write_tables(run_dir)
    names = {path.stem for path in written}
    assert names == {
        *("results_mig", "results_single", "published_beside_ours", "gains"),
        *("difficulty_shares_grpo_none", "paper_table1", "paper_table2"),
        *("paper_table3", "paper_table4"),
    }
    first = run_dir / "tables" / "results_mig.csv"
    pd.testing.assert_frame_equal(pd.read_csv(first), tables.result_table(run_dir))
    write_json(
        run_dir / "eval" / "base" / "refcoco_val" / "scores.json",
        {"tasks": {"refcoco_val": {"n": N, "hit_05": 7}}},
    )
    more = {path.stem for path in tables.write_tables(run_dir)} - names
    assert more == {"results_refcoco_val"}
    shares = (run_dir / "tables" / "difficulty_shares_grpo_none.md").read_text()
    assert shares.count("\n") == 12  # ten stretches of the training and the head


def drawn(figure):
    figure.set_dpi(40)  # quicker
    figure.canvas.draw()
    assert not matplotlib.pyplot.get_fignums()  # closed: shown once in a notebook
    return figure


def test_every_plot_draws_from_artefacts(run_dir, tmp_path):
    results = tables.result_table(run_dir)
    rows = [{"step": i, "loss": 1 / i, "reward": i / 9} for i in range(1, 9)]
    rows.append({"step": 9, "loss": 0.1})  # no reward logged at this step
    runs = {"grpo_none": rows, "grpo_exp": rows}
    figures = [
        plots.training_curves(runs),
        plots.training_curve({"only": rows}, "reward"),
        plots.difficulty_over_training(tables.difficulty_shares(GROUPS)),
        plots.difficulty_over_training(tables.difficulty_shares(GROUPS[:4])),
        plots.weight_functions(),
        plots.accuracy_bars(results),
        plots.group_bars([0.9, 0.8, 0.0], title="three replies"),
        plots.memory_bars({"LoRA": {"peak": 90}, "QLoRA": {"peak": 60, "swap": 3}}),
        plots.iou_curve({"base": [0.0, 0.4, 0.9], "b": [1.0]}),
        diagrams.average_bars(results, published=0),
        diagrams.pipeline(),
    ]
    assert all(type(drawn(figure)) is Figure for figure in figures)
    saved = plots.save(figures[0], tmp_path / "figures" / "curves.png")
    with Image.open(saved) as picture:
        assert min(picture.size) > 300
    assert [path.name for path in saved.parent.iterdir()] == ["curves.png"]


def test_plots_draw_into_given_axes():
    ax = Figure().add_subplot()
    assert isinstance(plots.weight_functions(ax=ax), Axes)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["exp", "power", "log", "log_released"]


def test_memory_is_shown_in_the_unit_that_reads_well():
    ax = Figure().add_subplot()
    plots.memory_bars({"full": {"weights": 15_000, "optimiser": 45_200}}, ax=ax)
    assert [text.get_text().strip() for text in ax.texts] == ["60.2 GB"]
    assert ax.get_xlabel() == "GB"
    ax = Figure().add_subplot()
    plots.memory_bars({"tiny": {"weights": 12}, "more": {"weights": 999}}, ax=ax)
    assert [text.get_text().strip() for text in ax.texts] == ["12 MB", "999 MB"]


def test_training_curve_names_what_was_logged():
    with pytest.raises(ValueError, match="a: no row has 'los'; logged: kl, loss"):
        plots.training_curve({"a": [{"step": 1, "loss": 1.0, "kl": 0.0}]}, "los")


def test_smooth_and_iou_curve_values():
    assert plots.smooth([0, 3, 6, 9], 3).tolist() == [1.5, 3.0, 6.0, 7.5]
    ax = Figure().add_subplot()
    plots.iou_curve({"m": [0.5, 0.49, 1.0, 0.0]}, ax=ax)
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


def test_draw_boxes_takes_any_box_a_model_writes():
    awkward = [(0, 0, 1000, 1000), (900, 900, 100, 100), (5, 5, 5, 5), (0, 0, 9000, 9)]
    boxes = [(box, "red", f"a long label {i}") for i, box in enumerate(awkward * 3)]
    picture = drawing.draw_boxes(Image.new("RGB", (500, 300)), boxes, 120)
    assert picture.size == (120, 72)
    with pytest.raises(ValueError, match="colour-of-mud"):
        drawing.draw_boxes(picture, [(awkward[0], "colour-of-mud", "")])


@pytest.mark.parametrize(
    ("task", "count", "question", "chain", "expected"),
    [
        ("single", 1, "Find the cup.", None, 0),
        ("object_tracking", 6, "marked in the first image, find it in the 4th image.",
         None, 3),
        ("multi_view", 3, "The thing in image 1, find it in image 3.", None, 2),
        ("region", 4, "Please locate the 2th region picture in the source image.",
         None, 0),
        ("refer_grounding", 2, "where is the object in image-1?", None, 1),
        ("reasonvos", 5, "the bounding box in the third image", None, 2),
        ("group_grounding", 3, "Find a girl.", None, None),
        ("group_grounding", 3, "Find a girl.", "Image 1 has none. Image 2 has.", 1),
        ("diff", 2, "What differs?", "It is only in image 1.", 0),
        ("diff", 2, "What differs?", None, None),
        ("multi_view", 2, "find it in image 9", None, None),
    ],
)  # fmt: skip
def test_target_image(tmp_path, task, count, question, chain, expected):
    assert (
        drawing.target_image(sample(tmp_path, task, count, question, chain)) == expected
    )


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
    results = tables.result_table(run_dir)
    drawn(diagrams.teaser([item, several], results, {"single": results}))
