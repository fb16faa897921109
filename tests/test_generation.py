"""Generation under kill -9, and shared between processes (issue 7)."""

import multiprocessing
import random
import signal
import time

import pytest
import small

from univg_nb import evaluate, models
from univg_nb.generation import OtherSettings, generate, part_path
from univg_nb.predictions import settings_path

KILLS = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    return small.questions(tmp_path_factory.mktemp("images"), 20)


@pytest.mark.slow
def test_kill_9_at_ten_random_moments_changes_nothing(folder, items, tmp_path):
    small.make_replies(folder, items, tmp_path / "whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_bytes()
    # A forkserver: libraries are imported once, and no thread of this one is forked.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["small", "univg_nb.replies", "univg_nb.collator"])
    out, rng = tmp_path / "cut.jsonl", random.Random(0)
    killed, cuts = 0, set()
    while killed < KILLS:
        child = context.Process(target=small.make_replies, args=(folder, items, out))
        child.start()
        # At a random place of the file, then a random moment later: some kills hit a
        # row half written, some a batch half made, some a model half loaded.
        already = out.stat().st_size if out.exists() else 0
        place = already + rng.randrange(len(whole) // 8)
        while child.is_alive() and (not out.exists() or out.stat().st_size < place):
            time.sleep(0.0005)
        time.sleep(0.03 * rng.random())
        child.kill()
        child.join()
        assert child.exitcode in (0, -signal.SIGKILL)
        killed += child.exitcode != 0
        cuts.add(out.stat().st_size if out.exists() else 0)
        if child.exitcode == 0:  # it was done: begin again
            assert out.read_bytes() == whole
            out.unlink()
            settings_path(out).unlink()
    assert len(cuts) > 3, "the kills did not fall at different places"
    small.make_replies(folder, items, out)
    assert out.read_bytes() == whole


def test_shards_make_the_file_that_one_process_makes(folder, items, tmp_path):
    loaded = models.load({"name_or_path": str(folder)})
    items = items[:7]
    options = {"max_new_tokens": 3, "batch_size": 2, "progress": False}
    alone, out = tmp_path / "alone.jsonl", tmp_path / "shared.jsonl"
    generate(*loaded, items, alone, **options)
    first = generate(*loaded, items, out, shard=(0, 2), **options)
    assert not out.exists()
    second = generate(*loaded, items, out, shard=(1, 2), **options)
    assert (first["replies"], second["replies"]) == (4, 3)
    assert out.read_bytes() == alone.read_bytes()
    settings = [settings_path(path).read_text() for path in (out, alone)]
    assert settings[0] == settings[1]
    again = generate(*loaded, items, out, shard=(1, 2), **options)
    assert (again["new"], again["replies"]) == (0, 3)
    # a stopped process is continued, whoever finished before
    part = part_path(out, 0, 2)
    part.write_bytes(part.read_bytes()[:-9])
    out.unlink()
    assert generate(*loaded, items, out, shard=(0, 2), **options)["new"] == 1
    assert out.read_bytes() == alone.read_bytes()
    with pytest.raises(OtherSettings, match="max_new_tokens"):
        generate(*loaded, items, out, shard=(0, 2), **options | {"max_new_tokens": 4})
    with pytest.raises(ValueError, match="shard 2 of 2: count from 0"):
        generate(*loaded, items, out, shard=(2, 2), **options)


def test_shard_comes_from_the_launcher_or_the_option(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert evaluate._shard(None) == (0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert evaluate._shard(None) == (3, 8)
    assert evaluate._shard("1/4") == (1, 4)
    with pytest.raises(ValueError, match="write K/N"):
        evaluate._shard("first")
