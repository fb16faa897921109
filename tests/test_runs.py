"""Run folders, stages and scale files."""

import argparse
import errno
import json
import os
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st
from interrupted import held_by_another_process

from univg_nb import config, io, runs
from univg_nb.train import checkpoints

# ---------------------------------------------------------------- files


def test_write_json_is_whole_or_old(tmp_path):
    path = tmp_path / "deep" / "a.json"
    io.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="Out of range float"):
        io.write_json(path, {"a": float("nan")})
    assert io.read_json(path) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize(("mode", "old", "new"), [("w", "ä", "ö"), ("wb", b"1", b"2")])
def test_a_file_is_replaced_only_when_it_is_complete(tmp_path, mode, old, new):
    path = tmp_path / "deep" / "a.txt"
    with io.open_atomically(path, mode) as handle:
        handle.write(old)
    with pytest.raises(KeyError), io.open_atomically(path, mode) as handle:
        handle.write(new)
        raise KeyError
    assert path.read_bytes() == (old.encode() if mode == "w" else old)
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_a_lock_says_who_holds_it_and_is_free_after_a_kill(tmp_path):
    place = tmp_path / "a" / "run"
    with held_by_another_process(place) as pid:
        said = (
            rf"run: {socket.gethostname()}, process {pid}, since 20\d\d-.* works on it"
        )
        with pytest.raises(ValueError, match=said), io.locked(place):
            pass
    assert (tmp_path / "a" / ".run.lock").is_file()  # what the killed process left
    with io.locked(place):
        assert f"process {os.getpid()}" in (tmp_path / "a" / ".run.lock").read_text()
    assert not list((tmp_path / "a").iterdir())


def test_a_lock_is_shared_with_child_processes_and_other_ranks(tmp_path, monkeypatch):
    with io.locked(tmp_path / "run"), io.locked(tmp_path / "run"):
        with held_by_another_process(tmp_path / "run"):
            pass
        assert (tmp_path / ".run.lock").is_file()
    with held_by_another_process(tmp_path / "run"):
        monkeypatch.setenv("RANK", "1")
        with io.locked(tmp_path / "run"):
            pass


def test_without_locks_of_the_file_system_work_goes_on(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(io.fcntl, "flock", refuse)
    with io.locked(tmp_path / "run"):
        assert "another writer would not be noticed" in capsys.readouterr().out


def test_what_is_set_aside_is_never_lost(tmp_path):
    for text in "abc":
        io.write_text(tmp_path / "p.jsonl", text)
        io.set_aside(tmp_path / "p.jsonl", tmp_path / "replaced" / "p.jsonl")
    kept = {p.name: p.read_text() for p in (tmp_path / "replaced").iterdir()}
    assert kept == {"p.jsonl": "a", "p.jsonl.1": "b", "p.jsonl.2": "c"}


def test_read_json_names_file_and_line(tmp_path):
    path = tmp_path / "bad.json"
    path.write_text('{"a": 1,\n"b" 2}')
    with pytest.raises(ValueError, match=r"bad\.json, line 2: malformed JSON"):
        io.read_json(path)


rows = st.lists(
    st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=9)),
    min_size=1,
    max_size=4,
)


@given(rows, st.data())
def test_jsonl_survives_a_cut_at_any_byte(tmp_path_factory, rows, data):
    path = tmp_path_factory.mktemp("jsonl") / "rows.jsonl"
    for row in rows:
        io.append_jsonl(path, row)
    assert io.read_jsonl(path) == rows
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    kept = whole[:cut].count(b"\n")
    # A last line that lacks only its newline is whole.
    kept += cut < len(whole) and whole[cut : cut + 1] == b"\n"
    assert io.read_jsonl(path) == rows[:kept]
    io.append_jsonl(path, {"after": 1})
    assert io.read_jsonl(path) == [*rows[:kept], {"after": 1}]


def test_jsonl_with_a_bad_line_inside_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\nnonsense\n{"a": 2}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2"):
        io.read_jsonl(path)
    path.write_text('{"a": 1}\n\n{"a": 2}\n\n')  # as an editor leaves it
    assert io.read_jsonl(path) == [{"a": 1}, {"a": 2}]


# ---------------------------------------------------------------- stages


def open_stage(folder, *args, **options):
    return runs.Run("tiny", folder, 0, {}).stage(*args, **options)


