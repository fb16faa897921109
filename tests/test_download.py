"""Fetching over a real local server that can be cut off; no network."""

import http.server
import threading

import pytest

from univg_nb import download

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
        start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
        type(self).asked.append(self.headers["Range"])
        self.send_response(206)
        self.end_headers()
        stop = len(CONTENT) // 3 if type(self).cut else len(CONTENT)
        type(self).cut = False
        self.wfile.write(CONTENT[start:stop])

    def log_message(self, *_):
        pass


@pytest.fixture
def url():
    Handler.asked, Handler.cut = [], True
    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/train.zip"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_cut_off_download_goes_on_and_gets_its_name_when_whole(url, tmp_path):
    size = download.url_size(url)
    assert size == len(CONTENT)
    path = tmp_path / "images" / "train.zip"
    with pytest.raises(ValueError, match="call again"):
        download.fetch_url(url, path, size)
    assert not path.exists()
    download.fetch_url(url, path, size)
    assert path.read_bytes() == CONTENT
    download.fetch_url(url, path, size)  # there: not asked for again
    assert Handler.asked == ["bytes=0-", f"bytes={len(CONTENT) // 3}-"]


def test_sizes_are_shown_by_source():
    source = download.DATA[0]
    files = [download.Remote(source, f"{i}.json", 10**9, "") for i in range(3)]
    text = download.table(files, [("coco", 2 * 10**9)])
    assert "GD-ML/UniVG-R1-data" in text and text.splitlines()[-1].endswith("5.00")


def test_scales_without_downloads_say_so(capsys):
    assert download.main(["tiny"]) == 2
    assert "needs no download" in capsys.readouterr().err
    assert download.main(["ful"]) == 2
    assert "did you mean 'full'" in capsys.readouterr().err
