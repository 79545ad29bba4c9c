"""The ends of the spectrum, and the condition number."""

from __future__ import annotations

import numpy as np
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator
from scipy.sparse.linalg import eigsh as arpack

from linop_hess.lq.convexity import count_up_to
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
    if problem.size <= _SMALL:
        dense = to_dense(H)
        values = np.linalg.eigvalsh((dense + dense.T) / 2)
        return float(values[0]), float(values[-1])
    low, high = _extreme(problem, H, "SA", rtol), _extreme(problem, H, "LA", rtol)
    margin = max(rtol, 1e-7) * max(abs(low), abs(high))
    outside = count_up_to(problem, low - margin) + problem.size - count_up_to(problem, high + margin)
    if outside:
        raise ArithmeticError(
            f"Lanczos found eigenvalues from {low:g} to {high:g}, but by inertia {outside} lie outside; ask for more with "
            "spectrum.eigsh at a shift there"
        )
    return low, high


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
    """One end of the spectrum: Lanczos on H, and where that takes long, as next to a null space, shift-invert just outside."""
    try:
        return _end(H, which, rtol, _RESTARTS)
    except ArpackNoConvergence:
        pass
    sign = -1.0 if which == "SA" else 1.0

    def is_outside(x: float) -> bool:
        below = count_up_to(problem, x)
        return below == 0 if which == "SA" else below == problem.size

    outer, inner = 1.5 * problem.norm, -1.5 * problem.norm  # in the direction of the end
    while not is_outside(sign * outer):
        outer *= 2.0
    while outer - inner > _CLOSE * problem.norm:
        middle = (outer + inner) / 2
        outer, inner = (middle, inner) if is_outside(sign * middle) else (outer, middle)
    shift = sign * (outer + _CLOSE * problem.norm)
    return shift + 1.0 / _end(HessianInverse(problem, -shift), "LM", rtol / _CLOSE, 300)


def _end(A: LinearOperator, which: str, rtol: float, restarts: int) -> float:
    start = np.random.default_rng(0).standard_normal(A.shape[0])
    values, vectors = arpack(A, k=1, which=which, tol=rtol / 10, v0=start, maxiter=restarts)
    value, vector = float(values[0]), vectors[:, 0]
    residual = float(np.linalg.norm(A @ vector - value * vector))
    scale = float(np.linalg.norm(A @ start) / np.linalg.norm(start))
    if residual > rtol * max(abs(value), scale):
        raise ArithmeticError(f"Lanczos left a residual of {residual:.1e} at the eigenvalue {value:g}")
    return value
