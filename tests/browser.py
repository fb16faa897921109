"""Chromium, driven by its own driver: what a reader of a page sees.

Tests that need it are skipped where it is not installed (Debian and Ubuntu:
`apt-get install chromium chromium-driver`).
"""

import base64
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from tempfile import TemporaryDirectory

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
QUIET = ("background-networking", "component-update", "sync", "gpu", "dev-shm-usage")

needs_chromium = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver"
)


class Page:
    """A window of Chromium; the commands are those of WebDriver."""

    def __init__(self, address, session):
        self.address = f"{address}/session/{session}"

    def call(self, path, **body):
        return post(f"{self.address}/{path}", body)

    def open(self, url, width, height=900):
        """Show a page as wide as a screen of `width` px, phones included."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1}
        self.call(
            "goog/cdp/execute",
            cmd="Emulation.setDeviceMetricsOverride",
            params={**size, "mobile": width < 600},
        )
        self.call("url", url=url)

    def run(self, script):
        """Return what a piece of JavaScript returns."""
        return self.call("execute/sync", script=script, args=[])

    def wait(self, script, limit=120):
        """Return what the script returns, as soon as that is true."""
        deadline = time.monotonic() + limit
        while not (found := self.run(script)):
            assert time.monotonic() < deadline, f"never true: {script}"
            time.sleep(0.3)
        return found

    def fits(self):
        """Whether the page needs no scrolling to the side."""
        return self.run(
            "const e = document.documentElement;"
            "return e.scrollWidth <= e.clientWidth + 1"
        )

    def save_picture(self, path):
        """Write what is seen as a PNG."""
        with urllib.request.urlopen(f"{self.address}/screenshot") as answer:
            path.write_bytes(base64.b64decode(json.load(answer)["value"]))


def post(url, body):
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=180) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        raise AssertionError(json.load(error)["value"]["message"]) from error


@contextmanager
def browse():
    """Yield a window of a new Chromium, without a network of its own."""
    driver = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        line = next(line for line in driver.stdout if "successfully on port" in line)
        address = f"http://127.0.0.1:{line.rsplit(' ', 1)[1].strip()}".rstrip(" .\n")
        with TemporaryDirectory(ignore_cleanup_errors=True) as profile:
            flags = ["--headless=new", "--no-sandbox", f"--user-data-dir={profile}"]
            flags += [f"--disable-{name}" for name in QUIET]
            options = {"binary": CHROMIUM, "args": flags}
            wanted = {"alwaysMatch": {"goog:chromeOptions": options}}
            session = post(f"{address}/session", {"capabilities": wanted})["sessionId"]
            page = Page(address, session)
            yield page
            request = urllib.request.Request(page.address, method="DELETE")
            urllib.request.urlopen(request).close()
    finally:
        driver.terminate()
        driver.wait()
