"""Backward errors of solutions of (H + εI)x = g, by products that do not use the factors."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from linop_hess.lq.accuracy import NORM_SETTLED
from linop_hess.lq.analysis import Analysis
from linop_hess.lq.matrix.many_columns import ManyColumns
from linop_hess.lq.methods.base import Factorization
from linop_hess.lq.solve.right_hand_side import norms

# Columns that one product tells of, which is their rounding in all taken for that of each.
_TOGETHER = 32


class Certificate:
    """Measures ‖g − (H + εI)x‖ / (‖H + εI‖‖x‖ + ‖g‖).

    Parameters
    ----------
    analysis : Analysis
    damping : complex
        ε.

    Attributes
    ----------
    norm : float
        ‖H + εI‖ from below, as far as it is known: from each product, and once settled by power iteration.
    is_settled : bool
    """

    def __init__(self, analysis: Analysis, damping: complex) -> None:
        self._analysis, self._damping = analysis, damping
        v, product = analysis.probe
        self.norm = float(norms(product + damping * v).max())
        self.is_settled = False

    def settle(self) -> None:
        """Find ‖H + εI‖ by power iteration."""
        self.norm = max(self.norm, self._analysis.damped_norm(self._damping, settled=NORM_SETTLED))
        self.is_settled = True

    def product(self, x: Tensor, factors: Factorization) -> Tensor:
        """(H + εI) x for x of shape (N, k), in the precision of the factors."""
        analysis, x = self._in_precision(x, factors)
        if self._has_many(factors):
            return analysis.once(ManyColumns).product(x, self._damping.real)
        return analysis.problem.hessian_product(x, self._damping)

    def measured(self, g: Tensor, x: Tensor, factors: Factorization, tolerance: float) -> tuple[float, Tensor, Tensor]:
        """Return the largest backward error of the columns of x, the norms of their residuals, and these.

        The norm is settled only if the error exceeds the tolerance without that.
        """
        by_matrix = self._by_matrix(x, factors)
        product = self.product(x, factors)
        r = g - product
        residuals = norms(r)
        sizes = torch.stack([residuals, norms(product), norms(x), norms(g)]).cpu().numpy()
        size_r, size_product, size_x, size_g = sizes
        growth = size_product[size_x > 0] / size_x[size_x > 0]
        if growth.size and math.isfinite(bound := float(growth.max())):
            self.norm = max(self.norm, bound)
        error = self._ratio(size_r, size_x, size_g)
        if not error <= tolerance and not self.is_settled:
            self.settle()
            error = self._ratio(size_r, size_x, size_g)
        if by_matrix is not None and math.isfinite(error):
            off = self._off(x, product, self.norm * size_x + size_g, factors)
            if not off <= tolerance:
                by_matrix.is_trusted = False
                return self.measured(g, x, factors, tolerance)
            error += off
        return error, residuals, r

    def _in_precision(self, x: Tensor, factors: Factorization) -> tuple[Analysis, Tensor]:
        """The analysis in the precision of the factors, and x in that."""
        is_own = factors.analysis.problem.dtype == self._analysis.problem.dtype
        analysis = self._analysis if is_own and not isinstance(self._damping, complex) else self._analysis.in_float64
        return analysis, x if x.is_complex() else x.to(analysis.problem.dtype)

    def _has_many(self, factors: Factorization) -> bool:
        """Whether blocks may be multiplied by a dense matrix: at real dampings, where there are factors of one."""
        return factors.method == "dense" and not isinstance(self._damping, complex)

    def _by_matrix(self, x: Tensor, factors: Factorization) -> ManyColumns | None:
        """What will multiply x by a dense matrix, if that is how it will be multiplied."""
        if not self._has_many(factors):
            return None
        found = self._in_precision(x, factors)[0].once(ManyColumns)
        return found if found.takes_matrix(x.shape[1]) else None

    def _off(self, x: Tensor, product: Tensor, scale: np.ndarray, factors: Factorization) -> float:
        """What products by a dense matrix are off, each relative to the scale of its column.

        Of so many columns at a time it is told by one product by stages, with their sum of random signs: the root of the sum of their
        squares, which is more than the largest. The largest of these.
        """
        analysis, x = self._in_precision(x, factors)
        signs = np.random.default_rng(0).choice([-1.0, 1.0], scale.size)
        weights = torch.from_numpy(np.divide(signs, scale, out=np.zeros(scale.size), where=scale > 0)).to(x)
        parts = list(zip(x.split(_TOGETHER, 1), product.split(_TOGETHER, 1), weights.split(_TOGETHER), strict=True))
        sums = torch.stack([part @ w for part, _, w in parts], 1)
        gaps = analysis.problem.hessian_product(sums, self._damping) - torch.stack(
            [part @ w for _, part, w in parts], 1
        )
        return float(norms(gaps).max())

    def _ratio(self, size_r: np.ndarray, size_x: np.ndarray, size_g: np.ndarray) -> float:
        scale = self.norm * size_x + size_g
        error = float(np.divide(size_r, scale, out=size_r.copy(), where=scale > 0).max(initial=0.0))
        return error if math.isfinite(error) else math.inf
