"""Which pivots may be divided by."""

import math

import pytest
import torch

from linop_hess.lq.accuracy import PIVOT_DELAY, PIVOT_SMALL, PIVOT_SUSPECT
from linop_hess.lq.pivots.rules import BoundedGrowth, SmallPivots, extremes


def accepts(rule, theta, white):
    """As the rule judges where states move by one."""
    return rule.accepts(theta, white, torch.ones(white.shape[1], 1, dtype=white.dtype))


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


def packed(theta, E):
    """A block that LAPACK has factored, and what `accepts_packed` is asked with, a leading axis before."""
    S = torch.diag(theta)[None]
    factors, interchanges, _ = torch.linalg.ldl_factor_ex(S)
    return factors, interchanges, E[None], torch.linalg.ldl_solve(factors, interchanges, E[None])


@pytest.mark.parametrize(("size", "accepted"), [(2 * PIVOT_SUSPECT, True), (0.5 * PIVOT_SUSPECT, False)])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("damping", [1e-6, -1e-6])
def test_small_pivots_are_those_below_the_damping(size, accepted, sign, damping):
    rule = SmallPivots(damping)
    theta = vector(1.0, sign * size * abs(damping))
    assert accepts(rule, theta, torch.zeros(2, 0)) == accepted
    assert rule.accepts_packed(*packed(theta, torch.ones(2, 1).double())) == accepted


def test_small_pivots_keep_what_is_large_in_terms_of_the_stage():
    """A pivot far below a large |ε| is not small where all of the stage are: 1e-4 of the largest."""
    rule = SmallPivots(1.0)
    assert accepts(rule, vector(1e-3, 5e-4), torch.zeros(2, 0))
    assert not accepts(rule, vector(1e-3, 0.5 * PIVOT_SMALL * 1e-3), torch.zeros(2, 0))
    assert rule.keeps(vector(1.0, 0.5 * PIVOT_SMALL, -2 * PIVOT_SMALL), torch.zeros(3, 1)).tolist() == [
        True,
        False,
        True,
    ]
    small = SmallPivots(1e-6)
    assert small.keeps(vector(1.0, 0.5 * PIVOT_DELAY * 1e-6, 2 * PIVOT_DELAY * 1e-6), torch.zeros(3, 1)).tolist() == [
        True,
        False,
        True,
    ]


def test_small_pivots_without_damping():
    rule = SmallPivots(0.0)
    assert accepts(rule, vector(1.0, 2 * PIVOT_SMALL**2), torch.zeros(2, 0))
    assert not accepts(rule, vector(1.0, 0.5 * PIVOT_SMALL**2), torch.zeros(2, 0))
    assert rule.coupling_up_to(1e-9) == math.inf and not rule.is_orthogonal


def test_bounded_growth():
    """White²/θ is what the cost-to-go grows by, white/θ the multiplier."""
    E = torch.tensor([[3.0], [0.1]]).double()
    theta = vector(1.0, 1e-3)
    for limit, accepted in ((20.0, True), (18.0, False)):  # 9/1 + 0.01/1e-3 = 19
        assert accepts(BoundedGrowth(limit), theta, E) == accepted
        assert BoundedGrowth(limit).accepts_packed(*packed(theta, E)) == accepted
    for multiplier, accepted in ((101.0, True), (99.0, False)):
        assert accepts(BoundedGrowth(1e9, multiplier), theta, E) == accepted
        assert BoundedGrowth(1e9, multiplier).accepts_packed(*packed(theta, E)) == accepted
    for smallest, accepted in ((0.9e-3, True), (1.1e-3, False)):
        rule = BoundedGrowth(1e9, smallest=smallest)
        assert accepts(rule, theta, E) == rule.accepts_packed(*packed(theta, E)) == accepted
        assert rule.keeps(theta, E).tolist() == [True, accepted]
    assert BoundedGrowth(9.5).keeps(theta, E).tolist() == [True, False]
    assert BoundedGrowth(1e9, 50.0).keeps(theta, E).tolist() == [True, False]


@pytest.mark.parametrize("rule", [SmallPivots(1e-3), BoundedGrowth(10.0)])
def test_nan_is_never_accepted(rule):
    E = torch.ones(2, 1).double()
    assert not accepts(rule, vector(math.nan, 1.0), E)
    factors, interchanges, _, gain = packed(vector(2.0, 1.0), E)
    assert not rule.accepts_packed(factors * math.nan, interchanges, E[None], gain * math.nan)


def test_what_couples_to_nothing_is_accepted():
    rule = BoundedGrowth(1e-9)
    assert accepts(rule, vector(1e-3), torch.zeros(1, 0)) and accepts(rule, vector(), torch.zeros(0, 3))
    assert rule.accepts_packed(*packed(vector(1e-3), torch.zeros(1, 0).double()))
    assert SmallPivots(1e-3).accepts_packed(
        torch.zeros(2, 0, 0), torch.zeros(2, 0), torch.zeros(2, 0, 1), torch.zeros(2, 0, 1)
    )


@pytest.mark.parametrize("damping", [1e-4, -1e-4])
def test_hidden_directions_grow_by_coupling_squared_over_the_damping(damping):
    assert BoundedGrowth(25.0).coupling_up_to(damping) == pytest.approx(5e-2)
    rule = BoundedGrowth(25.0, 2.0)
    assert rule.coupling_up_to(damping) == pytest.approx(2e-4) and rule.is_orthogonal
    assert not BoundedGrowth(25.0).is_orthogonal


def test_extremes():
    assert extremes(vector(-3.0, 0.5, 2.0)) == (0.5, 3.0) and extremes(vector()) == (1.0, 1.0)
