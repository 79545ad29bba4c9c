"""Any method in double precision, for a problem given in single precision."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from linop_hess.lq.methods.base import Factorization
from linop_hess.lq.problem import Problem


class PromotedFactorization:
    """Factors of a float32 problem's H + εI, computed and applied in float64.

    Raises
    ------
    SingularPivotError
        If H + εI is singular to double precision.
    """

    def __init__(self, factor: Callable[[Problem, float], Factorization], problem: Problem, damping: float) -> None:
        self.problem = problem.to(torch.float64)
        self._inner = factor(self.problem, damping)
        self.method = self._inner.method

    def solve(self, g: Tensor) -> Tensor:
        """(H + εI)⁻¹ g for g of shape (N, k), in float64 whatever comes."""
        return self._inner.solve(g.to(torch.float64))

    @property
    def nbytes(self) -> int:
        """Bytes held by the factors and the promoted problem."""
        return self._inner.nbytes + self.problem.nbytes
