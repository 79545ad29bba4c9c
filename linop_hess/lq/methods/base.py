"""What a factorization method gives back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from linop_hess.lq.problem import Problem


class Factorization(Protocol):
    """Factors of H + εI of `problem`."""

    method: str
    problem: Problem

    def solve(self, g: Tensor) -> Tensor:
        """(H + εI)⁻¹ g without refinement, g of shape (N, k)."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        ...


Factor = Callable[[Problem, float], Factorization]
"""What makes one: a problem and a damping."""
