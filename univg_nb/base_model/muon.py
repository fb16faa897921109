"""Muon: momentum whose update of a matrix has all its singular values near one.

With AdamW the vision tower stayed long on a plateau where it sees that there are things
but not which; with Muon it left it after a quarter of the pictures. The method is
Keller Jordan's (2024); the step size is matched to AdamW's as in Moonlight
(arXiv:2502.16982). `torch.optim.Muon` does the same in bfloat16, which few CPUs
multiply fast: there the optimizer took longer than the model, so this one keeps the
parameters' precision.
"""

from collections.abc import Iterable
from math import sqrt

import torch
from torch import Tensor, nn

QUINTIC = (3.4445, -4.7750, 2.0315)  # a x + b x^3 + c x^5, steepest at 0
ROUNDS = 5


def orthogonalize(matrix: Tensor) -> Tensor:
    """Return `matrix` (m, n) with singular values of 0.7 to 1.2, by Newton-Schulz."""
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / (x.norm() + 1e-7)
    a, b, c = QUINTIC
    for _ in range(ROUNDS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


def split_projection(matrix: Tensor) -> tuple[Tensor, ...]:
    """Return query, key and value of a fused (3 n, n) projection; else the matrix."""
    rows, columns = matrix.shape
    return matrix.split(columns) if rows == 3 * columns else (matrix,)


class Muon(torch.optim.Optimizer):
    """Muon for matrices; embeddings, norms and biases belong to AdamW.

    Args:
        params: parameters of two dimensions.
        lr: learning rate, on AdamW's scale.
        momentum: of the gradient's moving average.
        weight_decay: decoupled, times the learning rate.

    Raises:
        ValueError: for a parameter that is not a matrix.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.05,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        for group in self.param_groups:
            for param in group["params"]:
                if param.ndim != 2:
                    raise ValueError(
                        f"Muon takes matrices, not a parameter of shape "
                        f"{tuple(param.shape)}; give that one to AdamW"
                    )

    @torch.no_grad()
    def step(self) -> None:
        """Make one update with Nesterov momentum and decoupled weight decay."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group)

    def _update(self, param: nn.Parameter, group: dict) -> None:
        state = self.state[param]
        if not state:
            state["momentum"] = torch.zeros_like(param)
        average = state["momentum"].lerp_(param.grad, 1 - group["momentum"])
        ahead = param.grad.lerp(average, group["momentum"])
        update = torch.cat(
            [
                # 0.2 sqrt(longer side) gives the root mean square of AdamW's updates.
                orthogonalize(block) * (0.2 * sqrt(max(block.shape)))
                for block in split_projection(ahead)
            ]
        )
        param.mul_(1 - group["lr"] * group["weight_decay"])
        param.add_(update, alpha=-group["lr"])
