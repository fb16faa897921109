"""Whole small studies: trainings, resuming, verdicts, progress."""

import zlib

import numpy as np
import pytest

from univg_nb import io
from univg_nb.cot.stand_in import StandInTeacher
from univg_nb.minimig.items import make
from univg_nb.study import arms, command, outcomes
from univg_nb.study.design import read_study
from univg_nb.train import checkpoints

STUDY = """
scale: smoke
start: sft_a_0
set: [evaluate.max_new_tokens=8, grpo.max_completion_length=8, grpo.num_generations=2,
  grpo.per_device_train_batch_size=4, sft.max_steps=1, grpo.max_steps=1]
data: {seed: 0, stage1: 8, stage2: 6, single: 1}
seeds: 2
items: 10
plan: {pair: [grpo_exp, grpo_none], points: 90}
claims: {sft_lora: sft_a, sft_nocot: base, shipped: start}
arms:
  base: {style: direct}
  sft_a: {train: sft, from: base, questions: 8, set: [sft.adapter=none]}
  start: {from: start}
  more: {train: sft, from: start, set: [sft.adapter=none]}
  grpo_none: {train: grpo, from: start, set: [grpo.weight=none]}
  grpo_exp: {train: grpo, from: start, set: [grpo.weight=exp]}
  grpo_constant:
    {train: grpo, from: start, set: [grpo.weight=constant], constant_of: grpo_exp}
  rejected: {train: grpo, from: base, rejection: 2, set: [grpo.weight=none]}
"""


@pytest.fixture
def call(tmp_path, monkeypatch):
    """The command, whose processes are calls in this one."""
    (tmp_path / "study.yaml").write_text(STUDY)
    started = []

    def run_here(folder, commands, slots, fresh):
        for name, words in commands.items():
            started.append(name)
            command.main(words[words.index("study") + 1 :])
        return True

    def call(what, *options):
        started.clear()
        words = [what, str(tmp_path / "study.yaml"), "--run-dir", str(tmp_path / "run")]
        out = ["--out", str(tmp_path / "out")] if what == "run" else []
        code = command.main([*words, *out, *options])
        return code, list(started)

    monkeypatch.setattr(command, "run_processes", run_here)
    return call


def answer_at_random(run, config, style, adapters, out):
    rng = np.random.default_rng(zlib.crc32(out.name.encode()))
    return {"hits": arms.join_bits(rng.random(10) < 0.5), "thinks": "1" * 10}


def test_a_study_goes_on_where_it_stopped(call, tmp_path, capsys, monkeypatch):
    curves = {"easy": [0.1, 0.2, 0.3], "hard": [0.5, 0.4, 0.4]}

    def train(run, study, arm, config, out, needs):
        io.write_text(out / "log", str(config["grpo"]["weight"]))
        (out / "adapter").mkdir(exist_ok=True)
        return {"curves": curves}

    monkeypatch.setattr(arms, "train_arm", train)
    monkeypatch.setattr(arms, "evaluate", answer_at_random)
    run_dir = tmp_path / "run"
    assert call("run", "--only", "base", "sft_a", "--seeds", "0")[1] == [
        "base_0",
        "sft_a_0",
    ]
    names = ["grpo_none", "grpo_exp"]
    with pytest.raises(ValueError, match="no pilot: run two seeds"):
        call("plan")
    made = call("run", "--only", *names)[1]
    assert made == ["grpo_none_0", "grpo_exp_0", "grpo_none_1", "grpo_exp_1"]
    # cut off in the answers of one, and another made of something else
    marker = run_dir / "eval" / "grpo_none_1" / "stage.json"
    io.write_json(marker, io.read_json(marker) | {"status": "started"})
    (tmp_path / "out" / "study_smoke.json").unlink()  # would give it back
    path = tmp_path / "study.yaml"
    path.write_text(path.read_text().replace("weight=exp]", "weight=power]"))
    again = ["grpo_exp_0", "grpo_none_1", "grpo_exp_1"]
    assert call("run", "--only", *names)[1] == again
    assert io.read_text(run_dir / "grpo_exp_0" / "log") == "power"
    (kept,) = (run_dir / "replaced" / "grpo_exp_0").iterdir()
    assert io.read_text(kept / "log") == "exp"
    assert call("run", "--only", *names)[1] == []
    capsys.readouterr()

    call("status")
    text = capsys.readouterr().out
    assert "| grpo_none | 0 1 | – | – |" in text and "| more | – | – | 0 1 |" in text
    assert "6 of 14 done" in text and io.read_text(run_dir / "status.md") in text
    with io.locked(run_dir / "more_1"):
        call("status")
    assert "| more | – | 1 | 0 |" in capsys.readouterr().out

    call("plan")
    assert "grpo_exp - grpo_none, 2 seeds, 10 items" in capsys.readouterr().out
    assert io.read_json(run_dir / "plan.json")["seeds"] >= 2


