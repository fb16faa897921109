"""Tables and figures as files: what they hold, and when the check finds them stale."""

import json
import re
import shutil
import subprocess
import warnings
from pathlib import Path

import matplotlib as mpl
import pytest
from matplotlib.text import Text
from PIL import Image

from univg_nb import paper
from univg_nb.data import files
from univg_nb.evaluate import scoring
from univg_nb.evaluate.predictions import Reply
from univg_nb.evaluate.score import Benchmark
from univg_nb.figures import exhibits, plots, publish
from univg_nb.figures.exhibits import FIGURES, TABLES, Runs
from univg_nb.io import append_jsonl, write_json, write_text
from univg_nb.minimig import export, items

NAMES = {*TABLES, *FIGURES}
RIGHT = {"base": 2, "sft_nocot": 5, "sft_lora": 9, "grpo_none": 9, "grpo_exp": 12}


def make_run(run):
    """What a small run leaves: 20 items of MIG, five models, two GRPO trainings."""
    drawn = [
        items.make(task, 0, "val", k) for task in paper.TASK_COLUMN for k in (0, 1)
    ]
    for item in drawn:
        export.save_images(item, run / "data")
    samples = [item.sample for item in drawn]
    files.write(samples, run / "data" / "mig_bench.json", "mig_bench")
    marker = {"status": "finished", "config": {"source": "minimig"}}
    marker["results"] = {"files": {"mig_bench": "mig_bench.json"}}
    write_json(run / "data" / "stage.json", marker)
    bench = Benchmark.read(run / "data" / "mig_bench.json", run / "data", "mig")
    for model, right in RIGHT.items():
        folder, replies = run / "eval" / model / "mig", {}
        for k, sample in enumerate(bench.items):
            x1, y1, x2, y2 = sample.answer if k < right else (0, 0, 90, 90)
            text = (
                f"<think>It is_there.</think><answer>({x1},{y1}),({x2},{y2})</answer>"
            )
            replies[k] = Reply(text)
            append_jsonl(folder / "predictions.jsonl", {"index": k, "response": text})
        scored = scoring.summarize_items(scoring.score_items(bench.items, replies))
        scored["benchmark"] = bench.identify()
        write_json(folder / "scores.json", scored)
    scores = json.loads((run / "eval/base/mig/scores.json").read_text())
    for name in ("lisa", "single"):
        write_json(run / "eval" / "base" / name / "scores.json", scores)
    for model in ("grpo_none", "grpo_exp"):
        for step in range(1, 7):
            row = {"step": step, "reward": step / 6, "groups/mean_iou": 0.3}
            append_jsonl(
                run / model / "metrics.jsonl", row | {"completions/mean_length": 40}
            )
            for m in (0.1, 0.5, 0.65 + step / 20):
                group = {"step": step, "task": "diff", "mean_iou": m}
                append_jsonl(run / model / "rollouts.jsonl", group)
    write_json(
        run / "grpo_none" / "stage.json", {"needs": {"data": "", "sft_lora": ""}}
    )
    write_json(run / "manifest.json", {"scale": "tiny"})
    return run


@pytest.fixture(scope="module")
def run(folder):
    return make_run(folder / "run")


@pytest.fixture(scope="module")
def written(run):
    """The exhibits of the run; no warning is given."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        publish.write_exhibits(Runs([run]), run / "paper", command="the command")
    return run / "paper"


@pytest.fixture
def copy(written, tmp_path):
    """A run of one's own to change, with its exhibits."""
    shutil.copytree(written.parent, tmp_path / "run")
    return tmp_path / "run"


# ---------------------------------------------------------------- files


