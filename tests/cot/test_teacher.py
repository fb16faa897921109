"""The teacher's client against the stand-in, over real HTTP on the loopback."""

import threading
import time
from dataclasses import replace

import pytest
from interrupted import held_by_another_process

from univg_nb import io
from univg_nb.cot.checks import check_chain, extract_thinking
from univg_nb.cot.stand_in import STYLES, StandIn, StandInTeacher, name_style
from univg_nb.cot.teacher import (
    Teacher,
    insert_chains,
    make_client,
    summarize,
    write_chain,
    write_chains,
)
from univg_nb.data import files
from univg_nb.data.images import load_data_url
from univg_nb.minimig.export import save_images
from univg_nb.minimig.items import TASKS, make

SECRET = "sk-not-to-be-written-anywhere"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """One MiniMIG sample of each task, its pictures on disk."""
    root = tmp_path_factory.mktemp("data")
    (root / "images").mkdir()
    items = [make(task, 0, "train", 1) for task in TASKS]
    for item in items:
        save_images(item, root)
    return [
        replace(i.sample, images=tuple(str(root / p) for p in i.sample.images))
        for i in items
    ]


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)


def teacher_at(url, **changes):
    return Teacher(**{"base_url": url, "model": "stand-in"} | changes)


def test_candidates_checks_selection_and_files(rows, tmp_path):
    out = tmp_path / "chains.jsonl"
    with StandIn(rows, StandInTeacher(error_rate=0.6), busy_rate=0.3) as stand_in:
        teacher = teacher_at(stand_in.url, price=(2.0, 4.0))
        found = write_chains(rows, out, teacher)
        assert stand_in.turned_away  # and yet everything was answered
        planted = [[stand_in.teacher.write(s, n) for n in range(3)] for s in rows]
    assert [row["id"] for row in found] == [sample.id for sample in rows]
    texts = [[c["text"] for c in row["candidates"]] for row in found]
    assert texts == [[candidate.text for candidate in three] for three in planted]
    for row in found:
        passed = [n for n, c in enumerate(row["candidates"]) if not c["problems"]]
        assert (row["chosen"] in passed) if passed else row["chosen"] is None
        assert bool(row["selector"]) == (len(passed) > 1)
    facts = summarize(found, teacher)
    assert facts["kept"] == sum(row["chosen"] is not None for row in found) > 0
    assert facts["cost"] == pytest.approx(
        (2 * facts["prompt_tokens"] + 4 * facts["new_tokens"]) / 1e6
    )
    assert SECRET not in out.read_text()
    # the server is gone: what is recorded needs no request
    assert write_chains(rows, out, teacher) == found

    made = insert_chains(rows, found)
    assert len(made) == facts["kept"]
    files.write(made, tmp_path / "stage1.json", "stage1_cotsft")
    assert files.read(tmp_path / "stage1.json") == made
    row = next(row for row in found if row["chosen"] is not None)
    assert made[0].chain == extract_thinking(row["candidates"][row["chosen"]]["text"])


def test_the_teacher_writes_the_same_without_http(rows, tmp_path):
    shares = {"thorough": 0.3, "terse": 0.2, "glance": 0.4, "conclusion first": 0.1}
    mixture = StandInTeacher(seed=0, error_rate=0.3, styles=shares)
    with StandIn(rows, mixture) as server:
        teacher = teacher_at(server.url)
        found = write_chains(rows, tmp_path / "chains.jsonl", teacher)
    for sample, row in zip(rows, found, strict=True):
        del row["tokens"]
        assert write_chain(mixture.reply, sample, teacher) == row


@pytest.mark.parametrize("style", STYLES)
def test_a_sound_chain_of_every_style_passes_the_checks(rows, style):
    writer = StandInTeacher(error_rate=0, styles={style: 1})
    texts = [writer.write(sample, 0).text for sample in rows]
    assert {name_style(extract_thinking(text)) for text in texts} == {style}
    passed = [not check_chain(*pair) for pair in zip(rows, texts, strict=True)]
    # One wording of a thorough chain looks back at another image at its end.
    assert all(passed) or style == "thorough"


def test_selectors(rows):
    shares = {"thorough": 0.5, "glance": 0.5}
    good = StandInTeacher(selector_accuracy=1, styles=shares)
    replies = [good.write(rows[0], number) for number in range(8)]
    texts = [reply.text for reply in replies]
    chosen = replies[good.select(rows[0], texts) - 1]
    assert not chosen.error and chosen.style == "thorough"
    glances = [reply.text for reply in replies if reply.style == "glance"]
    assert good.select(rows[0], glances) in range(1, len(glances) + 1)
    first = StandInTeacher(selector="first", styles=shares)
    assert {first.select(row, texts) for row in rows} == {1}
    form = StandInTeacher(selector="form", styles=shares)
    assert len({form.select(row, texts) for row in rows}) > 1


def test_habits_depend_on_the_task(rows):
    glances = {task: {"glance": 1.0} for task in ("diff", "view_diff")}
    writer = StandInTeacher(error_rate=0, task_styles=glances)
    for sample in rows:
        wanted = "glance" if sample.task in glances else "thorough"
        assert writer.write(sample, 0).style == wanted
    assert len({sample.task in glances for sample in rows}) == 2
    assert writer.select(rows[0], [writer.write(rows[0], 0).text]) == 1


