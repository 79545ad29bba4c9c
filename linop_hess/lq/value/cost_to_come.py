"""The chain up to a state δ, eliminated from its first stage on: how far δ gives way to a force.

With μ the multiplier of δ, all that lies before contributes −½ μᵀ Σ μ to the Lagrangian: Σ, symmetric, is the cost-to-come of δ.
A segment ½ [s; δ]ᵀ [S, E; Eᵀ, Z] [s; δ], δ⁺ = F δ + R s takes it to

    Σ̂ = (I + ΣZ)⁻¹ Σ,     L = Rᵀ − E Σ̂ Fᵀ,     Σ⁺ = F Σ̂ Fᵀ + Lᵀ (S − E Σ̂ Eᵀ)⁻¹ L,

where no inverse of Σ is taken, which may be singular. Without what lies after, s has pivots as small as ε, and the *leading* block of
H + εI may be singular. So a curvature ½ ρ|δ⁺|² (in units of the state) is added to the end of what is eliminated, which bounds Σ⁺ by 1/ρ
where that is definite; it is taken off again from what follows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from linop_hess.lq.accuracy import ADDED_CURVATURE, ADDED_LIMIT
from linop_hess.lq.value.controls import Segment
from linop_hess.lq.value.dense import DenseValue


@dataclass(frozen=True)
class CostToCome:
    """Σ of a state, with the curvature diag(added) that was added to it.

    Parameters
    ----------
    matrix : Tensor, shape (n, n)
        Σ.
    added : Tensor, shape (n,)
    """

    matrix: Tensor
    added: Tensor

    @classmethod
    def of_nothing(cls, like: Tensor) -> CostToCome:
        """That before the first segment, where there is no state."""
        return cls(like.new_zeros(0, 0), like.new_zeros(0))

    def through(self, segment: Segment, after: DenseValue, units: Tensor) -> CostToCome:
        """Return that after a segment and before a cost-to-go, the state between them having these units, (n, 1)."""
        scale = after.largest(units)
        eye = torch.eye(after.V.shape[0], dtype=self.matrix.dtype, device=self.matrix.device)
        Rt, _ = segment.adjoint(eye)
        best: tuple[float, CostToCome] | None = None
        for factor in ADDED_CURVATURE:
            added = factor * scale / units[:, 0].square()
            matrix, inner = self._through(segment, Rt, *segment.congruence(torch.diag(added)))
            growth = max(inner, _largest(matrix, units))
            if best is None or growth < best[0]:
                best = growth, CostToCome(matrix, added)
            if growth * abs(factor * scale) <= ADDED_LIMIT:
                break
        assert best is not None
        return best[1]

    def _through(self, segment: Segment, Rt: Tensor, S: Tensor, E: Tensor, Z: Tensor) -> tuple[Tensor, float]:
        """Σ⁺, and the largest entry of Σ̂ in units of the state before."""
        if segment.hidden.coupling is not None:
            # Hidden directions that are too strongly coupled to be eliminated beforehand are controls that the output does not see.
            j = segment.hidden.delayed
            S = torch.block_diag(S, segment.hidden.damping * torch.eye(j, dtype=S.dtype, device=S.device))
            E, Rt = torch.cat([E, segment.hidden.coupling.mT]), torch.cat([Rt, Rt.new_zeros(j, Rt.shape[1])])
        if not self.matrix.numel():
            after = symmetrized(Rt.mT @ torch.linalg.solve_ex(S, Rt)[0])
            return after, 0.0
        Z = Z - torch.diag(self.added)
        A = self.matrix @ Z
        A.diagonal().add_(1.0)
        inner = symmetrized(torch.linalg.solve_ex(A, self.matrix)[0])
        through = _pushed(segment, inner).mT  # Σ̂ Fᵀ
        seen = E @ inner
        pivot = torch.addmm(S, seen, E.mT, alpha=-1.0)
        L = Rt - _pushed(segment, seen.mT).mT
        after = _pushed(segment, through)
        after = symmetrized(after.addmm(L.mT, torch.linalg.solve_ex(pivot, L)[0]))
        return after, _largest(inner, segment.units)

    def joined(self, cost: DenseValue) -> Tensor:
        """Covariance of (δ, c) under what lies before and the cost-to-go after: the block of the inverse there."""
        V = cost.V - torch.diag(self.added)
        N = self.matrix @ V
        N.diagonal().add_(1.0)
        if cost.Y is None or cost.Lambda is None:
            return symmetrized(torch.linalg.solve_ex(N, self.matrix)[0])
        eye = torch.eye(cost.Lambda.shape[0], dtype=V.dtype, device=V.device)
        N = torch.cat([torch.cat([N, self.matrix @ cost.Y], 1), torch.cat([cost.Y.mT, cost.Lambda], 1)])
        return symmetrized(torch.linalg.solve_ex(N, torch.block_diag(self.matrix, eye))[0])


def _pushed(segment: Segment, d: Tensor) -> Tensor:
    """F δ of a segment, its controls at rest."""
    return segment.forward(d.new_zeros(segment.r, d.shape[1]), d)


def _largest(matrix: Tensor, units: Tensor) -> float:
    """Largest |entry| of a covariance of a state in its units; infinite where there is NaN."""
    size = float((matrix / units / units.mT).abs().max()) if matrix.numel() else 0.0
    return size if size == size else math.inf


def symmetrized(matrix: Tensor) -> Tensor:
    """(X + Xᵀ)/2."""
    return (matrix + matrix.mT) / 2
