"""Stage y_j = w_f(j) ẑ_j + w₀_f(j) with ẑ affine in z entry by entry: the affine part of normalizations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from linop_hess.lq.stages.base import Stage, entries_of
from linop_hess.lq.wiring import add_at


@dataclass(frozen=True)
class Features:
    """Which of the `count` features each state entry belongs to: `index`, shape (n,)."""

    index: Tensor
    count: int


@dataclass(frozen=True)
class ScaleShiftStage(Stage):
    """K stages of scale and shift per feature; the controls are w and w₀, or either alone.

    F = diag(w_f slope);  G [X, X₀] = ẑ ∘ X_f + X₀_f;  B δ sums β ∘ slope ∘ δ over each feature, in the rows of w.

    Parameters
    ----------
    normalized : Tensor, shape (K, n)
        ẑ.
    slope : Tensor, shape (K, n)
        dẑ/dz.
    scale : Tensor, shape (K, n)
        w of each entry.
    beta : Tensor or None, shape (K, n)
        Adjoint of the output.
    features : Features
    weight, bias : bool
        Whether w, and whether w₀, is a control.
    """

    normalized: Tensor
    slope: Tensor
    scale: Tensor
    beta: Tensor | None
    features: Features
    weight: bool
    bias: bool

    @property
    def n_in(self) -> int:
        return self.scale.shape[1]

    @property
    def n_out(self) -> int:
        return self.scale.shape[1]

    @property
    def p(self) -> int:
        return self.features.count * (self.weight + self.bias)

    @property
    def samples(self) -> int:
        """The number of entries, each of which is by itself."""
        return max(1, self.scale.shape[1])

    @property
    def nonzero(self) -> frozenset[str]:
        return frozenset("B") if self.beta is not None and self.weight else frozenset()

    def F(self, d: Tensor) -> Tensor:
        return (self.scale * self.slope)[..., None] * d

    def Ft(self, y: Tensor) -> Tensor:
        return self.F(y)

    def _sum_features(self, y: Tensor) -> Tensor:
        out = y.new_zeros(y.shape[0], self.features.count, y.shape[-1])
        add_at(out, self.features.index, y)
        return out

    def G(self, x: Tensor) -> Tensor:
        y = x.new_zeros(self.count, self.n_out, x.shape[-1])
        if self.weight:
            y = y + self.normalized[..., None] * x[:, : self.features.count][:, self.features.index]
        if self.bias:
            y = y + x[:, x.shape[1] - self.features.count :][:, self.features.index]
        return y

    def Gt(self, y: Tensor) -> Tensor:
        parts = []
        if self.weight:
            parts.append(self._sum_features(self.normalized[..., None] * y))
        if self.bias:
            parts.append(self._sum_features(y))
        return torch.cat(parts, 1) if parts else super().Gt(y)

    def B(self, d: Tensor) -> Tensor:
        if self.beta is None or not self.weight:
            return super().B(d)
        out = d.new_zeros(self.count, self.p, d.shape[-1])
        out[:, : self.features.count] = self._sum_features((self.beta * self.slope)[..., None] * d)
        return out

    def Bt(self, x: Tensor) -> Tensor:
        if self.beta is None or not self.weight:
            return super().Bt(x)
        return (self.beta * self.slope)[..., None] * x[:, : self.features.count][:, self.features.index]

    def with_adjoint(self, beta: Tensor) -> Self:
        return replace(self, beta=beta)

    def gauss_newton(self) -> Self:
        return replace(self, beta=None)

    def dense_F(self) -> Tensor:
        return torch.diag_embed(self.scale * self.slope)

    def of_samples(self, start: int, stop: int, samples: int) -> Self:
        each = self.scale.shape[1] // samples
        part = slice(start * each, stop * each)
        return replace(
            self,
            normalized=self.normalized[:, part],
            slope=self.slope[:, part],
            scale=self.scale[:, part],
            beta=None if self.beta is None else self.beta[:, part],
            features=replace(self.features, index=self.features.index[part]),
        )

    def of_chosen(self, which: Tensor, weights: Tensor, samples: int) -> Self:
        at, weight = entries_of(which, weights, self.scale.shape[1] // samples, self.scale)
        return replace(
            self,
            normalized=self.normalized[:, at],
            slope=self.slope[:, at],
            scale=self.scale[:, at],
            beta=None if self.beta is None else self.beta[:, at] * weight,
            features=replace(self.features, index=self.features.index[at]),
        )

    def Gt_each(self, y: Tensor, samples: int) -> Tensor:
        features, k = self.features.count, y.shape[-1]
        sample = torch.arange(samples, device=y.device).repeat_interleave(self.n_out // samples)
        place = sample * features + self.features.index
        flat = y.reshape(self.n_out, k)
        parts = [self.normalized[0, :, None] * flat] * self.weight + [flat] * self.bias
        sums = [y.new_zeros(samples * features, k).index_add_(0, place, part) for part in parts]
        return torch.cat([y.new_zeros(samples, 0, k), *(part.view(samples, features, k) for part in sums)], 1)

    def entries(self, block: str) -> int:
        return self.n_in * {"F": 1, "G": self.weight + self.bias, "B": self.weight, "C": 0}[block]

    def calls(self, block: str) -> int:
        return {"F": 3, "G": 6 * self.weight + 4 * self.bias}.get(block, 8)

    def pull_back(self, V: Tensor) -> Tensor:
        slope = (self.scale * self.slope)[0]
        return (V * slope[:, None]).mul_(slope)
