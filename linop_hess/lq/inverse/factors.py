"""What the block LDLᵀ factors of H + εI know besides solutions: inertia, determinant, a positive operator, samples.

The recursion of method "riccati" is a congruence H + εI = L D Lᵀ with D the pivots θ of all segments and one ε for each hidden control, and
|det L| = 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from linop_hess.errors import FactorizationError
from linop_hess.lq.inverse import selected
from linop_hess.lq.methods import riccati
from linop_hess.lq.methods.stage_factor import PackedStep, Step
from linop_hess.lq.pivots.bunch_kaufman import packed_pivots
from linop_hess.lq.pivots.inertia import UNSURE, ZERO, Inertia, hidden_inertia, inertia_of
from linop_hess.lq.pivots.rules import BoundedGrowth
from linop_hess.lq.problem import Problem
from linop_hess.lq.segments import Loads, loads
from linop_hess.lq.value.dense import CostToGo

# What small pivots may make of the cost-to-go, in terms of ‖H‖: rounding in it then moves eigenvalues by about 1e-13‖H‖.
GROWTH = 300.0

# For the most careful diagonal of the inverse.
LITTLE_GROWTH = 0.1

# For the positive definite operator of an indefinite matrix, with the largest multiplier of a pivot: what is larger makes that operator
# large, and MINRES lose digits with it.
MODERATE_GROWTH = 10.0
MULTIPLIER = 2.0

# Below this times ‖H‖ rounding in the pivots that are ε of themselves makes their signs uncertain.
SMALLEST = 1e-12


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


class BlockLDL:
    """H + εI = L D Lᵀ along the chain, in float64; factored when first needed.

    Every method raises `SingularPivotError` if H + εI is singular to working precision, or ε = 0 and there are hidden controls.

    Parameters
    ----------
    problem : Problem
    damping : float
    factors : RiccatiFactorization, optional
        Factors of the same at hand, used where their pivots will do.
    """

    def __init__(self, problem: Problem, damping: float, factors: riccati.RiccatiFactorization | None = None) -> None:
        self.problem = self._given = problem.in_float64
        self.damping = damping
        self._at_hand = factors if factors is not None and factors.problem is self._given else None
        self._norm = max(self.problem.norm, abs(damping))
        self._smallest = min(UNSURE * self._norm, 1e-2 * abs(damping) if damping else math.inf)
        self._hidden_growth = _hidden_growth(self.problem, damping)
        self.problem = self.split(GROWTH)
        starts = np.flatnonzero(self.problem.p)
        hidden = np.zeros(starts.size, dtype=np.int64)
        for group in self.problem.segment_groups:
            hidden[group.segments] = group.split.complement
        self._starts, self._hidden = starts, hidden

    @cached_property
    def _extended(self) -> Problem:
        return self._given.with_extended_splits()

    def split(self, growth: float) -> Problem:
        """Return the problem, with splits without coupling where the hidden controls would make more growth than that."""
        return self._given if self._hidden_growth <= growth * self._norm else self._extended

    def _factored(self, problem: Problem, limit: float) -> riccati.RiccatiFactorization:
        """Return factors that grow no more than that: those at hand, if they will do."""
        rule = BoundedGrowth(limit, smallest=self._smallest)
        at_hand = self._at_hand if problem is self._given else None
        if at_hand is not None and at_hand.obeys(rule):
            return at_hand
        return riccati.RiccatiFactorization(problem, self.damping, rule=rule)

    @cached_property
    def _factors(self) -> riccati.RiccatiFactorization:
        return self._factored(self.problem, GROWTH * self._norm)

    @cached_property
    def _theta(self) -> list[Tensor]:
        """The pivots of each segment."""
        return _pivots(self._factors.steps)

    @cached_property
    def _whitened(self) -> riccati.RiccatiFactorization:
        return self._factors.whitened()

    @cached_property
    def _bounded(self) -> riccati.RiccatiFactorization:
        """Factors with bounded multipliers."""
        rule = BoundedGrowth(MODERATE_GROWTH * self._norm, MULTIPLIER, self._smallest)
        return riccati.RiccatiFactorization(self.split(MODERATE_GROWTH), self.damping, rule=rule).whitened()

    attempts = 2
    """How many ways `diagonal` and `blocks` know, each more accurate than the one before, and slower."""

    def _selecting(self, attempt: int) -> tuple[riccati.RiccatiFactorization, list[CostToGo]]:
        """Factors for selected entries of the inverse, and their costs-to-go."""
        if attempt > 0:
            factors = self._factored(self.split(LITTLE_GROWTH), LITTLE_GROWTH * self._norm)
            return factors, factors.costs()
        # What hidden controls add seldom does harm, and entries are compared with certified solves.
        limit = GROWTH * max(self._norm, self._hidden_growth)
        if self._at_hand is not None:
            costs = self._at_hand.costs()
            if _largest(costs) <= limit:
                return self._at_hand, costs
        factors = self._factors if self.problem is self._given else self._factored(self._given, limit)
        return factors, factors.costs()

    def factor(self) -> None:
        """Factor now, whatever is asked for next."""
        assert self._factors is not None

    def inertia(self, zero_below: float = ZERO) -> Inertia:
        """Count signs of the pivots; those below `zero_below` times max(‖H‖, |ε|) count as zero.

        Raises
        ------
        FactorizationError
            If |ε| is below `SMALLEST`·‖H‖ and there are hidden controls.
        """
        self._refuse_tiny_damping()
        return inertia_of(self._theta, zero_below * self._norm) + hidden_inertia(int(self._hidden.sum()), self.damping)

    @cached_property
    def doubt(self) -> float:
        """By how much rounding in the costs-to-go may move an eigenvalue, in terms of max(‖H‖, |ε|).

        Units of single states do not see states that move together: what the cost of their differences is may be far above ‖H‖.
        """
        largest = _largest(self._factors.costs())
        return 10.0 * float(np.finfo(float).eps) * largest / self._norm if self._norm else 0.0

    def logabsdet(self) -> float:
        """Logarithm of |det(H + εI)|; errors as of `inertia`."""
        self._refuse_tiny_damping()
        theta = torch.cat(self._theta) if self._theta else torch.zeros(0)
        hidden = int(self._hidden.sum())
        return math.fsum(theta.abs().log().tolist()) + (hidden * math.log(abs(self.damping)) if hidden else 0.0)

    def _refuse_tiny_damping(self) -> None:
        smallest = SMALLEST * self.problem.norm
        if self._hidden.any() and abs(self.damping) < 0.99 * smallest:
            raise FactorizationError(
                f"at damping={self.damping:g} signs of pivots are lost in rounding; it must be at least {smallest:.1e} in size",
                damping=self.damping,
                suggested_damping=smallest,
            )

    def report(self) -> list[SegmentReport]:
        """Return the pivots of each segment in the order of the chain."""
        rows = []
        for stage, hidden, step, theta in zip(
            self._starts, self._hidden, self._factors.steps, self._theta, strict=True
        ):
            low, high = theta.abs().aminmax() if theta.numel() else (0.0, 0.0)
            rows.append(SegmentReport(int(stage), theta.numel(), int(hidden), step.delayed, float(low), float(high)))
        return rows

    def positive(self, g: Tensor) -> Tensor:
        """(L|D|Lᵀ)⁻¹ g for g of shape (N, k): symmetric positive definite, (H + εI)⁻¹ where that is."""
        dtype = g.dtype
        load = self._loads(self._bounded.problem, g.to(torch.float64))
        held = [
            part * theta.sign()[:, None]
            for part, theta in zip(self._bounded.backward(load), _pivots(self._bounded.steps), strict=True)
        ]
        sign = math.copysign(1.0, self.damping)
        return self._bounded.forward([_hidden_scaled(part, sign) for part in load], held).to(dtype)

    @property
    def noise(self) -> int:
        """Size of the white noise that `color` takes: N."""
        return self.problem.size

    def color(self, xi: Tensor) -> Tensor:
        """L⁻ᵀ D^(−½) ξ for ξ of shape (N, k), of covariance (H + εI)⁻¹ where ξ is white.

        Raises
        ------
        FactorizationError
            If a pivot is not positive, be it by rounding.
        """
        theta = _pivots(self._whitened.steps)
        if any(part.numel() and not float(part.min()) > 0.0 for part in theta):
            raise FactorizationError(
                f"at damping={self.damping:g} H + damping·I is so close to singular that rounding made a pivot negative; use a larger one",
                damping=self.damping,
            )
        load = self._loads(self.problem, xi.to(torch.float64))
        # As many directions are eliminated as there are visible controls, though delays move them between segments.
        white = torch.cat(self._factors.in_order(load)).split([part.numel() for part in theta])
        held = [part * pivots.sqrt()[:, None] for part, pivots in zip(white, theta, strict=True)]
        root = math.sqrt(abs(self.damping))
        return self._whitened.forward([_hidden_scaled(part, root) for part in load], held).to(xi.dtype)

    def diagonal(self, attempt: int = 0) -> Tensor:
        """Diagonal of (H + εI)⁻¹, shape (N,)."""
        return selected.diagonal(*self._selecting(attempt))

    def blocks(self, attempt: int = 0) -> list[Tensor]:
        """Diagonal blocks of (H + εI)⁻¹, one per stage with controls."""
        return selected.blocks(*self._selecting(attempt))

    def _loads(self, problem: Problem, g: Tensor) -> list[Loads]:
        return [loads(group, g, self.damping) for group in problem.segment_groups]

    @property
    def nbytes(self) -> int:
        """Bytes held by the factors."""
        return self._factors.nbytes


def _hidden_growth(problem: Problem, damping: float) -> float:
    """What the elimination of the hidden controls adds to the cost-to-go."""
    largest = 0.0
    for group in problem.segment_groups:
        gram = group.split.B_complement_gram() if group.split.coupled and group.n_in else None
        if gram is not None:
            in_units = gram.diagonal(dim1=1, dim2=2) * group.scale_in[:, :, 0].square()
            largest = max(largest, float(in_units.max()))
    return largest / abs(damping) if damping else math.inf * (largest > 0.0)


def _largest(costs: Sequence[CostToGo]) -> float:
    """Largest |entry| of any V."""
    return max((float(cost.V.abs().max()) for cost in costs if cost.V.numel()), default=0.0)


def _hidden_scaled(load: Loads, factor: float) -> Loads:
    return load if load.hidden is None else replace(load, hidden=load.hidden * factor)


def _pivots(steps: Sequence[Step]) -> list[Tensor]:
    packed = [step for step in steps if isinstance(step, PackedStep)]
    if len(packed) < len(steps):
        return [step.whitened().pivots.theta for step in steps]
    theta: dict[int, Tensor] = {}
    for r in {step.packed.shape[0] for step in packed}:
        mine = [k for k, step in enumerate(packed) if step.packed.shape[0] == r]
        rows = packed_pivots(
            torch.stack([packed[k].packed for k in mine]), torch.stack([packed[k].interchanges for k in mine])
        )
        theta.update(zip(mine, rows.unbind(), strict=True))
    return [theta[k] for k in range(len(packed))]
