"""The range split of stages bilinear in controls and state, in Kronecker form."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from linop_hess.lq.stages.base import Stages
from linop_hess.lq.stages.row_space import Joint, RangeSplit, row_space


def bilinear_split(W: Tensor, Z: Tensor, beta: Tensor | None, weight: bool, bias: bool) -> BilinearSplit:
    """Range split from the rows Z̃ = [Z, 1] alone: G = (ρ ⊗ I)(Q_wᵀ ⊗ I) with Z̃ = ρ Q_wᵀ; arguments as of `BilinearStages`."""
    parts = []
    if weight:
        parts.append(Z)
    if bias:
        parts.append(Z.new_ones(Z.shape[0], Z.shape[1], 1))
    rows = torch.cat(parts, 2)
    b, c = rows.shape[1:]
    if b >= c:
        basis = torch.eye(c, dtype=rows.dtype, device=rows.device).expand(Z.shape[0], c, c)
        rho = rows
    elif b == 1:
        norm = rows.norm(dim=2, keepdim=True)
        safe = torch.where(norm == 0, torch.ones_like(norm), norm)
        basis, rho = (rows / safe).mT, norm
    else:
        basis = row_space(rows)
        rho = rows @ basis
    return BilinearSplit(basis, rho, beta, W.shape[1], W.shape[2], weight, bias)


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

    def to_controls(self, X: Tensor) -> Tensor:
        """Columns X̃ᵀ of [W, w₀], (K, c, o, k), as controls (K, p, k)."""
        K, k = X.shape[0], X.shape[-1]
        parts = []
        if self.weight:
            parts.append(X[:, : self.i].transpose(1, 2).reshape(K, self.o * self.i, k))
        if self.bias:
            parts.append(X[:, -1])
        return torch.cat(parts, 1)

    def from_controls(self, x: Tensor, basis: Tensor) -> Tensor:
        """basisᵀX̃ᵀ of controls x (K, p, k) for a basis (K, c, m): (K, m, o, k)."""
        K, m, k = x.shape[0], basis.shape[2], x.shape[-1]
        s = x.new_zeros(K, m, self.o * k)
        if self.weight:
            X = x[:, : self.o * self.i].reshape(K, self.o, self.i, k)
            s = basis[:, : self.i].mT @ X.transpose(1, 2).reshape(K, self.i, self.o * k)
        if self.bias:
            s = s + basis[:, -1, :, None] * x[:, x.shape[1] - self.o :].reshape(K, 1, self.o * k)
        return s.view(K, m, self.o, k)

    def Q(self, s: Tensor) -> Tensor:
        K, k = s.shape[0], s.shape[-1]
        return self.to_controls((self.basis @ s.reshape(K, -1, self.o * k)).view(K, -1, self.o, k))

    def Qt(self, x: Tensor) -> Tensor:
        return self.from_controls(x, self.basis).reshape(x.shape[0], self.r, x.shape[-1])

    def R(self, s: Tensor) -> Tensor:
        K, k = s.shape[0], s.shape[-1]
        return (self.rho @ s.reshape(K, -1, self.o * k)).reshape(K, -1, k)

    def Rt(self, y: Tensor) -> Tensor:
        K, k = y.shape[0], y.shape[-1]
        return (self.rho.mT @ y.reshape(K, -1, self.o * k)).reshape(K, self.r, k)

    def gram(self, Y: Tensor, samples: int) -> Tensor:
        rho, q = self.rho[0], Y.shape[1]
        if rho.shape[0] != samples:
            return super().gram(Y, samples)
        rows = Y.view(samples, self.o, q).mT.reshape(samples * q, self.o)
        products = (rows @ rows.mT).view(samples, q, samples, q)
        return (products * (rho @ rho.mT)[:, None, :, None]).reshape(samples * q, samples * q)

    def form_diagonal(self, stage: Stages, Y: Tensor, samples: int, A: Tensor) -> Tensor:
        rho, q = self.rho[0], Y.shape[1]
        if rho.shape[0] != samples:
            return super().form_diagonal(stage, Y, samples, A)
        rows = Y.view(samples, self.o, q)
        form = torch.einsum("boq,bqcr,cor->obc", rows, A.view(samples, q, samples, q), rows)
        inputs = rho @ self.basis[0].mT  # Z̃
        out = torch.einsum("bi,obc,ci->io", inputs, form, inputs)
        return self.to_controls(out[None, ..., None]).reshape(-1)

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

    def covariance_diagonal(self, stage: Stages, joint: Joint, damping: float) -> Tensor:
        rank, o, i = self.basis.shape[2], self.o, self.i
        q = self.basis[0]
        X, Y = (half.reshape(-1, rank, o).permute(2, 1, 0).contiguous() for half in (joint.left, joint.right))
        out = ((q @ (X @ Y.mT)) * q).sum(2).mT  # (c, o)
        if self.complement:
            out += (1.0 - q.square().sum(1))[:, None] / damping
        if self.complement and self.beta is not None and self.weight and joint.dd.numel():
            beta = self.beta[0]
            b = beta.shape[0]
            gap = torch.eye(q.shape[0], i, dtype=q.dtype, device=q.device) - q @ self._weight_basis[0].mT
            crossed = (joint.sd.view(rank, o, b, i) * beta.mT[:, :, None]).sum(2)  # (rank, o, i)
            out -= 2.0 / damping * torch.einsum("cri,roi->co", q[:, :, None] * gap[:, None], crossed)
            states = joint.dd.reshape(b, i, b, i).transpose(1, 2)
            seen = ((gap @ states) * gap).sum(3).view(b * b, -1)  # (b², c)
            out += seen.mT @ (beta[:, None] * beta).view(b * b, o) / damping**2
        return self.to_controls(out[None, ..., None]).reshape(-1)

    def extended(self, stages: Stages) -> RangeSplit:
        if self.beta is None or not self.weight or not self.complement:
            return self
        rank = self.basis.shape[2]
        whole, _ = torch.linalg.qr(self.basis, mode="complete")
        # The column of an all-zero row is zero, and any other direction may stand for it.
        blank = (self.basis == 0).all(1, keepdim=True)
        inner = replace(self, basis=torch.where(blank, whole[:, :, :rank], self.basis))
        left, _ = torch.linalg.qr(self.beta.mT)
        return KroneckerSplit(inner, left.contiguous(), whole[:, :, rank:].contiguous())


@dataclass(frozen=True)
class KroneckerSplit(RangeSplit):
    """s = (X̃ Q_w, Uᵀ X̃ Q_c): with what B sees of the rest, in the range of U (of β) times the complement Q_c of Q_w."""

    inner: BilinearSplit
    left: Tensor  # U, (K, o, m)
    right: Tensor  # Q_c, (K, c, c − rank)

    @property
    def _extra(self) -> int:
        return self.left.shape[2] * self.right.shape[2]

    @property
    def r(self) -> int:
        return self.inner.r + self._extra

    @property
    def complement(self) -> int:
        return self.inner.complement - self._extra

    @property
    def coupled(self) -> bool:
        return False

    def Q(self, s: Tensor) -> Tensor:
        K, k = s.shape[0], s.shape[-1]
        S = s[:, self.inner.r :].reshape(K, self.right.shape[2], self.left.shape[2] * k)
        X = (self.right @ S).view(K, -1, self.left.shape[2], k)
        return self.inner.Q(s[:, : self.inner.r]) + self.inner.to_controls(self.left[:, None] @ X)

    def Qt(self, x: Tensor) -> Tensor:
        beyond = self.left.mT[:, None] @ self.inner.from_controls(x, self.right)
        return torch.cat([self.inner.Qt(x), beyond.reshape(x.shape[0], self._extra, x.shape[-1])], 1)

    def R(self, s: Tensor) -> Tensor:
        return self.inner.R(s[:, : self.inner.r])

    def Rt(self, y: Tensor) -> Tensor:
        return torch.cat([self.inner.Rt(y), y.new_zeros(y.shape[0], self._extra, y.shape[-1])], 1)

    def A_range(self) -> Tensor | None:
        return None

    def B_range(self) -> Tensor | None:
        visible, beta = self.inner.B_range(), self.inner.beta
        assert visible is not None and beta is not None
        seen = (beta @ self.left).mT  # (K, m, b)
        beyond = self.right[:, : self.inner.i].mT[:, :, None, None, :] * seen[:, None, :, :, None]
        return torch.cat([visible, beyond.reshape(visible.shape[0], self._extra, visible.shape[2])], 1)

    def B_complement_gram(self) -> Tensor | None:
        return None
