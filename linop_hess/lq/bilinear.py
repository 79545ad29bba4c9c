"""Stages bilinear in controls and state: y_b = W z_b + w₀ for every row b, controls [W, w₀].

Linear layers, and through `lq.rearranged` convolutions and embeddings. A = 0 and C = 0, and every block is a
Kronecker product, so nothing of size p × p is ever formed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from linop_hess.lq.rangesplit import RangeSplit
from linop_hess.lq.stages import Stages


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
        return _split(self)


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


def _split(stages: BilinearStages) -> BilinearSplit:
    """Range split from the rows Z̃ = [Z, 1] alone: G = (ρ ⊗ I)(Q_wᵀ ⊗ I) with Z̃ = ρ Q_wᵀ."""
    parts = []
    if stages.weight:
        parts.append(stages.Z)
    if stages.bias:
        parts.append(stages.Z.new_ones(stages.count, stages.rows, 1))
    rows = torch.cat(parts, 2)
    b, c = rows.shape[1:]
    if b >= c:
        basis = torch.eye(c, dtype=rows.dtype, device=rows.device).expand(stages.count, c, c)
        rho = rows
    elif b == 1:
        norm = rows.norm(dim=2, keepdim=True)
        safe = torch.where(norm == 0, torch.ones_like(norm), norm)
        basis, rho = (rows / safe).mT, norm
    else:
        U, sigma, Vt = torch.linalg.svd(rows, full_matrices=False)
        cutoff = sigma[:, :1] * (max(b, c) * torch.finfo(rows.dtype).eps)
        rank = max(1, int((sigma > cutoff).sum(1).max()))
        basis, rho = Vt[:, :rank].mT.contiguous(), (U * sigma[:, None])[:, :, :rank].contiguous()
    return BilinearSplit(basis, rho, stages.beta, stages.W.shape[1], stages.W.shape[2], stages.weight, stages.bias)


@dataclass(frozen=True)
class BilinearSplit(RangeSplit):
    """s = X̃ Q_w, stored (rank, o); Q_w has orthonormal columns (or a zero column, for an all-zero single row)."""

    basis: Tensor  # Q_w, (K, c, rank)
    rho: Tensor  # (K, b, rank)
    beta: Tensor | None
    o: int
    i: int
    weight: bool
    bias: bool

    @property
    def r(self) -> int:
        return self.basis.shape[2] * self.o

    @property
    def complement(self) -> int:
        return (self.basis.shape[1] - self.basis.shape[2]) * self.o

    @property
    def _weight_basis(self) -> Tensor:
        """The rows of Q_w that belong to W, (K, i, rank)."""
        return self.basis[:, : self.i] if self.weight else self.basis[:, :0]

    def Q(self, s: Tensor) -> Tensor:
        K, k = s.shape[0], s.shape[-1]
        X = (self.basis @ s.reshape(K, -1, self.o * k)).view(K, -1, self.o, k)
        parts = []
        if self.weight:
            parts.append(X[:, : self.i].transpose(1, 2).reshape(K, self.o * self.i, k))
        if self.bias:
            parts.append(X[:, -1])
        return torch.cat(parts, 1)

    def Qt(self, x: Tensor) -> Tensor:
        K, k = x.shape[0], x.shape[-1]
        s = x.new_zeros(K, self.basis.shape[2], self.o * k)
        if self.weight:
            X = x[:, : self.o * self.i].reshape(K, self.o, self.i, k)
            s = self._weight_basis.mT @ X.transpose(1, 2).reshape(K, self.i, self.o * k)
        if self.bias:
            s = s + self.basis[:, -1, :, None] * x[:, x.shape[1] - self.o :].reshape(K, 1, self.o * k)
        return s.reshape(K, self.r, k)

    def R(self, s: Tensor) -> Tensor:
        K, k = s.shape[0], s.shape[-1]
        return (self.rho @ s.reshape(K, -1, self.o * k)).reshape(K, -1, k)

    def Rt(self, y: Tensor) -> Tensor:
        K, k = y.shape[0], y.shape[-1]
        return (self.rho.mT @ y.reshape(K, -1, self.o * k)).reshape(K, self.r, k)

    def A_range(self) -> Tensor | None:
        return None

    def B_range(self) -> Tensor | None:
        if self.beta is None or not self.weight:
            return None
        K, b = self.beta.shape[:2]
        blocks = self._weight_basis.mT[:, :, None, None, :] * self.beta.mT[:, None, :, :, None]
        return blocks.reshape(K, self.r, b * self.i)

    def B_complement_gram(self) -> Tensor | None:
        if self.beta is None or not self.weight or not self.complement:
            return None
        K, b = self.beta.shape[:2]
        Qw = self._weight_basis
        gap = torch.eye(self.i, dtype=Qw.dtype, device=Qw.device) - Qw @ Qw.mT
        gram = (self.beta @ self.beta.mT)[:, :, None, :, None] * gap[:, None, :, None, :]
        return gram.reshape(K, b * self.i, b * self.i)

    def covariance_diagonal(self, stage: Stages, ss: Tensor, sd: Tensor, dd: Tensor, damping: float) -> Tensor:
        """Diagonal of the covariance of x, row by row of [W, w₀], without a p × p block."""
        rank, o, i = self.basis.shape[2], self.o, self.i
        q = self.basis[0]
        of_rows = ss.reshape(rank, o, rank, o).diagonal(dim1=1, dim2=3)  # (rank, rank, o)
        out = torch.einsum("cr,rso,cs->co", q, of_rows, q)
        if self.complement:
            out = out + (1.0 - q.square().sum(1))[:, None] / damping
        if self.complement and self.beta is not None and self.weight and dd.numel():
            beta = self.beta[0]
            b = beta.shape[0]
            gap = torch.eye(q.shape[0], i, dtype=q.dtype, device=q.device) - q @ self._weight_basis[0].mT
            crossed = torch.einsum("robi,bo->ori", sd.reshape(rank, o, b, i), beta)
            out = out - 2.0 / damping * torch.einsum("ocr,cr->oc", gap @ crossed.mT, q).mT
            states = (beta.mT @ dd.reshape(b, i * b * i)).reshape(o, i, b, i)
            states = torch.einsum("oibj,bo->oij", states, beta)
            out = out + ((gap @ states) * gap).sum(2).mT / damping**2
        parts = []
        if self.weight:
            parts.append(out[:i].mT.reshape(-1))
        if self.bias:
            parts.append(out[-1])
        return torch.cat(parts)
