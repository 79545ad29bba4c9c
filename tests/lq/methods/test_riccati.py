"""Method "riccati": for solves, with bounded growth, and with everything delayed that may be."""

import numpy as np
import pytest
import torch

from linop_hess import lq
from linop_hess.errors import SingularPivotError
from linop_hess.lq.accuracy import GROWTH, GROWTH_LITTLE, GROWTH_MODERATE, MULTIPLIER, UNSURE_PIVOT
from linop_hess.lq.methods import riccati
from linop_hess.lq.methods.riccati import RiccatiFactorization
from linop_hess.lq.pivots import rules
from linop_hess.lq.pivots.rules import BoundedGrowth
from tests.lq.methods.conformance import (
    DAMPINGS,
    MIXED,
    SHAPES,
    WIRED,
    CongruenceConformance,
    SolveConformance,
    right_hand_side,
    setting,
)
from tests.lq.problems import backward_error, random_blocks


def bounded(analysis, damping, growth, multiplier=float("inf")):
    scale = max(analysis.norm, abs(damping))
    return RiccatiFactorization(
        analysis, damping, BoundedGrowth(growth * scale, multiplier, min(UNSURE_PIVOT * scale, 1e-2 * abs(damping)))
    )


class TestForSolves(SolveConformance):
    def factor(self, analysis, damping):
        return riccati.factor(analysis, damping)

    def amplified(self, damping):
        return 1 / abs(damping)


class TestCareful(TestForSolves):
    shapes = ("more controls than outputs", "wildly varying", "narrow, wide, narrow", *WIRED)

    def factor(self, analysis, damping):
        return riccati.factor_careful(analysis, damping)


class TestBoundedGrowth(CongruenceConformance):
    def factor(self, analysis, damping):
        return bounded(analysis, damping, GROWTH)


class TestBoundedMultipliers(CongruenceConformance):
    """Many directions are delayed, hidden ones among them."""

    shapes = ("more controls than outputs", "wildly varying", "stages without controls", *MIXED, *WIRED)

    def factor(self, analysis, damping):
        return bounded(analysis, damping, GROWTH_MODERATE, MULTIPLIER)


class TestLittleGrowth(TestBoundedMultipliers):
    def factor(self, analysis, damping):
        return bounded(analysis, damping, GROWTH_LITTLE)


@pytest.mark.parametrize("shape", ["more controls than outputs", "narrow, wide, narrow", "wide and narrow in turn"])
def test_hidden_directions_are_delayed_and_pivots_too(shape):
    truth = setting(shape)
    found = bounded(truth.analysis, 1e-5, GROWTH_MODERATE, MULTIPLIER)
    hidden = sum(factor.segment.hidden.delayed for factor in found.factors)
    assert hidden >= 2 and found.hidden == truth.analysis.hidden - hidden
    assert sum(factor.elimination.delayed for factor in found.factors) >= 2
    assert found.factors[0].delayed == 0
    assert found.delayed == {f.segment.stage: f.delayed for f in found.factors if f.delayed}


@pytest.mark.parametrize("shape", [*SHAPES, *MIXED])
@pytest.mark.parametrize("growth", [GROWTH, GROWTH_MODERATE, GROWTH_LITTLE])
def test_growth_is_bounded(shape, growth):
    """Each elimination adds at most growth · max(‖H‖, |ε|) a direction to the cost-to-go in units of the states."""
    truth = setting(shape)
    scale = max(truth.analysis.norm, 1e-5)
    found = bounded(truth.analysis, 1e-5, growth)
    assert found.obeys(BoundedGrowth(np.inf))
    for factor in found.factors[1:]:
        e = factor.elimination.whitened()
        units = factor.segment.units if not found.analysis.is_narrow else torch.ones_like(factor.segment.units)
        added = (e.white * units.mT).square() / e.theta.abs()[:, None]
        assert float(added.sum(0).max() if added.numel() else 0.0) <= e.theta.numel() * growth * scale


def test_obeys_tells_a_stricter_rule_apart():
    found = riccati.factor(setting("more controls than outputs").analysis, 1e-5)
    assert not found.obeys(BoundedGrowth(1e-3)) and found.obeys(BoundedGrowth(1e300))


@pytest.mark.parametrize("shape", ["equal", "more controls than outputs", "narrow, wide, narrow", "all wide"])
@pytest.mark.parametrize("damping", DAMPINGS)
def test_cost_to_go_is_the_schur_complement(shape, damping):
    """V before a segment is what dense elimination of all later controls leaves on the state."""
    truth = setting(shape)
    found = bounded(truth.analysis, damping, 1e12)  # nothing is delayed
    blocks = random_blocks(*{**SHAPES, **MIXED}[shape], seed=7)
    V = np.zeros((blocks.F[-1].shape[0],) * 2)
    dense = {}
    for l in range(len(blocks.A) - 1, -1, -1):
        A, B, C, F, G = (part[l] for part in (blocks.A, blocks.B, blocks.C, blocks.F, blocks.G))
        S = A + damping * np.eye(len(A)) + G.T @ V @ G
        E = B + G.T @ V @ F
        V = F.T @ V @ F + C - E.T @ np.linalg.solve(S, E)
        dense[l] = V, np.linalg.cond(S) if len(S) else 1.0
    lost = max(condition for _, condition in dense.values())
    for factor, cost in zip(found.factors[1:], found.costs_to_go()[1:], strict=True):
        expected, kept = dense[factor.segment.stage][0], _kept_units(found, factor)
        assert factor.delayed == 0
        atol = 1e-12 * lost * np.abs(expected).max(initial=1.0)
        np.testing.assert_allclose(cost.value.V.numpy() / kept / kept.T, expected, rtol=0, atol=atol)


def _kept_units(found, factor):
    """The units in which the recursion keeps the state before a segment."""
    k = [f.segment.stage for f in found.factors].index(factor.segment.stage)
    g, j = found.analysis.pairs[k]
    unit = found.analysis.groups[g].state_unit
    return np.ones((factor.segment.n_in, 1)) if unit is None else unit[j].numpy()


@pytest.mark.parametrize("delay", [0.1, 10.0, 1e3])
@pytest.mark.parametrize("shape", SHAPES)
def test_delayed_pivots_change_nothing(shape, delay, monkeypatch):
    """However many directions are carried to the stage before, it is the same system."""
    truth = setting(shape, seed=23)
    g = right_hand_side(len(truth.H))
    monkeypatch.setattr(rules, "PIVOT_DELAY", delay)
    monkeypatch.setattr(rules, "PIVOT_SMALL", 0.9)
    factors = riccati.factor_careful(truth.analysis, 0.04)
    x = factors.solve(torch.from_numpy(g)).numpy()
    assert backward_error(truth.H, 0.04, x, g) <= 1e-12
    if delay == 1e3 and shape in ("equal", "wildly varying"):
        assert sum(factors.delayed.values()) >= 6


def test_hidden_controls_need_a_damping():
    analysis = setting("more controls than outputs").analysis
    assert analysis.hidden
    with pytest.raises(SingularPivotError) as caught:
        riccati.factor(analysis, 0.0)
    assert caught.value.stage in (1, 3)


def test_singular_at_the_first_stage():
    zero = [np.zeros((2, 2))]
    problem = lq.Problem.from_blocks(zero, [np.zeros((2, 1))], [np.zeros((1, 1))], [np.zeros((2, 1))], [np.eye(2)])
    with pytest.raises(SingularPivotError) as caught:
        riccati.factor(lq.Analysis(problem), 0.0)
    assert caught.value.stage == 0
