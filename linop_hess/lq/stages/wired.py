"""Stages that act on some entries of a state, the live set of a graph, while the others pass through.

With reads S (a 0/1 matrix that may read an entry twice, or a constant), writes W and what is kept P, a stage F_i, G_i, A, B_i, C_i becomes

    F = P + W F_i S,        G = W G_i,        A,        B = B_i S,        C = Sᵀ C_i S.

S, W and P are never matrices: they are slices where entries are neighbours, and indices elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from linop_hess.lq.stages.base import SampleRows, Stage
from linop_hess.lq.stages.penalized import scaled
from linop_hess.lq.stages.row_space import Controlled, Joint, RowSpace
from linop_hess.lq.wiring import Wiring


@dataclass(frozen=True)
class WiredStage(Stage):
    """K stages that read some entries of the state and put their outputs beside those that are kept.

    Parameters
    ----------
    inner : Stage
        The stages by themselves.
    wiring : Wiring
        On the device of the stages.

    Raises
    ------
    ValueError
        If the sizes of the stage and of the wiring differ.
    """

    inner: Stage
    wiring: Wiring

    def __post_init__(self) -> None:
        mine, theirs = (self.wiring.read.numel(), self.wiring.outputs), (self.inner.n_in, self.inner.n_out)
        if mine != theirs:
            raise ValueError(
                f"expected a wiring of (inputs, outputs) {theirs} as of the stage, got {mine}: make them agree"
            )

    @property
    def n_in(self) -> int:
        return self.wiring.n_in

    @property
    def n_out(self) -> int:
        return self.wiring.n_out

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
        """As far as both the stage and the wiring fall apart."""
        return self.wiring.samples(self.inner.samples)

    @property
    def nonzero(self) -> frozenset[str]:
        return self.inner.nonzero

    def with_inner(self, inner: Stage) -> Self:
        """Return the same wiring of other stages, of the same sizes."""
        return replace(self, inner=inner)

    def local_adjoint(self, beta: Tensor) -> Tensor:
        """The adjoint (K, n_out) of the state after as that of the outputs of the inner stages, (K, inner.n_out); 0 of what is dropped."""
        return self.wiring.seen.pick(beta[..., None])[..., 0]

    def with_adjoint(self, beta: Tensor) -> Self:
        return self.with_inner(self.inner.with_adjoint(self.local_adjoint(beta)))

    def in_units(self, t: Tensor) -> Self:
        return self.with_inner(scaled(self.inner, t))

    def gauss_newton(self) -> Self:
        flat = self.inner.gauss_newton()
        return self if flat is self.inner else self.with_inner(flat)

    # No product is in the memory of its argument, to which a caller may add.

    def F(self, d: Tensor) -> Tensor:
        y = self.inner.F(self.wiring.reads.pick(d)) if self.inner.n_out else d[:, :0]
        return self.wiring.join(d, y)

    def Ft(self, y: Tensor) -> Tensor:
        wiring = self.wiring
        if not wiring.reads.count:
            return wiring.kept.copy(y)
        back = self.inner.Ft(wiring.seen.pick(y))
        if not wiring.carried.count:
            return wiring.reads.spread(back)
        if wiring.reads.is_whole:
            return wiring.kept.pick(y) + back
        out = wiring.kept.copy(y)
        wiring.reads.add_to(out, back)
        return out

    def rows_by_sample(self) -> Tensor:
        return self.wiring.reads.spread(self.inner.rows_by_sample())

    def G(self, x: Tensor) -> Tensor:
        return self.wiring.seen.spread(self.inner.G(x))

    def Gt(self, y: Tensor) -> Tensor:
        return self.inner.Gt(self.wiring.seen.pick(y))

    def A(self, x: Tensor) -> Tensor:
        return self.inner.A(x)

    def B(self, d: Tensor) -> Tensor:
        return self.inner.B(self.wiring.reads.pick(d))

    def Bt(self, x: Tensor) -> Tensor:
        return self.wiring.reads.spread(self.inner.Bt(x))

    def C(self, d: Tensor) -> Tensor:
        if "C" not in self.inner.nonzero:
            return super().C(d)
        return self.wiring.reads.spread(self.inner.C(self.wiring.reads.pick(d)))

    def add_curvature(self, T: Tensor, W: Tensor) -> None:
        self.inner.add_curvature(T, self.wiring.reads.pick(W))

    def row_space(self) -> RowSpace:
        return WiredRowSpace(self.inner.row_space(), self.inner, self.wiring)

    def curved_row_space(self, diagonal: Tensor) -> RowSpace | None:
        space = self.inner.curved_row_space(diagonal)
        return None if space is None else WiredRowSpace(space, self.inner, self.wiring)

    def dense_F(self) -> Tensor:
        wiring = self.wiring
        out = wiring.seen.spread(wiring.reads.spread_columns(self.inner.dense_F()))
        if wiring.keep_to.numel():
            out[:, wiring.keep_to, wiring.keep_from] = 1.0
        return out

    def dense_G(self) -> Tensor:
        return self.wiring.seen.spread(self.inner.dense_G())

    def dense_A(self) -> Tensor:
        return self.inner.dense_A()

    def dense_B(self) -> Tensor:
        return self.wiring.reads.spread_columns(self.inner.dense_B())

    def dense_C(self) -> Tensor:
        return self.wiring.reads.spread_both(self.inner.dense_C())

    def C_of_samples(self, samples: int) -> Tensor:
        blocks = self.inner.C_of_samples(samples).flatten(0, 1)
        out = self.wiring.part(1, samples).reads.spread_both(blocks)
        return out.view(self.count, samples, *out.shape[1:])

    def of_samples(self, start: int, stop: int, samples: int) -> Self:
        inner = self.inner.of_samples(start, stop, samples)
        return replace(self, inner=inner, wiring=self.wiring.part(stop - start, samples))

    def of_chosen(self, which: Tensor, weights: Tensor, samples: int) -> Self | None:
        inner = self.inner.of_chosen(which, weights, samples)
        return None if inner is None else replace(self, inner=inner, wiring=self.wiring.part(which.numel(), samples))

    def sample_rows(self, samples: int) -> SampleRows | None:
        # In pairs of stages outputs, and inputs where B is not zero, are whole states.
        rows = self.inner.sample_rows(samples) if self.wiring.seen.is_whole else None
        return None if rows is None or (rows.beta is not None and not self.wiring.reads.is_whole) else rows

    def G_columns(self, start: int, stop: int) -> Tensor:
        return self.wiring.seen.spread(self.inner.G_columns(start, stop))

    def Gt_each(self, y: Tensor, samples: int) -> Tensor:
        return self.inner.Gt_each(self.wiring.part(1, samples).seen.pick(y), samples)

    def entries(self, block: str) -> int:
        return self.inner.entries(block) + (self.wiring.keep_to.numel() if block == "F" else 0)

    def calls(self, block: str) -> int:
        wiring = self.wiring
        if block == "F":
            inner = self.inner.calls("F") if wiring.reads.count else 0
            return inner + 1 + wiring.reads.calls + wiring.kept.calls + wiring.seen.calls // 2
        around = {"G": wiring.seen.calls, "B": wiring.reads.calls, "C": 2 * wiring.reads.calls}
        return self.inner.calls(block) + around.get(block, 0)

    def pull_back(self, V: Tensor) -> Tensor:
        # V_kk of what is kept is copied, once; V_yy is pulled back by the inner stage, and V_yk is multiplied by F_iᵀ only.
        wiring = self.wiring
        reads, kept, seen = wiring.reads, wiring.carried, wiring.seen
        own = self.inner.pull_back(seen.pick_both(V[None])[0])[None]
        if not kept.count:
            return reads.spread_both(own)[0]
        out = wiring.kept.conjugated(V)
        if reads.count:
            crossed = self.inner.Ft(kept.pick(seen.pick(V[None]).mT).mT)
            crossed = wiring.origin.spread_columns(crossed)
            reads.add_to(out[None], crossed)
            reads.add_to(out.mT[None], crossed)
            reads.add_to(out[None], reads.spread_columns(own))
        return out


@dataclass(frozen=True)
class WiredRowSpace(RowSpace):
    """The row space of the inner stages, seen from the states around them. Q may span more than is seen, where outputs are dropped.

    Parameters
    ----------
    space : RowSpace
        Of the inner stages.
    stage : Stage
        The inner stages.
    wiring : Wiring
    """

    space: RowSpace
    stage: Stage
    wiring: Wiring

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
        return self.wiring.seen.spread(self.space.R(s))

    def Rt(self, y: Tensor) -> Tensor:
        return self.space.Rt(self.wiring.seen.pick(y))

    def QtAQ(self) -> Tensor:
        return self.space.QtAQ()

    def QtB(self) -> Tensor:
        return self.wiring.reads.spread_columns(self.space.QtB())

    def hidden_coupling(self) -> Tensor:
        return self.wiring.reads.spread_columns(self.space.hidden_coupling())

    def hidden_gram(self) -> Tensor:
        return self.wiring.reads.spread_both(self.space.hidden_gram())

    def hidden_directions(self, W: Tensor) -> Tensor:
        return self.space.hidden_directions(self.wiring.reads.pick(W))

    def _outputs(self, Y: Tensor, samples: int) -> Tensor:
        """Columns that stand for those of each sample, (n_out, q), at the outputs of the inner stage."""
        rows = self.wiring.part(1, samples).seen.pick(Y.reshape(samples, -1, Y.shape[1]))
        return rows.reshape(self.stage.n_out, Y.shape[1])

    def gram(self, Y: Tensor, samples: int) -> Tensor:
        return self.space.gram(self._outputs(Y, samples), samples)

    def form_diagonal(self, stage: Controlled, Y: Tensor, samples: int, A: Tensor) -> Tensor:
        return self.space.form_diagonal(self.stage, self._outputs(Y, samples), samples, A)

    def covariance(self, stage: Controlled, joint: Joint, damping: float) -> Tensor:
        return self.space.covariance(self.stage, self._read(joint), damping)

    def covariance_diagonal(self, stage: Controlled, joint: Joint, damping: float) -> Tensor:
        return self.space.covariance_diagonal(self.stage, self._read(joint), damping)

    def _read(self, joint: Joint) -> Joint:
        """The covariance with what is read in the place of the state."""
        n, reads = joint.state_size, self.wiring.reads
        if not n:
            return joint

        def rows(M: Tensor) -> Tensor:
            return torch.cat([reads.pick(M[None, :n])[0], M[n:]])

        return replace(joint, sd=rows(joint.sd.mT).mT, dd=rows(rows(joint.dd).mT))
