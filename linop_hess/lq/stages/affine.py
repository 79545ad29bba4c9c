"""Stages affine in their state and in their controls, y_b = W z_b + w₀ for every row b, controls [W, w₀]: linear layers.

A = 0 and C = 0, and every other block is a Kronecker product, so nothing of size p × p is ever formed. With the rows Z̃ = [Z, 1],

    F = I_b ⊗ W,        G [X, x₀] = (X z_b + x₀)_b,        B δ = [Σ_b β_b δ_bᵀ, 0].

The row space comes from the rows alone: Z̃ = ρ Q_wᵀ gives Q = Q_w ⊗ I_o and R = ρ ⊗ I_o.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from linop_hess.lq.stages.base import SampleRows, Stage, entries_of, times
from linop_hess.lq.stages.penalized import EntrywiseRowSpace
from linop_hess.lq.stages.row_space import (
    Controlled,
    IdentityRowSpace,
    Joint,
    RowSpace,
    orthogonal_complement,
    rows_split,
)

# From so many right-hand sides on a product a row takes less than one large product and the two transposed copies around it.
_BY_ROWS_FROM = 64


@dataclass(frozen=True)
class AffineStage(Stage):
    """K stages z ↦ W z + w₀ on b rows; the controls are W (row-major) and w₀, or either alone.

    Parameters
    ----------
    W : Tensor, shape (K, o, i)
    Z : Tensor, shape (K, b, i)
        The rows the stage was linearized at.
    beta : Tensor or None, shape (K, b, o)
        Adjoint of the output rows; None: B = 0.
    weight, bias : bool
        Whether W, and whether w₀, is a control.
    units : Tensor or None, shape (K, 2)
        Units of the controls W and w₀, by which Z and β are multiplied already and the ones in Z̃ are; None: 1. F is not touched.
    """

    W: Tensor
    Z: Tensor
    beta: Tensor | None
    weight: bool
    bias: bool
    units: Tensor | None = field(default=None, kw_only=True)

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
    def samples(self) -> int:
        """The number of rows, which is finer than the batch where a sample has several."""
        return max(1, self.rows)

    @property
    def nonzero(self) -> frozenset[str]:
        return frozenset("B") if self.beta is not None and self.weight else frozenset()

    def F(self, d: Tensor) -> Tensor:
        return _map_rows(self.W, d, self.rows)

    def Ft(self, y: Tensor) -> Tensor:
        return _map_rows(self.W.mT, y, self.rows)

    @property
    def _ones(self) -> Tensor:
        """The column of Z̃ that stands for w₀, (K, b, 1)."""
        ones = self.Z.new_ones(self.Z.shape[0], self.rows, 1)
        return ones if self.units is None else ones * self.units[:, 1, None, None]

    def _in_unit_of_bias(self, v: Tensor) -> Tensor:
        """The bias's part of controls, (K, o, k), times its unit."""
        return v if self.units is None else v * self.units[:, 1, None, None]

    def _weight_part(self, x: Tensor) -> Tensor:
        """The rows of W in x: (K, p, k) to (K, o, i, k)."""
        K, o, i = self.W.shape
        return x[:, : o * i].reshape(K, o, i, x.shape[-1])

    def G(self, x: Tensor) -> Tensor:
        (K, o, i), k = self.W.shape, x.shape[-1]  # the o·k columns of all right-hand sides make one product with Z
        bias = self._in_unit_of_bias(x[:, x.shape[1] - o :])[:, None] if self.bias else None  # (K, 1, o, k)
        if not self.weight:
            y = x.new_zeros(K, self.rows, o, k)
            return (y if bias is None else y.add_(bias)).reshape(K, self.rows * o, k)
        X = self._weight_part(x)
        X = X[..., 0].mT if k == 1 else X.transpose(1, 2).reshape(K, i, o * k)
        y = torch.bmm(self.Z, X) if bias is None else torch.baddbmm(bias.reshape(K, 1, o * k), self.Z, X)
        return y.reshape(K, self.rows * o, k)

    def Gt(self, y: Tensor) -> Tensor:
        (K, o, i), k = self.W.shape, y.shape[-1]
        Y = y.reshape(K, self.rows, o, k)
        parts = [self._in_unit_of_bias(Y.sum(1))] if self.bias else []
        if self.weight and k == 1:
            parts.insert(0, times(Y[..., 0].mT, self.Z).reshape(K, o * i, k))
        elif self.weight:
            X = times(self.Z.mT, Y.reshape(K, self.rows, o * k)).view(K, i, o, k).transpose(1, 2)
            parts.insert(0, X.reshape(K, o * i, k))
        return torch.cat(parts, 1) if parts else y.new_zeros(K, 0, k)

    def B(self, d: Tensor) -> Tensor:
        if self.beta is None or not self.weight:
            return super().B(d)
        return _outer(self.beta, d, self.bias)

    def Bt(self, x: Tensor) -> Tensor:
        if self.beta is None or not self.weight:
            return x.new_zeros(self.count, self.rows * self.W.shape[2], x.shape[-1])
        (K, o, i), k = self.W.shape, x.shape[-1]
        return torch.bmm(self.beta, self._weight_part(x).reshape(K, o, i * k)).reshape(K, self.rows * i, k)

    def with_adjoint(self, beta: Tensor) -> Self:
        K, o, _ = self.W.shape
        beta = beta.reshape(K, self.rows, o).contiguous()
        return replace(self, beta=beta if self.units is None else beta * self.units[:, 0, None, None])

    def in_units(self, t: Tensor) -> Self | None:
        weights = t[:, : self.W.shape[1] * self.W.shape[2] * self.weight]
        biases = t[:, weights.shape[1] :]
        parts = [part[:, 0] if part.shape[1] else t.new_ones(t.shape[0]) for part in (weights, biases)]
        if any(bool((part != one[:, None]).any()) for part, one in zip((weights, biases), parts, strict=True)):
            return None
        units = torch.stack(parts, 1)
        of_weight = units[:, 0, None, None]
        beta = None if self.beta is None else self.beta * of_weight
        return replace(self, Z=self.Z * of_weight, beta=beta, units=units if self.units is None else units * self.units)

    def gauss_newton(self) -> Self:
        return replace(self, beta=None)

    def row_space(self) -> RowSpace:
        return self._space(*rows_split(self._rows_of_controls()), None) if self.p else IdentityRowSpace(self)

    def curved_row_space(self, diagonal: Tensor) -> RowSpace | None:
        # With w₀ in columns of its own, Q = diag(Q_w, 1) ⊗ I_o, the structure stays where only w₀ is curved, and if all is visible anyway.
        weights = diagonal[:, : self.W.shape[1] * self.W.shape[2] * self.weight]
        if self.rows > self.W.shape[2]:
            return self._space(*rows_split(self._rows_of_controls()), diagonal)
        if not (self.weight and self.bias) or bool(weights.any()):
            return super().curved_row_space(diagonal)
        basis, rho = rows_split(self.Z)
        K, i, rank = basis.shape
        own = basis.new_zeros(K, i + 1, rank + 1)
        own[:, :i, :rank], own[:, i, rank] = basis, 1.0
        return self._space(own, torch.cat([rho, self._ones], 2), diagonal)

    def row_space_in_units(self, t: Tensor) -> RowSpace | None:
        if not self.weight or self.rows > self.W.shape[2]:
            return None
        return EntrywiseRowSpace.of(self._rows_of_controls(), self.beta, t, *self.W.shape[1:])

    def _rows_of_controls(self) -> Tensor:
        """Z̃, (K, b, c)."""
        return torch.cat([self.Z] * self.weight + [self._ones] * self.bias, 2)

    def _space(self, basis: Tensor, rho: Tensor, curved_by: Tensor | None) -> RowSpace:
        o, i = self.W.shape[1:]
        return AffineRowSpace(basis, rho, self.beta, o, i, self.weight, self.bias, curved_by=curved_by)

    def dense_F(self) -> Tensor:
        (K, o, i), b = self.W.shape, self.rows
        blocks = self.W.new_zeros(K, b, o, b, i)
        blocks.diagonal(dim1=1, dim2=3).copy_(self.W[..., None].expand(K, o, i, b))
        return blocks.view(K, b * o, b * i)

    def of_samples(self, start: int, stop: int, samples: int) -> Self:
        each = self.rows // samples
        part = slice(start * each, stop * each)
        return replace(self, Z=self.Z[:, part], beta=None if self.beta is None else self.beta[:, part])

    def of_chosen(self, which: Tensor, weights: Tensor, samples: int) -> Self:
        at, weight = entries_of(which, weights, self.rows // samples, self.Z)
        return replace(self, Z=self.Z[:, at], beta=None if self.beta is None else self.beta[:, at] * weight[:, None])

    def sample_rows(self, samples: int) -> SampleRows | None:
        if self.rows != samples or not self.p:
            return None
        beta = self.beta[0] if self.beta is not None and self.weight else None
        return SampleRows(self._rows_of_controls()[0], beta, self.weight, self.bias)

    def G_columns(self, start: int, stop: int) -> Tensor:
        o, i = self.W.shape[1:]
        out = self.Z.new_zeros(self.rows, o, stop - start)
        control = torch.arange(start, stop, device=out.device)
        weights = control[: max(0, min(stop, self.weight * o * i) - start)]
        out[:, weights // max(i, 1), weights - start] = self.Z[0][:, weights % max(i, 1)]
        biases = control[weights.numel() :]
        out[:, biases - self.weight * o * i, biases - start] = self._ones[0]
        return out.view(1, self.rows * o, stop - start)

    def Gt_each(self, y: Tensor, samples: int) -> Tensor:
        (o, i), k, each = self.W.shape[1:], y.shape[-1], self.rows // samples
        Y = y.reshape(samples, each, o, k)
        out = y.new_empty(samples, self.p, k)
        if self.weight:
            Z, X = self.Z[0].reshape(samples, each, i), out[:, : o * i].view(samples, o, i, k)
            if each == 1:
                torch.mul(Y[:, 0, :, None], Z[:, 0, None, :, None], out=X)
            else:
                X.copy_((Z.mT @ Y.reshape(samples, each, o * k)).view(samples, i, o, k).transpose(1, 2))
        if self.bias:
            out[:, self.p - o :] = self._in_unit_of_bias(Y.sum(1))
        return out

    def entries(self, block: str) -> int:
        o, i = self.W.shape[1:]
        return self.rows * {"F": o * i, "G": self.p, "B": o * i * self.weight, "C": 0}[block]

    def calls(self, block: str) -> int:
        return 9 if block == "G" else 6

    def pull_back(self, V: Tensor) -> Tensor:
        return self._pulled_back(V, V.new_empty(self.n_in, self.n_in))

    def pull_back_over(self, V: Tensor) -> Tensor:
        return self._pulled_back(V, V) if self.n_in == self.n_out and V.is_contiguous() else self.pull_back(V)

    def _pulled_back(self, V: Tensor, out: Tensor) -> Tensor:
        """FᵀVF in `out`, which may be V: a product of the rows of V, and one that reads the columns of that where they are."""
        b, (i, o), Wt = self.rows, self.W.shape[:0:-1], self.W[0].mT
        if b == 1:
            return torch.mm(Wt, V @ self.W[0], out=out)
        below = torch.bmm(Wt.expand(b, i, o), V.reshape(b, o, b * o)).view(b * i, b, o)
        return torch.bmm(Wt.expand(b, i, o), below.permute(1, 2, 0), out=out.view(b, i, b * i)).view(b * i, b * i)


def _map_rows(W: Tensor, d: Tensor, rows: int) -> Tensor:
    """(I ⊗ W) d with as few and as large matrix products as the shapes allow."""
    (K, o, i), k = W.shape, d.shape[-1]
    D = d.reshape(K, rows, i, k)
    if k == 1:
        y = torch.bmm(D[..., 0], W.mT)
    elif rows == 1 or (K == 1 and k >= _BY_ROWS_FROM):
        y = W[:, None] @ D
    else:
        y = torch.bmm(W, D.transpose(1, 2).reshape(K, i, rows * k)).view(K, o, rows, k).transpose(1, 2)
    return y.reshape(K, rows * o, k)


def _outer(beta: Tensor, d: Tensor, bias: bool) -> Tensor:
    """B δ: Σ_b β_b δ_bᵀ in the place of W, zero in that of w₀; δ is (K, b·i, k)."""
    (K, b, o), k = beta.shape, d.shape[-1]
    i = d.shape[1] // max(1, b)
    X = times(beta.mT, d.reshape(K, b, i * k)).reshape(K, o * i, k)
    return torch.cat([X, X.new_zeros(K, o, k)], 1) if bias else X


@dataclass(frozen=True)
class AffineRowSpace(RowSpace):
    """s = X̃ Q_w, stored (rank, o).

    The hidden part of B is the Kronecker product of (I − Q_wQ_wᵀ), in the columns of W, and βᵀ.
    """

    basis: Tensor  # Q_w, (K, c, rank)
    rho: Tensor  # (K, b, rank)
    beta: Tensor | None  # (K, b, o)
    o: int
    i: int
    weight: bool
    bias: bool

    @property
    def r(self) -> int:
        return self.basis.shape[2] * self.o

    @property
    def hidden(self) -> int:
        return (self.basis.shape[1] - self.basis.shape[2]) * self.o

    @property
    def coupled(self) -> bool:
        return self.beta is not None and self.weight and self.hidden > 0

    def _to_controls(self, X: Tensor) -> Tensor:
        """Columns X̃ᵀ of [W, w₀], (K, c, o, k), as controls (K, p, k)."""
        K, k = X.shape[0], X.shape[-1]
        i = self.i * self.weight
        weight = X[:, :i].transpose(1, 2).reshape(K, self.o * i, k)
        return torch.cat([weight, X[:, -1]], 1) if self.bias else weight

    def Q(self, s: Tensor) -> Tensor:
        K, k = s.shape[0], s.shape[-1]
        X = times(self.basis, s.reshape(K, self.basis.shape[2], self.o * k))
        return self._to_controls(X.view(K, self.basis.shape[1], self.o, k))

    def Qt(self, x: Tensor) -> Tensor:
        K, k = x.shape[0], x.shape[-1]
        weights, i = x[:, : self.o * self.i * self.weight], self.i * self.weight
        X = weights.reshape(K, self.o, i, k).transpose(1, 2).reshape(K, i, self.o * k)
        s = torch.bmm(self.basis[:, :i].mT, X)  # zero where i is
        if self.bias:
            s.addcmul_(self.basis[:, -1, :, None], x[:, x.shape[1] - self.o :].reshape(K, 1, self.o * k))
        return s.view(K, self.r, k)

    def R(self, s: Tensor) -> Tensor:
        (K, b, rank), k = self.rho.shape, s.shape[-1]
        return times(self.rho, s.reshape(K, rank, self.o * k)).reshape(K, b * self.o, k)

    def Rt(self, y: Tensor) -> Tensor:
        (K, b, _), k = self.rho.shape, y.shape[-1]
        return times(self.rho.mT, y.reshape(K, b, self.o * k)).reshape(K, self.r, k)

    def QtB(self) -> Tensor:
        K, b, rank = self.rho.shape
        if self.beta is None or not self.weight:
            return self.rho.new_zeros(K, self.r, b * self.i)
        # Made as its transpose, which is what a recursion adds to (K, b·i, r) numbers that lie so.
        blocks = self.beta[:, :, None, None, :] * self.basis[:, None, : self.i, :, None]
        return blocks.reshape(K, b * self.i, self.r).mT

    def hidden_coupling(self) -> Tensor:
        K, b, _ = self.rho.shape
        if self.beta is None or not self.coupled:
            return self.rho.new_zeros(K, 0, b * self.i)
        # I − Q_wQ_wᵀ = Q_cQ_cᵀ, so N = Q_cᵀ ⊗ L with LᵀL = ββᵀ, L being βᵀ or, where that has more rows than columns, its triangle.
        L = self.beta.mT if self.o <= b else torch.linalg.qr(self.beta.mT, mode="r").R
        unseen = orthogonal_complement(self.basis)[:, : self.i].mT
        return (unseen[:, :, None, None, :] * L[:, None, :, :, None]).reshape(K, -1, b * self.i)

    def hidden_gram(self) -> Tensor:
        K, b, _ = self.rho.shape
        if self.beta is None or not self.coupled:
            return self.rho.new_zeros(K, b * self.i, b * self.i)
        Qw = self.basis[:, : self.i]
        gap = torch.eye(self.i, dtype=Qw.dtype, device=Qw.device) - Qw @ Qw.mT
        gram = (self.beta @ self.beta.mT)[:, :, None, :, None] * gap[:, None, :, None, :]
        return gram.reshape(K, b * self.i, b * self.i)

    def hidden_directions(self, W: Tensor) -> Tensor:
        if self.beta is None or not self.coupled:
            return W.new_zeros(W.shape[0], self.r + self.hidden, W.shape[-1])
        return self.project_out_twice(_outer(self.beta, W, self.bias))

    def gram(self, Y: Tensor, samples: int) -> Tensor:
        rho, q = self.rho[0], Y.shape[1]
        if rho.shape[0] != samples:
            return super().gram(Y, samples)
        rows = Y.view(samples, self.o, q).mT.reshape(samples * q, self.o)
        products = (rows @ rows.mT).view(samples, q, samples, q)
        return (products * (rho @ rho.mT)[:, None, :, None]).reshape(samples * q, samples * q)

    def form_diagonal(self, stage: Controlled, Y: Tensor, samples: int, A: Tensor) -> Tensor:
        rho, q = self.rho[0], Y.shape[1]
        if rho.shape[0] != samples:
            return super().form_diagonal(stage, Y, samples, A)
        rows = Y.view(samples, self.o, q)
        form = torch.einsum("boq,bqcr,cor->obc", rows, A.view(samples, q, samples, q), rows)
        inputs = rho @ self.basis[0].mT  # Z̃
        out = torch.einsum("bi,obc,ci->io", inputs, form, inputs)
        return self._to_controls(out[None, ..., None]).reshape(-1)

    def covariance_diagonal(self, stage: Controlled, joint: Joint, damping: float) -> Tensor:
        if joint.directions is not None:
            return super().covariance_diagonal(stage, joint, damping)
        rank, o, i = self.basis.shape[2], self.o, self.i
        q = self.basis[0]
        # Of x = Q s + …: the diagonal of (Q_w ⊗ I) XᵀY (Q_wᵀ ⊗ I), one (rank, rank) block for each of the o rows of W.
        X, Y = (half.reshape(-1, rank, o).permute(2, 1, 0).contiguous() for half in (joint.left, joint.right))
        out = ((q @ (X @ Y.mT)) * q).sum(2).mT  # (c, o)
        if self.hidden:
            out += (1.0 - q.square().sum(1))[:, None] / damping
        if self.coupled and self.beta is not None and joint.state_size:
            # … − (gap ⊗ βᵀ) δ/ε, gap = (I − Q_wQ_wᵀ) in the columns of W: the cross term with s, then that of δ with itself.
            beta = self.beta[0]
            b = beta.shape[0]
            gap = torch.eye(q.shape[0], i, dtype=q.dtype, device=q.device) - q @ q[:i].mT
            crossed = (joint.sd.view(rank, o, b, i) * beta.mT[:, :, None]).sum(2)  # (rank, o, i)
            out -= 2.0 / damping * torch.einsum("cri,roi->co", q[:, :, None] * gap[:, None], crossed)
            states = joint.dd.reshape(b, i, b, i).transpose(1, 2)
            seen = ((gap @ states) * gap).sum(3).view(b * b, -1)  # (b², c)
            out += seen.mT @ (beta[:, None] * beta).view(b * b, o) / damping**2
        return self._to_controls(out[None, ..., None]).reshape(-1)
