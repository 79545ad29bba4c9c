"""Eigenvalue counts and the smallest convex damping of a problem, from inertia."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch

from linop_hess._memory import require
from linop_hess.errors import FactorizationError
from linop_hess.lq.inverse.factors import BlockLDL
from linop_hess.lq.inverse.gram_factors import inertia_in_function_space
from linop_hess.lq.methods.dense import assemble
from linop_hess.lq.methods.parallel import Lockstep, serves
from linop_hess.lq.methods.plan import make_plan
from linop_hess.lq.methods.singular import SingularPivotError
from linop_hess.lq.pivots.inertia import UNSURE, ZERO, Inertia, inertia_of
from linop_hess.lq.problem import Problem

# Factors are taken at their word where rounding in them moves eigenvalues by this much of ‖H‖ at most; where it may move them by more,
# problems of up to so many controls are looked at as dense matrices.
CERTAIN = 1e-12
DENSE = 1000

# A shift closer to an eigenvalue than rounding allows is moved by this much of ‖H‖.
NUDGE = 1e-7


_locksteps: WeakKeyDictionary[Problem, Lockstep | None] = WeakKeyDictionary()


def _inertia(problem: Problem, damping: float, zero_below: float = ZERO) -> Inertia:
    """Inertia of H + εI: in lockstep where the chain is long and that is certain, in function space, or by the block LDLᵀ."""
    problem = problem.in_float64
    if problem not in _locksteps:
        _locksteps[problem] = Lockstep(problem) if serves(problem) else None
    lockstep = _locksteps[problem]
    scale = max(problem.norm, abs(damping))
    found = None if lockstep is None else lockstep.inertia(damping, UNSURE * scale)
    if found is not None and not found.zero:
        return found
    plan = make_plan(problem, damping)
    if plan.choice == "woodbury":
        return inertia_in_function_space(problem, damping, zero_below * scale)
    require(
        2 * plan.costs["riccati"].nbytes, f"the block LDLᵀ factorization for {problem.size} parameters", plan.available
    )
    return certain_inertia(BlockLDL(problem, damping), zero_below)


def certain_inertia(factors: BlockLDL, zero_below: float = ZERO) -> Inertia:
    """Inertia from factors, looked at again where rounding in them might change it.

    Raises
    ------
    FactorizationError
        If an eigenvalue is so close to zero that they cannot tell.
    """
    found, problem, damping = factors.inertia(zero_below), factors.problem, factors.damping
    if factors.doubt <= CERTAIN:
        return found
    scale = max(problem.norm, abs(damping))
    if problem.size <= DENSE:
        return inertia_of([torch.linalg.eigvalsh(assemble(problem)) + damping], zero_below * scale)
    move = factors.doubt * scale
    if all(BlockLDL(problem, damping + side * move).inertia(zero_below) == found for side in (-1, 1)):
        return found
    raise FactorizationError(
        f"at damping={damping:g} an eigenvalue lies within {move:.1e} of zero, which is what rounding may make of the factors of this "
        "chain; move damping by more than that",
        damping=damping,
        suggested_damping=damping + 3 * move,
    )


def inertia(problem: Problem, damping: float, zero_below: float = ZERO) -> Inertia:
    """Inertia of H + εI, pivots of up to `zero_below`·max(‖H‖, |ε|) counted as zero.

    Raises
    ------
    FactorizationError
        If H + εI is singular to working precision.
    """
    try:
        return _inertia(problem, damping, zero_below)
    except SingularPivotError as error:
        move = NUDGE * problem.norm
        raise FactorizationError(
            f"H + damping·I with damping={damping:g} is singular to working precision, so its inertia is not to be had; "
            + (f"move damping by {move:.1e}" if move else "H is zero"),
            damping=damping,
            stage=None if error.stage is None else problem.name(error.stage),
            suggested_damping=damping + move,
        ) from None


def count_up_to(problem: Problem, b: float) -> int:
    """Count the eigenvalues λ ≤ b of H; where b is an eigenvalue to rounding, those up to b + NUDGE·‖H‖."""
    if problem.norm == 0.0:
        return problem.size if b >= 0.0 else 0
    for moved in (b, b + NUDGE * problem.norm):
        try:
            found = inertia(problem, -moved, UNSURE)
        except FactorizationError:
            continue
        if not found.zero:
            return found.negative
    found = inertia(problem, -moved)
    return found.negative + found.zero


def smallest_convex_damping(problem: Problem, rtol: float) -> float:
    """Return the least ε, to a relative tolerance from above, for which H + εI ≻ 0; `NUDGE`·‖H‖ where H is semidefinite, 1 where it is 0.

    Raises
    ------
    FactorizationError
        If no damping up to 1e8·‖H‖ makes H + εI positive definite.
    """
    norm = problem.norm
    if norm == 0.0:
        return 1.0
    low, high = 0.0, NUDGE * norm
    while not _is_convex(problem, high):
        low, high = high, 4.0 * high
        if high > 1e8 * norm:
            raise FactorizationError("no damping up to 1e8·‖H‖ makes H + damping·I positive definite", damping=high)
    if low == 0.0:
        return high
    while high - low > rtol * high:
        middle = (low + high) / 2
        if not low < middle < high:
            break
        if _is_convex(problem, middle):
            high = middle
        else:
            low = middle
    return high


def _is_convex(problem: Problem, damping: float) -> bool:
    try:
        found = _inertia(problem, damping)
    except SingularPivotError:
        return False
    return found.negative == 0 and found.zero == 0