def test_rates_are_the_best_on_validation(call, tmp_path, monkeypatch):
    """More hits the nearer to twice the rate of sft_a, the same for every grpo."""
    path, start = tmp_path / "study.yaml", checkpoints.SHIPPED
    text = STUDY.replace("start: sft_a_0", f"start: {start}")
    path.write_text(text + "rates: {arms: [sft_a, grpo_none], factors: [4, 1, 2]}\n")
    made = []

    def train(run, study, arm, config, out, needs):
        made.append(config[arm.train]["learning_rate"])
        (out / "adapter").mkdir()
        curves = {"easy": [0.1, 0.2, 0.3], "hard": [0.5, 0.4, 0.4]}
        return {"curves": curves}

    def evaluate(run, config, style, adapters, out):
        hits = 7
        if "sft" in out.name:
            hits = {4: 2, 1: 3, 2: 9}[round(config["sft"]["learning_rate"] / 2e-3)]
        assert "-val-" in io.read_text(run.dir / "test" / "mig_bench.json")
        return {"hits": "1" * hits + "0" * (10 - hits), "thinks": "1" * 10}

    monkeypatch.setattr(arms, "train_arm", train)
    monkeypatch.setattr(arms, "evaluate", evaluate)
    call("rates")
    assert len(made) == 6
    found = io.read_json(tmp_path / "run" / "rates.json")["chosen"]
    assert found == {"sft_a": 4e-3, "grpo_none": 1e-4}
    assert call("rates")[1] == []  # what is done is kept
    study = read_study(path, tmp_path / "run")
    assert study.make_config(study.arms["more"], 0)["sft"]["learning_rate"] == 4e-3


def test_a_study_goes_on_from_its_record_alone(call, tmp_path, monkeypatch):
    path, start = tmp_path / "study.yaml", checkpoints.SHIPPED
    path.write_text(STUDY.replace("start: sft_a_0", f"start: {start}"))
    curves = {"easy": [0.1, 0.2, 0.3], "hard": [0.5, 0.4, 0.4]}

    def train(run, study, arm, config, out, needs):
        io.write_text(out / "adapter" / "weights", "")
        return {"curves": curves, "fair_constant": 1.5}

    monkeypatch.setattr(arms, "evaluate", answer_at_random)
    monkeypatch.setattr(arms, "train_arm", train)
    names = ["base", "start", "grpo_none", "grpo_exp"]
    assert len(call("run", "--only", *names)[1]) == 6
    first = io.read_json(tmp_path / "out" / "study_smoke.json")
    io.write_json(tmp_path / "run" / "rates.json", {"chosen": {"grpo_none": 3e-4}})
    call("run", "--only", *names)  # at another rate: trained again
    second = io.read_json(tmp_path / "out" / "study_smoke.json")
    assert second["rates"] == {"chosen": {"grpo_none": 3e-4}}
    assert (
        first["arms"]["grpo_exp"]["0"]["hashes"]
        != (second["arms"]["grpo_exp"]["0"]["hashes"])
    )
    other = ("--run-dir", str(tmp_path / "other"))
    assert call("run", "--only", *names, *other)[1] == []
    third = io.read_json(tmp_path / "out" / "study_smoke.json")
    assert third["arms"] == second["arms"] and third["rates"] == second["rates"]
    assert third["findings"] == second["findings"]
    marker = tmp_path / "other" / "grpo_exp_1" / "stage.json"
    assert io.read_json(marker)["results"]["fair_constant"] == 1.5
    # rates and plan are those of the very arms they were found with
    study = read_study(path)
    for changed in ({"data": {}}, {"rates": {}, "plan": {}}, {"arms": {}}):
        given = {"plan": {"seeds": 9}, **third, "study": third["study"] | changed}
        outcomes.restore_choices(tmp_path / "bare", study, given)
        assert not (tmp_path / "bare" / "rates.json").exists() or "arms" in changed
        assert not (tmp_path / "bare" / "plan.json").exists()
    # another test: what is recorded has no weights to answer it
    io.write_text(path, path.read_text().replace("items: 10", "items: 20"))
    with pytest.raises(ValueError, match="grpo_exp_1 has no weights"):
        call("run", "--only", "grpo_exp", "--seeds", "1", *other)


