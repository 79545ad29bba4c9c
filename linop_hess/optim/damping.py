"""How much damping: strategies as small objects that an optimizer asks before its trial points and tells how they went.

A strategy holds one number, the damping λ of the next trial point. The optimizer calls `begin` once a step with what is known of the
curvature, `accepted` with the gain ratio of a step that was taken, and `refused` after each trial point that was not.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Protocol

from linop_hess._validate import finite_real
from linop_hess.lq.pivots.inertia import Inertia

CONVEX_DAMPING = 1e-6
"""Damping where the curvature is positive definite and nothing else is said."""

TOLERANCE = 1e-8
"""Backward error of the solves of a step."""

MOST = 1e12
"""No damping is raised beyond this."""

_LEAST = 1e-14


def iterations(length: int) -> int:
    """Return how many steps of refinement, or of a Krylov method, a chain of `length` stages gets at most: min(100, 2L)."""
    return max(1, min(100, 2 * length))


class Curvature(Protocol):
    """What strategies ask of the curvature of a step."""

    def norm(self) -> float:
        """‖H‖, within some per cent."""

    def smallest_convex_damping(self) -> float:
        """The least damping that makes it positive definite, 0 where it is already."""

    def inertia(self, damping: float) -> Inertia:
        """Signs of its eigenvalues, damped."""


class Damping(ABC):
    """A damping strategy.

    Attributes
    ----------
    value : float
        λ of the next trial point.
    factor : float or None
        By which λ is changed while that lowers the loss of a step further; None where it is left as it is.
    bold : float
        How far a step may go on uphill, see `DelayedGratification`; 0 where none may.
    """

    factor: float | None = None
    bold: float = 0.0

    def __init__(self, value: float) -> None:
        self.value = _positive(value, "the damping")
        self._growth = 2.0

    @abstractmethod
    def begin(self, curvature: Curvature) -> Inertia | None:
        """Choose λ for a new point; return the inertia of the damped curvature where it was asked for."""

    def accepted(self, ratio: float, backward_error: float) -> None:
        """Learn from a step that was taken: its gain ratio, and the backward error of its solve."""
        self._growth = 2.0

    def refused(self) -> None:
        """Raise λ, by 2, 4, 8, … as refusals follow each other."""
        self.value = min(self.value * self._growth, MOST)
        self._growth = min(2.0 * self._growth, 2.0**20)

    def state_dict(self) -> dict[str, float]:
        """Numbers that `load_state_dict` takes."""
        return {name: value for name, value in vars(self).items() if isinstance(value, float)}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a stored state.

        Raises
        ------
        KeyError
            If it is that of another strategy.
        """
        self.require_state(state)
        vars(self).update(state)

    def require_state(self, state: object) -> None:
        """Refuse a state that is another's.

        Raises
        ------
        KeyError
            If it is that of another strategy.
        """
        mine = self.state_dict()
        if not isinstance(state, Mapping) or set(mine) != set(state):
            got = sorted(state) if isinstance(state, Mapping) else f"a {type(state).__name__}"
            raise KeyError(
                f"expected the state of {type(self).__name__} ({sorted(mine)}), got {got}: use the same damping"
            )


class Fixed(Damping):
    """λ as given; refusals raise it for the rest of the step only.

    Parameters
    ----------
    value : float
    """

    def __init__(self, value: float = CONVEX_DAMPING) -> None:
        super().__init__(value)
        self._given = self.value

    def begin(self, curvature: Curvature) -> Inertia | None:
        self.value = self._given
        return None


class GainRatio(Damping):
    """Nielsen's rule: λ times max(1/3, 1 − (2ρ − 1)³) where a step is taken, and times 2, 4, 8, … where one is refused.

    Parameters
    ----------
    initial : float
        λ of the first trial point.
    least : float
        λ does not fall below this.

    References
    ----------
    H. B. Nielsen, "Damping parameter in Marquardt's method", IMM-REP-1999-05 (1999).
    """

    def __init__(self, initial: float = 1.0, least: float = _LEAST) -> None:
        super().__init__(initial)
        self.least = _positive(least, "the least damping")

    def begin(self, curvature: Curvature) -> Inertia | None:
        return None

    def accepted(self, ratio: float, backward_error: float) -> None:
        super().accepted(ratio, backward_error)
        rho = min(max(ratio, 0.0), 1.0)
        self.value = min(max(self.value * max(1.0 / 3.0, 1.0 - (2.0 * rho - 1.0) ** 3), self.least), MOST)


class Searched(Damping):
    """The λ whose step lowers the loss most, among those a factor apart around the last one; refusals raise it by that factor squared.

    Each λ takes an evaluation of the loss, and another factorization unless the optimizer finds steps at any damping in one space, as
    `SaddleFree` does.

    Parameters
    ----------
    initial : float
        λ of the first trial point.
    factor : float
        Above 1.
    least : float
        λ does not fall below this.

    Raises
    ------
    ValueError, TypeError
        If a number is not usable.
    """

    def __init__(self, initial: float = 1.0, factor: float = 3.0, least: float = _LEAST) -> None:
        super().__init__(initial)
        self.factor, self.least = _above_one(factor, "factor"), _positive(least, "the least damping")

    def begin(self, curvature: Curvature) -> Inertia | None:
        return None

    def accepted(self, ratio: float, backward_error: float) -> None:
        super().accepted(ratio, backward_error)
        self.value = min(max(self.value, self.least), MOST)

    def refused(self) -> None:
        assert self.factor is not None
        self.value = min(self.value * self.factor**2, MOST)


