"""Products of H and many columns: by its stages or, once these have taken as long as forming it, by the dense matrix.

A product by stages costs the same for each column, in proportion to the samples; one by the matrix 2N² flops a column. Who solves for many
right-hand sides by method "dense" has memory for N² numbers, but no such matrix: factors in single precision were made of another one, and
those in double precision have overwritten it.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

from linop_hess._memory import available_on
from linop_hess.errors import SingularPivotError
from linop_hess.lq.analysis import Analysis
from linop_hess.lq.iterative.convergence import product_seconds
from linop_hess.lq.matrix.hessian import counted, kept
from linop_hess.lq.methods.base import Tally

# Fewer columns are multiplied by stages: for these the matrix is memory to be read, and nothing more.
_FEW = 4
# The matrix is kept where it takes no more of the memory that there is.
_SHARE = 0.25


class ManyColumns:
    """Products with H of a real problem in float64, by whichever way is faster for what has been asked so far, by all threads.

    Parameters
    ----------
    analysis : Analysis

    Attributes
    ----------
    spent : float
        Modelled seconds of the products by stages that a matrix would have taken the place of.
    is_trusted : bool
        Whether the matrix is: all is multiplied by stages where it has been found to be another one than theirs.
    """

    def __init__(self, analysis: Analysis) -> None:
        self._analysis, self.spent, self.is_trusted = analysis, 0.0, True
        self._lock = threading.Lock()
        problem = analysis.problem
        # All processes must choose alike: by the time of the first.
        price = _forming_seconds(analysis) if problem.dtype == torch.float64 else math.inf
        self._price = problem.processes.from_first(price)

    def product(self, x: Tensor, damping: float) -> Tensor:
        """(H + εI) x for x of shape (N, k)."""
        return self.product_and_way(x, damping)[0]

    def product_and_way(self, x: Tensor, damping: float) -> tuple[Tensor, bool]:
        """The same, and whether it was the matrix that multiplied."""
        if x.shape[1] >= _FEW:
            with self._lock:  # one thread forms the matrix, and the others wait for it
                if (H := self._matrix()) is None:
                    self.spent += product_seconds(self._analysis, columns=x.shape[1])
            if H is not None:
                return (H @ x).add_(x, alpha=damping), True
        return self._analysis.problem.hessian_product(x, damping), False

    def _matrix(self) -> Tensor | None:
        """H as a dense matrix where that is to multiply."""
        if not self.is_trusted or not math.isfinite(self._price):
            return None
        if not self._analysis.has(kept):
            if self.spent <= self._price:
                return None
            if not self._fits():
                self._price = math.inf
                return None
        try:
            return self._analysis.once(kept)
        except (
            ArithmeticError,
            SingularPivotError,
        ):  # a defect of its assembly, or entries beyond the range: stages go on
            self.is_trusted = False
            return None

    def _fits(self) -> bool:
        """Whether the matrix, and what forming it takes, is no more than a share of the memory that each process has now."""
        problem = self._analysis.problem
        needed = max(8.0 * problem.size**2, self._analysis.once(counted).nbytes)
        return problem.processes.all_of(needed <= _SHARE * available_on(problem.device))


def _forming_seconds(analysis: Analysis) -> float:
    """Modelled time of an assembly of H."""
    tally, assembly = Tally(analysis.problem.dtype), analysis.once(counted)
    tally.calls(assembly.calls)
    tally.kernel("gemm", assembly.flops, (assembly.inner * max(analysis.problem.size, 1)) ** 0.5)
    tally.moved(assembly.moved)
    return tally.seconds