def test_every_exhibit_has_its_files_and_says_what_made_it(written, run):
    kinds = dict.fromkeys(TABLES, (".csv", ".md", ".tex"))
    kinds |= dict.fromkeys(FIGURES, (".pdf", ".png"))
    for name, suffixes in kinds.items():
        sidecar = json.loads((written / f"{name}.json").read_text())
        assert set(sidecar["files"]) == {name + suffix for suffix in suffixes}
        assert sidecar["runs"] == [".."] and sidecar["command"] == "the command"
        assert sidecar["versions"]["matplotlib"] == mpl.__version__
    assert {path.stem for path in written.iterdir()} == NAMES == set(exhibits.SPECS)
    read = json.loads((written / "table1.json").read_text())["artifacts"]
    assert set(read[0]) == {f"eval/{model}/mig/scores.json" for model in RIGHT}
    assert list(read[1]) == ["paper.yaml"]


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_a_column_wide_with_truetype_fonts_and_300_dpi(written, name):
    pdf = (written / f"{name}.pdf").read_bytes()
    width = float(re.search(rb"/MediaBox \[ 0 0 ([\d.]+)", pdf)[1])
    assert width == pytest.approx(3.25 * 72)
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf and b"/CreationDate" not in pdf
    with Image.open(written / f"{name}.png") as picture:
        assert picture.width == 975
        assert picture.info["dpi"][0] == pytest.approx(300, abs=0.1)


@pytest.mark.parametrize("width", publish.WIDTHS.values())
def test_text_has_at_least_seven_points(run, width):
    runs = Runs([run])
    for name in FIGURES:
        with mpl.rc_context({**publish.STYLE}):
            figure = exhibits.draw(name, runs, width)
        for text in figure.findobj(Text):
            if text.get_text().strip() and text.get_visible():
                assert text.get_fontsize() >= 7, f"{name}: {text.get_text()!r}"


def test_lines_and_bars_differ_without_color(run):
    styles = [str(plots.line_of(index)) for index in range(6)]
    assert len(set(styles)) == 6
    (ax,) = exhibits.draw("failures", Runs([run]), 3.25).axes
    hatches = [bars[0].get_hatch() for bars in ax.containers]
    assert len(set(hatches[:4])) == 4


# ---------------------------------------------------------------- tables


def test_published_cells_are_labeled_and_missing_ones_stay_empty(run):
    frame = TABLES["table4"](Runs([run]))
    assert frame.loc[("+ GRPO 10k", "paper, Table 4"), "AVG"] == 70.65
    ours = frame.loc[("grpo_none", "ours, MiniMIG, n = 20")]
    assert ours["AVG"] == pytest.approx(45) and ours["lo"] < 45 < ours["hi"]
    names = list(frame.index)
    place = names.index(("+ GRPO 10k", "paper, Table 4"))
    assert names[place + 1] == ("grpo_none", "ours, MiniMIG, n = 20")
    empty = frame[[source.startswith("not run") for _, source in names]]
    assert ("", "not run: + CoT-SFT 10k") in empty.index
    assert ("sft_qlora", "not run") in empty.index
    assert empty.isna().all(axis=None)
    shown = exhibits.format_table(frame)
    assert shown.loc[("grpo_none", "ours, MiniMIG, n = 20"), "AVG"].startswith("45.0 [")
    assert set(shown.loc[("sft_qlora", "not run")]) == {"–"}


def test_an_average_of_too_few_columns_is_not_given(run):
    frame = TABLES["table2"](Runs([run]))
    base = frame.loc[("base", "ours, n = 20")]
    assert (
        base["LISA val"] == pytest.approx(10) and base[["LLMSeg", "AVG"]].isna().all()
    )
    assert ("Migician", "Table 3, second-hand") in TABLES["table3"](Runs([run])).index


def test_the_record_of_a_study_becomes_a_table_and_a_forest(run, tmp_path):
    def say(arms, ours, claim=None):
        row = {"arms": arms, "ours": ours, "lo": ours - 1, "hi": ours + 1}
        return row | {"claim": claim, "paper": None, "verdict": "undecided"}

    record = {"findings": [say("a over b", 1.5, "it gains"), say("b", 4.0, "a trend")]}
    record["weights"] = [say("c over b", -2.0)]
    write_json(tmp_path / "records" / "study_x.json", record)
    runs = Runs([run, tmp_path / "records"])
    frame = TABLES["study"](runs)
    assert list(frame.index) == ["a over b", "b", "c over b"]
    assert list(frame["ours"]) == [1.5, 4.0, -2.0]
    (ax,) = exhibits.draw("ablation", runs, 3.25).axes
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a\nover b", "c\nover b"]
    # models keep their names: only one of the two folders is a run
    assert TABLES["table4"](runs).equals(TABLES["table4"](Runs([run])))
    assert list(TABLES["study"](Runs([run])).index) == ["not run"]
    assert "not run" in exhibits.draw("ablation", Runs([run]), 3.25).texts[0].get_text()


