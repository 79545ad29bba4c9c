"""What stages have in common."""

import torch

from linop_hess.lq.stages.base import common_samples, times
from linop_hess.lq.stages.dense import DenseStage
from linop_hess.lq.stages.diagonal import DiagonalStage


def test_common_samples():
    twelve, eight = DiagonalStage(torch.ones(1, 12)), DiagonalStage(torch.ones(1, 8))
    together = DenseStage(torch.ones(1, 1, 2, 2))
    assert common_samples([twelve, eight]) == 4
    assert common_samples([twelve, together]) == 1
    assert common_samples([]) == 1


def test_products_entry_by_entry_are_those_of_matrices():
    X, Y = torch.arange(12.0).view(2, 3, 2), torch.arange(16.0).view(2, 2, 4)
    assert torch.equal(times(X, Y), X @ Y)
    assert torch.equal(times(X[..., :1], Y[:, :1]), X[..., :1] @ Y[:, :1])
