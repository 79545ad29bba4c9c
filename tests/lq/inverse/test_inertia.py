"""Inertia by the cheapest factors, looked at again where rounding might change it."""

import numpy as np
import pytest
import torch

from linop_hess import lq
from linop_hess.errors import FactorizationError, SingularPivotError
from linop_hess.lq import Analysis, make_plan
from linop_hess.lq.inverse import inertia as inertia_module
from linop_hess.lq.inverse.factors import Factors
from linop_hess.lq.inverse.inertia import inertia, inertia_at, inertia_of_factors
from linop_hess.lq.methods.riccati import RiccatiFactorization
from linop_hess.lq.pivots.inertia import Inertia
from tests.lq.methods.conformance import DTYPES, MIXED, SHAPES, WIRED, setting


def of(values):
    return Inertia(int((values < 0).sum()), 0, int((values > 0).sum()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, *MIXED, *WIRED])
def test_between_all_eigenvalues(shape, dtype):
    truth = setting(shape, dtype)
    between = -(truth.eigenvalues[1:] + truth.eigenvalues[:-1]) / 2
    wide = np.diff(truth.eigenvalues) > 1e-7 * truth.norm
    chosen = between[wide][:: max(1, int(wide.sum()) // 12)] if len(between) else between
    analysis = truth.analysis
    for damping in [0.5, 1e-6, *chosen]:
        values = truth.eigenvalues + damping
        if np.abs(values).min(initial=np.inf) > 1e-10 * truth.norm:
            assert inertia_at(analysis, float(damping)) == of(values), damping


@pytest.mark.parametrize("shape", ["equal", "wildly varying", "narrow, wide, narrow"])
@pytest.mark.parametrize("side", [-1, 1])
def test_close_to_eigenvalues(shape, side):
    truth = setting(shape)
    for value in truth.eigenvalues[:: max(1, len(truth.H) // 10)]:
        damping = float(-value + side * 1e-11 * truth.norm)
        if truth.analysis.hidden and abs(damping) < 1e-10 * truth.norm:
            continue
        assert inertia_at(truth.analysis, damping) == of(truth.eigenvalues + damping)


def test_pivots_that_small_count_as_zero():
    """Two controls without curvature but ε."""
    problem = lq.Problem.from_blocks(
        [np.diag([1.0, 0.0])], [np.zeros((2, 1))], [np.zeros((1, 1))], [np.zeros((1, 1))], [np.ones((1, 2))]
    )
    analysis = Analysis(problem)
    assert inertia_at(analysis, -1e-12, 1e-11) == Inertia(0, 1, 1)
    assert inertia_at(analysis, -1e-10, 1e-11) == Inertia(1, 0, 1)


@pytest.mark.parametrize("small", [True, False])
def test_doubtful_factors_are_looked_at_again(small, monkeypatch):
    """As dense eigenvalues where there are few controls, else by factors at two dampings beside."""
    truth = setting("wildly varying")
    analysis = truth.new_analysis()
    monkeypatch.setattr(RiccatiFactorization, "growth", 1e-9)
    monkeypatch.setattr(inertia_module, "DENSE_UP_TO", 1000 if small else 0)
    values = truth.eigenvalues + 0.3
    factors = Factors(analysis, 0.3, make_plan(analysis, 0.3))
    riccati = factors.made("riccati")
    monkeypatch.setattr(factors, "answering", lambda question: riccati)
    assert inertia_of_factors(factors) == of(values)
    near = float(-truth.eigenvalues[20] + 1e-10 * truth.norm)
    close = Factors(analysis, near, make_plan(analysis, near))
    monkeypatch.setattr(close, "answering", lambda question: close.made("riccati"))
    if small:
        assert inertia_of_factors(close) == of(truth.eigenvalues + near)
    else:
        with pytest.raises(FactorizationError, match="an eigenvalue lies within") as caught:
            inertia_of_factors(close)
        moved = caught.value.suggested_damping
        assert moved is not None and abs(moved - near) <= 1e-8 * truth.norm


def test_singular_is_told_with_a_way_out():
    blocks_without_damping = setting("more controls than outputs").analysis
    with pytest.raises(SingularPivotError):
        inertia_at(blocks_without_damping, 0.0)
    with pytest.raises(FactorizationError, match="move damping by") as caught:
        inertia(blocks_without_damping, 0.0)
    assert inertia(blocks_without_damping, caught.value.suggested_damping).zero == 0


def test_of_nothing():
    zero = lq.Problem.from_blocks(
        [np.zeros((2, 2))], [np.zeros((2, 1))], [np.zeros((1, 1))], [np.zeros((1, 1))], [np.ones((1, 2))]
    )
    assert inertia(Analysis(zero), 0.5) == Inertia(0, 0, 2) and inertia(Analysis(zero), -0.5) == Inertia(2, 0, 0)
    with pytest.raises(FactorizationError, match="H is zero"):
        inertia(Analysis(zero), 0.0)
    assert torch.is_grad_enabled()
