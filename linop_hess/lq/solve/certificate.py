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
    lost_trust : bool
        Whether a dense matrix, by which columns were measured before, was found to be another one.
    """

    def __init__(self, analysis: Analysis, damping: complex) -> None:
        self._analysis, self._damping = analysis, damping
        v, product = analysis.probe
        self.norm = float(norms(product + damping * v).max())
        self.is_settled = self.lost_trust = False

    def settle(self) -> None:
        """Find ‖H + εI‖ by power iteration."""
        self.norm = max(self.norm, self._analysis.damped_norm(self._damping, settled=NORM_SETTLED))
        self.is_settled = True

    def product(self, x: Tensor, factors: Factorization) -> Tensor:
        """(H + εI) x for x of shape (N, k), in the precision of the factors."""
        return self._product(x, factors)[0]

    def _product(self, x: Tensor, factors: Factorization) -> tuple[Tensor, ManyColumns | None]:
        """The same, and what has multiplied by a dense matrix: at real dampings, where there are factors of one."""
        analysis, x = self._in_precision(x, factors)
        if factors.method != "dense" or isinstance(self._damping, complex):
            return analysis.problem.hessian_product(x, self._damping), None
        many = analysis.once(ManyColumns)
        product, is_by_matrix = many.product_and_way(x, self._damping)
        return product, many if is_by_matrix else None

    def measured(
        self, g: Tensor, x: Tensor, factors: Factorization, tolerance: float, *, is_judged: bool = True
    ) -> tuple[float, Tensor, Tensor]:
        """Return the largest backward error of the columns of x, the norms of their residuals, and these.

        The norm is settled only where the error, if it is to be judged by the tolerance, exceeds it without that, or what a dense matrix
        is off does.
        """
        known = self.norm, self.is_settled
        product, many = self._product(x, factors)
        r = g - product
        residuals = norms(r)
        sizes = torch.stack([residuals, norms(product), norms(x), norms(g)]).cpu().numpy()
        size_r, size_product, size_x, size_g = sizes
        growth = size_product[size_x > 0] / size_x[size_x > 0]
        if growth.size and math.isfinite(bound := float(growth.max())):
            self.norm = max(self.norm, bound)
        error, off = self._ratio(size_r, size_x, size_g), 0.0
        if many is not None and math.isfinite(error):
            off = self._off(x, product, self.norm * size_x + size_g, factors)
        settles = is_judged and not error + off <= tolerance
        if not self.is_settled and (settles or not off <= tolerance):
            self.settle()
            error = self._ratio(size_r, size_x, size_g)
            if many is not None and math.isfinite(error):
                off = self._off(x, product, self.norm * size_x + size_g, factors)
        if many is not None and (not off <= tolerance or error <= tolerance < error + off):
            many.is_trusted, self.lost_trust = False, True
            self.norm, self.is_settled = known  # no norm of another matrix
            return self.measured(g, x, factors, tolerance, is_judged=is_judged)
        return error + off, residuals, r

    def _in_precision(self, x: Tensor, factors: Factorization) -> tuple[Analysis, Tensor]:
        """The analysis in the precision of the factors, and x in that."""
        is_own = factors.analysis.problem.dtype == self._analysis.problem.dtype
        analysis = self._analysis if is_own and not isinstance(self._damping, complex) else self._analysis.in_float64
        return analysis, x if x.is_complex() else x.to(analysis.problem.dtype)

    def _off(self, x: Tensor, product: Tensor, scale: np.ndarray, factors: Factorization) -> float:
        """What products by a dense matrix are off, each relative to the scale of its column.

        Of so many columns at a time it is told by two products by stages, with the real and imaginary parts of their sum with random
        phases: the root of the sum of their squares where they are off in different directions, which is more than the largest, and
        where all are in the same, as copies of one column are, of any signs, all but never much less. The largest of these.
        """
        analysis, x = self._in_precision(x, factors)
        angles = np.random.default_rng(0).uniform(0.0, 2.0 * np.pi, scale.size)
        phases = np.stack([np.cos(angles), np.sin(angles)], 1)
        weights = torch.from_numpy(
            np.divide(phases, scale[:, None], out=np.zeros_like(phases), where=scale[:, None] > 0)
        )
        parts = list(zip(*(part.split(_TOGETHER, -1) for part in (x, product, weights.T.to(x))), strict=True))
        sums = torch.cat([part @ w.mT for part, _, w in parts], 1)
        gaps = analysis.problem.hessian_product(sums, self._damping) - torch.cat(
            [part @ w.mT for _, part, w in parts], 1
        )
        return float(norms(gaps).view(-1, 2).norm(dim=1).max())

    def _ratio(self, size_r: np.ndarray, size_x: np.ndarray, size_g: np.ndarray) -> float:
        scale = self.norm * size_x + size_g
        error = float(np.divide(size_r, scale, out=size_r.copy(), where=scale > 0).max(initial=0.0))
        return error if math.isfinite(error) else math.inf