def test_unknown_styles_and_selectors_are_refused():
    with pytest.raises(ValueError, match="any of thorough, conclusion first, terse"):
        StandInTeacher(styles={"rude": 1})
    with pytest.raises(ValueError, match="give shares of zero or more"):
        StandInTeacher(task_styles={"diff": {"terse": -1}})
    with pytest.raises(ValueError, match="no task dif; name any of diff, view_diff"):
        StandInTeacher(task_styles={"dif": {"terse": 1}})
    with pytest.raises(ValueError, match="'best' is unknown; use one of first, form"):
        StandInTeacher(selector="best")


def test_a_cut_off_run_goes_on(rows, tmp_path):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    with StandIn(rows, busy_rate=0) as stand_in:
        teacher = teacher_at(stand_in.url)
        expected = write_chains(rows, whole, teacher)
        lines = whole.read_text().splitlines(keepends=True)
        out.write_text("".join(lines[:4]) + lines[4][:50])
        asked = []
        answer = stand_in.answer
        stand_in.answer = lambda request: asked.append(1) or answer(request)
        assert write_chains(rows, out, teacher) == expected
    missing = [r for r in expected if r["id"] not in "".join(lines[:4])]
    assert len(missing) == len(rows) - 4
    assert len(asked) == sum(3 + bool(r["selector"]) for r in missing)
    assert {r["id"] for r in io.read_jsonl(out)} == {s.id for s in rows}


def test_no_more_requests_at_once_than_allowed(rows, tmp_path):
    class Counting(StandIn):
        now = most = 0
        lock = threading.Lock()

        def answer(self, request):
            with self.lock:
                self.now += 1
                self.most = max(self.most, self.now)
            time.sleep(0.02)
            with self.lock:
                self.now -= 1
            return super().answer(request)

    with Counting(rows) as stand_in:
        write_chains(
            rows, tmp_path / "f.jsonl", teacher_at(stand_in.url, concurrency=2)
        )
        assert stand_in.most == 2


def test_no_two_processes_pay_for_the_same_chains(rows, tmp_path):
    out = tmp_path / "chains.jsonl"
    with (
        held_by_another_process(out) as pid,
        pytest.raises(ValueError, match=f"process {pid}, since .* works on it"),
    ):
        write_chains(rows[:1], out, teacher_at("x"))


def test_other_settings_are_refused(rows, tmp_path):
    out = tmp_path / "f.jsonl"
    with StandIn(rows) as stand_in:
        write_chains(rows[:1], out, teacher_at(stand_in.url))
        with pytest.raises(ValueError, match=r"f\.jsonl, line 1: made with another"):
            write_chains(rows[:1], out, teacher_at(stand_in.url, temperature=0.1))


def test_refused_samples_are_recorded_and_too_many_stop_the_run(rows, tmp_path):
    with StandIn(rows[:5]) as stand_in:
        teacher = teacher_at(stand_in.url, concurrency=1)
        found = write_chains(rows[:7], tmp_path / "two.jsonl", teacher)
        assert ["not known here" in row["refused"] for row in found] == (
            [False] * 5 + [True] * 2
        )
        assert summarize(found, teacher)["refused"] == 2
        assert insert_chains(rows[:7], found) == insert_chains(rows[:5], found[:5])
        with pytest.raises(
            ValueError, match=r"refused 5 samples in a row: .*not known"
        ):
            write_chains(rows[5:], tmp_path / "all.jsonl", teacher)


def test_an_endpoint_that_is_not_there(rows, tmp_path):
    with StandIn(rows) as stand_in:
        url = stand_in.url
    with pytest.raises(ValueError, match=rf"{url}.*correct the cause and run again"):
        write_chains(rows[:1], tmp_path / "f.jsonl", teacher_at(url, retries=0))


def test_the_key_comes_from_the_environment(monkeypatch):
    far = teacher_at("https://example.org/v1", key_variable="MY_KEY")
    with pytest.raises(ValueError, match="MY_KEY holds no key for https"):
        make_client(far)
    monkeypatch.setenv("MY_KEY", "abc")
    assert make_client(far).api_key == "abc"
    assert SECRET not in repr(far)
    monkeypatch.delenv("OPENAI_API_KEY")
    assert make_client(teacher_at("http://localhost:8000/v1")).api_key == "none"


def test_wrong_settings_and_samples(rows, tmp_path):
    with pytest.raises(ValueError, match="candidates is 0"):
        teacher_at("x", candidates=0)
    single = replace(rows[0], cot=False)
    with pytest.raises(ValueError, match="is single-image"):
        write_chains([single], tmp_path / "f.jsonl", teacher_at("x"))


def test_large_images_are_sent_smaller(rows):
    path = rows[0].images[0]
    assert len(load_data_url(path, max_pixels=64 * 64)) < len(load_data_url(path)) / 2


def test_two_samples_with_one_id_never_share_a_chain(rows, tmp_path):
    first, second = rows[0], replace(rows[1], id=rows[0].id)
    with pytest.raises(ValueError, match=f"have the same id '{first.id}', and chains"):
        write_chains([first, second], tmp_path / "f.jsonl", teacher_at("x"))
    assert not list(tmp_path.iterdir())
    mine = write_chain(StandInTeacher(error_rate=0).reply, first, teacher_at("x"))
    assert insert_chains([first], [mine])[0].id == first.id
    moved = replace(first, answer=(1, 2, 30, 40))  # drawn again, with the same id
    for other in (second, moved, rows[1]):
        with pytest.raises(ValueError, match=f"sample {other.id} .* for another quest"):
            insert_chains([other], [mine])
