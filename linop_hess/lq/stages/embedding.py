"""Stages whose output rows are selected rows of their controls: embeddings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from linop_hess.lq.stages.base import Stage, entries_of
from linop_hess.lq.stages.row_space import IdentityRowSpace, RowSpace


@dataclass(frozen=True)
class EmbeddingStage(Stage):
    """One stage y_b = X[index_b] without input state; the controls are the rows of X.

    Parameters
    ----------
    like : Tensor, shape (1, 0)
        Carries dtype and device.
    index, mask : Tensor, shape (1, b)
        The row each output takes, and 0 where it depends on no control.
    distinct : Tensor of int, shape (1, r)
        The rows that occur.
    place : Tensor of int, shape (1, b)
        Where each index stands in `distinct`.
    vocabulary, width : int
        Shape of X; vocabulary 0 where X is constant.
    """

    like: Tensor
    index: Tensor
    mask: Tensor
    distinct: Tensor
    place: Tensor
    vocabulary: int
    width: int

    @classmethod
    def of(cls, X: Tensor, index: Tensor, seen: Tensor, trainable: bool) -> Self:
        """Build from the table, the indices, and which of them are differentiated."""
        distinct, place = torch.unique(index, return_inverse=True)
        vocabulary = X.shape[0] if trainable else 0
        mask = seen.to(X.dtype)
        return cls(X.new_zeros(1, 0), index[None], mask[None], distinct[None], place[None], vocabulary, X.shape[1])

    @property
    def n_in(self) -> int:
        return 0

    @property
    def n_out(self) -> int:
        return self.index.shape[1] * self.width

    @property
    def p(self) -> int:
        return self.vocabulary * self.width

    @property
    def samples(self) -> int:
        """The number of outputs."""
        return max(1, self.index.shape[1])

    def F(self, d: Tensor) -> Tensor:
        return d.new_zeros(1, self.n_out, d.shape[-1])

    def Ft(self, y: Tensor) -> Tensor:
        return y.new_zeros(1, 0, y.shape[-1])

    def G(self, x: Tensor) -> Tensor:
        if not self.p:
            return super().G(x)
        rows = x.reshape(self.vocabulary, self.width, -1)[self.index[0]] * self.mask[0, :, None, None]
        return rows.reshape(1, self.n_out, -1)

    def Gt(self, y: Tensor) -> Tensor:
        if not self.p:
            return super().Gt(y)
        k = y.shape[-1]
        rows = y.reshape(-1, self.width, k) * self.mask[0, :, None, None]
        return y.new_zeros(self.vocabulary, self.width, k).index_add_(0, self.index[0], rows).reshape(1, self.p, k)

    def gauss_newton(self) -> Self:
        return self

    def of_samples(self, start: int, stop: int, samples: int) -> Self:
        each = self.index.shape[1] // samples
        part = slice(start * each, stop * each)
        return replace(self, index=self.index[:, part], mask=self.mask[:, part], place=self.place[:, part])

    def of_chosen(self, which: Tensor, weights: Tensor, samples: int) -> Self:
        at, _ = entries_of(which, weights, self.index.shape[1] // samples, self.mask)
        return replace(self, index=self.index[:, at], mask=self.mask[:, at], place=self.place[:, at])

    def Gt_each(self, y: Tensor, samples: int) -> Tensor:
        k, outputs = y.shape[-1], self.index.shape[1]
        out = y.new_zeros(samples * self.vocabulary, self.width, k)
        if self.p:
            sample = torch.arange(samples, device=y.device).repeat_interleave(outputs // samples)
            rows = y.reshape(outputs, self.width, k) * self.mask[0, :, None, None]
            out.index_add_(0, sample * self.vocabulary + self.index[0], rows)
        return out.view(samples, self.p, k)

    def entries(self, block: str) -> int:
        return self.n_out if block == "G" else 0

    def calls(self, block: str) -> int:
        return super().calls(block) if block == "G" and self.p else 1

    def row_space(self) -> RowSpace:
        if not self.p:
            return IdentityRowSpace(self)
        return EmbeddingRowSpace(self.distinct, self.place, self.mask, self.vocabulary, self.width)


@dataclass(frozen=True)
class EmbeddingRowSpace(RowSpace):
    """s = the rows that occur."""

    distinct: Tensor
    place: Tensor
    mask: Tensor
    vocabulary: int
    width: int

    @property
    def r(self) -> int:
        return self.distinct.shape[1] * self.width

    @property
    def hidden(self) -> int:
        return self.vocabulary * self.width - self.r

    @property
    def coupled(self) -> bool:
        return False

    def Q(self, s: Tensor) -> Tensor:
        k = s.shape[-1]
        x = s.new_zeros(self.vocabulary, self.width, k)
        x[self.distinct[0]] = s.reshape(-1, self.width, k)
        return x.reshape(1, -1, k)

    def Qt(self, x: Tensor) -> Tensor:
        k = x.shape[-1]
        return x.reshape(self.vocabulary, self.width, k)[self.distinct[0]].reshape(1, self.r, k)

    def R(self, s: Tensor) -> Tensor:
        k = s.shape[-1]
        rows = s.reshape(-1, self.width, k)[self.place[0]] * self.mask[0, :, None, None]
        return rows.reshape(1, -1, k)

    def Rt(self, y: Tensor) -> Tensor:
        k = y.shape[-1]
        rows = y.reshape(-1, self.width, k) * self.mask[0, :, None, None]
        out = y.new_zeros(self.distinct.shape[1], self.width, k)
        return out.index_add_(0, self.place[0], rows).reshape(1, self.r, k)

    def QtB(self) -> Tensor:
        return self.mask.new_zeros(1, self.r, 0)

    def hidden_coupling(self) -> Tensor:
        return self.mask.new_zeros(1, 0, 0)

    def hidden_directions(self, W: Tensor) -> Tensor:
        return W.new_zeros(1, self.vocabulary * self.width, W.shape[-1])
