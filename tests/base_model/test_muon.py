"""Muon against torch's own (bfloat16 inside), and what it promises of an update."""

import pytest
import torch
from torch import nn

from univg_nb.base_model.muon import Muon, orthogonalize, split_projection
from univg_nb.base_model.training import make_optimizers


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (30, 96)])
def test_singular_values_end_near_one(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape) @ torch.diag(torch.linspace(0.1, 3, shape[1]))
    values = torch.linalg.svdvals(orthogonalize(matrix))
    assert values.min() > 0.6 and values.max() < 1.25


def test_orthogonalize_keeps_the_singular_vectors():
    torch.manual_seed(0)
    matrix = torch.randn(16, 40)
    u, s, v = torch.linalg.svd(orthogonalize(matrix), full_matrices=False)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    polar = left @ right
    close = torch.nn.functional.cosine_similarity(
        (u @ torch.diag(s) @ v).flatten(), polar.flatten(), dim=0
    )
    assert close > 0.95


def test_three_steps_equal_torch_up_to_its_bfloat16():
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(24, 40))
    theirs = nn.Parameter(ours.detach().clone())
    start = ours.detach().clone()
    one = Muon([ours], lr=0.01, weight_decay=0.1)
    settings = {"weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    two = torch.optim.Muon([theirs], lr=0.01, **settings)
    for _ in range(3):
        grad = torch.randn(24, 40)
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        one.step()
        two.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved


def test_a_fused_projection_is_orthogonalize_block_by_block():
    fused = torch.arange(3 * 4 * 4.0).view(12, 4)
    assert [b.shape for b in split_projection(fused)] == [(4, 4)] * 3
    assert split_projection(torch.zeros(8, 4))[0].shape == (8, 4)


def test_vectors_are_refused():
    with pytest.raises(ValueError, match=r"not a parameter of shape \(3,\)"):
        Muon([nn.Parameter(torch.zeros(3))], lr=0.1)


def test_every_parameter_has_one_optimizer():
    model = nn.ModuleDict(
        {"layers": nn.Sequential(nn.Linear(4, 8)), "embed": nn.Embedding(5, 4)}
    )
    muon, adamw = make_optimizers([model], lr=0.1, matrix_lr=0.2)
    inner = [p for g in muon.param_groups for p in g["params"]]
    rest = [p for g in adamw.param_groups for p in g["params"]]
    assert [tuple(p.shape) for p in inner] == [(8, 4)]
    assert sorted(tuple(p.shape) for p in rest) == [(5, 4), (8,)]
