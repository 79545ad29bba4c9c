"""The chain up to a state δ, eliminated from its first stage on: how far δ gives way to a force.

With μ the multiplier of δ, all that lies before contributes −½ μᵀ Σ μ to the Lagrangian: Σ, symmetric, is the compliance of δ.
A segment ½ [s; δ]ᵀ [S, E; Eᵀ, Z] [s; δ], δ⁺ = F δ + R s takes it to

    Σ̂ = (I + ΣZ)⁻¹ Σ,     L = Rᵀ − E Σ̂ Fᵀ,     Σ⁺ = F Σ̂ Fᵀ + Lᵀ (S − E Σ̂ Eᵀ)⁻¹ L,

where no inverse of Σ is taken, which may be singular. Without what lies after, s has pivots as small as ε, and the *leading* block of
H + εI may be singular. So a curvature ½ ρ|δ⁺|² is lent to the end of what is eliminated, which bounds Σ⁺ by 1/ρ where that is
definite; it is taken back from what follows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from linop_hess.lq.value.dense import CostToGo, Segment

# What to lend, in terms of the largest entry of the cost-to-go that follows: the first with which |ρΣ⁺| stays below the limit.
_LENT = (1e-2, -1e-2, 3e-3, -3e-2)
_LIMIT = 100.0


@dataclass(frozen=True)
class Compliance:
    """Σ of a state, with the curvature ρ lent to it."""

    matrix: Tensor  # (n, n)
    lent: float = 0.0

    @classmethod
    def of_nothing(cls, like: Tensor) -> Compliance:
        """That before the first segment, where there is no state."""
        return cls(like.new_zeros(0, 0))

    def through(self, segment: Segment, after: CostToGo) -> Compliance:
        """Return that after a segment and before a cost-to-go."""
        scale = _largest(after.V)
        eye = torch.eye(after.V.shape[0], dtype=self.matrix.dtype, device=self.matrix.device)
        Rt, _ = segment.adjoint(eye)
        best: tuple[float, Tensor, float] | None = None
        for factor in _LENT:
            rho = factor * scale
            matrix, growth = self._through(segment, Rt, *segment.pull_back(rho * eye if rho else None))
            if best is None or growth < best[0]:
                best = growth, matrix, rho
            if growth * abs(rho) <= _LIMIT:
                break
        assert best is not None
        return Compliance(best[1], best[2])

    def _through(self, segment: Segment, Rt: Tensor, S: Tensor, E: Tensor, Z: Tensor) -> tuple[Tensor, float]:
        """Σ⁺ and the largest number met."""
        if not self.matrix.numel():
            after = Rt.mT @ torch.linalg.solve_ex(S, Rt)[0]
            return _symmetrized(after), _largest(after)
        Z.diagonal().sub_(self.lent)
        A = self.matrix @ Z
        A.diagonal().add_(1.0)
        inner = _symmetrized(torch.linalg.solve_ex(A, self.matrix)[0])
        through = segment.forward(None, inner).mT  # Σ̂ Fᵀ
        seen = E @ inner
        pivot = torch.addmm(S, seen, E.mT, alpha=-1.0)
        L = Rt - segment.forward(None, seen.mT).mT
        after = segment.forward(None, through).addmm_(L.mT, torch.linalg.solve_ex(pivot, L)[0])
        return _symmetrized(after), max(_largest(inner), _largest(after))

    def joined(self, cost: CostToGo) -> Tensor:
        """Covariance of (δ, c) under what lies before and the cost-to-go after: the block of the inverse there."""
        n = self.matrix.shape[0]
        V = cost.V
        if self.lent:
            V = V - self.lent * torch.eye(n, dtype=V.dtype, device=V.device)
        N = self.matrix @ V
        N.diagonal().add_(1.0)
        if cost.Y is None or cost.mu is None:
            return _symmetrized(torch.linalg.solve_ex(N, self.matrix)[0])
        delayed = torch.eye(cost.mu.numel(), dtype=V.dtype, device=V.device)
        N = torch.cat([torch.cat([N, self.matrix @ cost.Y], 1), torch.cat([cost.Y.mT, torch.diag(cost.mu)], 1)])
        return _symmetrized(torch.linalg.solve_ex(N, torch.block_diag(self.matrix, delayed))[0])


def _largest(matrix: Tensor) -> float:
    """Largest |entry|; infinite where there is NaN."""
    size = float(matrix.abs().max()) if matrix.numel() else 0.0
    return size if size == size else math.inf


def _symmetrized(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2
