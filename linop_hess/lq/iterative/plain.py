"""Method "iterative": GMRES on H + εI without a preconditioner, where that is the fastest: large dampings, few right-hand sides."""

from __future__ import annotations

import torch
from torch import Tensor

from linop_hess.lq.analysis import Analysis
from linop_hess.lq.iterative.convergence import (
    LEAST,
    PROBES,
    expected_iterations,
    least_iterations,
    orthogonalizing_seconds,
    product_of,
    product_seconds,
)
from linop_hess.lq.iterative.gmres import vectors_nbytes
from linop_hess.lq.iterative.options import Asked
from linop_hess.lq.methods.base import Cost, Method


class NoFactors:
    """The identity as factors: every solve is left to GMRES."""

    method = "iterative"
    answers = frozenset({"solve"})

    def __init__(self, analysis: Analysis, damping: float) -> None:
        self.analysis, self.damping = analysis, damping

    def solve(self, g: Tensor) -> Tensor:
        """G itself."""
        return g

    @property
    def precision(self) -> torch.dtype:
        """That of the problem."""
        return self.analysis.problem.dtype

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return 0


def forecast(analysis: Analysis, asked: Asked, worth: float) -> Cost:
    """Iterations times a product, for every right-hand side.

    The spectrum is looked at only where that could pay: while even a few iterations take less than `worth` seconds; else the cost is told
    as more than that.
    """
    each = product_seconds(analysis)
    flops, nbytes = analysis.once(product_of).flops, vectors_nbytes(analysis.problem, asked.right_hand_sides)
    least = asked.right_hand_sides * LEAST
    if (PROBES + least) * each >= worth:
        return Cost(least * flops, nbytes, (PROBES + least) * each, at_least=True)
    most = worth / (asked.right_hand_sides * each)
    told = asked.right_hand_sides * least_iterations(analysis, asked.damping, asked.tolerance, most)
    if told * each > worth:
        return Cost(told * flops, nbytes, told * each, at_least=True)
    iterations = expected_iterations(analysis, asked.damping, asked.tolerance)
    total = asked.right_hand_sides * iterations
    seconds = total * each + asked.right_hand_sides * orthogonalizing_seconds(analysis, iterations)
    return Cost(total * flops, nbytes, seconds, iterations=round(iterations))


METHOD = Method("iterative", NoFactors, None, NoFactors.answers, of_matrix=True, forecast=forecast)
