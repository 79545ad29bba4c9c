"""A solution of (H + εI)x = g, and what is known of how good it is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor

from linop_hess._display import Shown, Unpacked
from linop_hess.errors import FactorizationError
from linop_hess.lq.iterative.options import SketchOptions

Array = TypeVar("Array")


class _Shown(Shown, Unpacked):
    """How a `Solution` is shown and unpacked."""

    x: Any
    backward_error: float
    refinement_steps: int
    method: str
    iterations: int

    _order = ("x", "backward_error", "residual_norm", "refinement_steps", "method")

    def __str__(self) -> str:
        steps, what = self.refinement_steps, "refinement step"
        if self.iterations:
            steps, what = self.iterations, "iteration"
        return (
            f"Solution(x of shape {tuple(self.x.shape)}, backward error {self.backward_error:.1e}, "
            f"{steps} {what}{'s' * (steps != 1)}, by {self.method})"
        )


@dataclass(frozen=True, repr=False)
class Solution(_Shown, Generic[Array]):
    """A solution of (H + εI)x = g and what is known of its quality.

    It can be unpacked: ``x, backward_error, residual_norm, refinement_steps, method = inverse.solve(g)``.

    Attributes
    ----------
    x : ndarray or Tensor, shape (N,) or (N, k)
        As the right-hand side came.
    backward_error : float
        max over columns of ‖g − (H+εI)x‖ / (‖H+εI‖‖x‖ + ‖g‖): how much H and g would have to be changed, relatively, for x
        to be exact. ‖H+εI‖ is estimated from below, so this errs on the large side. It tells as much of x as the condition number
        of H + εI allows: where that exceeds 1/eps, nothing, and `structured_error` is what x is judged by.
    residual_norm : float
        max over columns of ‖g − (H+εI)x‖.
    refinement_steps : int
    method : str
        The method whose factors gave x.
    structured_error : float
        Where H + εI as a matrix is singular to working precision although its stages determine x, as in chains whose states grow:
        max over columns of the part of ‖x‖ by which rounding in the blocks of the stages moves x. NaN where it was not needed.
    iterations : int
        Of GMRES, where the method iterates, the most that any column took; 0 where its factors are those of H + εI.
    """

    x: Array
    backward_error: float
    residual_norm: float
    refinement_steps: int
    method: str
    structured_error: float = math.nan
    iterations: int = 0


@dataclass(frozen=True)
class Found:
    """A `Solution` for columns of size one, with the residual of each."""

    x: Tensor
    backward_error: float
    residuals: Tensor
    steps: int
    method: str
    structured_error: float = math.nan
    iterations: int = 0


def not_converged(
    damping: complex, tolerance: float, found: Found, sizes: Tensor, sketch: SketchOptions | None
) -> FactorizationError:
    """What to raise where GMRES does not reach a backward error; `sizes` of the right-hand sides, `sketch` what was asked of one."""
    remedy = 'a larger damping, or method "dense" or "sketched"'
    if found.method == "sketched":
        remedy = (sketch or SketchOptions()).remedies
    residual = float((found.residuals / sizes).max())
    return FactorizationError(
        f"H + damping·I with damping={damping:g} could not be solved to a backward error of {tolerance:.0e} by method "
        f"{found.method!r}: after {found.iterations} iterations of GMRES the relative residual is {residual:.1e}, the backward error "
        f"{found.backward_error:.1e}; try {remedy}",
        damping=damping,
    )
