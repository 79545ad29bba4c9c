"""Which pivots may be divided by: a rule for solves, and one for all else."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from linop_hess.lq.accuracy import PIVOT_DELAY, PIVOT_SMALL, PIVOT_SUSPECT
from linop_hess.lq.pivots.bunch_kaufman import packed_pivots


class PivotRule(Protocol):
    """Which pivots may be divided by; couplings to the state are in its units."""

    def coupling_up_to(self, damping: complex) -> float:
        """The largest coupling to the state of a hidden direction, whose pivot is ε, that may be eliminated."""

    @property
    def is_orthogonal(self) -> bool:
        """Whether T must be orthogonal at the last block too, where everything is eliminated."""

    def accepts(self, theta: Tensor, white: Tensor, units: Tensor) -> bool:
        """Whether all of T θ Tᵀ may be eliminated, `white` being T⁻¹E and `units` those of the state, (n, 1)."""

    def accepts_packed(self, packed: Tensor, interchanges: Tensor, E: Tensor, gain: Tensor) -> bool:
        """The same for each of K blocks: LAPACK's factors (K, r, r), (K, r), and E, S⁻¹E, (K, r, n)."""

    def keeps(self, values: Tensor, Y: Tensor) -> Tensor:
        """Which eigenvectors to eliminate, by their eigenvalues, and their products with E, (r, n)."""


@dataclass(frozen=True)
class SmallPivots:
    """For solves: pivots far below |ε| are delayed. What digits a pivot near |ε| costs, refinement restores."""

    damping: complex
    is_orthogonal: bool = False

    def coupling_up_to(self, damping: complex) -> float:
        return math.inf

    def accepts(self, theta: Tensor, white: Tensor, units: Tensor) -> bool:
        smallest, largest = extremes(theta)
        return smallest > self._small(PIVOT_SUSPECT, largest)

    def accepts_packed(self, packed: Tensor, interchanges: Tensor, E: Tensor, gain: Tensor) -> bool:
        if not packed.shape[1]:
            return True
        low, high = packed_pivots(packed, interchanges).abs().aminmax(dim=1)
        return all(a > self._small(PIVOT_SUSPECT, b) for a, b in zip(low.tolist(), high.tolist(), strict=True))

    def keeps(self, values: Tensor, Y: Tensor) -> Tensor:
        return values.abs() > self._small(PIVOT_DELAY, extremes(values)[1])

    def _small(self, fraction: float, largest: float) -> float:
        """What counts as a small pivot among those of a stage."""
        small = PIVOT_SMALL * largest
        return min(small, fraction * abs(self.damping)) if self.damping else PIVOT_SMALL * small


@dataclass(frozen=True)
class BoundedGrowth:
    """For all else: pivots are delayed that make the cost-to-go, or a multiplier, grow beyond its limit, or are up to `smallest`."""

    limit: float
    multiplier: float = math.inf
    smallest: float = 0.0

    @property
    def is_orthogonal(self) -> bool:
        # The multipliers of Bunch-Kaufman are not bounded.
        return self.multiplier < math.inf

    def coupling_up_to(self, damping: complex) -> float:
        return min(math.sqrt(self.limit * abs(damping)), self.multiplier * abs(damping))

    def accepts(self, theta: Tensor, white: Tensor, units: Tensor) -> bool:
        if not extremes(theta)[0] > self.smallest:
            return False
        if not white.numel():
            return True
        size, coupling = theta.abs()[:, None], white.abs() * units.mT
        multipliers = coupling / size
        grown = float(coupling.mul_(multipliers).sum(0).max())
        return grown <= self.limit and float(multipliers.max()) <= self.multiplier

    def accepts_packed(self, packed: Tensor, interchanges: Tensor, E: Tensor, gain: Tensor) -> bool:
        if not E.numel():
            return True
        growth = float((E.abs() * gain.abs()).sum(1).max())
        if not (growth <= self.limit and float(gain.abs().max()) <= self.multiplier):
            return False
        return not self.smallest or float(packed_pivots(packed, interchanges).abs().min()) > self.smallest

    def keeps(self, values: Tensor, Y: Tensor) -> Tensor:
        size = values.abs()
        coupling = Y.norm(dim=1)
        return (coupling.square() <= self.limit * size) & (coupling <= self.multiplier * size) & (size > self.smallest)


def extremes(theta: Tensor) -> tuple[float, float]:
    """Smallest and largest |θ|; 1 where there is none."""
    if not theta.numel():
        return 1.0, 1.0
    low, high = torch.aminmax(theta.abs())
    return float(low), float(high)
