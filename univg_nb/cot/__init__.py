"""Reasoning chains for stage 1, written by a teacher that knows the true boxes.

`checks` holds the prompts and the checks of the replies, `teacher` the client of an
OpenAI-compatible endpoint, `stand_in` a server that plays the teacher for MiniMIG.
"""

from univg_nb.cot.checks import check_chain

__all__ = ["check_chain"]