def test_a_stage_is_reused_only_when_finished_and_equal(tmp_path):
    first = open_stage(tmp_path, "sft", {"lr": 1})
    assert not first.done
    (first.dir / "checkpoint").write_text("half")
    resumed = open_stage(tmp_path, "sft", {"lr": 1})
    assert not resumed.done and (resumed.dir / "checkpoint").exists()
    resumed.finish(loss=0.5)
    again = open_stage(tmp_path, "sft", {"lr": 1})
    assert again.done and again.results == {"loss": 0.5}
    changed = open_stage(tmp_path, "sft", {"lr": 2})
    assert not changed.done and not (changed.dir / "checkpoint").exists()
    kept = tmp_path / "replaced" / "sft" / again.hash
    assert (kept / "checkpoint").read_text() == "half"


def test_changing_back_restores_what_was_finished(tmp_path, capsys):
    made = {}
    for rate in (1, 2, 1, 3, 2):  # the last two of these are only begun
        stage = open_stage(tmp_path, "eval/sft", {"lr": rate})
        assert stage.done == (rate in made)
        if not stage.done and rate < 3:
            (stage.dir / "adapter").write_text(f"rate {rate}")
            made[rate] = stage.finish(rate=rate)
    assert (
        stage.results == {"rate": 2} and stage.hash != open_stage(tmp_path, "x", 0).hash
    )
    assert (stage.dir / "adapter").read_text() == "rate 2"
    kept = {path.parent for path in (tmp_path / "replaced").rglob("stage.json")}
    assert {io.read_json(path / "stage.json")["config"]["lr"] for path in kept} == {
        1,
        3,
    }
    said = capsys.readouterr().out
    assert said.count("what was kept is back") == 2
    assert said.count("it runs again") == 2
    # Made again on purpose, the newer of two equal ones comes back.
    fresh = open_stage(tmp_path, "eval/sft", {"lr": 2}, fresh=True)
    fresh.finish(rate="2 again")
    open_stage(tmp_path, "eval/sft", {"lr": 3})
    assert open_stage(tmp_path, "eval/sft", {"lr": 2}).results == {"rate": "2 again"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"seed": "a"}, "SEED = 'a': write a whole number from 0 on"),
        ({"seed": -1}, "SEED = -1: write a whole"),
        ({"seed": 1.5}, r"SEED = 1\.5: write a whole"),
        ({"seed": True}, "SEED = True: write a whole"),
        ({"run_dir": 5}, "RUN_DIR = 5: write a folder in quotes"),
        ({"scale": 5}, "SCALE = 5: write a name"),
        ({"overrides": "sft.lr=1"}, r"OVERRIDES = 'sft\.lr=1': write a list"),
    ],
)
def test_a_parameter_that_cannot_be_meant_moves_nothing(
    tmp_path, monkeypatch, given, said
):
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=said):
        runs.start(**{"scale": "smoke"} | given)
    assert [path.name for path in tmp_path.iterdir()] == ["pyproject.toml"]


def test_fresh_is_yes_or_no_before_anything_moves(tmp_path):
    open_stage(tmp_path, "sft", {}).finish()
    with pytest.raises(ValueError, match="FRESH = 'no': write True or False"):
        open_stage(tmp_path, "sft", {}, fresh="no")
    assert open_stage(tmp_path, "sft", {}).done


def test_fresh_begins_again(tmp_path):
    open_stage(tmp_path, "eval/base/mig", {}).finish(n=1)
    assert open_stage(tmp_path, "eval/base/mig", {}).done
    assert not open_stage(tmp_path, "eval/base/mig", {}, fresh=True).done
    io.write_text(
        tmp_path / "sft" / "config.yaml", ""
    )  # by the command, not as a stage
    assert list(open_stage(tmp_path, "sft", {}, fresh=True).dir.iterdir()) == [
        tmp_path / "sft" / "stage.json"
    ]


def test_a_stage_that_somebody_works_on_is_not_opened(tmp_path):
    stage = open_stage(tmp_path, "sft", {})
    with held_by_another_process(stage.dir) as pid:
        for options in ({}, {"fresh": True}):
            with pytest.raises(ValueError, match=f"process {pid}, since"):
                open_stage(tmp_path, "sft", {}, **options)
    assert not (tmp_path / "replaced").exists()


def test_a_stage_that_was_begun_again_is_not_finished_by_its_first_opener(tmp_path):
    first, second = (open_stage(tmp_path, "sft", {"lr": rate}) for rate in (1, 2))
    with pytest.raises(ValueError, match="sft was begun again by another process"):
        first.finish(loss=1)
    second.finish(loss=2)
    assert open_stage(tmp_path, "sft", {"lr": 2}).results == {"loss": 2}


