"""Stages without a state before them: controls that become state, controls that nothing sees, and the first that moves.

A parameter that several stages use is injected before the first of them: as state it is read by each, and the Hessian of the chain is that
of the parameter, without any case of its own. Both kinds have no state before them; beside other states they are wired (`lq.stages.wired`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from linop_hess.lq.stages.base import SampleRows, Stage
from linop_hess.lq.stages.penalized import scaled
from linop_hess.lq.stages.row_space import DenseRowSpace, IdentityRowSpace, RowSpace


@dataclass(frozen=True)
class _Parametric(Stage):
    """K stages without a state before them and without curvature.

    Parameters
    ----------
    size : int
        Number of controls p.
    like : Tensor, shape (K, 1)
        Of the dtype and device, and as many as stages; its numbers mean nothing.
    """

    size: int
    like: Tensor

    @classmethod
    def of(
        cls, size: int, count: int = 1, *, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
    ) -> Self:
        """Make a stack of `count` stages with `size` controls each."""
        return cls(size, torch.zeros(count, 1, dtype=dtype, device=device))

    @property
    def n_in(self) -> int:
        return 0

    @property
    def p(self) -> int:
        return self.size

    def F(self, d: Tensor) -> Tensor:
        return d.new_zeros(self.count, self.n_out, d.shape[-1])

    def Ft(self, y: Tensor) -> Tensor:
        return y.new_zeros(self.count, 0, y.shape[-1])

    def gauss_newton(self) -> Self:
        return self

    def calls(self, block: str) -> int:
        return 2


@dataclass(frozen=True)
class InjectionStage(_Parametric):
    """K stages whose output is their controls: G = I, n_in = 0.

    Parameters
    ----------
    start : int
    stop : int or None
        Controls start..stop are the output; all but for a part of the samples.
    """

    start: int = 0
    stop: int | None = None

    @property
    def _seen(self) -> slice:
        return slice(self.start, self.size if self.stop is None else self.stop)

    @property
    def n_out(self) -> int:
        return self._seen.stop - self._seen.start

    @property
    def samples(self) -> int:
        """The number of outputs, each of which is by itself."""
        return max(1, self.n_out)

    def G(self, x: Tensor) -> Tensor:
        return x[:, self._seen].clone()  # which a caller may add to

    def Gt(self, y: Tensor) -> Tensor:
        if self.n_out == self.size:
            return y.clone()
        out = super().Gt(y)
        out[:, self._seen] = y
        return out

    def row_space(self) -> RowSpace:
        return IdentityRowSpace(self)

    def of_samples(self, start: int, stop: int, samples: int) -> Self:
        each = self.n_out // samples
        return replace(self, start=self.start + start * each, stop=self.start + stop * each)

    def Gt_each(self, y: Tensor, samples: int) -> Tensor:
        out = y.new_zeros(samples, self.size, y.shape[-1])
        own = out[:, self._seen].view(samples, samples, *y.shape[1:])
        own.diagonal(dim1=0, dim2=1).copy_(y.movedim(0, -1))
        return out

    def entries(self, block: str) -> int:
        return self.n_out if block == "G" else 0


@dataclass(frozen=True)
class IdleStage(_Parametric):
    """K stages whose controls nothing sees: n_in = n_out = 0 and r = 0, all of them hidden and none coupled."""

    @property
    def n_out(self) -> int:
        return 0

    @property
    def samples(self) -> int:
        """0: there is no state, so that any number is right."""
        return 0

    def row_space(self) -> RowSpace:
        nothing = self.like.new_zeros(self.count, self.size, 0)
        return DenseRowSpace(nothing, nothing[:, :0], nothing, curved=False)

    def in_units(self, t: Tensor) -> Self:
        return self

    def of_chosen(self, which: Tensor, weights: Tensor, samples: int) -> Self:
        return self

    def of_samples(self, start: int, stop: int, samples: int) -> Self:
        return self

    def entries(self, block: str) -> int:
        return 0


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

    def of_chosen(self, which: Tensor, weights: Tensor, samples: int) -> InitialStage | None:
        inner = self.inner.of_chosen(which, weights, samples)
        return None if inner is None else replace(self, inner=inner)

    def sample_rows(self, samples: int) -> SampleRows | None:
        rows = self.inner.sample_rows(samples)
        return None if rows is None else replace(rows, beta=None)

    def G_columns(self, start: int, stop: int) -> Tensor:
        return self.inner.G_columns(start, stop)

    def Gt_each(self, y: Tensor, samples: int) -> Tensor:
        return self.inner.Gt_each(y, samples)

    def entries(self, block: str) -> int:
        return self.inner.entries(block) if block == "G" else 0

    def calls(self, block: str) -> int:
        return 1 if block == "F" else self.inner.calls(block)

    def in_units(self, t: Tensor) -> Stage:
        return replace(self, inner=scaled(self.inner, t))
