"""Any method in double precision, for a problem given in single precision."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from linop_hess.lq.analysis import Analysis
from linop_hess.lq.methods.base import Factor


def promoted(factor: Factor) -> Factor:
    """Return the method that factors in float64, whatever the precision of the problem."""
    return partial(PromotedFactorization, factor)


class PromotedFactorization:
    """Factors of a float32 problem's H + εI, computed and applied in float64.

    Parameters
    ----------
    factor : Factor
        The method.
    analysis : Analysis
        Of the problem in float32; its twin in float64 is made once for all dampings.
    damping : float

    Raises
    ------
    SingularPivotError
        If H + εI is singular to double precision.
    """

    answers = frozenset({"solve"})

    def __init__(self, factor: Factor, analysis: Analysis, damping: complex) -> None:
        self.analysis, self.damping = analysis.in_float64, damping
        self.inner = factor(self.analysis, damping)
        self.method = self.inner.method

    @property
    def precision(self) -> torch.dtype:
        """What the factors are computed in."""
        return self.analysis.problem.dtype

    def solve(self, g: Tensor) -> Tensor:
        """(H + εI)⁻¹ g for g of shape (N, k), in float64 whatever comes."""
        return self.inner.solve(g.to(torch.float64))

    @property
    def nbytes(self) -> int:
        """Bytes held by the factors and the promoted problem."""
        return self.inner.nbytes + self.analysis.problem.nbytes