def test_a_stage_knows_what_it_was_made_from(tmp_path):
    with pytest.raises(ValueError, match="needs 'data', which is not finished"):
        open_stage(tmp_path, "sft", {}, needs=["data"])
    open_stage(tmp_path, "data", {"seed": 0}).finish()
    open_stage(tmp_path, "sft", {}, needs=["data"]).finish()
    assert open_stage(tmp_path, "sft", {}, needs=["data"]).done
    open_stage(tmp_path, "data", {"seed": 1}).finish()
    assert not open_stage(tmp_path, "sft", {}, needs=["data"]).done


def test_the_manifest_records_a_stage(tmp_path):
    open_stage(tmp_path, "data", {}).finish(n=3)
    manifest = io.read_json(tmp_path / "manifest.json")
    assert manifest["stages"]["data"]["peak_memory_mb"] > 10
    assert manifest["stages"]["data"]["seconds"] >= 0
    assert manifest["versions"]["trl"]


def test_a_library_that_is_missing_has_no_version(monkeypatch):
    monkeypatch.setattr(runs, "PACKAGES", ("torch", "no-such-package"))
    found = runs.versions()
    assert found["torch"] and found["no-such-package"] == ""


def test_start_prints_versions_and_refuses_another_scale(tmp_path, capsys):
    run = runs.start("smoke", tmp_path, seed=3)
    assert "torch" in capsys.readouterr().out
    assert run.config["data"]["seed"] == run.config["grpo"]["seed"] == 3
    assert (
        runs.start("smoke", tmp_path, 3, ["sft.max_steps=9"]).config["sft"]["max_steps"]
        == 9
    )
    with pytest.raises(ValueError, match="holds a run at scale 'smoke', not 'tiny'"):
        runs.start("tiny", tmp_path)


def test_relative_run_dirs_count_from_the_repository(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert runs.resolve_run_dir("", "tiny") == tmp_path.resolve() / "runs" / "tiny"
    assert runs.resolve_run_dir("x", "tiny") == tmp_path.resolve() / "x"
    assert runs.resolve_run_dir(tmp_path, "tiny") == tmp_path


# ---------------------------------------------------------------- scales


@pytest.mark.parametrize("name", ["smoke", "tiny", "small", "full"])
def test_shipped_scales_are_valid_and_survive_a_round_trip(name, tmp_path):
    scale = runs.load_scale(name)
    copy = tmp_path / "copy.yaml"
    io.write_text(copy, config.dump(scale))
    assert runs.load_scale(copy) == scale


@pytest.mark.parametrize("name", ["smoke", "tiny"])
def test_the_libraries_take_the_options_of_a_scale(name, tmp_path):
    from peft import LoraConfig
    from trl import GRPOConfig, SFTConfig

    scale = runs.load_scale(name)
    LoraConfig(**scale["sft"]["lora"])
    for section, library in (("sft", SFTConfig), ("grpo", GRPOConfig)):
        options = checkpoints.make_trainer_options(scale, section, tmp_path)
        assert library(**options).report_to == []


def test_full_equals_the_paper():
    """See docs/paper_facts.md#training-configuration, line by line."""
    full = runs.load_scale("full")
    expected = {
        "model": {
            "name_or_path": "Qwen/Qwen2-VL-7B-Instruct",
            "attn_implementation": "flash_attention_2",
            "dtype": "bfloat16",
            "min_pixels": 3136,
            "max_pixels": 401408,
        },
        "sft": {
            "adapter": "none",
            "freeze_vision": True,
            "learning_rate": 5e-6,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.015,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 3,
            "num_train_epochs": 1,
            "max_length": 6000,
            "save_steps": 800,
        },
        "grpo": {
            "weight": "exp",
            "unit_mean": False,
            "freeze_vision": True,
            "num_generations": 8,
            "beta": 0.04,
            "epsilon": 0.2,
            "num_iterations": 1,
            "temperature": 1.0,
            "max_completion_length": 256,
            "learning_rate": 1e-6,
            "lr_scheduler_type": "linear",
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 2,
            "num_train_epochs": 1,
            "save_steps": 200,
            "data_seed": 42,
        },
        "evaluate": {"max_new_tokens": 256},
    }
    for section, options in expected.items():
        assert {key: full[section][key] for key in options} == options


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("sft.learning_rte=1", "unknown key sft.learning_rte; did you mean 'learning_"),
        ("sft.zzzz=1", "unknown key sft.zzzz; see univg_nb/scales"),
        ("grpo.learning_rate=fast", "learning_rate = 'fast' has the wrong type"),
        (
            "grpo.weight=expo",
            r"grpo.weight = 'expo'; did you mean 'exp'\?",
        ),
        (
            "sft.lora.lora_alfa=1",
            "unknown key sft.lora.lora_alfa; did you mean 'lora_a",
        ),
        ("model.min_pixels=2.5", "expected int"),
        ("model.min_pixels=true", "expected int"),
        ("modle.dtype=float32", "unknown section 'modle'; did you mean 'model'"),
        ("dtype=float32", "write SECTION.KEY=VALUE"),
        ("model.lora.r=3", "unknown key model.lora"),
        ("sft.save_strategy=sometimes", "expected one of 'no', 'steps', 'epoch'"),
        ("sft.gradient_accumulation_steps=0", "_steps = 0; expected 1 or more"),
        ("sft.save_steps=0", "save_steps = 0; expected more than 0"),
        ("grpo.temperature=0.0", "temperature = 0.0; expected more than 0"),
        ("grpo.num_generations=1", "num_generations = 1; expected 2 or more"),
        ("grpo.beta=-0.04", "beta = -0.04; expected 0 or more"),
        ("data.stage2=-5", "stage2 = -5; expected 0 or more"),
    ],
)
def test_override_refuses_with_a_way_out(assignment, message):
    with pytest.raises(ValueError, match=message):
        runs.override(runs.load_scale("smoke"), assignment)


