"""The factors that questions are put to: those of the solves where they answer, else the cheapest that do; each made once.

Everything but solves is answered in float64, whatever the precision of the problem.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, cast

from torch import Tensor

from linop_hess._memory import require
from linop_hess.errors import FactorizationError, UnsupportedModelError
from linop_hess.lq.accuracy import (
    GROWTH,
    GROWTH_LITTLE,
    GROWTH_MODERATE,
    MULTIPLIER,
    SMALLEST_DAMPING,
    UNSURE_PIVOT,
)
from linop_hess.lq.analysis import Analysis
from linop_hess.lq.methods.base import Factorization
from linop_hess.lq.methods.plan import METHODS, Plan
from linop_hess.lq.methods.riccati import RiccatiFactorization
from linop_hess.lq.pivots.hidden import strongest_coupling
from linop_hess.lq.pivots.inertia import Inertia
from linop_hess.lq.pivots.rules import BoundedGrowth


class Answering(Protocol):
    """Factors that answer questions."""

    method: str
    analysis: Analysis

    @property
    def damping(self) -> complex:
        """ε."""

    @property
    def growth(self) -> float:
        """By how much rounding may move eigenvalues, in terms of max(‖H‖, |ε|)."""

    def inertia(self, zero_below: float) -> Inertia:
        """Count the signs of the pivots."""

    def logabsdet(self) -> float:
        """Logarithm of |det(H + εI)|."""

    def positive(self, g: Tensor) -> Tensor:
        """L⁻ᵀ|D|⁻¹L⁻¹ g."""

    @property
    def noise(self) -> int:
        """Size of the white noise that `color` takes."""

    def color(self, xi: Tensor) -> Tensor:
        """Make white noise of covariance (H + εI)⁻¹."""


@dataclass(frozen=True)
class SegmentReport:
    """The pivots of one segment.

    Attributes
    ----------
    stage : int
        Its stage with controls, 0-based.
    pivots : int
        Number of directions eliminated here, hidden controls not counted.
    hidden : int
        Number of hidden controls, whose pivot is ε.
    delayed : int
        Number of directions carried to the segment before.
    smallest, largest : float
        Extremes of |θ| (0 where there is no pivot).
    """

    stage: int
    pivots: int
    hidden: int
    delayed: int
    smallest: float
    largest: float


class Factors:
    """Factors of H + εI in float64 for questions.

    Every method raises `SingularPivotError` if H + εI is singular to working precision, or ε = 0 and there are hidden controls, and
    `MemoryError` if the factors do not fit; `UnsupportedModelError` where a sum over batches lacks the stages that are asked about.

    Parameters
    ----------
    analysis : Analysis
        In any precision.
    damping : float
    plan : Plan
    solving : Factorization, optional
        Factors that solves use.

    Attributes
    ----------
    change : Change
        What is factored at that damping, in the variables that answers are read in; without a diagonal of the problem itself.
    analysis : Analysis
    damping : float
        Those of `change`.
    """

    def __init__(self, analysis: Analysis, damping: float, plan: Plan, solving: Factorization | None = None) -> None:
        self.change = analysis.in_float64.at(damping)
        self.analysis, self.damping, self._plan = self.change.analysis, self.change.damping.real, plan
        # Factors that only solve, such as those promoted from another precision, stand for no method here.
        known = solving is not None and solving.analysis is self.analysis and solving.answers > {"solve"}
        # Nor do those of a method that iterates, whose matrix is another.
        known = known and solving is not None and not solving.answers <= {"solve", "positive"}
        self._asked_for = None if solving is None else solving.method
        self._made: dict[str, Factorization] = {solving.method: solving} if known and solving is not None else {}
        self._riccati: dict[BoundedGrowth, RiccatiFactorization] = {}

    @cached_property
    def scale(self) -> float:
        """max(‖H‖, |ε|)."""
        return max(self.analysis.norm, abs(self.damping))

    @cached_property
    def hidden_growth(self) -> float:
        """What the elimination of all hidden controls adds to the cost-to-go, in terms of max(‖H‖, |ε|)."""
        largest = self.analysis.once(strongest_coupling)
        if not largest:
            return 0.0
        return largest / abs(self.damping) / self.scale if self.damping else math.inf

    @property
    def has_determinant(self) -> bool:
        """Whether the factors at work answer a determinant, and need no pivots looked at for it."""
        return any(
            "determinant" in made.answers and name not in ("riccati", "banded") for name, made in self._made.items()
        )

    def answering(self, question: str) -> Answering:
        """Return factors that answer "inertia", "determinant", "positive" or "sample": any that exist, else the cheapest."""
        for made in self._made.values():
            if question in made.answers:
                return self._certain(made)
        # In another precision the method of the solves comes first, then the fastest.
        able = [name for name in self._plan.by_time() if METHODS[name].exact and question in METHODS[name].answers]
        for name in sorted(able, key=lambda name: name != self._asked_for):
            if question in (made := self.made(name)).answers:
                return self._certain(made)
        return self.riccati(GROWTH)

    def made(self, name: str) -> Factorization:
        """Return the factors of a method, made once."""
        if name == "riccati":
            return self.riccati(GROWTH)
        if name not in self._made:
            self._require(name)
            self._made[name] = METHODS[name].factor(self.analysis, self.damping)
        return self._made[name]

    def _certain(self, made: Factorization) -> Answering:
        """Return factors whose signs may be believed: the pivots of those of a solve may have grown too much."""
        return self.riccati(GROWTH) if made.method == "riccati" else cast(Answering, made)

    def riccati(self, growth: float, multiplier: float = math.inf) -> RiccatiFactorization:
        """Return the block LDLᵀ with growth (in terms of max(‖H‖, |ε|)) and multipliers bounded, made once."""
        smallest = min(UNSURE_PIVOT * self.scale, 1e-2 * abs(self.damping) if self.damping else math.inf)
        rule = BoundedGrowth(growth * self.scale, multiplier, smallest)
        if rule not in self._riccati:
            solving = cast("RiccatiFactorization | None", self._made.get("riccati"))
            if solving is not None and solving.obeys(rule):
                self._riccati[rule] = solving
            else:
                self._require("riccati")
                self._riccati[rule] = RiccatiFactorization(self.analysis, self.damping, rule)
        return self._riccati[rule]

    def bounded(self) -> Answering:
        """Return factors for the positive definite operator of an indefinite matrix."""
        found = self.answering("positive")
        return found if found.method != "riccati" else self.riccati(GROWTH_MODERATE, MULTIPLIER)

    def for_entries(self, attempt: int) -> RiccatiFactorization:
        """Return factors for entries of the inverse: those of the solves if they grew little, else bounded; at attempt 1 tightly."""
        if attempt:
            return self.riccati(GROWTH_LITTLE)
        # What hidden controls add does little harm here, and entries are compared with certified solves.
        limit = GROWTH * max(1.0, self.hidden_growth)
        solving = cast("RiccatiFactorization | None", self._made.get("riccati"))
        if solving is not None and solving.largest_cost <= limit * self.scale:
            return solving
        return self.riccati(limit)

    def refuse_tiny_damping(self) -> None:
        """Raise where |ε| is so small that the signs of pivots are rounding which are ε by themselves.

        Raises
        ------
        FactorizationError
            With a damping that is large enough.
        """
        smallest = SMALLEST_DAMPING * self.analysis.norm
        if self.analysis.hidden and abs(self.damping) < 0.99 * smallest:
            enough, asked = self.change.to_asked(smallest), self.change.asked.real
            where = asked - self.damping  # with a penalty of the same curvature for all parameters, what cancels it
            size = f"{enough:.1e} in size" if where == 0.0 else f"{smallest:.1e} away from {where:.6g}"
            raise FactorizationError(
                f"at damping={asked:g} signs of pivots are lost in rounding; it must be at least {size}",
                damping=asked,
                suggested_damping=enough,
            )

    def report(self) -> list[SegmentReport]:
        """Return the pivots of each segment, in the order of the chain."""
        found, rows = self.riccati(GROWTH), []
        for (g, _), factor, theta in zip(self.analysis.pairs, found.factors, found.segment_pivots, strict=True):
            low, high = theta.abs().aminmax() if theta.numel() else (0.0, 0.0)
            hidden = self.analysis.groups[g].hidden - factor.segment.hidden.delayed
            rows.append(
                SegmentReport(factor.segment.stage, theta.numel(), hidden, factor.delayed, float(low), float(high))
            )
        return rows

    def _require(self, name: str) -> None:
        if why_not := self._plan.costs[name].why_not:
            raise UnsupportedModelError(f'method "{name}" cannot be used here: {why_not}')
        what = f'factors of method "{name}" for {self.analysis.problem.size} parameters'
        require(2 * self._plan.costs[name].nbytes, what, self._plan.available)  # beside those of the solves
