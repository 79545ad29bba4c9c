"""Is this a minimum? Gradient, inertia at zero and around it, flat directions, and how well each is known."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from linop_hess._display import Shown
from linop_hess._validate import finite_real
from linop_hess.errors import FactorizationError
from linop_hess.lq.analysis import Analysis
from linop_hess.lq.inverse.counting import count_up_to
from linop_hess.lq.inverse.inertia import inertia
from linop_hess.lq.pivots.inertia import Inertia
from linop_hess.operators.inverse import HessianInverse
from linop_hess.spectrum.extremes import NULL, analysis_of, extreme_eigenvalues
from linop_hess.trust_region.api import gradient_of

Verdict = Literal[
    "strict minimum", "no descent, flat directions undecided", "saddle point", "maximum", "not stationary"
]

_MEANING: dict[str, str] = {
    "strict minimum": "every direction curves up by more than the edge",
    "no descent, flat directions undecided": "second derivatives cannot tell more: along flat directions higher ones decide",
    "saddle point": "there are directions of descent by negative curvature",
    "maximum": "every direction curves down by more than the edge",
    "not stationary": "the gradient is above its tolerance, so the inertia is that of a point on the way",
}


@dataclass(frozen=True, repr=False)
class MinimumReport(Shown):
    """What second derivatives say of a point. Made by `certify_minimum`.

    Attributes
    ----------
    verdict : str
        "strict minimum", "no descent, flat directions undecided", "saddle point", "maximum" or "not stationary".
    gradient_norm, gradient_tolerance : float
        In units of the loss by a parameter.
    edge : float
        Curvature up to this size counts as flat.
    around : Inertia
        Numbers of eigenvalues below −edge, within ±edge, and above edge: from the inertia of H ± edge·I.
    at_zero : Inertia or None
        Of H itself; None: it is singular to working precision, or rounding leaves it open.
    lowest, highest, norm : float
        Ends of the spectrum to 1e-8‖H‖, and ‖H‖.
    predicted_decrease, step_length : float
        Of the Newton step with H + edge·I, ½gᵀ(H + edge·I)⁻¹g and its length: how far the minimum of the model is. NaN where
        that matrix is not positive definite or no method solves with it.
    backward_error : float
        Of that solve; NaN where there is none.
    """

    verdict: Verdict
    gradient_norm: float
    gradient_tolerance: float
    edge: float
    around: Inertia
    at_zero: Inertia | None
    lowest: float
    highest: float
    norm: float
    predicted_decrease: float
    step_length: float
    backward_error: float

    @property
    def is_minimum(self) -> bool:
        """Whether the point is a strict local minimum, to the gradient's tolerance."""
        return self.verdict == "strict minimum"

    @property
    def flat(self) -> int:
        """Number of flat directions."""
        return self.around.zero

    def __str__(self) -> str:
        """Return the report as a table."""
        _, *rows = self._cells()
        width = max(len(name) for name, _ in rows)
        return "\n".join([*self._notes(), *(f"  {name:<{width}}  {value}" for name, value in rows)])

    def _cells(self) -> list[tuple[str, str]]:
        below, flat, above = self.around
        zero = "singular or open" if self.at_zero is None else "{} negative, {} zero, {} positive".format(*self.at_zero)
        return [
            ("", "value"),
            ("gradient norm", f"{self.gradient_norm:.3e} (tolerance {self.gradient_tolerance:.1e})"),
            (f"eigenvalues below {-self.edge:.1e}", str(below)),
            (f"within ±{self.edge:.1e}, flat", str(flat)),
            (f"above {self.edge:.1e}", str(above)),
            ("inertia of H", zero),
            ("spectrum", f"[{self.lowest:.6e}, {self.highest:.6e}], to {1e-8 * self.norm:.1e}"),
            ("Newton step", f"falls by {self.predicted_decrease:.3e}, length {self.step_length:.3e}"),
            ("backward error of it", f"{self.backward_error:.1e}"),
        ]

    def _notes(self) -> list[str]:
        return [f"{self.verdict}: {_MEANING[self.verdict]}"]


def certify_minimum(lin: Any, *, gradient: Any = None, gtol: float = 1e-8, flat: float = NULL) -> MinimumReport:
    """Say whether a point is a minimum, to what tolerance, and how many directions are flat.

    Parameters
    ----------
    lin : Linearization or ChainCurvature
        A linearization, or a curvature with a gradient.
    gradient : array_like or Tensor, shape (N,), optional
        By default that of the linearization.
    gtol : float
        The point is stationary where ‖g‖ is at most this.
    flat : float
        Eigenvalues up to this times ‖H‖ in size count as flat; an eigenvalue that is an edge to rounding is moved by 1e-7‖H‖.

    Returns
    -------
    MinimumReport

    Raises
    ------
    ValueError, TypeError
        If `gtol` is negative, `flat` not between 0 and 1, or there is no gradient of shape (N,).
    FactorizationError
        If rounding leaves it open how many eigenvalues lie beyond an edge.

    Examples
    --------
    >>> import torch, linop_hess as lh
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1)).double()
    >>> _ = torch.nn.init.zeros_(model[0].weight), torch.nn.init.zeros_(model[0].bias)
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]).double()
    >>> report = lh.certify_minimum(lh.linearize(model, torch.nn.functional.mse_loss, x, torch.zeros(3, 1).double()))
    >>> report.verdict, report.flat
    ('strict minimum', 0)
    """
    gtol, flat = finite_real(gtol, "gtol"), finite_real(flat, "flat")
    if gtol < 0.0 or not 0.0 < flat < 1.0:
        raise ValueError(f"gtol must be at least 0 and flat between 0 and 1, got gtol={gtol!r}, flat={flat!r}")
    analysis, g = analysis_of(lin), gradient_of(lin, gradient)
    size, slope = g.size, float(np.linalg.norm(g))
    with torch.no_grad():
        edge = flat * analysis.norm
        below, up_to = (
            (0, size) if analysis.norm == 0.0 else (count_up_to(analysis, -edge), count_up_to(analysis, edge))
        )
        around = Inertia(below, up_to - below, size - up_to)
        at_zero: Inertia | None = None
        with suppress(FactorizationError):
            at_zero = inertia(analysis, 0.0)
    lowest, highest = extreme_eigenvalues(analysis)
    decrease, length, error = _newton(analysis, edge, g) if not below and edge else (np.nan, np.nan, np.nan)
    return MinimumReport(
        verdict=_verdict(slope <= gtol, around),
        gradient_norm=slope,
        gradient_tolerance=gtol,
        edge=edge,
        around=around,
        at_zero=at_zero,
        lowest=lowest,
        highest=highest,
        norm=analysis.norm,
        predicted_decrease=decrease,
        step_length=length,
        backward_error=error,
    )


def _newton(analysis: Analysis, edge: float, g: np.ndarray) -> tuple[float, float, float]:
    """Decrease, length and backward error of the Newton step with H + edge·I; NaN where it is not positive definite."""
    with suppress(FactorizationError):
        inverse = HessianInverse(analysis, edge)
        if inverse.is_positive_definite:
            solution = inverse.solve(g)
            return (
                0.5 * float(g @ solution.x),
                float(np.linalg.norm(solution.x)),
                float(np.max(solution.backward_error)),
            )
    return np.nan, np.nan, np.nan


def _verdict(stationary: bool, around: Inertia) -> Verdict:
    if not stationary:
        return "not stationary"
    if around.negative:
        return "saddle point" if around.zero or around.positive else "maximum"
    return "no descent, flat directions undecided" if around.zero else "strict minimum"