@pytest.mark.slow
def test_all_arms_and_the_record_of_a_study(call, tmp_path, grpo_folder, monkeypatch):
    # no reply of so short a training is right: let there be something to weight
    monkeypatch.setattr(arms, "compute_fair_constant", lambda rows: 1.5)
    monkeypatch.setattr(arms, "reject", lambda c, b, rows, *_: (rows, {"rejection": 1}))
    model = f"set: [model.name_or_path={grpo_folder / 'base'}, "
    (tmp_path / "study.yaml").write_text(STUDY.replace("set: [", model, 1))
    call("run", "--only", "sft_a", "--seeds", "0")  # others begin from it
    assert call("run", "--seeds", "0")[1][-1] == "grpo_constant_0"
    record = io.read_json(tmp_path / "out" / "study_smoke.json")
    assert list(record["arms"]) == list(read_study(tmp_path / "study.yaml").arms)
    start = record["arms"]["start"]["0"]
    assert set(start["hits"]) <= {"0", "1"} and len(start["hits"]) == 10
    assert start["hits"] == record["arms"]["sft_a"]["0"]["hits"]  # the same weights
    trained = record["arms"]["grpo_constant"]["0"]["training"]
    assert trained["weight"]["constant"] == 1.5
    assert len(trained["curves"]["thinks"]) == trained["steps"] == 1
    assert record["arms"]["rejected"]["0"]["training"]["rejection"] == 1
    verdicts = {row["claim"]: row["verdict"] for row in record["findings"]}
    assert verdicts["the weight gains over plain GRPO"] != "not run"
    assert verdicts["RL without a cold start is behind"] == "not run"
    assert verdicts["chains gain over plain SFT"] != "not run"
    assert {"command", "config", "versions", "device", "speed"} <= record.keys()
    compared = [row["arms"].split(" over ") for row in record["weights"]]
    # all that is trained as plain GRPO is, and no other
    assert {before for _, before in compared} == {"grpo_none"}
    assert "grpo_constant" in [after for after, _ in compared]
    assert not {"sft_a", "grpo_none", "grpo_cold"} & {after for after, _ in compared}


def test_rejection_keeps_what_is_sometimes_right(tmp_path, monkeypatch):
    good, bad = (f"<answer>({x},0),(500,500)</answer>" for x in (0, 490))
    texts = [good, good, good, bad, bad, bad]

    def answer(model, processor, asked, out, options):
        for i, text in enumerate(texts):
            io.append_jsonl(out, {"index": i, "response": text})
        assert options.temperature == 0.7 and options.max_new_tokens == 99
        return {"replies": len(texts), "seconds": 2.0}

    monkeypatch.setattr(arms, "generate", answer)
    monkeypatch.setattr(arms, "load_model", lambda *_: (None, None))
    sample = make("diff", 0, "train", 0).sample
    rows = [arms.replace(sample, id=str(i), answer=(0, 0, 500, 500)) for i in range(3)]
    grpo = {"max_completion_length": 99, "temperature": 0.7, "seed": 3}
    config = {"grpo": grpo, "evaluate": {"batch_size": 4}}
    kept, facts = arms.reject(config, tmp_path, rows, 2, tmp_path)
    assert [row.id for row in kept] == ["1"]
    counts = {"replies": 6, "seconds": 2.0, "kept": 1, "right": 1, "wrong": 1}
    assert facts["rejection"] == counts


def test_the_constant_makes_the_whole_update_as_large():
    rows = [
        {"weight": 2.0, "advantages": [1.0, -1.0]},
        {"weight": 1.0, "advantages": [0.5, -0.5]},
        {"weight": 2.7, "advantages": [0.0, 0.0]},  # silent: no part in it
    ]
    constant = arms.compute_fair_constant(rows)
    assert constant * 3.0 == pytest.approx(2 * 2.0 + 1 * 1.0)
    with pytest.raises(ValueError, match="silent"):
        arms.compute_fair_constant(rows[2:])


def test_chains_are_the_teacher_s_and_a_glance_is_no_reasoning():
    drawn = [make(task, 0, "train", 0).sample for task in ("diff", "region")]
    single = make("single", 0, "train", 0).sample
    glance = {"glance": 1.0}
    teacher = StandInTeacher(0, error_rate=0.0, styles=glance)
    made = arms.write_chains([*drawn, single], teacher)
    assert [row.id for row in made] == [row.id for row in (*drawn, single)]
    assert made[-1] == single
    for row in made[:-1]:
        assert not arms.is_reasoned(f"<think>{row.chain}</think><answer>")
    assert arms.is_reasoned(f"<think>{drawn[0].chain}</think><answer>")
    assert not arms.is_reasoned("(1,2),(3,4)")


def test_an_arm_without_seeds_counts_with_every_seed():
    study = read_study()
    found = {
        "base": {0: {"hits": "10"}},
        "grpo_exp": {1: {"hits": "11"}, 3: {"hits": "01"}},
    }
    hits = outcomes.stack_hits(found, study, ["grpo_exp", "base"])
    assert hits.tolist() == [[[1, 1], [0, 1]], [[1, 0], [1, 0]]]
