"""The pages that a reader opens in a browser: report, question form, book."""

import importlib.util
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import builders
import pytest
from browser import browse, needs_chromium

from univg_nb.data import files
from univg_nb.evaluate import predictions
from univg_nb.figures import report
from univg_nb.io import append_jsonl

ROOT = Path(__file__).parents[1]
WIDE, PHONE = 1280, 400
IMAGES = "return [...document.images].every(i => i.complete && i.naturalWidth > 0)"


@pytest.fixture(scope="module")
def page():
    with browse() as window:
        yield window


def write_records(folder):
    """Records with paths relative to their folder, and a model's replies."""
    items = builders.questions(folder, 4)
    files.write(items, folder / "bench.json", "mig_bench", image_root=folder)
    said = "<think>It is there.</think><answer>(1,2),(300,400)</answer>"
    for index in range(len(items)):
        row = predictions.Reply(said, 9)
        append_jsonl(
            folder / "p.jsonl",
            {"index": index, "response": row.text, "tokens": row.tokens},
        )


@needs_chromium
def test_report_finds_pictures_beside_its_records_and_fits_a_phone(page, tmp_path):
    write_records(tmp_path)
    arguments = [str(tmp_path / "p.jsonl"), "--records", str(tmp_path / "bench.json")]
    report.main([*arguments, "--out", str(tmp_path / "r.html"), "--cases", "1"])
    for width in (WIDE, PHONE):
        page.open((tmp_path / "r.html").as_uri(), width)
        assert page.run("return window.innerWidth") == width
        assert page.fits(), width
        assert page.run(IMAGES)


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@needs_chromium
@pytest.mark.slow
def test_ask_as_a_page(page, tmp_path):
    images = builders.questions(tmp_path, 1)[0].images[:1]
    port = free_port()
    command = [sys.executable, "-m", "univg_nb", "ask", "--model", "tiny", "--page"]
    command += ["--port", str(port), "--max-new-tokens", "24", *images, "Find the cup."]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert f"http://localhost:{port}" in server.stdout.readline()
        deadline = time.monotonic() + 120
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert time.monotonic() < deadline and server.poll() is None
            time.sleep(0.3)
        page.open(f"http://127.0.0.1:{port}", PHONE)
        ask = "[...document.querySelectorAll('button')].find(b => b.innerText == 'Ask')"
        page.wait(f"return !!{ask}")
        assert page.wait(IMAGES)  # shown before anything is asked
        assert page.run("return document.querySelector('textarea').value")
        page.run(f"{ask}.click()")
        text = page.wait(
            "return [...document.querySelectorAll('pre')].map(p => p.innerText)"
            ".find(t => t.includes('box '))"
        )
        assert re.search(r"box (\(|None)", text)
        assert page.fits()
    finally:
        server.terminate()
        server.wait()


BOOK = ("myst_nb", "sphinx_book_theme", "sphinx")
missing = [name for name in BOOK if importlib.util.find_spec(name) is None]


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    out = tmp_path_factory.mktemp("book")
    script = str(ROOT / "docs" / "make_book.py")
    command = [sys.executable, script, str(out), "00", "06"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no warning
    return out


@needs_chromium
@pytest.mark.slow
@pytest.mark.skipif(bool(missing), reason=f"needs the extra book ({missing})")
def test_the_book_reads_offline_wide_and_on_a_phone(page, book):
    for file in book.rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|link|img)[^>]+(?:src|href)=\"(https?:[^\"]+)", file.read_text()
        )
        assert not loaded, file
    for name in ("index", "notebooks/06_difficulty_weights"):
        for width in (WIDE, PHONE):
            page.open((book / f"{name}.html").as_uri(), width)
            page.wait(IMAGES)
            assert page.fits(), (name, width)
    page.wait("return document.querySelectorAll('mjx-container').length > 3")
    listed = page.run(
        "return [...document.querySelectorAll('nav.bd-links a')].map(a => a.innerText)"
    )
    assert any("Start here" in one for one in listed)
    page.open((book / "search.html").as_uri() + "?q=advantage", WIDE)
    assert page.wait("return document.querySelectorAll('ul.search a').length")
