"""How many eigenvalues of H + εI are negative, zero and positive."""

from __future__ import annotations

import torch
from torch import Tensor

from linop_hess.errors import FactorizationError, SingularPivotError
from linop_hess.lq.accuracy import CERTAIN, NUDGE, ROUNDED_EIGENVALUE, UNSURE_PIVOT, ZERO_PIVOT
from linop_hess.lq.analysis import Analysis
from linop_hess.lq.elimination.parallel import legs_of
from linop_hess.lq.inverse.factors import Answering, Factors
from linop_hess.lq.matrix.hessian import assembled
from linop_hess.lq.methods.plan import make_plan
from linop_hess.lq.pivots.inertia import Inertia, inertia_of

# Up to so many controls, inertia that rounding in the factors may have changed is that of the dense matrix.
DENSE_UP_TO = 1000


def inertia_of_factors(factors: Factors, zero_below: float = ZERO_PIVOT) -> Inertia:
    """Inertia from the factors of an inverse; pivots of up to `zero_below`·max(‖H‖, |ε|) are counted as zero.

    Raises
    ------
    SingularPivotError
        If H + εI is singular to working precision.
    FactorizationError
        If an eigenvalue is so close to zero that rounding leaves its sign open, or |ε| is too small.
    """
    return _certain(factors, factors.answering("inertia"), zero_below)


def _certain(factors: Factors, found: Answering, zero_below: float) -> Inertia:
    """Inertia from factors; where rounding might change it, that of the dense matrix, or confirmed at dampings on either side."""
    if found.method == "riccati":
        factors.refuse_tiny_damping()
    inertia, scale = found.inertia(zero_below * factors.scale), factors.scale
    if found.growth <= CERTAIN:
        return inertia
    analysis, damping = factors.analysis, factors.damping
    if analysis.problem.size <= DENSE_UP_TO:
        return inertia_of([torch.linalg.eigvalsh(assembled(analysis)) + damping], zero_below * scale)
    move = found.growth * scale
    moved = (Factors(analysis, damping + side * move, make_plan(analysis, damping)) for side in (-1, 1))
    if all(_riccati_inertia(other, zero_below) == inertia for other in moved):
        return inertia
    asked = factors.change.asked
    raise FactorizationError(
        f"at damping={asked:g} an eigenvalue lies within {move:.1e} of zero, which is what rounding may make of the factors of this "
        "chain; move damping by more than that",
        damping=asked,
        suggested_damping=asked + 3 * move,
    )


def _riccati_inertia(factors: Factors, zero_below: float) -> Inertia:
    factors.refuse_tiny_damping()
    return factors.made("riccati").inertia(zero_below * factors.scale)  # type: ignore[attr-defined]


def inertia_at(
    analysis: Analysis, damping: float, zero_below: float = ZERO_PIVOT, factors: Factors | None = None
) -> Inertia:
    """Inertia of H + εI: side by side where the chain is long and that is certain, else from the cheapest factors.

    `factors` are those of an inverse at this damping, which keeps what is made of them here for what it is asked next.

    Raises
    ------
    SingularPivotError
        If H + εI is singular to working precision.
    FactorizationError
        As of `inertia_of_factors`.
    """
    change = analysis.in_float64.at(damping)
    scale = max(change.analysis.norm, abs(change.damping))
    legs = change.analysis.once(legs_of)
    found = None if legs is None else legs.inertia(change.damping.real, UNSURE_PIVOT * scale)
    if found is not None and not found.zero:
        return found
    analysis = analysis.in_float64
    factors = factors or Factors(analysis, damping, make_plan(analysis, damping))
    try:
        return inertia_of_factors(factors, zero_below)
    except (SingularPivotError, FactorizationError):
        # Without damping a chain has no block LDLᵀ where controls are hidden in a stage, though H may have an inverse.
        if (pivots := dense_spectrum(analysis, damping)) is None:
            raise
        return inertia_of([pivots], zero_below * scale)


def dense_spectrum(analysis: Analysis, damping: float) -> Tensor | None:
    """Eigenvalues of H where ε = 0, few parameters allow it and none of them is rounding; None otherwise.

    With a damping a chain whose block LDLᵀ fails is nearly singular, and the matrix tells less of it than the stages.
    """
    if damping != 0.0 or analysis.problem.size > DENSE_UP_TO:
        return None
    values = torch.linalg.eigvalsh(assembled(analysis)) + damping
    sizes = values.abs()
    return values if sizes.numel() and float(sizes.min()) > UNSURE_PIVOT * float(sizes.max()) else None


def inertia(
    analysis: Analysis, damping: float, zero_below: float = ZERO_PIVOT, factors: Factors | None = None
) -> Inertia:
    """Inertia of H + εI, as `inertia_at`, with errors that users see.

    Raises
    ------
    FactorizationError
        If H + εI is singular to working precision, or rounding leaves its inertia open.
    """
    try:
        return inertia_at(analysis, damping, zero_below, factors)
    except SingularPivotError as error:
        move = NUDGE * analysis.norm
        raise FactorizationError(
            f"H + damping·I with damping={damping:g} is singular to working precision, so its inertia cannot be told; "
            + (f"move damping by {move:.1e}" if move else "H is zero"),
            damping=damping,
            stage=None if error.stage is None else analysis.problem.name(error.stage),
            suggested_damping=damping + move,
        ) from None


def between(analysis: Analysis, damping: float, found: Inertia) -> Inertia:
    """Inertia of an H + εI that is nearly singular: eigenvalues whose sign rounding may have made are counted as zero.

    They are those that change their sign, or are found to be zero, when the damping is moved by what rounding in H may be.

    Parameters
    ----------
    analysis : Analysis
    damping : float
    found : Inertia
        What the factors at this damping say.
    """
    move = max(ROUNDED_EIGENVALUE * max(analysis.norm, abs(damping)), 4.0 * analysis.rounding)
    change = analysis.at(damping)
    if change.analysis.hidden and abs(change.damping) <= 2.0 * move:
        return found  # the eigenvalue ε of the hidden controls is no rounding
    below, above = inertia(analysis, damping - move), inertia(analysis, damping + move)
    negative, positive = min(found.negative, above.negative), min(found.positive, below.positive)
    return Inertia(negative, analysis.problem.size - negative - positive, positive)
