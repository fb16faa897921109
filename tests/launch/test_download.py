"""Fetching over a real local server that can be cut off; no network."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from univg_nb.launch import download

CONTENT = bytes(range(256)) * 4096  # 1 MiB


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT; answers ranges; breaks off the first whole answer."""

    asked: list[str]
    cut = True

    def do_HEAD(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()

    def do_GET(self):
        asked = self.headers["Range"] or "bytes=0-"
        start = int(asked.removeprefix("bytes=").rstrip("-"))
        type(self).asked.append(asked)
        self.send_response(206 if start else 200)
        self.end_headers()
        stop = len(CONTENT) // 3 if type(self).cut else len(CONTENT)
        type(self).cut = False
        self.wfile.write(CONTENT[start:stop])

    def log_message(self, *_):
        pass


@contextmanager
def served(handler):
    """The address of a server with this handler."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:  # else the tests do not end after a failure
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def url():
    Handler.asked, Handler.cut = [], True
    with served(Handler) as address:
        yield f"{address}/train.zip"


def test_a_cut_off_download_goes_on_and_gets_its_name_when_whole(
    url, tmp_path, monkeypatch
):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    size = download.url_size(url)
    assert size == len(CONTENT)
    path = tmp_path / "images" / "train.zip"
    with pytest.raises(OSError, match="should be of size"):
        download.fetch_url(url, path, size)
    assert not path.exists()
    download.fetch_url(url, path, size)
    assert path.read_bytes() == CONTENT
    download.fetch_url(url, path, size)  # there: not asked for again
    assert Handler.asked == ["bytes=0-", f"bytes={len(CONTENT) // 3}-"]


def test_scales_without_downloads_say_so():
    with pytest.raises(ValueError, match="needs no download"):
        download.main(["tiny"])


FILES = {"notes.json": b"[]", "parts/images.zip": CONTENT}
CALL = """
import sys
from univg_nb.__main__ import main
from univg_nb.launch import download
download.COCO = sys.argv[2]
sys.exit(main(["download", "small", "--yes", "--to", sys.argv[1]]))
"""


def describe(name: str, body: bytes) -> dict[str, Any]:
    """A file as the hub's list of a repository has it."""
    blob = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
    one = {"type": "file", "path": name, "size": len(body), "oid": blob}
    if name.endswith(".zip"):
        digest = hashlib.sha256(body).hexdigest()
        one["lfs"] = {"oid": digest, "size": len(body), "pointerSize": 134}
    return one


class Hub(http.server.BaseHTTPRequestHandler):
    """Speaks as the hub does of a repository with FILES, whatever its name; the first
    archive that is fetched arrives broken."""

    protocol_version = "HTTP/1.1"
    fetched: list[str]
    broken = True

    def reply(self, body: bytes, **headers: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path.startswith("/api/"):
            about: Any = {"id": path.partition("s/")[2], "sha": "c" * 40}
            if "/tree/" in path:
                about = [describe(*item) for item in FILES.items()]
            self.reply(json.dumps(about).encode(), Content_Type="application/json")
            return
        if "/resolve/" not in path:  # COCO's archive
            self.reply(CONTENT)
            return
        name = path.partition("/resolve/")[2].partition("/")[2]
        body = FILES[name]
        tag = hashlib.sha256(body).hexdigest()
        if self.command == "GET":
            type(self).fetched.append(path)
            if name.endswith(".zip") and type(self).broken:
                type(self).broken, body = False, b"x" * len(body)
        self.reply(body, ETag=f'"{tag}"', X_Repo_Commit="c" * 40)

    do_HEAD = do_GET  # noqa: N815 (the name that http.server calls)

    def log_message(self, *_):
        pass


def test_the_hub_is_fetched_from_checked_and_not_asked_twice(tmp_path):
    """huggingface_hub itself against a server that speaks its protocol."""
    Hub.fetched, Hub.broken = [], True
    to = tmp_path / "data"
    with served(Hub) as address:
        environment = os.environ | {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0"}
        environment |= {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_DISABLE_XET": "1"}
        environment["PYTHONPATH"] = str(Path(download.__file__).parents[2])
        environment["no_proxy"] = "127.0.0.1"

        def call():
            command = [sys.executable, "-c", CALL, str(to), f"{address}/coco.zip"]
            return subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=120
            )

        first = call()
        assert first.returncode == 1 and "call again" in first.stderr, first.stderr
        assert not (to / "parts" / "images.zip").exists()
        second = call()
        assert second.returncode == 0, second.stderr
        assert "GD-ML/UniVG-R1-data (released JSON files)" in second.stdout
        assert "still to be done by hand" in second.stdout
        for source in download.LISTED["datasets"]:
            for name, body in FILES.items():
                assert (to / source["folder"] / name).read_bytes() == body
        assert (to / "images" / "coco_train2014.zip").read_bytes() == CONTENT
        kept = list((tmp_path / "hub").rglob("snapshots/*/parts/images.zip"))
        assert [path.read_bytes() for path in kept] == [CONTENT]  # the weights
        done = len(Hub.fetched)
        assert call().returncode == 0
        assert len(Hub.fetched) == done
