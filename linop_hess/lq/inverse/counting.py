"""Eigenvalue counts and the smallest convex damping, from inertia; and a damping at which solves work."""

from __future__ import annotations

import numpy as np
import torch

from linop_hess.errors import FactorizationError, SingularPivotError
from linop_hess.lq.accuracy import NUDGE, UNSURE_PIVOT
from linop_hess.lq.analysis import Analysis
from linop_hess.lq.inverse.inertia import inertia, inertia_at
from linop_hess.lq.methods.base import Factor

# The largest damping tried, in terms of ‖H‖, and the factor between trials.
_LARGEST_DAMPING = 1e8
_STRIDE = 4.0


def count_up_to(analysis: Analysis, b: float) -> int:
    """Count the eigenvalues λ ≤ b of H; where b is an eigenvalue to rounding, those up to b + NUDGE·‖H‖.

    Raises
    ------
    FactorizationError
        If neither can be told.
    """
    if analysis.norm == 0.0:
        return analysis.problem.size if b >= 0.0 else 0
    for moved in (b, b + NUDGE * analysis.norm):
        try:
            found = inertia(analysis, -moved, UNSURE_PIVOT)
        except FactorizationError:
            continue
        if not found.zero:
            return found.negative
    found = inertia(analysis, -moved)
    return found.negative + found.zero


def smallest_convex_damping(analysis: Analysis, rtol: float) -> float:
    """Return the least ε, to a relative tolerance from above, for which H + εI ≻ 0; `NUDGE`·‖H‖ where H is semidefinite, 1 where it is 0.

    Raises
    ------
    FactorizationError
        If no damping up to 1e8·‖H‖ makes H + εI positive definite.
    """
    norm = analysis.norm
    if norm == 0.0:
        return 1.0
    # Strides upwards before the bisection: ‖H‖ says nothing of the size of the smallest eigenvalue, which may be decades below it.
    low, high = 0.0, NUDGE * norm
    while not _is_convex(analysis, high):
        low, high = high, _STRIDE * high
        if high > _LARGEST_DAMPING * norm:
            raise FactorizationError("no damping up to 1e8·‖H‖ makes H + damping·I positive definite", damping=high)
    if low == 0.0:
        return high
    while high - low > rtol * high:
        middle = (low + high) / 2
        if not low < middle < high:
            break
        if _is_convex(analysis, middle):
            high = middle
        else:
            low = middle
    return high


def _is_convex(analysis: Analysis, damping: float) -> bool:
    try:
        found = inertia_at(analysis, damping)
    except SingularPivotError:
        return False
    return found.negative == 0 and found.zero == 0


def damping_that_works(analysis: Analysis, damping: complex, factor: Factor, tolerance: float) -> complex | None:
    """Try dampings growing by decades from one that failed, each with a random right-hand side; None if none works."""
    if isinstance(damping, complex):
        analysis = analysis.in_float64
    problem, norm = analysis.problem, analysis.norm
    unit = np.finfo(problem.numpy_dtype).eps * (norm if norm > 0 else 1.0)
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(problem.size, 1, generator=generator, dtype=torch.float64, device="cpu")
    g = g.to(torch.complex128 if isinstance(damping, complex) else problem.dtype).to(problem.device)
    # What is advised must have worked: two steps of refinement and the backward error, as in a solve, but for its own norm.
    for power in range(2, 17, 2):
        size = float(f"{max(abs(damping), unit) * 10.0**power:.0e}")
        trial = damping / abs(damping) * size if isinstance(damping, complex) else size
        change = analysis.at(trial)
        try:
            factors = factor(change.analysis, change.damping)
        except SingularPivotError:
            continue
        x = change.solve(factors, g).to(g.dtype)
        for _ in range(2):
            x = x + change.solve(factors, g - problem.hessian_product(x, trial)).to(g.dtype)
        r = g - problem.hessian_product(x, trial)
        if float(r.norm()) <= tolerance * (norm * float(x.norm()) + float(g.norm())):
            return trial
    return None
