"""Method "dense": H + εI formed column by column and factored; for few controls, and the last resort."""

from __future__ import annotations

import torch
from torch import Tensor

from linop_hess.lq.methods.cost import Cost
from linop_hess.lq.methods.singular import SingularPivotError
from linop_hess.lq.pivots.bunch_kaufman import Congruence
from linop_hess.lq.problem import Problem

_COLUMNS_AT_ONCE = 512


def assemble(problem: Problem) -> Tensor:
    """Form H, shape (N, N), by products with unit vectors."""
    N = problem.size
    H = torch.empty(N, N, dtype=problem.dtype, device=problem.device)
    for start in range(0, N, _COLUMNS_AT_ONCE):
        stop = min(start + _COLUMNS_AT_ONCE, N)
        unit = torch.zeros(N, stop - start, dtype=H.dtype, device=H.device)
        unit[torch.arange(start, stop), torch.arange(stop - start)] = 1.0
        H[:, start:stop] = problem.hessian_product(unit)
    return H


class DenseFactorization:
    """Bunch-Kaufman factorization of the dense H + εI.

    Raises
    ------
    SingularPivotError
        If H + εI is singular to working precision.
    """

    method = "dense"

    def __init__(self, problem: Problem, damping: float) -> None:
        self.problem = problem
        H = assemble(problem)
        H.diagonal().add_(damping)
        self._pivots = Congruence.of(H)
        if problem.size and self._pivots.smallest_pivot_ratio <= 4 * torch.finfo(H.dtype).eps:
            raise SingularPivotError(None)

    def solve(self, g: Tensor) -> Tensor:
        """(H + εI)⁻¹ g for g of shape (N, k)."""
        return self._pivots.solve(g)

    @property
    def nbytes(self) -> int:
        """Bytes held by the factors."""
        return self._pivots.nbytes


def factor(problem: Problem, damping: float) -> DenseFactorization:
    """Form and factor H + εI."""
    return DenseFactorization(problem, damping)


def estimate(problem: Problem) -> Cost:
    """N products and N³/3 flops."""
    N = float(problem.size)
    item = problem.numpy_dtype.itemsize
    flops = N**3 / 3
    products = N * (4.0 * N + 8.0 * float((problem.n_in * problem.n_out).sum()))
    return Cost(flops + products, 4.0 * N**2 * item, 1e-3 + flops / 1e10 + products / 1e9)
