"""The stage at which a chain begins to move: its input is given, so that no state lies before it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from linop_hess.lq.stages.base import SampleRows, Stage
from linop_hess.lq.stages.row_space import RowSpace


@dataclass(frozen=True)
class InitialStage(Stage):
    """The controls of the stages `inner` alone: n_in = 0, and B and C play no part.

    What precedes the first controls of a chain never moves, so neither F nor a derivative by its input is needed.
    """

    inner: Stage

    @property
    def n_in(self) -> int:
        return 0

    @property
    def n_out(self) -> int:
        return self.inner.n_out

    @property
    def p(self) -> int:
        return self.inner.p

    @property
    def samples(self) -> int:
        return self.inner.samples

    @property
    def nonzero(self) -> frozenset[str]:
        return self.inner.nonzero & {"A"}

    def F(self, d: Tensor) -> Tensor:
        return d.new_zeros(self.count, self.n_out, d.shape[-1])

    def Ft(self, y: Tensor) -> Tensor:
        return y.new_zeros(self.count, 0, y.shape[-1])

    def G(self, x: Tensor) -> Tensor:
        return self.inner.G(x)

    def Gt(self, y: Tensor) -> Tensor:
        return self.inner.Gt(y)

    def A(self, x: Tensor) -> Tensor:
        return self.inner.A(x)

    def with_adjoint(self, beta: Tensor) -> Self:
        return replace(self, inner=self.inner.with_adjoint(beta))

    def gauss_newton(self) -> Self:
        return replace(self, inner=self.inner.gauss_newton())

    def row_space(self) -> RowSpace:
        return self.inner.row_space()

    def of_samples(self, start: int, stop: int, samples: int) -> Self:
        return replace(self, inner=self.inner.of_samples(start, stop, samples))

    def sample_rows(self, samples: int) -> SampleRows | None:
        rows = self.inner.sample_rows(samples)
        return None if rows is None else replace(rows, beta=None)

    def G_columns(self, start: int, stop: int) -> Tensor:
        return self.inner.G_columns(start, stop)

    def Gt_each(self, y: Tensor, samples: int) -> Tensor:
        return self.inner.Gt_each(y, samples)

    def entries(self, block: str) -> int:
        return self.inner.entries(block) if block == "G" else 0
