"""Damping strategies, on curvatures whose eigenvalues are known."""

import math
from dataclasses import dataclass

import pytest

from linop_hess import Inertia
from linop_hess.optim.damping import (
    CONVEX_DAMPING,
    ConditionNumber,
    Fixed,
    GainRatio,
    JustConvex,
    ResidualMonitored,
    as_damping,
    iterations,
)


@dataclass
class Diagonal:
    values: tuple

    def norm(self):
        return max(map(abs, self.values))

    def smallest_convex_damping(self):
        return max(0.0, -min(self.values))

    def inertia(self, damping):
        moved = [v + damping for v in self.values]
        return Inertia(sum(v < 0 for v in moved), sum(v == 0 for v in moved), sum(v > 0 for v in moved))


INDEFINITE, CONVEX = Diagonal((-2.0, 1.0, 8.0)), Diagonal((0.5, 1.0, 8.0))


def test_fixed_goes_back_after_refusals():
    damping = Fixed(0.1)
    assert damping.begin(INDEFINITE) is None and damping.value == 0.1
    damping.refused()
    damping.refused()
    assert damping.value == pytest.approx(0.8)
    damping.begin(INDEFINITE)
    assert damping.value == 0.1 and Fixed().value == CONVEX_DAMPING


def test_gain_ratio_is_nielsens_rule():
    damping = GainRatio(1.0)
    for expected in (2.0, 8.0, 64.0):
        damping.refused()
        assert damping.value == expected
    damping.accepted(1.0, math.nan)
    assert damping.value == pytest.approx(64 / 3)
    damping.accepted(0.5, math.nan)
    assert damping.value == pytest.approx(64 / 3)
    damping.accepted(0.0, math.nan)
    assert damping.value == pytest.approx(128 / 3)
    damping.refused()
    assert damping.value == pytest.approx(256 / 3)  # the growth starts anew
    low = GainRatio(1e-3, least=1e-3)
    low.accepted(1.0, math.nan)
    assert low.value == 1e-3


def test_just_convex():
    damping = JustConvex(margin=0.5)
    assert tuple(damping.begin(INDEFINITE)) == (0, 0, 3) and damping.value == 3.0
    assert tuple(damping.begin(CONVEX)) == (0, 0, 3) and damping.value == CONVEX_DAMPING


def test_condition_number():
    damping = ConditionNumber(101.0)
    damping.begin(INDEFINITE)
    assert damping.value == pytest.approx(0.08)
    eigenvalues = [abs(v) + damping.value for v in (*INDEFINITE.values, 0.0)]
    assert max(eigenvalues) / min(eigenvalues) <= 101.0 * (1 + 1e-12)


def test_residual_monitored():
    damping = ResidualMonitored(1.0, tolerance=1e-8, least=0.3)
    damping.accepted(1.0, 1e-10)
    assert damping.value == 0.5
    damping.accepted(1.0, 1e-5)
    assert damping.value == 5.0
    for _ in range(10):
        damping.accepted(1.0, 1e-10)
    assert damping.value == 0.3


@pytest.mark.parametrize("kind", [Fixed, GainRatio, JustConvex, ConditionNumber, ResidualMonitored])
def test_states(kind):
    damping, other = kind(), kind()
    damping.begin(INDEFINITE)
    for _ in range(3):
        damping.refused()
    other.load_state_dict(damping.state_dict())
    assert vars(other) == vars(damping)
    damping.refused()
    other.refused()
    assert other.value == damping.value
    with pytest.raises(KeyError, match="same damping"):
        kind().load_state_dict({"value": 1.0})
    for _ in range(1000):
        damping.refused()
    assert math.isfinite(damping.value)


def test_bad_input():
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError):
            Fixed(wrong)
        with pytest.raises(ValueError):
            ConditionNumber(wrong)
    with pytest.raises(TypeError, match="real number"):
        as_damping("small", Fixed())
    assert as_damping(0.5, Fixed()).value == 0.5 and as_damping(None, default := Fixed()) is default
    assert (iterations(1), iterations(20), iterations(1000)) == (2, 40, 100)
