"""The last stage of a chain: a scalar objective of the state before it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from linop_hess.lq.accuracy import ROUNDED
from linop_hess.lq.stages.base import Stage, entries_of


@dataclass(frozen=True)
class ObjectiveStage(Stage):
    """δ_out = rowᵀ δ_in, with curvature block diagonal over m samples; its adjoint is 1, so that the curvature is given.

    Parameters
    ----------
    row : Tensor, shape (1, n_in)
        Gradient of the objective.
    c : Tensor, shape (1, m, i, i)
        Its Hessian, m · i = n_in.
    """

    row: Tensor
    c: Tensor

    @property
    def n_in(self) -> int:
        return self.row.shape[1]

    @property
    def n_out(self) -> int:
        return 1

    @property
    def p(self) -> int:
        return 0

    @property
    def samples(self) -> int:
        """The blocks of its Hessian; F adds them up."""
        return max(1, self.c.shape[1])

    @property
    def nonzero(self) -> frozenset[str]:
        return frozenset("C")

    def F(self, d: Tensor) -> Tensor:
        return self.row[:, None, :] @ d

    def Ft(self, y: Tensor) -> Tensor:
        return self.row[:, :, None] @ y

    def rows_by_sample(self) -> Tensor:
        m = self.samples
        return torch.diag_embed(self.row.view(1, m, -1).mT).permute(0, 2, 1, 3).reshape(1, self.n_in, m)

    def C(self, d: Tensor) -> Tensor:
        m, i = self.c.shape[1:3]
        return (self.c @ d.reshape(1, m, i, d.shape[-1])).reshape(d.shape)

    def gauss_newton(self) -> Self:
        return self

    def of_samples(self, start: int, stop: int, samples: int) -> Self:
        states, each = self.n_in // samples, self.c.shape[1] // samples
        row = self.row[:, start * states : stop * states]
        return replace(self, row=row, c=self.c[:, start * each : stop * each])

    def of_chosen(self, which: Tensor, weights: Tensor, samples: int) -> Self:
        at, weight = entries_of(which, weights, self.n_in // samples, self.row)
        blocks, of_block = entries_of(which, weights, self.c.shape[1] // samples, self.c)
        return replace(self, row=self.row[:, at] * weight, c=self.c[:, blocks] * of_block[:, None, None])

    def entries(self, block: str) -> int:
        return self.n_in * {"F": 1, "G": 0, "B": 0, "C": self.c.shape[-1]}[block]

    def to(self, dtype: torch.dtype) -> Self:
        """As of any stage; what rounding in a lower precision left of eigenvalues of C that are zero is taken off."""
        stage = super().to(dtype)
        rounding = ROUNDED * self.c.shape[-1] * torch.finfo(self.dtype).eps
        if torch.finfo(dtype).eps >= torch.finfo(self.dtype).eps or not self.c.numel():
            return stage
        values, vectors = torch.linalg.eigh(stage.c)
        values = torch.where(values.abs() > rounding * values.abs().max(), values, 0.0)
        c = (vectors * values[..., None, :]) @ vectors.mT
        return replace(stage, c=(c + c.mT) / 2)
