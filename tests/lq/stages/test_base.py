"""What stages have in common."""

import torch

from linop_hess.lq.stages.base import common_samples
from linop_hess.lq.stages.dense import DenseStage
from linop_hess.lq.stages.diagonal import DiagonalStage


def test_common_samples():
    twelve, eight = DiagonalStage(torch.ones(1, 12)), DiagonalStage(torch.ones(1, 8))
    together = DenseStage(torch.ones(1, 1, 2, 2))
    assert common_samples([twelve, eight]) == 4
    assert common_samples([twelve, together]) == 1
    assert common_samples([]) == 1
