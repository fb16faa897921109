"""tests/versions.sh, up to where it would download gigabytes."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("versions.sh")


def test_a_pair_that_cannot_be_had_is_a_line_of_the_table(tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    environment = os.environ | {
        "PYTHON": sys.executable,
        "WORK": str(work),
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(work),
    }
    command = ["bash", str(SCRIPT), str(tmp_path), "2.10.0:5.18.0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    line = "torch 2.10.0   transformers 5.18.0   not installed\n"
    assert done.stdout == line and (tmp_path / "table.txt").read_text() == line
    log = (tmp_path / "torch-2.10.0-transformers-5.18.0.log").read_text()
    assert "torch===2.10.0" in log
    assert not list(work.iterdir())
