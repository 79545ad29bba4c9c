"""What proves that a step minimizes its model: three conditions, and the bound that follows from them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from linop_hess._display import Shown
from linop_hess.lq.accuracy import CONDITION_HOLDS
from linop_hess.lq.pivots.inertia import Inertia


@dataclass(frozen=True, repr=False)
class Certificate(Shown):
    """Conditions under which a step s is a global minimizer of its model (Moré & Sorensen 1983; Nesterov & Polyak 2006).

    Attributes
    ----------
    multiplier : float
        λ ≥ 0.
    inertia : Inertia or None
        Of H + λI, from its factors; None: rounding leaves it open.
    stationarity : float
        ‖g + Hs + λs‖ / ((‖H‖ + λ)‖s‖ + ‖g‖), a backward error; with λ = σ‖s‖ for the cubic model.
    complementarity : float
        How far the step is from the boundary, relatively, |‖s‖ − radius| / radius, or |σ‖s‖ − λ| / λ; where λ = 0, by how much it is
        outside.
    gap : float
        No step allowed has a model value lower than this one's by more than this. Follows from the three conditions.
    """

    multiplier: float
    inertia: Inertia | None
    stationarity: float
    complementarity: float
    gap: float

    @property
    def convex(self) -> bool:
        """Whether H + λI has no negative eigenvalue, by inertia."""
        return self.inertia is not None and self.inertia.negative == 0

    @property
    def holds(self) -> bool:
        """Whether all conditions hold to 1e-10."""
        return self.convex and self.stationarity <= CONDITION_HOLDS and self.complementarity <= CONDITION_HOLDS

    def __str__(self) -> str:
        """Return the conditions, a line each."""
        head, *rows = self._cells()
        width = max(len(row[0]) for row in rows)
        return "\n".join(f"{name:<{width}}  {value:>10}  {verdict}".rstrip() for name, value, verdict in rows)

    def _cells(self) -> list[tuple[str, str, str]]:
        negative = "open" if self.inertia is None else f"{self.inertia.negative} neg."
        return [
            ("condition", "value", ""),
            (f"H + {self.multiplier:.6g}·I ⪰ 0", negative, _verdict(self.convex)),
            ("stationarity", f"{self.stationarity:.1e}", _verdict(self.stationarity <= CONDITION_HOLDS)),
            ("complementarity", f"{self.complementarity:.1e}", _verdict(self.complementarity <= CONDITION_HOLDS)),
            ("gap at most", f"{self.gap:.1e}", ""),
        ]


def _verdict(holds: bool) -> str:
    return "holds" if holds else "does not hold"


def gap_in_region(residual: float, s: np.ndarray, lam: float, radius: float) -> float:
    """Bound of m(s) − m(p) for all ‖p‖ ≤ radius where H + λI ⪰ 0.

    m(p) ≥ m(s) + rᵀ(p − s) + ½λ(‖s‖² − ‖p‖²), with the residual r = g + (H + λI)s.
    """
    size = float(np.linalg.norm(s))
    return residual * (size + radius) + 0.5 * lam * max(0.0, (radius - size) * (radius + size))


def gap_of_cubic(residual: float, s: np.ndarray, lam: float, sigma: float) -> float:
    """Bound of m(s) − m(p) for all p where H + λI ⪰ 0, for the model with σ/3‖p‖³ and r = g + (H + σ‖s‖I)s.

    m(p) ≥ m(s) + rᵀ(p − s) − ½δ‖p − s‖² + σ/6 (‖p‖ − ‖s‖)²(2‖p‖ + ‖s‖), δ = max(0, λ − σ‖s‖): the first bound is for ‖p‖ ≤ 2‖s‖,
    the second for longer p, where the last term is at least σ‖p‖³/12.
    """
    size = float(np.linalg.norm(s))
    short = max(0.0, lam - sigma * size)
    near = 3.0 * size * residual + 4.5 * short * size**2
    far = residual * (12.0 * residual / sigma) ** 0.5 + 121.5 * short**3 / sigma**2
    return max(near, far)
