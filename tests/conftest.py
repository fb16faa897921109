"""For all tests: no network, no windows, no fight over the cores."""

import os

from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ.setdefault("MPLBACKEND", "Agg")

# A busy machine is not a failure.
settings.register_profile("univg", deadline=None)
settings.load_profile("univg")