class DelayedGratification(Damping):
    """λ is raised by little where a point is refused and lowered by more where a step is taken; steps may go on uphill.

    A step that lowers the loss most leads to the bottom of a narrow curved valley, from which each further one is short. These are as long
    as the loss allows. One that raises the loss, up to a hundred times the least so far, is taken too where (1 − cos β)ᵇ times it is at
    most that, β being the angle between the step and the one before. `TrialOptimizer.return_to_least` goes back there in the end. Losses
    below zero never rise.

    Parameters
    ----------
    initial : float
        λ of the first trial point.
    raised, lowered : float
        The factors, above 1.
    bold : float
        The exponent b ≥ 0; with 0 no step goes uphill.
    least : float
        λ does not fall below this.

    Raises
    ------
    ValueError, TypeError
        If a number is not usable.

    References
    ----------
    M. K. Transtrum and J. P. Sethna, "Improvements to the Levenberg-Marquardt algorithm for nonlinear least-squares minimization",
    arXiv 1201.5885 (2012).
    """

    def __init__(
        self, initial: float = 0.01, raised: float = 2.0, lowered: float = 5.0, bold: float = 2.0, least: float = _LEAST
    ) -> None:
        super().__init__(initial)
        self.raised, self.lowered = _above_one(raised, "raised"), _above_one(lowered, "lowered")
        self.bold, self.least = finite_real(bold, "bold"), _positive(least, "the least damping")
        if self.bold < 0.0:
            raise ValueError(f"expected bold to be 0 or more, got {bold!r}: pass 2.0, or 0 for steps downhill alone")

    def begin(self, curvature: Curvature) -> Inertia | None:
        return None

    def accepted(self, ratio: float, backward_error: float) -> None:
        super().accepted(ratio, backward_error)
        self.value = min(max(self.value / self.lowered, self.least), MOST)

    def refused(self) -> None:
        self.value = min(self.value * self.raised, MOST)


class JustConvex(Damping):
    """The least λ that makes the curvature positive definite, by inertia, with a margin; a floor where it is so already.

    Parameters
    ----------
    margin : float
        What is added, relatively.
    least : float
        λ where the curvature is positive definite.
    """

    def __init__(self, margin: float = 0.1, least: float = CONVEX_DAMPING) -> None:
        super().__init__(least)
        self.margin, self.least = _positive(margin, "margin"), self.value

    def begin(self, curvature: Curvature) -> Inertia | None:
        self.value = max(self.least, (1.0 + self.margin) * curvature.smallest_convex_damping())
        return curvature.inertia(self.value)


class ConditionNumber(Damping):
    """λ = ‖H‖/(κ − 1), with which |H| + λI has a condition number of κ at most.

    Parameters
    ----------
    target : float
        κ > 1.

    Raises
    ------
    ValueError, TypeError
        If it is not a number above 1.
    """

    def __init__(self, target: float = 1e6) -> None:
        super().__init__(CONVEX_DAMPING)
        self.target = _above_one(target, "the condition number")

    def begin(self, curvature: Curvature) -> Inertia | None:
        self.value = max(curvature.norm() / (self.target - 1.0), _LEAST)
        return None


class ResidualMonitored(Damping):
    """λ is halved while solves reach a backward error, and raised tenfold where one does not.

    Parameters
    ----------
    initial : float
    tolerance : float
        The backward error.
    least : float
        λ does not fall below this.
    """

    def __init__(self, initial: float = 1.0, tolerance: float = TOLERANCE, least: float = CONVEX_DAMPING) -> None:
        super().__init__(initial)
        self.tolerance, self.least = _positive(tolerance, "tolerance"), _positive(least, "the least damping")

    def begin(self, curvature: Curvature) -> Inertia | None:
        return None

    def accepted(self, ratio: float, backward_error: float) -> None:
        super().accepted(ratio, backward_error)
        solved = not math.isfinite(backward_error) or backward_error <= self.tolerance
        self.value = max(self.value / 2.0, self.least) if solved else min(10.0 * self.value, MOST)


def as_damping(damping: Damping | float | None, default: Damping) -> Damping:
    """Return a strategy: a number is a fixed one.

    Raises
    ------
    TypeError
        If it is neither a strategy nor a real number.
    """
    if damping is None:
        return default
    return damping if isinstance(damping, Damping) else Fixed(finite_real(damping, "damping"))


def _positive(value: float, name: str) -> float:
    number = finite_real(value, name)
    if not number > 0.0:
        raise ValueError(f"expected {name} to be positive, got {value!r}: pass a positive number")
    return number


def _above_one(value: float, name: str) -> float:
    number = finite_real(value, name)
    if not number > 1.0:
        raise ValueError(f"expected {name} above 1, got {value!r}: pass a larger number")
    return number
