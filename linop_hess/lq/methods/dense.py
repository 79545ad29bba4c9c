"""Method "dense": H + εI formed from the structure of its stages and factored; for few controls at any batch, and the last resort."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from linop_hess.errors import SingularPivotError
from linop_hess.lq.accuracy import ASSEMBLED
from linop_hess.lq.analysis import Analysis
from linop_hess.lq.iterative.convergence import product_seconds
from linop_hess.lq.matrix.hessian import copies, counted, fresh
from linop_hess.lq.methods.base import EVERYTHING, Congruence, Cost, Method, Tally
from linop_hess.lq.pivots.bunch_kaufman import SymmetricFactor

# Products that tell how far rounding moves H.
_PRODUCTS = 2

_COLUMNS_AT_ONCE = 512


class DenseFactorization(Congruence):
    """Bunch-Kaufman factorization of the dense H + εI.

    Raises
    ------
    SingularPivotError
        If H + εI is singular to working precision.
    """

    method = "dense"
    growth = 0.0

    def __init__(self, analysis: Analysis, damping: complex) -> None:
        self.analysis, self.damping = analysis.over(damping), damping
        real = self.analysis.real
        H = fresh(real, real.problem.dtype).to(self.analysis.problem.dtype)
        H.diagonal().add_(damping)
        self._factor = SymmetricFactor.of(H, is_own=True)
        if H.numel() and self._factor.smallest_pivot_ratio <= 4 * torch.finfo(H.dtype).eps:
            raise SingularPivotError(None)

    @property
    def theta(self) -> Tensor:
        return self._factor.theta

    def whiten(self, g: Tensor) -> Tensor:
        return self._factor.whiten(g)

    def unwhiten(self, w: Tensor) -> Tensor:
        return self._factor.unwhiten(w)

    def diagonal(self) -> Tensor:
        """Diagonal of (H + εI)⁻¹, shape (N,): D⁻¹ seen through L⁻¹, some columns at a time."""
        N, theta = self.analysis.problem.size, self.theta
        parts = [theta.new_zeros(0)]
        for start in range(0, N, _COLUMNS_AT_ONCE):
            half = self.whiten(_unit_columns(theta, np.arange(start, min(start + _COLUMNS_AT_ONCE, N))))
            parts.append((half.square() / theta[:, None]).sum(0))
        return torch.cat(parts)

    def blocks(self) -> list[Tensor]:
        """Diagonal blocks of (H + εI)⁻¹, one of shape (p, p) per stage with controls."""
        layout = self.analysis.problem.layout
        halves = (self.whiten(_unit_columns(self.theta, layout.controls(l))) for l in np.flatnonzero(layout.p).tolist())
        return [half.mT @ (half / self.theta[:, None]) for half in halves]

    @property
    def nbytes(self) -> int:
        return self._factor.nbytes


def _unit_columns(like: Tensor, which: np.ndarray) -> Tensor:
    """Columns of the identity, of the order of `like`."""
    unit = like.new_zeros(like.numel(), which.size)
    unit[torch.from_numpy(which).to(like.device), torch.arange(which.size, device=like.device)] = 1.0
    return unit


def factor(analysis: Analysis, damping: complex) -> DenseFactorization:
    """Form and factor H + εI.

    Raises
    ------
    SingularPivotError
        If what is left of H after cancelling is rounding that the damping does not exceed.
    """
    scale = max(analysis.norm, abs(damping))
    if isinstance(damping, complex):
        analysis = analysis.in_float64
    if analysis.rounding > ASSEMBLED * torch.finfo(analysis.problem.dtype).eps * scale:
        raise SingularPivotError(None)
    return DenseFactorization(analysis, damping)


def estimate(analysis: Analysis) -> Cost:
    """The assembly, and N³/3 flops; in memory that of the assembly or, where more, H beside H where that is kept."""
    problem, tally = analysis.problem, Tally(analysis.problem.dtype)
    N, item = float(problem.size), problem.dtype.itemsize
    assembly = analysis.once(counted)
    tally.calls(assembly.calls)
    tally.kernel("gemm", assembly.flops, (assembly.inner * max(N, 1.0)) ** 0.5)
    tally.kernel("ldl", N**3 / 3, N)
    tally.moved(item * 16 * N**2 + assembly.moved)
    factoring = copies(problem, problem.dtype) * N**2 * item
    products = _PRODUCTS * product_seconds(analysis)
    return Cost(tally.flops, max(assembly.nbytes, factoring), tally.seconds + products)


METHOD = Method("dense", factor, estimate, EVERYTHING, is_complex=True, of_matrix=True)
