"""What the backward recursion asks of one segment: the congruence of a cost-to-go by it, and products with it.

With ½ δ⁺ᵀ V δ⁺ the cost after the segment, that before it is the quadratic form of T = [S, E; Eᵀ, Z] + [R, F]ᵀ V [R, F] in (s, δ).
Narrow segments are condensed to dense blocks; wide ones keep the structure of their stages. States are in their units (see `lq.scaling`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from linop_hess.lq.condensed import condensed
from linop_hess.lq.methods.singular import SingularPivotError
from linop_hess.lq.segments import SegmentGroup
from linop_hess.lq.stages.dense import DiagonalStages

# Dense blocks cost more flops and fewer calls; below this size the calls are what takes the time.
_NARROW = 160


@dataclass(frozen=True)
class CostToGo:
    """½ δᵀVδ + δᵀYc + ½ cᵀ diag(μ) c of a state δ and all after it, c being directions not eliminated yet."""

    V: Tensor  # (n, n)
    Y: Tensor | None = None  # (n, m)
    mu: Tensor | None = None  # (m,)


class Segment(ABC):
    """One segment, r visible controls, states of n_in before and n_out after."""

    r: int

    @abstractmethod
    def pull_back(self, V: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """T's blocks (r, r), (r, n_in) and (n_in, n_in), the last in memory of its own; V None stands for zero."""

    @abstractmethod
    def pull_back_state(self, V: Tensor | None) -> Tensor:
        """The last of these blocks alone."""

    @abstractmethod
    def adjoint(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """(Rᵀ v, Fᵀ v) for v of shape (n_out, k)."""

    @abstractmethod
    def forward(self, s: Tensor | None, d: Tensor | None) -> Tensor:
        """F δ + R s; None for one of them stands for zero."""


class DenseSegment(Segment):
    """A segment as dense blocks W = [R, F] and T₀ = [S, E; Eᵀ, Z]."""

    def __init__(self, W: Tensor, T: Tensor, r: int) -> None:
        self._W, self._Wt, self._T, self.r = W, W.mT, T, r

    def pull_back(self, V: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        T = self._T if V is None else torch.addmm(self._T, self._Wt @ V, self._W)
        r = self.r
        return T[:r, :r], T[:r, r:], T[r:, r:] if V is not None else T[r:, r:].clone()

    def pull_back_state(self, V: Tensor | None) -> Tensor:
        Z, F = self._T[self.r :, self.r :], self._W[:, self.r :]
        return Z.clone() if V is None else torch.addmm(Z, F.mT @ V, F)

    def adjoint(self, v: Tensor) -> tuple[Tensor, Tensor]:
        both = self._Wt @ v
        return both[: self.r], both[self.r :]

    def forward(self, s: Tensor | None, d: Tensor | None) -> Tensor:
        if s is None:
            assert d is not None
            return self._W[:, self.r :] @ d
        return self._W[:, : self.r] @ s if d is None else self._W @ torch.cat([s, d])


class StagesSegment(Segment):
    """A segment as the stages it is made of."""

    def __init__(self, group: SegmentGroup, position: int, damping: float) -> None:
        self._steps = [stage.at(position) for stage in group.steps]
        self._split = group.split.at(position)
        self._damping = damping
        self._n_in = group.n_in
        self._unit_in = group.scale_in[position]
        self._unit_out: Tensor | None = group.scale_out[position]
        last = self._steps[-1]
        if isinstance(last, DiagonalStages):  # which can take the unit in
            self._steps[-1] = replace(last, f=last.f / self._unit_out.mT)
            self._unit_out = None
        self.r = group.r
        if self._split.complement and damping == 0.0:
            raise SingularPivotError(int(group.stages[position]))

    def pull_back(self, V: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        control, split, n_in = self._steps[0], self._split, self._n_in
        V = self._before_control(V)
        VR = None if V is None else split.Rt(V[None]).mT.contiguous()
        K = torch.zeros(self.r, self.r, dtype=control.dtype, device=control.device) if VR is None else split.Rt(VR)[0]
        K.diagonal().add_(self._damping)
        A = split.A_range()
        if A is not None:
            K += A[0]
        cross = K.new_zeros(n_in, self.r) if VR is None or not n_in else control.Ft(VR)[0]
        B = split.B_range() if n_in else None
        if B is not None:
            cross += B[0].mT
        if n_in:
            cross *= self._unit_in
        return K, cross.mT, self._through_control(V)

    def pull_back_state(self, V: Tensor | None) -> Tensor:
        return self._through_control(self._before_control(V))

    def _before_control(self, V: Tensor | None) -> Tensor | None:
        """Take V back to the state right after the stage with controls."""
        if V is not None and self._unit_out is not None:
            V = V / self._unit_out / self._unit_out.mT
        for stage in reversed(self._steps[1:]):
            V = stage.pull_back(V)
        return V

    def _through_control(self, V: Tensor | None) -> Tensor:
        control, n_in = self._steps[0], self._n_in
        V = control.pull_back(V) if n_in else None
        if V is None:
            V = torch.zeros(n_in, n_in, dtype=control.dtype, device=control.device)
        gram = self._split.B_complement_gram() if n_in and self._split.coupled else None
        if gram is not None:
            V.add_(gram[0], alpha=-1.0 / self._damping)
        return V.mul_(self._unit_in).mul_(self._unit_in.mT)

    def adjoint(self, v: Tensor) -> tuple[Tensor, Tensor]:
        y = (v if self._unit_out is None else v / self._unit_out)[None]
        for stage in reversed(self._steps[1:]):
            y = stage.Ft(y)
        seen = self._split.Rt(y)[0]
        return seen, self._steps[0].Ft(y)[0] * self._unit_in if self._n_in else v.new_zeros(0, v.shape[1])

    def forward(self, s: Tensor | None, d: Tensor | None) -> Tensor:
        parts = [] if s is None else [self._split.R(s[None])]
        if d is not None:
            parts.append(self._steps[0].F((d * self._unit_in)[None]))
        y = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        for stage in self._steps[1:]:
            y = stage.F(y)
        return y[0] if self._unit_out is None else y[0] / self._unit_out


def is_narrow(group: SegmentGroup) -> bool:
    """Whether the segments of a group are condensed to dense blocks."""
    return group.r + group.n_in + max(stage.n_out for stage in group.steps) <= _NARROW


def segments_of(group: SegmentGroup, damping: float) -> list[Segment]:
    """Return the segments of a group, dense where they are narrow.

    Raises
    ------
    SingularPivotError
        If damping = 0 and there are controls that the output does not see.
    """
    if not is_narrow(group):
        return [StagesSegment(group, k, damping) for k in range(group.count)]
    blocks = condensed(group, damping)
    return [DenseSegment(w, t, group.r) for w, t in zip(blocks.W.unbind(), blocks.T(damping).unbind(), strict=True)]
