"""Convolutions: affine stages on gathered patches of their input, whose outputs are laid out by channels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from linop_hess.lq.stages.affine import AffineRowSpace, AffineStage
from linop_hess.lq.stages.base import SampleRows, Stage
from linop_hess.lq.stages.row_space import Controlled, Joint, RowSpace


@dataclass(frozen=True)
class Arrangement:
    """How a convolution's patches are gathered, and how its outputs are laid out.

    Attributes
    ----------
    samples : int
    source : int
        State size of a sample before the stage.
    gather : Tensor of int, shape (patch entries of a sample,)
        Source of each patch entry, `source` standing for zero padding.
    positions, channels : int
        Output positions and channels of a sample; the rows are (samples, positions, channels), the state is
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
        return padded[:, :, self.gather].reshape(K, self.samples * self.gather.numel(), k)

    def fold(self, y: Tensor) -> Tensor:
        """Uᵀ y, the adjoint of `unfold`."""
        K, k = y.shape[0], y.shape[-1]
        padded = y.new_zeros(K, self.samples, self.source + 1, k)
        padded.index_add_(2, self.gather, y.reshape(K, self.samples, self.gather.numel(), k))
        return padded[:, :, : self.source].reshape(K, self.samples * self.source, k)

    def to_state(self, y: Tensor) -> Tensor:
        """Order of rows to order of the state."""
        K, k = y.shape[0], y.shape[-1]
        return y.reshape(K, self.samples, self.positions, self.channels, k).transpose(2, 3).reshape(y.shape)

    def from_state(self, y: Tensor) -> Tensor:
        """Order of the state to order of rows."""
        K, k = y.shape[0], y.shape[-1]
        return y.reshape(K, self.samples, self.channels, self.positions, k).transpose(2, 3).reshape(y.shape)


@dataclass(frozen=True)
class ConvolutionStage(AffineStage):
    """The affine stages on patches: rows Z of shape (K, samples · positions, patch), the state arranged by `arrangement`."""

    arrangement: Arrangement

    @property
    def n_in(self) -> int:
        return self.arrangement.samples * self.arrangement.source

    @property
    def samples(self) -> int:
        """The samples of the batch: patches of one sample overlap."""
        return max(1, self.arrangement.samples)

    def F(self, d: Tensor) -> Tensor:
        return self.arrangement.to_state(super().F(self.arrangement.unfold(d)))

    def Ft(self, y: Tensor) -> Tensor:
        return self.arrangement.fold(super().Ft(self.arrangement.from_state(y)))

    def G(self, x: Tensor) -> Tensor:
        return self.arrangement.to_state(super().G(x))

    def Gt(self, y: Tensor) -> Tensor:
        return super().Gt(self.arrangement.from_state(y))

    def B(self, d: Tensor) -> Tensor:
        return super().B(self.arrangement.unfold(d))

    def Bt(self, x: Tensor) -> Tensor:
        return self.arrangement.fold(super().Bt(x))

    def with_adjoint(self, beta: Tensor) -> Self:
        return super().with_adjoint(self.arrangement.from_state(beta[..., None]))

    def row_space_in_units(self, t: Tensor) -> RowSpace | None:
        return None  # of arranged outputs only where a tensor has one unit

    def _space(self, basis: Tensor, rho: Tensor, curved_by: Tensor | None) -> RowSpace:
        o, i = self.W.shape[1:]
        return ConvolutionRowSpace(
            basis, rho, self.beta, o, i, self.weight, self.bias, self.arrangement, curved_by=curved_by
        )

    def calls(self, block: str) -> int:
        return Stage.calls(self, block) + {"F": 12, "A": 0}.get(block, 6)

    def dense_F(self) -> Tensor:
        return Stage.dense_F(self)

    def of_samples(self, start: int, stop: int, samples: int) -> Self:
        size = self.arrangement.samples * (stop - start) // samples
        arrangement = replace(self.arrangement, samples=size)
        return replace(super().of_samples(start, stop, samples), arrangement=arrangement)

    def of_chosen(self, which: Tensor, weights: Tensor, samples: int) -> Self:
        arrangement = replace(self.arrangement, samples=self.arrangement.samples * which.numel() // samples)
        return replace(super().of_chosen(which, weights, samples), arrangement=arrangement)

    def sample_rows(self, samples: int) -> SampleRows | None:
        return None

    def G_columns(self, start: int, stop: int) -> Tensor:
        return self.arrangement.to_state(super().G_columns(start, stop))

    def Gt_each(self, y: Tensor, samples: int) -> Tensor:
        rows = self.arrangement.from_state(y.reshape(1, self.n_out, y.shape[-1]))
        return super().Gt_each(rows.reshape(y.shape), samples)

    def pull_back(self, V: Tensor) -> Tensor:
        return Stage.pull_back(self, V)

    def pull_back_over(self, V: Tensor) -> Tensor:
        return self.pull_back(V)


@dataclass(frozen=True)
class ConvolutionRowSpace(AffineRowSpace):
    """Q is that of the rows; what touches the state is arranged."""

    arrangement: Arrangement

    def R(self, s: Tensor) -> Tensor:
        return self.arrangement.to_state(super().R(s))

    def Rt(self, y: Tensor) -> Tensor:
        return super().Rt(self.arrangement.from_state(y))

    def QtB(self) -> Tensor:
        return self.arrangement.fold(super().QtB().mT).mT

    def hidden_coupling(self) -> Tensor:
        return self.arrangement.fold(super().hidden_coupling().mT).mT

    def hidden_gram(self) -> Tensor:
        # Not folded from that of the patches, which is larger by the kernel size twice.
        return RowSpace.hidden_gram(self)

    def hidden_directions(self, W: Tensor) -> Tensor:
        return super().hidden_directions(self.arrangement.unfold(W))

    def covariance_diagonal(self, stage: Controlled, joint: Joint, damping: float) -> Tensor:
        return RowSpace.covariance_diagonal(self, stage, joint, damping)
