"""What readers do to the course: stop a training, run it again, change their mind."""

import re
import subprocess
import sys

import pytest
from interrupted import held_by_another_process
from notebook_kernel import Kernel, code_of

from univg_nb import io

UPDATES = 6
TRAININGS = {  # notebook: cell that trains, stage
    "03": ("cell-21", "sft_lora"),
    "04": ("cell-24", "sft_qlora"),
    "05": ("cell-34", "grpo_none"),
    "06": ("cell-22", "grpo_exp"),
}


@pytest.fixture(scope="module")
def kernel():
    kernel = Kernel()
    yield kernel
    kernel.close()


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A run that has notebooks 01 and 02 behind it; trainings take six updates."""
    folder = tmp_path_factory.mktemp("course")
    given = ["01", "02", "--scale", "smoke", "--run-dir", str(folder)]
    for section in ("sft", "grpo"):
        given += ["--set", f"{section}.max_steps={UPDATES}"]
    # In a process of its own: this one holds a kernel's channels already.
    command = [sys.executable, "-m", "univg_nb", "run", *given]
    subprocess.run(command, check=True, timeout=600)
    return folder


def prepare(kernel, name, course, until, **parameters):
    """Run the cells of a notebook before the cell `until`; return that cell."""
    kernel.run("%reset -f")
    cells = code_of(name)
    given = {"SCALE": str(course / "scale.yaml"), "RUN_DIR": str(course), **parameters}
    for number, (cell, source) in enumerate(cells.items()):
        if cell == until:
            return source
        if number == 2:  # behind the parameters
            source = "\n".join(f"{k} = {v!r}" for k, v in given.items()) + f"\n{source}"
        seen = kernel.run(source)
        assert not seen.text("error"), f"{name}, {cell}: {seen.text('error')}"
    raise KeyError(until)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_that_is_stopped_goes_on_when_run_again(kernel, course, name):
    cell, stage = TRAININGS[name]
    source = prepare(kernel, name, course, cell)
    metrics = course / stage / "metrics.jsonl"
    seen = kernel.run(source, lambda: metrics.is_file() and io.read_jsonl(metrics))
    said = seen.text("error", "stdout")
    done = re.search(
        rf"interrupted: {stage} stopped after update (\d) of {UPDATES}, with", said
    )
    assert done, said
    assert len(seen.text("error").splitlines()) == 1
    assert "\x1b" not in said and "rror" not in seen.text("stderr")
    assert "arning" not in seen.text("stderr"), seen.text("stderr")
    checkpoint = course / stage / "checkpoints" / f"checkpoint-{done[1]}"
    assert (checkpoint / "complete.json").is_file()
    again = kernel.run(source)
    assert not again.text("error"), again.text("error")
    assert "arning" not in again.text("stderr"), again.text("stderr")
    went_on = f"{stage} resumes at update {int(done[1]) + 1} of {UPDATES}"
    assert again.text("stdout").count(went_on) == 1, again.text("stdout")
    assert io.read_json(course / stage / "stage.json")["status"] == "finished"
    steps = [row["step"] for row in io.read_jsonl(metrics)]
    assert steps == list(range(1, UPDATES + 1))


def test_a_second_kernel_on_a_stage_is_told_who_works_there(kernel, tmp_path):
    begin = f"from univg_nb import runs\nrun = runs.start('smoke', {str(tmp_path)!r})"
    assert not kernel.run(begin).text("error")
    with held_by_another_process(tmp_path / "sft_lora") as pid:
        said = kernel.run("stage = run.stage('sft_lora', {})").text("error")
    assert f"process {pid}, since" in said and "wait until that ends" in said
    assert said.startswith("error: ") and len(said.splitlines()) == 2
    assert not kernel.run("stage = run.stage('sft_lora', {})").text("error")


def test_a_parameter_that_cannot_be_meant_is_one_line(kernel):
    kernel.run("from univg_nb import runs")
    said = kernel.run("run = runs.start('smoke', 5)").text("error")
    assert said.startswith("error: RUN_DIR = 5: write a folder in quotes")
    assert len(said.splitlines()) == 2  # and that of the cell


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("raise NotImplementedError", "0.1 not solved yet"),
        ("pass", "got None, expected 0.5; is the `return` missing?"),
        ("return 50.0", "a share of 0 to 1 is wanted, not percent"),
        ("return ious.mean()", "in the line: return ious.mean()"),
    ],
)
def test_a_wrong_answer_is_a_line_and_no_error(kernel, answer, said):
    (source,) = (s for s in code_of("00").values() if "def check_0_1" in s)
    kernel.run("from univg_nb.exercises import checker, expect")
    seen = kernel.run(source.replace("raise NotImplementedError", answer))
    assert not seen.text("error")
    (line,) = seen.text("stdout").splitlines()
    assert line.startswith("0.1 not solved") and said in line
