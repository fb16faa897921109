"""For all tests: no network, no windows, no fight over the cores."""

import os

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ.setdefault("MPLBACKEND", "Agg")

# A busy machine is not a failure.
settings.register_profile("univg", deadline=None)
settings.load_profile("univg")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that the tests of a module share."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="session")
def grpo_folder(tmp_path_factory):
    """A small Qwen2-VL (base), an SFT adapter (sft) and images."""
    from grpo_builders import build_folder  # torch must not be imported any earlier

    return build_folder(tmp_path_factory.mktemp("grpo"))


@pytest.fixture(scope="session")
def family_folders(grpo_folder, tmp_path_factory):
    """The same for each family: {"qwen2", "qwen2_5", "qwen3": folder}."""
    from tiny_models import PROCESSORS, save_model

    root = tmp_path_factory.mktemp("families")
    made = {name: save_model(root / name, grpo_folder, name) for name in PROCESSORS}
    return {"qwen2": grpo_folder} | made


@pytest.fixture(scope="module")
def model_cfg(folder):
    """`model` section of a scale: the shipped architecture, random weights."""
    from test_models import make_tiny  # torch must not be imported any earlier

    return {"name_or_path": str(make_tiny(folder / "model"))}
