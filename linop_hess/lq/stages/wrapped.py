"""Stages seen otherwise: without the state before them, with their controls in other units, with curvature of their controls added."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from linop_hess.lq.stages.base import SampleRows, Stage
from linop_hess.lq.stages.row_space import Controlled, IdentityRowSpace, Joint, RowSpace, generic_row_space


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

    def in_units(self, t: Tensor) -> Stage:
        return replace(self, inner=scaled(self.inner, t))


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

    def pull_back(self, V: Tensor) -> Tensor:
        return self.inner.pull_back(V)


@dataclass(frozen=True)
class ScaledStage(_Around):
    """Stages with controls in units of their own.

    Parameters
    ----------
    inner : Stage
    t : Tensor, shape (K, p)
        Positive; see `scaled`.
    """

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
    """The row space of stages whose controls all have one unit t: Q is the same, R and B are t times what they were.

    Parameters
    ----------
    space : RowSpace
        Of the stages before.
    stage : Stage
        These.
    t : Tensor, shape (K, 1)
    """

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
