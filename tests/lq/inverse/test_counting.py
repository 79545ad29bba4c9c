"""Counts of eigenvalues, and the smallest convex damping."""

import numpy as np
import pytest

from linop_hess import lq
from linop_hess.errors import FactorizationError
from linop_hess.lq.accuracy import NUDGE
from linop_hess.lq.inverse import counting
from linop_hess.lq.inverse.counting import count_up_to, smallest_convex_damping
from tests.lq.methods.conformance import DTYPES, MIXED, SHAPES, WIRED, setting


def zero(size=2):
    return lq.Analysis(
        lq.Problem.from_blocks(
            [np.zeros((size, size))],
            [np.zeros((size, 1))],
            [np.zeros((1, 1))],
            [np.zeros((1, 1))],
            [np.ones((1, size))],
        )
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, *MIXED, *WIRED])
def test_count(shape, dtype):
    truth = setting(shape, dtype)
    for b in (-2 * truth.norm, -0.3, -1e-3, 1e-3, 0.2, 2 * truth.norm):
        assert count_up_to(truth.analysis, b) == (truth.eigenvalues <= b).sum()


@pytest.mark.parametrize("shape", ["equal", "more controls than outputs"])
def test_an_eigenvalue_at_the_end_is_counted(shape):
    truth = setting(shape)
    for k in range(0, len(truth.H), 5):
        value = float(truth.eigenvalues[k])
        assert count_up_to(truth.analysis, value) == (truth.eigenvalues <= value + 1e-9 * truth.norm).sum()


def test_count_of_nothing():
    assert count_up_to(zero(), -1e-3) == 0 and count_up_to(zero(), 0.0) == count_up_to(zero(), 1.0) == 2


@pytest.mark.parametrize("rtol", [1e-3, 1e-8])
@pytest.mark.parametrize("shape", [*SHAPES, *MIXED, *WIRED])
def test_smallest_convex_damping(shape, rtol):
    truth = setting(shape)
    found, least = smallest_convex_damping(truth.analysis, rtol), -float(truth.eigenvalues.min(initial=0.0))
    if not truth.norm:
        assert found == 1.0
    elif least <= NUDGE * truth.norm:
        assert found == pytest.approx(NUDGE * truth.analysis.norm)
    else:
        assert least * (1 - 1e-12) < found <= least * (1 + 1.01 * rtol)


def test_of_a_zero_hessian_it_is_one():
    assert smallest_convex_damping(zero(), 1e-3) == 1.0


def test_no_damping_at_all(monkeypatch):
    monkeypatch.setattr(counting, "_is_convex", lambda analysis, damping: False)
    with pytest.raises(FactorizationError, match="no damping up to"):
        smallest_convex_damping(setting("equal").new_analysis(), 1e-3)
