"""Stages between a linear gathering of their input and a permutation of their output: convolutions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from linop_hess.lq.stages.base import Stages
from linop_hess.lq.stages.row_space import RangeSplit


@dataclass(frozen=True)
class Arrangement:
    """How a convolution's patches are gathered, and how its outputs are laid out.

    Attributes
    ----------
    samples : int
    source : int
        State size of a sample before the stage.
    gather : tuple of int arrays flattened to Tensor, shape (patch entries of a sample,)
        Source of each patch entry, `source` standing for zero padding.
    positions, channels : int
        Output positions and channels of a sample; the inner stage gives (samples, positions, channels), the state is
        (samples, channels, positions).
    """

    samples: int
    source: int
    gather: Tensor
    positions: int
    channels: int

    def unfold(self, d: Tensor) -> Tensor:
        """U δ: (K, samples · source, k) to (K, samples · patch entries, k)."""
        K, k = d.shape[0], d.shape[-1]
        padded = torch.cat([d.reshape(K, self.samples, self.source, k), d.new_zeros(K, self.samples, 1, k)], 2)
        return padded[:, :, self.gather].reshape(K, -1, k)

    def fold(self, y: Tensor) -> Tensor:
        """Uᵀ y, the adjoint of `unfold`."""
        K, k = y.shape[0], y.shape[-1]
        padded = y.new_zeros(K, self.samples, self.source + 1, k)
        padded.index_add_(2, self.gather, y.reshape(K, self.samples, -1, k))
        return padded[:, :, : self.source].reshape(K, self.samples * self.source, k)

    def to_state(self, y: Tensor) -> Tensor:
        """Inner output order to state order."""
        K, k = y.shape[0], y.shape[-1]
        return y.reshape(K, self.samples, self.positions, self.channels, k).transpose(2, 3).reshape(y.shape)

    def from_state(self, y: Tensor) -> Tensor:
        """State order to inner output order."""
        K, k = y.shape[0], y.shape[-1]
        return y.reshape(K, self.samples, self.channels, self.positions, k).transpose(2, 3).reshape(y.shape)


@dataclass(frozen=True)
class RearrangedStages(Stages):
    """The stages `inner` on gathered input and with permuted output; B and C follow."""

    inner: Stages
    arrangement: Arrangement

    @property
    def count(self) -> int:
        return self.inner.count

    @property
    def n_in(self) -> int:
        return self.arrangement.samples * self.arrangement.source

    @property
    def n_out(self) -> int:
        return self.inner.n_out

    @property
    def p(self) -> int:
        return self.inner.p

    @property
    def dtype(self) -> torch.dtype:
        return self.inner.dtype

    @property
    def device(self) -> torch.device:
        return self.inner.device

    def F(self, d: Tensor) -> Tensor:
        return self.arrangement.to_state(self.inner.F(self.arrangement.unfold(d)))

    def Ft(self, y: Tensor) -> Tensor:
        return self.arrangement.fold(self.inner.Ft(self.arrangement.from_state(y)))

    def G(self, x: Tensor) -> Tensor:
        return self.arrangement.to_state(self.inner.G(x))

    def Gt(self, y: Tensor) -> Tensor:
        return self.inner.Gt(self.arrangement.from_state(y))

    def A(self, x: Tensor) -> Tensor | None:
        return self.inner.A(x)

    def B(self, d: Tensor) -> Tensor | None:
        return self.inner.B(self.arrangement.unfold(d))

    def Bt(self, x: Tensor) -> Tensor | None:
        y = self.inner.Bt(x)
        return None if y is None else self.arrangement.fold(y)

    def C(self, d: Tensor) -> Tensor | None:
        y = self.inner.C(self.arrangement.unfold(d))
        return None if y is None else self.arrangement.fold(y)

    def without_curvature(self) -> Self:
        return replace(self, inner=self.inner.without_curvature())

    def range_split(self) -> RangeSplit:
        return RearrangedSplit(self.inner.range_split(), self.arrangement)


@dataclass(frozen=True)
class RearrangedSplit(RangeSplit):
    """The split of the inner stages, seen from outside."""

    inner: RangeSplit
    arrangement: Arrangement

    @property
    def r(self) -> int:
        return self.inner.r

    @property
    def complement(self) -> int:
        return self.inner.complement

    @property
    def coupled(self) -> bool:
        return self.inner.coupled

    def extended(self, stages: Stages) -> RangeSplit:
        assert isinstance(stages, RearrangedStages)
        return replace(self, inner=self.inner.extended(stages.inner))

    def Q(self, s: Tensor) -> Tensor:
        return self.inner.Q(s)

    def Qt(self, x: Tensor) -> Tensor:
        return self.inner.Qt(x)

    def R(self, s: Tensor) -> Tensor:
        return self.arrangement.to_state(self.inner.R(s))

    def Rt(self, y: Tensor) -> Tensor:
        return self.inner.Rt(self.arrangement.from_state(y))

    def A_range(self) -> Tensor | None:
        return self.inner.A_range()

    def B_range(self) -> Tensor | None:
        B = self.inner.B_range()
        return None if B is None else self.arrangement.fold(B.mT).mT

    def B_complement_gram(self) -> Tensor | None:
        gram = self.inner.B_complement_gram()
        return None if gram is None else self.arrangement.fold(self.arrangement.fold(gram).mT)

    def project_out(self, x: Tensor) -> Tensor:
        return self.inner.project_out(x)
