"""The ends of the spectrum, and the condition number."""

from __future__ import annotations

import numpy as np
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator
from scipy.sparse.linalg import eigsh as arpack

from linop_hess.lq.convexity import NUDGE, count_up_to
from linop_hess.lq.problem import Problem
from linop_hess.operators.dense import to_dense
from linop_hess.operators.inverse import HessianInverse
from linop_hess.operators.pieces import ChainHessian

# Up to this order LAPACK's dense solver is as fast.
_SMALL = 100

# ARPACK's restarts before Lanczos on H is given up, and how close to the end the shift then is, in terms of ‖H‖.
_RESTARTS = 15
_CLOSE = 1e-3


def extreme_eigenvalues(problem: Problem, rtol: float = 1e-8) -> tuple[float, float]:
    """Smallest and largest eigenvalue of H, by Lanczos, to rtol·‖H‖; that none lies outside is verified by inertia."""
    problem = problem.in_float64
    H = ChainHessian(problem)
    if problem.norm == 0.0:
        return 0.0, 0.0
    if problem.size <= _SMALL:
        dense = to_dense(H)
        values = np.linalg.eigvalsh((dense + dense.T) / 2)
        return float(values[0]), float(values[-1])
    return _extreme(problem, H, "SA", rtol), _extreme(problem, H, "LA", rtol)


def condition_number(problem: Problem, damping: float, rtol: float = 1e-6) -> float:
    """‖H + εI‖·‖(H + εI)⁻¹‖ by Lanczos on both, to rtol."""
    problem = problem.in_float64
    low, high = extreme_eigenvalues(problem, rtol)
    inverse = HessianInverse(problem, damping)
    if problem.size <= _SMALL:
        dense = to_dense(inverse)
        largest = float(np.abs(np.linalg.eigvalsh((dense + dense.T) / 2)).max())
    else:
        largest = abs(_end(inverse, "LM", rtol, 300))
    return max(abs(low + damping), abs(high + damping)) * largest


def _extreme(problem: Problem, H: LinearOperator, which: str, rtol: float) -> float:
    """One end of the spectrum: Lanczos on H; where that takes long or ends at an inner eigenvalue, shift-invert just outside."""
    try:
        value = _end(H, which, rtol, _RESTARTS)
        if not _beyond(problem, which, value, rtol):
            return value
    except ArpackNoConvergence:
        pass
    sign = -1.0 if which == "SA" else 1.0
    outer, inner = 1.5 * problem.norm, -1.5 * problem.norm  # in the direction of the end
    while _outside(problem, which, sign * outer):
        outer *= 2.0
    while outer - inner > _CLOSE * problem.norm:
        middle = (outer + inner) / 2
        outer, inner = (outer, middle) if _outside(problem, which, sign * middle) else (middle, inner)
    shift = sign * (outer + _CLOSE * problem.norm)
    value = shift + 1.0 / _end(HessianInverse(problem, -shift), "LM", rtol / _CLOSE, 300)
    missed = _beyond(problem, which, value, rtol)
    if missed:
        raise ArithmeticError(
            f"Lanczos found {value:g} at an end of the spectrum, but by inertia {missed} eigenvalues lie beyond it; ask for more "
            "with spectrum.eigsh at a shift there"
        )
    return value


def _outside(problem: Problem, which: str, x: float) -> int:
    """Count the eigenvalues below ("SA") or above ("LA") x."""
    up_to = count_up_to(problem, x)
    return up_to if which == "SA" else problem.size - up_to


def _beyond(problem: Problem, which: str, value: float, rtol: float) -> int:
    """Count the eigenvalues farther out than a value known to rtol·‖H‖."""
    margin = max(rtol, 2 * NUDGE) * problem.norm
    return _outside(problem, which, value - margin if which == "SA" else value + margin)


def _end(A: LinearOperator, which: str, rtol: float, restarts: int) -> float:
    start = np.random.default_rng(0).standard_normal(A.shape[0])
    values, vectors = arpack(A, k=1, which=which, tol=rtol / 10, v0=start, maxiter=restarts)
    value, vector = float(values[0]), vectors[:, 0]
    residual = float(np.linalg.norm(A @ vector - value * vector))
    scale = float(np.linalg.norm(A @ start) / np.linalg.norm(start))
    if residual > rtol * max(abs(value), scale):
        raise ArithmeticError(f"Lanczos left a residual of {residual:.1e} at the eigenvalue {value:g}")
    return value
