"""What the Gram matrix of a function space knows besides solutions, where its cost is convex; as `lq.block_ldl` for any problem."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from linop_hess.lq.methods.woodbury import WoodburyFactorization, space_of
from linop_hess.lq.pivots.inertia import Inertia, inertia_of
from linop_hess.lq.problem import Problem
from linop_hess.lq.stages.row_space import spread


class GramFactors:
    """H + εI with H = JᵀJ and ε > 0, from εI + Γ, in float64."""

    def __init__(self, problem: Problem, damping: float) -> None:
        self.problem = problem.in_float64
        self.damping = damping

    @staticmethod
    def serves(problem: Problem, damping: float) -> bool:
        """Whether the cost is convex, and ε > 0."""
        return damping > 0 and space_of(problem).is_convex

    @cached_property
    def _factors(self) -> WoodburyFactorization:
        return WoodburyFactorization(self.problem, self.damping)

    def factor(self) -> None:
        """Factor now, whatever is asked for next."""
        assert self._factors is not None

    def logabsdet(self) -> float:
        """Logarithm of det(H + εI)."""
        theta = self._factors.pivots.theta
        return math.fsum(theta.abs().log().tolist()) + (self.problem.size - theta.numel()) * math.log(self.damping)

    def positive(self, g: Tensor) -> Tensor:
        """(H + εI)⁻¹ g for g of shape (N, k), which is positive definite."""
        return self._factors.solve(g.to(torch.float64)).to(g.dtype)

    @property
    def noise(self) -> int:
        """Size of white noise that `color` takes: N + M."""
        return self.problem.size + self._factors.space.rows

    def color(self, xi: Tensor) -> Tensor:
        """(H + εI)⁻¹(√ε ξ + Jᵀη) for (ξ, η) of shape (N + M, k), of covariance (H + εI)⁻¹ where that is white."""
        N = self.problem.size
        right = math.sqrt(self.damping) * xi[:N] + self._factors.space.Jt(xi[N:])
        return self._factors.solve(right)

    attempts = 1

    def diagonal(self, attempt: int = 0) -> Tensor:
        """Diagonal of (H + εI)⁻¹, shape (N,)."""
        space, A = self._factors.space, self._inverse_gram
        parts = [
            group.split.at(k).form_diagonal(group.steps[0].at(k), Y, space.samples, A) for group, k, Y in space.walk()
        ]
        return (1.0 - torch.cat(parts[::-1])) / self.damping if parts else A.new_zeros(0)

    def blocks(self, attempt: int = 0) -> list[Tensor]:
        """Diagonal blocks of (H + εI)⁻¹, one per stage with controls."""
        space, A = self._factors.space, self._inverse_gram
        out = []
        for group, k, Y in space.walk():
            X = group.steps[0].at(k).Gt(spread(Y, space.samples)[None])[0]
            out.append((torch.eye(X.shape[0], dtype=X.dtype, device=X.device) - X @ A @ X.mT) / self.damping)
        return out[::-1]

    @cached_property
    def _inverse_gram(self) -> Tensor:
        A = self._factors.pivots.solve(
            torch.eye(self._factors.space.rows, dtype=torch.float64, device=self.problem.device)
        )
        return (A + A.mT) / 2


def inertia_in_function_space(problem: Problem, damping: float, zero_below: float) -> Inertia:
    """Inertia of H + εI = εI + JᵀΣJ: that of εI, and of −(Σ + Γ/ε), less that of −Σ.

    Raises
    ------
    SingularPivotError
        If ε = 0, or H + εI is singular to working precision.
    """
    factors = WoodburyFactorization(problem.in_float64, damping)
    of_gram, of_signs = inertia_of([factors.pivots.theta], zero_below), inertia_of([factors.space.signs], 0.0)
    N = problem.size
    if damping > 0:
        return Inertia(of_gram.positive - of_signs.positive, of_gram.zero, N + of_gram.negative - of_signs.negative)
    return Inertia(N + of_gram.negative - of_signs.positive, of_gram.zero, of_gram.positive - of_signs.negative)
