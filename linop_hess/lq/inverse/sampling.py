"""What the halves of a congruence make of a vector: a positive definite operator, and samples."""

from __future__ import annotations

import torch
from torch import Tensor

from linop_hess.errors import FactorizationError
from linop_hess.lq.inverse.factors import Answering


def positive(factors: Answering, g: Tensor) -> Tensor:
    """L⁻ᵀ|D|⁻¹L⁻¹ g for g of shape (N, k) and any dtype: symmetric positive definite, (H + εI)⁻¹ where that is."""
    return factors.positive(g.to(torch.float64)).to(g.dtype)


def sample(factors: Answering, k: int, generator: torch.Generator | None) -> Tensor:
    """K samples of N(0, (H + εI)⁻¹), shape (N, k), in float64; H + εI must be positive definite.

    Raises
    ------
    FactorizationError
        If a pivot is not positive, even if only by rounding.
    """
    device = factors.analysis.problem.device
    noise_on = device if generator is None else generator.device
    xi = torch.randn(factors.noise, k, generator=generator, dtype=torch.float64, device=noise_on).to(device)
    out = factors.color(xi)
    if not bool(torch.isfinite(out).all()):
        raise FactorizationError(
            f"at damping={factors.damping:g} H + damping·I is so close to singular that rounding made a pivot negative; use a larger one",
            damping=factors.damping,
        )
    return out
