"""UniVG-R1 as a course of executable notebooks: the small helper package."""

import gc
import logging

__version__ = "0.1.0"

# On CPUs with AVX512-BF16 bitsandbytes looks for one more kernel, to be downloaded, and
# warns in every notebook that there is none. Its built-in one does the same work.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "gemm_4bit_forward" not in record.msg
)

# Importing torch, transformers, peft and trl makes millions of objects that all stay.
# At Python's threshold of 700 the collector walks through them again and again, which
# is a quarter of the import's processor time, in every notebook and process.
_USUAL = gc.get_threshold()
gc.set_threshold(100_000, *_USUAL[1:])


def imports_done() -> None:
    """Collect as often as Python usually does: a training leaves tensors in cycles.
    `models.load` calls it."""
    gc.set_threshold(*_USUAL)
