"""Method "dense"."""

import numpy as np
import pytest
import torch

from linop_hess import lq
from linop_hess.errors import SingularPivotError
from linop_hess.lq.methods import dense
from linop_hess.lq.methods.dense import assemble, assembled
from tests.lq.methods.conformance import SIZES, CongruenceConformance, setting
from tests.lq.problems import random_blocks


class TestDense(CongruenceConformance):
    def factor(self, analysis, damping):
        return dense.factor(analysis, damping)


@pytest.mark.parametrize("shape", SIZES)
def test_assemble(shape, monkeypatch):
    monkeypatch.setattr(dense, "_COLUMNS_AT_ONCE", 7)
    truth = setting(shape)
    ours = assemble(truth.problem).numpy()
    np.testing.assert_allclose(ours, truth.H, rtol=0, atol=1e-13 * max(truth.norm, 1.0))


def test_h_is_kept_for_other_dampings_where_it_is_small(monkeypatch):
    analysis = setting("equal").analysis
    assert assembled(analysis) is assembled(analysis)
    before = assembled(analysis).clone()
    dense.factor(analysis, 0.5).solve(torch.ones(analysis.problem.size, 1).double())
    assert torch.equal(assembled(analysis), before)
    monkeypatch.setattr(dense, "_KEPT_UP_TO", 0)
    analysis = setting("equal").analysis
    assert assembled(analysis) is not assembled(analysis)


def test_singular():
    blocks = random_blocks([2, 3, 2], [3, 4], seed=43, with_A="none")
    blocks.B[1][:] = 0
    with pytest.raises(SingularPivotError):
        dense.factor(lq.Analysis(blocks.problem()), 0.0)


def test_no_rounding_is_made_by_elimination_along_the_chain():
    assert dense.factor(setting("equal").analysis, 0.5).growth == 0.0
