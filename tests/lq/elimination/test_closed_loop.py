"""Solves with narrow factors: the closed loop against the open one, and against dense solves."""

import numpy as np
import pytest
import torch

from linop_hess.lq.accuracy import GROWTH
from linop_hess.lq.analysis import Analysis
from linop_hess.lq.elimination.closed_loop import ClosedLoop
from linop_hess.lq.methods import riccati
from linop_hess.lq.pivots.delayed import PackedElimination
from linop_hess.lq.pivots.rules import BoundedGrowth
from tests.lq.methods.conformance import DTYPES, SHAPES, eye, right_hand_side, setting
from tests.lq.problems import backward_error, random_blocks


def narrow(shape, dtype=torch.float64, damping=0.4):
    """Factors of which nothing was delayed."""
    truth = setting(shape, dtype)
    factors = riccati.RiccatiFactorization(truth.analysis, damping, BoundedGrowth(1e12))
    assert all(isinstance(factor.elimination, PackedElimination) for factor in factors.factors)
    return truth, factors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_dense_matrix(shape, dtype):
    truth, factors = narrow(shape, dtype)
    loop = ClosedLoop(factors.analysis, 0.4, factors.factors)
    g = right_hand_side(len(truth.H)).astype(truth.problem.numpy_dtype)
    given = torch.from_numpy(g.copy())
    x = loop.solve(given)
    assert x.dtype == dtype and np.array_equal(given.numpy(), g)
    assert backward_error(truth.H, 0.4, x.numpy(), g) <= 1e4 * torch.finfo(dtype).eps
    assert loop.nbytes > 0


@pytest.mark.parametrize("shape", SHAPES)
def test_a_solve_by_halves_is_the_same(shape):
    """L⁻ᵀD⁻¹L⁻¹ and the closed loop come from the same factors, in whichever order they are asked."""
    for halves_first in (True, False):
        truth, factors = narrow(shape)
        I = eye(len(truth.H), torch.float64)
        loop = factors.solve(I) if not halves_first else None
        halves = factors.unwhiten(factors.whiten(I) / factors.pivots)
        loop = factors.solve(I) if loop is None else loop
        torch.testing.assert_close(halves, loop, rtol=0, atol=1e-10 * float(loop.abs().max()))
    assert factors.growth >= 0.0 and GROWTH > 0


class LittleGrowth(BoundedGrowth):
    """Of hidden directions none is delayed, of the others as many as make the cost-to-go grow."""

    def coupling_up_to(self, damping: float) -> float:
        return float("inf")


@pytest.mark.parametrize("shape", SHAPES)
def test_some_segments_delay_directions(shape):
    """Those, and those that what is delayed arrives at, take the steps of the halves; all others the closed loop."""
    truth = setting(shape)
    g = right_hand_side(len(truth.H))
    for damping, growth in ((0.4, 0.3), (0.4, 3.0), (-0.3, 1.0), (1e-3, 1.0)):
        rule = LittleGrowth(growth * max(truth.analysis.norm, damping))
        x = riccati.RiccatiFactorization(truth.analysis, damping, rule).solve(torch.from_numpy(g.copy())).numpy()
        assert backward_error(truth.H, damping, x, g) <= 1e-13 / abs(damping)


def test_directions_are_delayed_in_a_long_chain():
    """Both kinds of segment in one chain: solves and inertia as of the dense matrix."""
    blocks = random_blocks([3] * 31, [5] * 30, seed=3)
    analysis, H = Analysis(blocks.problem()), blocks.hessian()
    g = right_hand_side(len(H))
    for damping in (0.4, -0.3):
        for growth in (3.0, 6.0):
            factors = riccati.RiccatiFactorization(analysis, damping, LittleGrowth(growth * analysis.norm))
            packed = [isinstance(factor.elimination, PackedElimination) for factor in factors.factors]
            assert 3 <= sum(packed) < len(packed) and any(factor.elimination.delayed for factor in factors.factors)
            x = factors.solve(torch.from_numpy(g.copy())).numpy()
            assert backward_error(H, damping, x, g) <= 1e-13
            assert factors.inertia(0.0).negative == int((np.linalg.eigvalsh(H) + damping < 0).sum())
