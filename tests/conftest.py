"""For all tests: no network, no windows, no fight over the cores."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ.setdefault("MPLBACKEND", "Agg")

sys.path.insert(0, str(Path(__file__).parent / "train"))  # until test_grpo is split

# A busy machine is not a failure.
settings.register_profile("univg", deadline=None)
settings.load_profile("univg")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that the tests of a module share."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def model_cfg(folder):
    """`model` section of a scale: the shipped architecture, random weights."""
    from test_models import make_tiny  # torch must not be imported any earlier

    return {"name_or_path": str(make_tiny(folder / "model"))}