@pytest.mark.parametrize("name", ["failures", "curves", "groups", "iou_curve"])
def test_legends_of_a_column_stay_inside_it(run, name):
    with mpl.rc_context(publish.STYLE):
        figure = exhibits.draw(name, Runs([run]), 3.25)
        figure.draw_without_rendering()
    for legend in figure.legends:
        box = legend.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1


@pytest.mark.parametrize("name", TABLES)
def test_latex_has_rules_and_as_many_cells_in_every_row(written, name):
    text = (written / f"{name}.tex").read_text()
    assert text.isascii() and text.startswith("% needs \\usepackage{booktabs}")
    for rule in ("toprule", "midrule", "bottomrule"):
        assert text.count(f"\\{rule}") == 1
    kinds = re.sub(r"p{[^}]*}", "p", re.search(r"{tabular}{(.*)}\n", text)[1])
    rows = [line for line in text.splitlines() if line.endswith("\\\\")]
    assert {len(re.split(r"(?<!\\)&", row)) for row in rows} == {len(kinds)}
    assert not re.search(r"(?<!\\)[%_]", "".join(rows))
    for pair in ("table*", "tabular"):
        assert text.count(f"\\begin{{{pair}}}") == text.count(f"\\end{{{pair}}}") == 1


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="no LaTeX here")
def test_latex_compiles_and_fits_the_page(written, tmp_path):
    page = "\\documentclass[twocolumn]{article}\n\\usepackage{booktabs}\n"
    page += "\\usepackage[textwidth=6.75in]{geometry}\n\\begin{document}x\n"
    page += "".join((written / f"{name}.tex").read_text() for name in TABLES)
    write_text(tmp_path / "page.tex", page + "\\end{document}\n")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "page.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "Overfull" not in done.stdout


# ---------------------------------------------------------------- several runs, none


def test_models_of_several_runs_carry_the_run(run, copy):
    with pytest.raises(ValueError, match="two runs have one name: run, run"):
        Runs([run, copy])
    other = copy.rename(copy.with_name("other"))
    runs = Runs([run, other])
    assert list(runs.items)[:2] == ["run/base", "run/sft_nocot"]
    frame = TABLES["table4"](runs)
    assert ("other/grpo_exp", "ours, MiniMIG, n = 20") in frame.index
    assert ("grpo_exp", "not run") not in frame.index
    assert exhibits.draw("forest", runs, 6.75).axes


def test_a_run_of_nothing_leaves_empty_labeled_places(tmp_path, monkeypatch):
    few = {name: FIGURES[name] for name in ("figure1", "figure3")}
    monkeypatch.setattr(publish, "FIGURES", few)
    write_json(tmp_path / "bare" / "manifest.json", {})
    publish.write_exhibits(Runs([tmp_path / "bare"]), tmp_path / "out")
    assert "not run" in (tmp_path / "out" / "findings.md").read_text()
    figure = exhibits.draw("figure3", Runs([tmp_path / "bare"]), 3.25)
    assert figure.texts[0].get_text() == "not run: no grpo_*/rollouts.jsonl"
    assert not list(publish.check_exhibits(tmp_path / "out"))


def test_forest_compares_grpo_with_what_it_began_from(run):
    assert exhibits.find_pairs(run, ["grpo_power"]) == {
        "sft_nocot": "base",
        "sft_lora": "sft_nocot",
        "shipped": "base",
        "grpo_none": "sft_lora",
        "grpo_exp": "grpo_none",
        "grpo_power": "grpo_none",
    }


# ---------------------------------------------------------------- the check


