"""Training: stage 1 (`sft`), stage 2 (`grpo`), and what only they need.

`rewards` and `difficulty` hold the formulas of stage 2, `checkpoints` what both stages
share, and `merge` writes trained adapters into the weights of a model.
"""

__all__: list[str] = []
