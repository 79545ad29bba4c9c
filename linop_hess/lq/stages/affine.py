"""Stages bilinear in controls and state: y_b = W z_b + w₀ for every row b, controls [W, w₀].

Linear layers, and through `lq.rearranged` convolutions and embeddings. A = 0 and C = 0, and every block is a
Kronecker product, so nothing of size p × p is ever formed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from linop_hess.lq.stages.affine_row_space import bilinear_split
from linop_hess.lq.stages.base import Stages
from linop_hess.lq.stages.row_space import RangeSplit


@dataclass(frozen=True)
class BilinearStages(Stages):
    """K stages z ↦ W z + w₀ on b rows; the controls are W (row-major) and w₀, or either alone.

    F = I_b ⊗ W;  G [X, x₀] = rows X z_b + x₀;  B δ = Σ_b β_b δ_bᵀ (in the rows of W).

    Parameters
    ----------
    W : Tensor, shape (K, o, i)
    Z : Tensor, shape (K, b, i)
        The rows the stage was linearized at.
    beta : Tensor or None, shape (K, b, o)
        Adjoint of the output rows; None: B = 0.
    weight, bias : bool
        Whether W, and whether w₀, is a control.
    """

    W: Tensor
    Z: Tensor
    beta: Tensor | None
    weight: bool
    bias: bool

    @property
    def count(self) -> int:
        return self.W.shape[0]

    @property
    def rows(self) -> int:
        """Number of rows b."""
        return self.Z.shape[1]

    @property
    def n_in(self) -> int:
        return self.Z.shape[1] * self.W.shape[2]

    @property
    def n_out(self) -> int:
        return self.Z.shape[1] * self.W.shape[1]

    @property
    def p(self) -> int:
        o, i = self.W.shape[1:]
        return o * (i * self.weight + self.bias)

    @property
    def dtype(self) -> torch.dtype:
        return self.W.dtype

    @property
    def device(self) -> torch.device:
        return self.W.device

    def F(self, d: Tensor) -> Tensor:
        return _map_rows(self.W, d, self.rows)

    def Ft(self, y: Tensor) -> Tensor:
        return _map_rows(self.W.mT, y, self.rows)

    def dense_F(self) -> Tensor:
        (K, o, i), b = self.W.shape, self.rows
        blocks = self.W.new_zeros(K, b, o, b, i)
        blocks.diagonal(dim1=1, dim2=3).copy_(self.W[..., None].expand(K, o, i, b))
        return blocks.view(K, b * o, b * i)

    def _weight_part(self, x: Tensor) -> Tensor:
        """The rows of W in x: (K, p, k) to (K, o, i, k)."""
        K, o, i = self.W.shape
        return x[:, : o * i].reshape(K, o, i, x.shape[-1])

    def G(self, x: Tensor) -> Tensor:
        (K, o, i), k = self.W.shape, x.shape[-1]
        y = x.new_zeros(K, self.rows, o, k)
        if self.weight:
            X = self._weight_part(x)
            if k == 1:
                y = (self.Z @ X[..., 0].mT)[..., None]
            else:
                y = (self.Z @ X.transpose(1, 2).reshape(K, i, o * k)).view(K, self.rows, o, k)
        if self.bias:
            y = y + x[:, x.shape[1] - o :][:, None]
        return y.reshape(K, self.rows * o, k)

    def Gt(self, y: Tensor) -> Tensor:
        (K, o, i), k = self.W.shape, y.shape[-1]
        Y = y.reshape(K, self.rows, o, k)
        parts = []
        if self.weight:
            if k == 1:
                X = Y[..., 0].mT @ self.Z
            else:
                X = (self.Z.mT @ Y.reshape(K, self.rows, o * k)).view(K, i, o, k).transpose(1, 2)
            parts.append(X.reshape(K, o * i, k))
        if self.bias:
            parts.append(Y.sum(1))
        return torch.cat(parts, 1) if parts else super().Gt(y)

    def B(self, d: Tensor) -> Tensor | None:
        if self.beta is None or not self.weight:
            return None
        (K, o, i), k = self.W.shape, d.shape[-1]
        X = self.beta.mT @ d.reshape(K, self.rows, i * k)
        if not self.bias:
            return X.reshape(K, o * i, k)
        out = d.new_zeros(K, self.p, k)
        out[:, : o * i] = X.reshape(K, o * i, k)
        return out

    def Bt(self, x: Tensor) -> Tensor | None:
        if self.beta is None or not self.weight:
            return None
        (K, o, i), k = self.W.shape, x.shape[-1]
        return (self.beta @ self._weight_part(x).reshape(K, o, i * k)).reshape(K, self.n_in, k)

    def without_curvature(self) -> Self:
        return replace(self, beta=None)

    def range_split(self) -> RangeSplit:
        return bilinear_split(self.W, self.Z, self.beta, self.weight, self.bias)


def _map_rows(W: Tensor, d: Tensor, rows: int) -> Tensor:
    """(I ⊗ W) d with as few and as large matrix products as the shapes allow."""
    (K, o, i), k = W.shape, d.shape[-1]
    D = d.reshape(K, rows, i, k)
    if k == 1:
        y = D[..., 0] @ W.mT
    elif rows == 1 or K == 1:
        y = torch.matmul(W[:, None] if rows == 1 else W, D if rows == 1 else D[0])
    else:
        y = (W @ D.transpose(1, 2).reshape(K, i, rows * k)).view(K, o, rows, k).transpose(1, 2)
    return y.reshape(K, rows * o, k)
