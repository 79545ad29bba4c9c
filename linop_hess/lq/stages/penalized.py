"""Stages of a chain with a penalty on its controls: with these in units of their own, and with a diagonal added to A.

`Analysis.at` says why. Where units differ within an affine stage from entry to entry, x = t ∘ x̃, its row space is one for each of the o
outputs of a row, that of (z̃_b ∘ t_o)_b, of shape (b, c): nothing of n_out × p is formed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from linop_hess.lq.stages.base import SampleRows, Stage
from linop_hess.lq.stages.row_space import (
    Controlled,
    IdentityRowSpace,
    Joint,
    RowSpace,
    generic_row_space,
    orthogonal_complement,
    row_basis,
)


def scaled(stage: Stage, t: Tensor) -> Stage:
    """Return the stages with controls x̃, x = t ∘ x̃, for positive t of shape (K, p): G T, T A T and T B in the place of G, A and B.

    Where the kind keeps its structure in these units it is of the same kind.
    """
    own = stage.in_units(t)
    return ScaledStage(stage, t) if own is None else own


@dataclass(frozen=True)
class _Around(Stage):
    """What does not touch the controls is that of the stages `inner`.

    Parameters
    ----------
    inner : Stage
    """

    inner: Stage

    @property
    def n_in(self) -> int:
        return self.inner.n_in

    @property
    def n_out(self) -> int:
        return self.inner.n_out

    @property
    def inputs(self) -> int:
        return self.inner.inputs

    @property
    def outputs(self) -> int:
        return self.inner.outputs

    @property
    def p(self) -> int:
        return self.inner.p

    @property
    def samples(self) -> int:
        return self.inner.samples

    @property
    def nonzero(self) -> frozenset[str]:
        return self.inner.nonzero

    def F(self, d: Tensor) -> Tensor:
        return self.inner.F(d)

    def Ft(self, y: Tensor) -> Tensor:
        return self.inner.Ft(y)

    def G(self, x: Tensor) -> Tensor:
        return self.inner.G(x)

    def Gt(self, y: Tensor) -> Tensor:
        return self.inner.Gt(y)

    def A(self, x: Tensor) -> Tensor:
        return self.inner.A(x)

    def B(self, d: Tensor) -> Tensor:
        return self.inner.B(d)

    def Bt(self, x: Tensor) -> Tensor:
        return self.inner.Bt(x)

    def C(self, d: Tensor) -> Tensor:
        return self.inner.C(d)

    def with_adjoint(self, beta: Tensor) -> Self:
        return replace(self, inner=self.inner.with_adjoint(beta))

    def dense_F(self) -> Tensor:
        return self.inner.dense_F()

    def dense_C(self) -> Tensor:
        return self.inner.dense_C()

    def C_of_samples(self, samples: int) -> Tensor:
        return self.inner.C_of_samples(samples)

    def entries(self, block: str) -> int:
        return self.inner.entries(block)

    def calls(self, block: str) -> int:
        return self.inner.calls(block)

    def pull_back(self, V: Tensor) -> Tensor:
        return self.inner.pull_back(V)


@dataclass(frozen=True)
class ScaledStage(_Around):
    """Stages with controls in units t of their own, (K, p); see `scaled`."""

    t: Tensor

    def G(self, x: Tensor) -> Tensor:
        return self.inner.G(self.t[..., None] * x)

    def Gt(self, y: Tensor) -> Tensor:
        return self.t[..., None] * self.inner.Gt(y)

    def A(self, x: Tensor) -> Tensor:
        return self.t[..., None] * self.inner.A(self.t[..., None] * x)

    def B(self, d: Tensor) -> Tensor:
        return self.t[..., None] * self.inner.B(d)

    def Bt(self, x: Tensor) -> Tensor:
        return self.inner.Bt(self.t[..., None] * x)

    def gauss_newton(self) -> Self:
        flat = self.inner.gauss_newton()
        return self if flat is self.inner else replace(self, inner=flat)

    def row_space(self) -> RowSpace:
        own = self.inner.row_space_in_units(self.t)
        if own is not None:
            return own
        if bool((self.t == self.t[:, :1]).all()):
            return ScaledRowSpace(self.inner.row_space(), self.inner, self.t[:, :1].contiguous())
        if self.p > self.n_out and "A" not in self.nonzero:
            self.require_dense()
        return generic_row_space(self)

    def of_samples(self, start: int, stop: int, samples: int) -> Self:
        return replace(self, inner=self.inner.of_samples(start, stop, samples))

    def G_columns(self, start: int, stop: int) -> Tensor:
        return self.inner.G_columns(start, stop) * self.t[:, None, start:stop]

    def Gt_each(self, y: Tensor, samples: int) -> Tensor:
        return self.t[..., None] * self.inner.Gt_each(y, samples)


@dataclass(frozen=True)
class ScaledRowSpace(RowSpace):
    """The row space `space` of stages `stage` whose controls get one unit t, (K, 1): Q is the same, R and B are t times what they were."""

    space: RowSpace
    stage: Stage
    t: Tensor

    @property
    def r(self) -> int:
        return self.space.r

    @property
    def hidden(self) -> int:
        return self.space.hidden

    @property
    def coupled(self) -> bool:
        return self.space.coupled

    def Q(self, s: Tensor) -> Tensor:
        return self.space.Q(s)

    def Qt(self, x: Tensor) -> Tensor:
        return self.space.Qt(x)

    def R(self, s: Tensor) -> Tensor:
        return self.t[..., None] * self.space.R(s)

    def Rt(self, y: Tensor) -> Tensor:
        return self.t[..., None] * self.space.Rt(y)

    def QtAQ(self) -> Tensor:
        return self.t[..., None].square() * self.space.QtAQ()

    def QtB(self) -> Tensor:
        return self.t[..., None] * self.space.QtB()

    def hidden_coupling(self) -> Tensor:
        return self.t[..., None] * self.space.hidden_coupling()

    def hidden_gram(self) -> Tensor:
        return self.t[..., None].square() * self.space.hidden_gram()

    def hidden_directions(self, W: Tensor) -> Tensor:
        return self.space.hidden_directions(self.t[..., None] * W)

    def gram(self, Y: Tensor, samples: int) -> Tensor:
        return self.t.square() * self.space.gram(Y, samples)

    def form_diagonal(self, stage: Controlled, Y: Tensor, samples: int, A: Tensor) -> Tensor:
        return self.t[0].square() * self.space.form_diagonal(self.stage, Y, samples, A)

    def covariance(self, stage: Controlled, joint: Joint, damping: float) -> Tensor:
        return self.space.covariance(self.stage, self._of_state(joint), damping)

    def covariance_diagonal(self, stage: Controlled, joint: Joint, damping: float) -> Tensor:
        return self.space.covariance_diagonal(self.stage, self._of_state(joint), damping)

    def _of_state(self, joint: Joint) -> Joint:
        """The covariance with t δ in the place of δ, since the state acts by t B."""
        if not joint.state_size:
            return joint
        unit = torch.ones_like(joint.dd[:, :1])
        unit[: joint.state_size] = self.t
        return replace(joint, sd=joint.sd * unit.mT, dd=joint.dd * unit * unit.mT)


@dataclass(frozen=True)
class CurvedStage(_Around):
    """Stages with a diagonal added to A, as a penalty on the controls does.

    Controls with such a curvature are visible, and so in a pivot block; a diagonal of one sign is no pivot but a change of units, see
    `Analysis.at`.

    Parameters
    ----------
    inner : Stage
    diagonal : Tensor, shape (K, p)
    """

    diagonal: Tensor

    @property
    def nonzero(self) -> frozenset[str]:
        return self.inner.nonzero | {"A"}

    def A(self, x: Tensor) -> Tensor:
        return self.inner.A(x) + self.diagonal[..., None] * x

    def gauss_newton(self) -> Stage:  # type: ignore[override]
        return self.inner.gauss_newton()

    def row_space(self) -> RowSpace:
        return self.inner.curved_row_space(self.diagonal) or IdentityRowSpace(self)

    def of_samples(self, start: int, stop: int, samples: int) -> Stage:  # type: ignore[override]
        return self.inner.of_samples(start, stop, samples)

    def sample_rows(self, samples: int) -> SampleRows | None:
        return self.inner.sample_rows(samples)

    def G_columns(self, start: int, stop: int) -> Tensor:
        return self.inner.G_columns(start, stop)

    def Gt_each(self, y: Tensor, samples: int) -> Tensor:
        return self.inner.Gt_each(y, samples)


@dataclass(frozen=True)
class EntrywiseRowSpace(RowSpace):
    """The row space of affine stages, [W, w₀] in units t, an output at a time; s is stored (o, rank)."""

    basis: Tensor  # Q_o, (K, o, c, rank)
    rho: Tensor  # (K, o, b, rank): z̃_b ∘ t_o = ρ_o Q_oᵀ
    beta: Tensor | None  # (K, b, o)
    t: Tensor  # units of W, (K, o, i)

    @classmethod
    def of(cls, rows: Tensor, beta: Tensor | None, t: Tensor, o: int, i: int) -> Self:
        """Build from the rows Z̃ (K, b, c), the adjoint of the output and units t (K, p), W before w₀."""
        K, b, c = rows.shape
        of_weight = t[:, : o * i].view(K, o, i)
        of_output = torch.cat([of_weight, *([t[:, o * i :, None]] if c > i else [])], 2)
        seen = rows[:, None] * of_output[:, :, None]
        basis = row_basis(seen.flatten(0, 1)).unflatten(0, (K, o))
        return cls(basis, seen @ basis, beta, of_weight)

    @property
    def r(self) -> int:
        return self.basis.shape[1] * self.basis.shape[3]

    @property
    def hidden(self) -> int:
        return self.basis.shape[1] * (self.basis.shape[2] - self.basis.shape[3])

    @property
    def coupled(self) -> bool:
        return self.beta is not None and self.hidden > 0

    def _to_controls(self, X: Tensor) -> Tensor:
        """[W, w₀] of shape (K, o, c, k) as controls (K, p, k)."""
        i = self.t.shape[2]
        return torch.cat([X[:, :, :i].flatten(1, 2), X[:, :, i:].flatten(1, 2)], 1)

    def _each(self, s: Tensor) -> Tensor:
        return s.reshape(s.shape[0], self.basis.shape[1], self.basis.shape[3], s.shape[-1])

    def Q(self, s: Tensor) -> Tensor:
        return self._to_controls(self.basis @ self._each(s))

    def Qt(self, x: Tensor) -> Tensor:
        (K, o, i), k = self.t.shape, x.shape[-1]
        W, w0 = x[:, : o * i].reshape(K, o, i, k), x[:, o * i :].reshape(K, o, self.basis.shape[2] - i, k)
        return (self.basis.mT @ torch.cat([W, w0], 2)).reshape(K, self.r, k)

    def R(self, s: Tensor) -> Tensor:
        return (self.rho @ self._each(s)).transpose(1, 2).flatten(1, 2)

    def Rt(self, y: Tensor) -> Tensor:
        K, o, b, _ = self.rho.shape
        rows = y.reshape(K, b, o, y.shape[-1]).transpose(1, 2)
        return (self.rho.mT @ rows).reshape(K, self.r, y.shape[-1])

    def _acting(self, rows: Tensor) -> Tensor:
        """Rows ∘ t ⊗ β: M (K, o, m, i) of directions in W seen from the state, (K, o, m, b · i)."""
        assert self.beta is not None
        acting = (rows * self.t[:, :, None])[:, :, :, None, :] * self.beta.mT[:, :, None, :, None]
        return acting.flatten(3, 4)

    @property
    def _n_in(self) -> int:
        return self.rho.shape[2] * self.t.shape[2]

    def QtB(self) -> Tensor:
        if self.beta is None:
            return self.rho.new_zeros(self.count, self.r, self._n_in)
        return self._acting(self.basis[:, :, : self.t.shape[2]].mT).flatten(1, 2)

    def hidden_coupling(self) -> Tensor:
        o, i = self.t.shape[1:]
        N = self.rho.new_zeros(self.count, 0, self._n_in)
        if not self.coupled:
            return N
        # One output after the other, orthogonally factored as soon as there are more rows than states.
        for k in range(o):
            one = replace(self, basis=self.basis[:, k : k + 1], t=self.t[:, k : k + 1])
            one = replace(one, beta=None if self.beta is None else self.beta[:, :, k : k + 1])
            unseen = orthogonal_complement(one.basis[:, 0])[:, None, :i].mT
            N = torch.cat([N, one._acting(unseen)[:, 0]], 1)
            if N.shape[1] >= 2 * self._n_in or (k == o - 1 and N.shape[1] > self._n_in):
                N = torch.linalg.qr(N, mode="r").R
        return N

    def hidden_gram(self) -> Tensor:
        (K, _, b, _), i = self.rho.shape, self.t.shape[2]
        if self.beta is None or not self.coupled:
            return self.rho.new_zeros(K, b * i, b * i)
        gap = self._gap()[:, :, :i] * self.t[:, :, :, None]
        pairs = self.beta[:, :, None] * self.beta[:, None]  # (K, b, b, o)
        gram = (pairs.flatten(1, 2) @ gap.flatten(2, 3)).view(K, b, b, i, i)
        return gram.transpose(2, 3).reshape(K, b * i, b * i)

    def _gap(self) -> Tensor:
        """(I − Q_oQ_oᵀ)_{:, W} t_o, (K, o, c, i)."""
        eye = torch.eye(self.basis.shape[2], self.t.shape[2], dtype=self.basis.dtype, device=self.basis.device)
        return (eye - self.basis @ self.basis[:, :, : self.t.shape[2]].mT) * self.t[:, :, None]

    def hidden_directions(self, W: Tensor) -> Tensor:
        (K, o, i), k = self.t.shape, W.shape[-1]
        X = W.new_zeros(K, o, self.basis.shape[2], k)
        if self.beta is not None:
            acts = self.beta.mT @ W.reshape(K, -1, i * k)
            X[:, :, :i] = acts.view(K, o, i, k) * self.t[..., None]
        return self.project_out_twice(self._to_controls(X))

    def covariance_diagonal(self, stage: Controlled, joint: Joint, damping: float) -> Tensor:
        if joint.directions is not None:
            return super().covariance_diagonal(stage, joint, damping)
        o, rank, i = self.basis.shape[1], self.basis.shape[3], self.t.shape[2]
        q = self.basis[0]
        X, Y = (half.reshape(-1, o, rank).movedim(1, 0) for half in (joint.left, joint.right))
        out = ((q @ (X.mT @ Y)) * q).sum(2)  # (o, c), of Q s
        out += (1.0 - q.square().sum(2)) / damping
        if self.coupled and self.beta is not None and joint.state_size:
            # … − gap β δ/ε: the cross term with s, then that of δ with itself.
            gap, beta = self._gap()[0], self.beta[0]
            b = beta.shape[0]
            crossed = (joint.sd.view(o, rank, b, i) * beta.mT[:, None, :, None]).sum(2)
            out -= 2.0 / damping * ((q @ crossed) * gap).sum(2)
            states = joint.dd.reshape(b, i, b, i).transpose(1, 2).reshape(b * b, i * i)
            seen = ((beta[:, None] * beta).view(b * b, o).mT @ states).view(o, i, i)
            out += ((gap @ seen) * gap).sum(2) / damping**2
        return self._to_controls(out[None, ..., None])[0, :, 0]