def test_nothing_is_stale_after_writing_and_bytes_repeat(copy, monkeypatch):
    assert not list(publish.check_exhibits(copy / "paper"))
    few = {name: FIGURES[name] for name in ("figure3", "forest")}
    monkeypatch.setattr(publish, "FIGURES", few)
    again = publish.write_exhibits(Runs([copy]), copy / "again")
    assert len(again) == 3 * len(TABLES) + 4
    for path in again:
        assert path.read_bytes() == (copy / "paper" / path.name).read_bytes()


def test_stale_changed_and_unfounded_files_are_found(copy):
    scores = copy / "eval" / "base" / "mig" / "scores.json"
    write_text(scores, scores.read_text().replace("0", "1", 1))
    shutil.copytree(copy / "grpo_none", copy / "grpo_power")
    shutil.rmtree(copy / "eval" / "base" / "lisa")
    write_text(copy / "paper" / "table3.md", "| 99 |")
    (copy / "paper" / "weights.png").unlink()
    write_text(copy / "paper" / "mine.md", "| 12.3 |")
    found = list(publish.check_exhibits(copy / "paper"))
    for problem in (
        f"table1: stale, {copy}/eval/base/mig/scores.json is changed",
        f"figure3: stale, {copy}/grpo_power/rollouts.jsonl is new",
        f"table2: stale, {copy}/eval/base/lisa/scores.json is no longer there",
        "table3.md: changed since it was written",
        "weights.png: missing, though weights.json names it",
        "mine.md: no NAME.json names it: there is no artifact behind it",
    ):
        assert problem in found
    assert not any("figure2" in problem for problem in found)


def make_notebook(path, value):
    """A notebook that ran in runs/tiny and shows one table and one duration."""
    said = {"output_type": "stream", "text": ["x · seed 0 · runs/tiny\n", "3.1 s"]}
    data = {"text/html": ["<table>"], "text/plain": [f"acc {value}"]}
    cell = {"outputs": [said, {"output_type": "display_data", "data": data}]}
    write_json(path, {"cells": [cell, {"cell_type": "markdown"}]})


def test_readme_and_notebooks_are_compared_with_the_run_that_they_name(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(publish, "repo_root", lambda: tmp_path)
    run, page = tmp_path / "runs" / "tiny", tmp_path / "notebooks" / "00_a.ipynb"
    make_notebook(page, 1.5)
    real = Path(__file__).parents[2] / "docs" / "fill_readme.py"
    source = real.read_text().partition("def build_parts")[0]
    source += "PAGES = {'README.md': ['results']}\n"
    source += "def build_parts(run):\n    return {'results': '| 1.5 |'}\n"
    write_text(tmp_path / "docs" / "fill_readme.py", source)
    write_text(tmp_path / "README.md", "<!-- results -->\n| 1.5 |\n<!-- /results -->")
    (problem,) = publish.check_texts(run)
    assert problem.startswith("00_a.ipynb: no artifact behind its outputs")
    make_notebook(run / "notebooks" / "00_a.ipynb", 1.5)
    assert not list(publish.check_texts(run))
    assert not list(publish.check_texts(tmp_path / "runs" / "another"))
    make_notebook(run / "notebooks" / "00_a.ipynb", 1.4)
    write_text(tmp_path / "README.md", "<!-- results -->\n| 1.6 |\n<!-- /results -->")
    found = list(publish.check_texts(run))
    assert found[0].startswith("00_a.ipynb: its tables are not those of")
    assert found[1].startswith("README.md: results is not what the artifacts say")


def test_the_command_writes_then_checks(copy, capsys):
    out = copy / "paper"
    assert publish.main(["--check", str(out)]) == 0
    assert "all as its artifacts say" in capsys.readouterr().out
    (out / "table1.tex").unlink()
    assert publish.main(["--check", str(out)]) == 1
    assert "table1.tex: missing" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no exhibits there"):
        publish.main(["--check", str(copy / "eval")])
    (out / "manifest.json").write_text("{}")  # a folder of a run is none of exhibits
    for sidecar in set(out.glob("*.json")) - {out / "manifest.json"}:
        sidecar.unlink()
    with pytest.raises(ValueError, match="no exhibits there"):
        publish.main(["--check", str(out)])
    with pytest.raises(ValueError, match="give run folders, or --check DIR"):
        publish.main([])
