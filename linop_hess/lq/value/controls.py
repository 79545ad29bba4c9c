"""The controls of a segment for a dense cost-to-go: as dense blocks where they are narrow, else as the stage that they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from linop_hess.errors import SingularPivotError
from linop_hess.lq.analysis import Analysis
from linop_hess.lq.condensed import Damped
from linop_hess.lq.pivots.hidden import Hidden, hidden_controls
from linop_hess.lq.segments import SegmentGroup
from linop_hess.lq.stages.base import Stage
from linop_hess.lq.stages.row_space import RowSpace


class CondensedControl:
    """A whole segment as dense blocks W = [R, F] and T = [S, E; Eᵀ, Z] at a damping; leading axes are carried along.

    T may be a function that gives it.
    """

    def __init__(self, W: Tensor, T: Tensor | Callable[[], Tensor], r: int) -> None:
        self._W, self._Wt, self._given, self.r = W, W.mT, T, r

    @property
    def _T(self) -> Tensor:
        return self._given if isinstance(self._given, Tensor) else self._given()

    @property
    def n_in(self) -> int:
        """Size of the state before."""
        return self._W.shape[-1] - self.r

    @property
    def n_out(self) -> int:
        """Size of the state after."""
        return self._W.shape[-2]

    def congruence(self, V: Tensor, over: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """T + Wᵀ V W, block by block."""
        r = self.r
        T = add_product(self._T, self._Wt @ V, self._W)
        return T[..., :r, :r], T[..., :r, r:], T[..., r:, r:]

    def pull_back(self, V: Tensor) -> Tensor:
        """Z + Fᵀ V F."""
        F = self._W[..., self.r :]
        return add_product(self._T[..., self.r :, self.r :], F.mT @ V, F)

    def adjoint(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """(Rᵀ y, Fᵀ y)."""
        both = self._Wt @ y
        return both[..., : self.r, :], both[..., self.r :, :]

    def forward(self, s: Tensor, d: Tensor) -> Tensor:
        """F δ + R s."""
        return self._W @ torch.cat([s, d], -2)


class StageControl:
    """The control stage of a wide segment, with the structure of its kind."""

    def __init__(self, stage: Stage, space: RowSpace, damping: complex, hidden: Hidden) -> None:
        self._stage, self._space, self._damping, self._hidden = stage, space, damping, hidden

    @property
    def r(self) -> int:
        """Number of visible controls."""
        return self._space.r

    @property
    def n_in(self) -> int:
        """Size of the state before."""
        return self._stage.n_in

    @property
    def n_out(self) -> int:
        """Size of the state right after."""
        return self._stage.n_out

    def congruence(self, V: Tensor, over: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """S, E and the value at s = 0, from products of the stage; the last in the memory of V where it may be overwritten."""
        stage, space = self._stage, self._space
        VR = space.Rt(V[None]).mT.contiguous()
        S = space.Rt(VR)[0]
        if "A" in stage.nonzero:
            S = S + space.QtAQ()[0]
        S.diagonal().add_(self._damping)
        Et = stage.Ft(VR)[0]
        if "B" in stage.nonzero:
            Et = Et + space.QtB()[0].mT
        return S, Et.mT, self._less_hidden(self._stage.pull_back_over(V) if over else self._stage.pull_back(V))

    def pull_back(self, V: Tensor) -> Tensor:
        """FᵀVF + C less the hidden controls."""
        return self._less_hidden(self._stage.pull_back(V))

    def _less_hidden(self, V: Tensor) -> Tensor:
        if self._hidden.gram is not None:
            V.sub_(self._hidden.gram, alpha=1.0 / self._damping)
        return V

    def adjoint(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """(Rᵀ y, Fᵀ y)."""
        return self._space.Rt(y[None])[0], self._stage.Ft(y[None])[0]

    def forward(self, s: Tensor, d: Tensor) -> Tensor:
        """F δ + R s."""
        out = self._space.R(s[None])[0]
        return out + self._stage.F(d[None])[0] if self.n_in else out


@dataclass(frozen=True)
class Segment:
    """One segment at one damping: its controls, and the control-free stages after them.

    Attributes
    ----------
    control : CondensedControl or StageControl
    free : tuple of Stage
        Empty where the whole segment is condensed.
    hidden : Hidden
    stage : int
        Position of the control stage in the chain.
    units : Tensor, shape (n_in, 1)
        How far the state before it moves, in the unit that the recursion keeps it in; see `lq.scaling`.
    is_first : bool
    """

    control: CondensedControl | StageControl
    free: tuple[Stage, ...]
    hidden: Hidden
    stage: int
    units: Tensor
    is_first: bool

    @property
    def r(self) -> int:
        """Number of visible controls."""
        return self.control.r

    @property
    def n_in(self) -> int:
        """Size of the state before."""
        return self.control.n_in

    @cached_property
    def n_out(self) -> int:
        """Size of the state after."""
        return self.free[-1].n_out if self.free else self.control.n_out

    def congruence(self, V: Tensor, over: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """S, E and the value at s = 0 before the whole segment, of a value V after it."""
        for stage in reversed(self.free):
            V, over = stage.pull_back_over(V) if over else stage.pull_back(V), True
        return self.control.congruence(V, over)

    def adjoint(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """(Rᵀ v, Fᵀ v) of the whole segment for v of shape (n_out, k)."""
        for stage in reversed(self.free):
            v = stage.Ft(v[None])[0]
        return self.control.adjoint(v)

    def forward(self, s: Tensor, d: Tensor) -> Tensor:
        """F δ + R s of the whole segment."""
        y = self.control.forward(s, d)
        for stage in self.free:
            y = stage.F(y[None])[0]
        return y


def segments_at(analysis: Analysis, damping: complex, largest: float) -> list[Segment]:
    """Return the segments of a chain in order, at a damping.

    Parameters
    ----------
    analysis : Analysis
    damping : float
    largest : float
        The largest coupling to the state of a hidden direction that is eliminated; others are delayed.

    Raises
    ------
    SingularPivotError
        If damping = 0 and there are hidden controls.
    """
    for group in analysis.groups:
        if group.hidden and damping == 0.0:
            raise SingularPivotError(int(group.stages[0]))
    of_group = [
        _condensed(analysis, g, damping, largest) if group.is_narrow else _wide(group, damping, largest)
        for g, group in enumerate(analysis.groups)
    ]
    return [of_group[g][k] for g, k in analysis.pairs]


def _condensed(analysis: Analysis, g: int, damping: complex, largest: float) -> list[Segment]:
    group, blocks = analysis.groups[g], analysis.condensed_group(g)
    units = torch.ones_like(group.unit_in)
    if not group.in_units:
        blocks, units = blocks.out_of_units(group.unit_in, group.unit_out), group.unit_in
    hidden = hidden_controls(group, blocks.gram, damping, largest)
    # Those delayed must never have been taken off: 1/ε is so large that adding them again would leave nothing but rounding.
    left = None
    if any(mine.is_split for mine in hidden):
        left = torch.stack([mine.gram for mine in hidden if mine.gram is not None])
    damped = Damped(blocks, damping, left)
    return [
        Segment(CondensedControl(W, partial(damped.T, k), group.r), (), mine, int(stage), unit, group.is_first)
        for k, (W, mine, stage, unit) in enumerate(
            zip(blocks.W.unbind(), hidden, group.stages, units.unbind(), strict=True)
        )
    ]


def _wide(group: SegmentGroup, damping: complex, largest: float) -> list[Segment]:
    gram = group.space.hidden_gram() if group.is_coupled else None
    segments = []
    for k, hidden in enumerate(hidden_controls(group, gram, damping, largest)):
        control = StageControl(group.control.at(k), group.space.at(k), damping, hidden)
        free = tuple(stage.at(k) for stage in group.free)
        segments.append(Segment(control, free, hidden, int(group.stages[k]), group.unit_in[k], group.is_first))
    return segments


def add_product(C: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """C + A B, with or without a leading axis."""
    return torch.addmm(C, A, B) if C.ndim == 2 else torch.baddbmm(C, A, B)
