"""Method "dense": H + εI formed as a matrix and factored; for few controls, and the last resort."""

from __future__ import annotations

import torch
from torch import Tensor

from linop_hess.errors import SingularPivotError
from linop_hess.lq.analysis import Analysis
from linop_hess.lq.methods.base import EVERYTHING, Congruence, Cost, Method
from linop_hess.lq.pivots.bunch_kaufman import SymmetricFactor
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


# Up to so many bytes H is kept for other dampings.
_KEPT_UP_TO = 64 << 20


def assembled(analysis: Analysis) -> Tensor:
    """H as a dense matrix, shape (N, N), read only: kept for all dampings where it is small."""
    problem = analysis.problem
    small = problem.size**2 * problem.dtype.itemsize <= _KEPT_UP_TO
    return analysis.once(_assemble) if small else _assemble(analysis)


def _assemble(analysis: Analysis) -> Tensor:
    return assemble(analysis.problem)


class DenseFactorization(Congruence):
    """Bunch-Kaufman factorization of the dense H + εI.

    Raises
    ------
    SingularPivotError
        If H + εI is singular to working precision.
    """

    method = "dense"
    growth = 0.0

    def __init__(self, analysis: Analysis, damping: float) -> None:
        self.analysis, self.damping = analysis, damping
        H = assembled(analysis).clone()
        H.diagonal().add_(damping)
        self._factor = SymmetricFactor.of(H)
        if H.numel() and self._factor.smallest_pivot_ratio <= 4 * torch.finfo(H.dtype).eps:
            raise SingularPivotError(None)

    @property
    def theta(self) -> Tensor:
        return self._factor.theta

    def whiten(self, g: Tensor) -> Tensor:
        return self._factor.whiten(g)

    def unwhiten(self, w: Tensor) -> Tensor:
        return self._factor.unwhiten(w)

    @property
    def nbytes(self) -> int:
        return self._factor.nbytes


def factor(analysis: Analysis, damping: float) -> DenseFactorization:
    """Form and factor H + εI."""
    return DenseFactorization(analysis, damping)


def estimate(analysis: Analysis) -> Cost:
    """N products and N³/3 flops."""
    layout = analysis.problem.layout
    N = float(layout.size)
    item = analysis.problem.numpy_dtype.itemsize
    flops = N**3 / 3
    products = N * (4.0 * N + 8.0 * float((layout.n_in * layout.n_out).sum()))
    return Cost(flops + products, 4.0 * N**2 * item, 1e-3 + flops / 1e10 + products / 1e9)


METHOD = Method("dense", factor, estimate, EVERYTHING)