def test_a_word_that_yaml_takes_for_false_stays_a_word_where_one_is_wanted():
    changed = runs.override(runs.load_scale("smoke"), "sft.save_strategy=no")
    assert changed["sft"]["save_strategy"] == "no"
    changed = runs.override(changed, "sft.bf16=no")
    assert changed["sft"]["bf16"] is False


def test_a_command_line_names_a_scale_and_its_options():
    options = ["--set", "sft.max_steps=2", "--set", "grpo.weight=none"]
    for arguments, default in ((["smoke"], None), ([], "smoke")):
        parser = argparse.ArgumentParser()
        config.add_scale_arguments(parser, default)
        parsed = parser.parse_args([*arguments, *options])
        assert parsed.scale == "smoke"
        loaded = config.load_scale(parsed.scale, parsed.set)
        assert loaded["sft"]["max_steps"] == 2 and loaded["grpo"]["weight"] == "none"
    assert config.load_scale("smoke", ["sft.max_steps=2", "grpo.weight=none"]) == loaded


def test_override_leaves_the_original_alone():
    scale = runs.load_scale("smoke")
    before = json.dumps(scale)
    changed = runs.override(scale, "sft.learning_rate=1e-3")
    changed = runs.override(changed, "sft.lora.r=4")
    assert changed["sft"]["learning_rate"] == 1e-3 and changed["sft"]["lora"]["r"] == 4
    assert json.dumps(scale) == before


def test_bad_scale_files_name_file_and_key(tmp_path):
    with pytest.raises(ValueError, match="unknown scale 'tny'; did you mean 'tiny'"):
        runs.load_scale("tny")
    good = config.dump(runs.load_scale("smoke"))
    for text, message in (
        (good + "extra: {}\n", "unknown section 'extra'"),
        (good.replace("beta:", "betta:"), r"scale\.yaml: unknown key grpo\.betta"),
        (good.replace("model:", "model: [", 1), "not readable as YAML"),
        ("model: {}\n", "section missing: data, sft, grpo, evaluate"),
        ("", "not a scale file"),
        (good.replace("model:", "model: 3\nx:", 1), "unknown section 'x'"),
        (good + "model: {}\n", "key written twice: model"),
    ):
        path = tmp_path / "scale.yaml"
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            runs.load_scale(path)


def test_numbers_without_a_point_are_numbers():
    assert config.parse_value("1e-3") == 1e-3
    assert config.parse_value("[1, true, x]") == [1, True, "x"]


def test_the_speed_of_the_machine_is_measured_and_said(tmp_path, monkeypatch):
    measure = runs.measure_speed
    monkeypatch.setattr(runs, "measure_speed", lambda: measure(seconds=0.05))
    io.write_json(tmp_path / "manifest.json", {"scale": "tiny"})
    speed = runs.record_speed(tmp_path)
    made = io.read_json(tmp_path / "manifest.json")
    assert made == {"scale": "tiny", "speed": speed}
    assert 0.1 < speed["gflops"] < 1e5 and 1 < speed["million_steps"] < 1e4
    assert f"{speed['gflops']:.0f} GFLOP/s" in runs.format_speed(speed)
