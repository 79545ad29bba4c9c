"""Stages that act on every entry of the state by itself: pointwise functions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from linop_hess.lq.stages.base import Stage, entries_of


@dataclass(frozen=True)
class DiagonalStage(Stage):
    """K stages without controls, δ_out = f ∘ δ_in with curvature diag(c).

    Parameters
    ----------
    f : Tensor, shape (K, n)
        First derivative of the function at each entry.
    c : Tensor or None, shape (K, n)
        None: C = 0.
    second : Tensor or None, shape (K, n)
        Second derivative, by which an adjoint β has the curvature c = β ∘ second; None where c is given, or zero.
    """

    f: Tensor
    c: Tensor | None = None
    second: Tensor | None = None

    @property
    def n_in(self) -> int:
        return self.f.shape[1]

    @property
    def n_out(self) -> int:
        return self.f.shape[1]

    @property
    def p(self) -> int:
        return 0

    @property
    def samples(self) -> int:
        """The number of entries, each of which is by itself."""
        return max(1, self.f.shape[1])

    @property
    def nonzero(self) -> frozenset[str]:
        return frozenset() if self.c is None else frozenset("C")

    def F(self, d: Tensor) -> Tensor:
        return self.f[:, :, None] * d

    def Ft(self, y: Tensor) -> Tensor:
        return self.f[:, :, None] * y

    def C(self, d: Tensor) -> Tensor:
        return super().C(d) if self.c is None else self.c[:, :, None] * d

    def with_adjoint(self, beta: Tensor) -> Self:
        return self if self.second is None else replace(self, c=self.second * beta)

    def gauss_newton(self) -> Self:
        return replace(self, c=None)

    def dense_F(self) -> Tensor:
        return torch.diag_embed(self.f)

    def dense_C(self) -> Tensor:
        return super().dense_C() if self.c is None else torch.diag_embed(self.c)

    def of_samples(self, start: int, stop: int, samples: int) -> Self:
        each = self.f.shape[1] // samples
        part = slice(start * each, stop * each)
        return replace(
            self,
            f=self.f[:, part],
            c=None if self.c is None else self.c[:, part],
            second=None if self.second is None else self.second[:, part],
        )

    def of_chosen(self, which: Tensor, weights: Tensor, samples: int) -> Self:
        at, weight = entries_of(which, weights, self.f.shape[1] // samples, self.f)
        return replace(self, f=self.f[:, at], c=None if self.c is None else self.c[:, at] * weight, second=None)

    def entries(self, block: str) -> int:
        return self.f.shape[1] if block in "FC" else 0

    def calls(self, block: str) -> int:
        return 2

    def pull_back(self, V: Tensor) -> Tensor:
        return self._pulled_back(V * self.f[0, :, None])

    def pull_back_over(self, V: Tensor) -> Tensor:
        return self._pulled_back(V.mul_(self.f[0, :, None]))

    def _pulled_back(self, rows: Tensor) -> Tensor:
        """FᵀVF + C from FᵀV, in its memory."""
        out = rows.mul_(self.f[0])
        if self.c is not None:
            out.diagonal().add_(self.c[0])
        return out
