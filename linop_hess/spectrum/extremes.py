"""The ends of the spectrum, its null space, and the condition number."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from scipy.sparse.linalg import ArpackError, LinearOperator
from scipy.sparse.linalg import eigsh as arpack

from linop_hess.errors import FactorizationError
from linop_hess.lq.analysis import Analysis
from linop_hess.lq.inverse.counting import count_up_to
from linop_hess.lq.inverse.inertia import inertia
from linop_hess.operators.dense import to_dense
from linop_hess.operators.inverse import HessianInverse
from linop_hess.operators.pieces import ChainHessian

# Eigenvalues up to this times ‖H‖ in size count as zero.
NULL = 1e-7

# Up to this order LAPACK's dense solver is as fast.
_SMALL = 100

# ARPACK's restarts before Lanczos on H is given up, and how close to the end the shift then is, in terms of ‖H‖.
_RESTARTS = 15
_CLOSE = 1e-3


class HasSpectrum(Protocol):
    """A `Linearization`, its `H` or its `gauss_newton()`."""

    @property
    def analysis(self) -> Analysis:
        """Of the LQ problem whose H is meant."""
        ...


def nullity(analysis: Analysis) -> int:
    """Count the eigenvalues up to `NULL`·‖H‖ in size."""
    if analysis.norm == 0.0:
        return analysis.problem.size
    edge = NULL * analysis.norm
    return count_up_to(analysis, edge) - count_up_to(analysis, -edge)


def analysis_of(lin: Any) -> Analysis:
    """Return the analysis behind a linearization, in float64.

    Raises
    ------
    TypeError
        If there is none.
    """
    analysis = getattr(lin, "analysis", None)
    if not isinstance(analysis, Analysis):
        raise TypeError(
            f"expected a linearization, its H or its gauss_newton(), got {type(lin).__name__}: make one by linearize"
        )
    return analysis.in_float64


def extreme_eigenvalues(analysis: Analysis, rtol: float = 1e-8) -> tuple[float, float]:
    """Smallest and largest eigenvalue of H, to rtol·‖H‖; that none lies outside is verified by inertia."""
    analysis = analysis.in_float64
    H = ChainHessian(analysis.problem)
    if analysis.norm == 0.0:
        return 0.0, 0.0
    if analysis.problem.size <= _SMALL:
        dense = to_dense(H)
        values = np.linalg.eigvalsh((dense + dense.T) / 2)
        return float(values[0]), float(values[-1])
    return _extreme(analysis, H, "SA", rtol), _extreme(analysis, H, "LA", rtol)


def condition_number(analysis: Analysis, damping: float, rtol: float = 1e-6) -> float:
    """‖H + εI‖·‖(H + εI)⁻¹‖ by Lanczos on both, or inertia where that takes long, to rtol."""
    analysis = analysis.in_float64
    low, high = extreme_eigenvalues(analysis, rtol)
    largest = max(abs(low + damping), abs(high + damping))
    if analysis.norm == 0.0:
        return 1.0 if damping else np.inf
    inverse = HessianInverse(analysis, damping)
    if analysis.problem.size <= _SMALL:
        dense = to_dense(inverse)
        return largest * float(np.abs(np.linalg.eigvalsh((dense + dense.T) / 2)).max())
    try:
        return abs(_end(_Scaled(inverse, largest), "LM", rtol, 300))
    except (ArpackError, ArithmeticError):
        return largest / _nearest(analysis, damping, largest, rtol)


def _nearest(analysis: Analysis, damping: float, largest: float, rtol: float) -> float:
    """Smallest |λ + ε|, by bisection on the number of eigenvalues within reach of −ε."""
    within, without = largest, 0.0
    while within - without > rtol * within and within > 1e-15 * largest:
        reach = (within * without) ** 0.5 if without else within / 1e3
        count = negatives(analysis, reach - damping) - negatives(analysis, -reach - damping)
        within, without = (reach, without) if count else (within, reach)
    return within


def negatives(analysis: Analysis, x: float) -> int:
    """Count the eigenvalues below x, one of them within rounding of x on either side."""
    try:
        return inertia(analysis, -x).negative
    except FactorizationError:
        return inertia(analysis, -x - 1e-12 * analysis.norm).negative


class _Scaled(LinearOperator):
    """A operator times a number: ARPACK takes what is smaller than 4e-11 for zero."""

    def __init__(self, A: LinearOperator, factor: float) -> None:
        super().__init__(np.dtype(np.float64), A.shape)
        self._A, self._factor = A, factor

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        return self._factor * (self._A @ x)


def _extreme(analysis: Analysis, H: LinearOperator, which: str, rtol: float) -> float:
    """One end of the spectrum.

    By Lanczos on H; where that takes long or ends at an inner eigenvalue, by shift-invert just outside, and where that does too, by
    bisection on inertia.
    """
    norm = analysis.norm
    try:
        value = norm * _end(_Scaled(H, 1 / norm), which, rtol, _RESTARTS)
        if not _beyond(analysis, which, value, rtol):
            return value
    except (ArpackError, ArithmeticError):
        pass
    sign = -1.0 if which == "SA" else 1.0
    outer, inner = 1.5 * norm, -1.5 * norm  # in the direction of the end
    while _outside(analysis, which, sign * outer):
        outer *= 2.0

    def bracket(width: float) -> None:
        nonlocal outer, inner
        while outer - inner > width:
            middle = (outer + inner) / 2
            outer, inner = (outer, middle) if _outside(analysis, which, sign * middle) else (middle, inner)

    bracket(_CLOSE * norm)
    shift = sign * (outer + _CLOSE * norm)
    try:
        value = shift + norm / _end(_Scaled(HessianInverse(analysis, -shift), norm), "LM", rtol / _CLOSE, 100)
        if not _beyond(analysis, which, value, rtol):
            return value
    except (ArpackError, ArithmeticError, FactorizationError):
        pass
    bracket(max(rtol, 1e-12) * norm)
    return sign * (outer + inner) / 2


def _outside(analysis: Analysis, which: str, x: float) -> int:
    """Count the eigenvalues below ("SA") or above ("LA") x."""
    below = negatives(analysis, x)
    return below if which == "SA" else analysis.problem.size - below


def _beyond(analysis: Analysis, which: str, value: float, rtol: float) -> int:
    """Count the eigenvalues farther out than a value known to rtol·‖H‖."""
    margin = max(2 * rtol, 1e-11) * analysis.norm
    return _outside(analysis, which, value - margin if which == "SA" else value + margin)


def _end(A: LinearOperator, which: str, rtol: float, restarts: int) -> float:
    start = np.random.default_rng(0).standard_normal(A.shape[0])
    values, vectors = arpack(A, k=1, which=which, tol=rtol / 10, v0=start, maxiter=restarts)
    value, vector = float(values[0]), vectors[:, 0]
    residual = float(np.linalg.norm(A @ vector - value * vector))
    scale = float(np.linalg.norm(A @ start) / np.linalg.norm(start))
    if residual > rtol * max(abs(value), scale):
        raise ArithmeticError(f"Lanczos left a residual of {residual:.1e} at the eigenvalue {value:g}")
    return value
