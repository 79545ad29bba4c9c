"""What the halves of a congruence make of a vector: a positive definite operator, and samples."""

from __future__ import annotations

import torch
from torch import Tensor

from linop_hess.errors import FactorizationError, NotPositiveDefiniteError
from linop_hess.lq.analysis import Analysis
from linop_hess.lq.inverse.factors import Answering
from linop_hess.lq.pivots.inertia import Inertia
from linop_hess.lq.solve.right_hand_side import times_power_of_two, to_size_one

_ABOVE_NORM = 1.5


def positive(factors: Answering, g: Tensor) -> Tensor:
    """L⁻ᵀ|D|⁻¹L⁻¹ g: symmetric positive definite, (H + εI)⁻¹ where that is positive definite.

    With K = H + εI its square is (L⁻ᵀ|D|⁻¹L⁻¹ K)² = I, so that MINRES with it as `M` stops after two iterations.

    Parameters
    ----------
    factors : Answering
        In float64.
    g : Tensor, shape (N, k)
        In any precision, which the result has too.

    Raises
    ------
    OverflowError
        If the product exceeds the range of the dtype.
    """
    # Columns of size one: those of other sizes would under- or overflow on the way.
    columns, exponents = to_size_one(g)
    return in_range(times_power_of_two(factors.positive(columns.to(torch.float64)), exponents), g.dtype)


def in_range(product: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a product in another dtype.

    Raises
    ------
    OverflowError
        If it exceeds the range of the dtype.
    """
    out = product.to(dtype)
    if not bool(torch.isfinite(out.sum())) and not bool(torch.isfinite(out).all()):
        raise OverflowError(f"the product exceeds the range of {dtype}: scale the vector down")
    return out


def require_definite(found: Inertia, analysis: Analysis, damping: float) -> None:
    """Refuse an H + εI that is not positive definite.

    Raises
    ------
    NotPositiveDefiniteError
        It names the inertia and a damping that works: one above ‖H‖, which costs nothing to know.
    """
    if found.negative or found.zero:
        # ‖H‖ is known from below, to within some per cent.
        raise NotPositiveDefiniteError(
            f"samples need a positive definite H + damping·I; with damping={damping:g} it has {found.negative} negative "
            f"and {found.zero} zero eigenvalues; damping={_ABOVE_NORM * analysis.norm or 1.0:.2e} works, and "
            "smallest_convex_damping() finds the least"
        )


def sample(factors: Answering, k: int, generator: torch.Generator | None, asked: float | None = None) -> Tensor:
    """K samples of N(0, (H + εI)⁻¹), shape (N, k), in float64; H + εI must be positive definite.

    `asked` is the damping that messages tell, by default that of the factors. Where there are several processes, all have those of the
    first, wherever their random numbers stand.

    Raises
    ------
    FactorizationError
        If a pivot is not positive, even if only by rounding.
    """
    problem = factors.analysis.problem
    noise_on = problem.device if generator is None else generator.device
    xi = torch.randn(factors.noise, k, generator=generator, dtype=torch.float64, device=noise_on)
    if problem.processes.are_several:
        xi = problem.processes.from_first(xi.cpu())
    out = factors.color(xi.to(problem.device))
    if not bool(torch.isfinite(out).all()):
        told = factors.damping if asked is None else asked
        raise FactorizationError(
            f"at damping={told:g} H + damping·I is so close to singular that rounding made a pivot negative; use a larger one",
            damping=told,
        )
    return out
