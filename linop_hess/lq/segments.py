"""A chain cut into segments: a stage with controls and the control-free stages after it.

Segments of the same make-up form a group and are computed together, as arrays with a leading axis. What precedes the first controls
never moves, so the first segment has no state before it. In each segment the control component x⊥ that the output does not see (the
hidden controls, see `lq.stages.row_space`) is eliminated exactly, which leaves r visible controls s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from linop_hess.lq.layout import Slots
from linop_hess.lq.problem import Problem
from linop_hess.lq.scaling import Units
from linop_hess.lq.stacked import neighbours
from linop_hess.lq.stages.base import Stage
from linop_hess.lq.stages.injection import InitialStage
from linop_hess.lq.stages.row_space import RowSpace

# Dense blocks cost more flops and fewer calls; up to this size (r + n_in + widest state) the calls are what takes the time.
CONDENSED_UP_TO = 160


@dataclass(frozen=True)
class SegmentGroup:
    """K segments of one make-up.

    Attributes
    ----------
    segments : ndarray of int, shape (K,)
        Their positions among the segments of the chain.
    stages : ndarray of int, shape (K,)
        Positions of their control stages in the chain.
    path : tuple of int
        The stacks that they run through.
    control : Stage
        The control stages, a stack of K.
    space : RowSpace
        Their row spaces.
    free : tuple of Stage
        The control-free stages after them, each a stack of K.
    x_slots : Slots
        Where the controls lie in a flat vector.
    units : Units
        Those of all states of the chain.
    in_slots, out_slots : Slots
        Where the states before and after lie among them.
    is_first : bool
        Whether this is the first segment of the chain.
    in_units : bool
        Whether recursions keep states in their units: where all segments of the chain are condensed, so that it costs nothing.
    """

    segments: np.ndarray
    stages: np.ndarray
    path: tuple[int, ...]
    control: Stage
    space: RowSpace
    free: tuple[Stage, ...]
    x_slots: Slots
    units: Units
    in_slots: Slots
    out_slots: Slots
    is_first: bool
    in_units: bool = False

    @property
    def count(self) -> int:
        """K."""
        return self.segments.size

    @property
    def r(self) -> int:
        """Number of visible controls of a segment."""
        return self.space.r

    @property
    def hidden(self) -> int:
        """Number of hidden controls of a segment."""
        return self.space.hidden

    @property
    def n_in(self) -> int:
        """Size of the state before a segment; before the first there is none."""
        return self.control.n_in

    @property
    def n_out(self) -> int:
        """Size of the state after a segment."""
        return self.free[-1].n_out if self.free else self.control.n_out

    @property
    def is_coupled(self) -> bool:
        """Whether the state acts on the hidden controls."""
        return "B" in self.control.nonzero and self.n_in > 0 and self.space.hidden > 0 and self.space.coupled

    @property
    def is_narrow(self) -> bool:
        """Whether the segments are condensed to dense blocks."""
        widest = max(stage.n_out for stage in (self.control, *self.free))
        return self.r + self.n_in + widest <= CONDENSED_UP_TO

    def to(self, dtype: torch.dtype) -> SegmentGroup:
        """Return the segments with their arrays in another dtype."""
        return replace(
            self,
            control=self.control.to(dtype),
            space=self.space.to(dtype),
            free=tuple(stage.to(dtype) for stage in self.free),
        )

    def part(self, which: slice) -> SegmentGroup:
        """Return some neighbours of the group, in its memory."""
        return replace(
            self,
            segments=self.segments[which],
            stages=self.stages[which],
            control=self.control.take(which),
            space=self.space.take(which),
            free=tuple(stage.take(which) for stage in self.free),
            x_slots=self.x_slots.take(which),
            in_slots=self.in_slots.take(which),
            out_slots=self.out_slots.take(which),
        )

    @cached_property
    def unit_in(self) -> Tensor:
        """Units of the states before, (K, n_in, 1); see `lq.scaling`."""
        units = self.in_slots.gather(self.units.before[:, None]).to(self.control.dtype)
        return units[:, :0] if self.is_first else units

    @cached_property
    def unit_out(self) -> Tensor:
        """Units of the states after, (K, n_out, 1)."""
        return self.out_slots.gather(self.units.after[:, None]).to(self.control.dtype)

    @cached_property
    def state_unit(self) -> Tensor | None:
        """The unit in which recursions keep the state before a segment; None: 1."""
        return self.unit_in if self.in_units else None


def segment_groups(problem: Problem, row_spaces: Sequence[RowSpace | None]) -> list[SegmentGroup]:
    """Cut a chain into segments and group those that run through the same stacks.

    Parameters
    ----------
    problem : Problem
    row_spaces : sequence of RowSpace
        One for each stack that has controls.
    """
    layout, units = problem.layout, Units(problem, row_spaces)
    starts = np.flatnonzero(layout.p)
    lengths = np.diff(np.append(starts, problem.length))
    groups: list[SegmentGroup] = []
    for length in np.unique(lengths):
        of_length = np.flatnonzero(lengths == length)
        members = starts[of_length][:, None] + np.arange(length)
        paths_and_first = np.column_stack([layout.order[members, 0], of_length == 0])
        kinds, kind_of = np.unique(paths_and_first, axis=0, return_inverse=True)
        for kind, path in enumerate(kinds):
            chosen = np.flatnonzero(kind_of.ravel() == kind)
            blocks, is_first = tuple(int(b) for b in path[:-1]), bool(path[-1])
            at = layout.order[members[chosen], 1]  # (K, length) positions in those stacks
            picked = [_picked(problem.blocks[b], at[:, k]) for k, b in enumerate(blocks)]
            space = row_spaces[blocks[0]]
            assert space is not None
            groups.append(
                SegmentGroup(
                    segments=of_length[chosen],
                    stages=starts[of_length[chosen]],
                    path=blocks,
                    control=InitialStage(picked[0]) if is_first else picked[0],
                    space=_picked(space, at[:, 0]),
                    free=tuple(picked[1:]),
                    x_slots=layout.x_slots[blocks[0]].take(at[:, 0]),
                    units=units,
                    in_slots=layout.in_slots[blocks[0]].take(at[:, 0]),
                    out_slots=layout.out_slots[blocks[-1]].take(at[:, -1]),
                    is_first=is_first,
                )
            )
    if all(group.is_narrow for group in groups):
        return [replace(group, in_units=True) for group in groups]
    return groups


_Stack = TypeVar("_Stack", Stage, RowSpace)


def _picked(stack: _Stack, positions: np.ndarray) -> _Stack:
    return stack if positions.size == stack.count else stack.take(neighbours(positions))


def order_of(groups: Sequence[SegmentGroup]) -> np.ndarray:
    """(group, position in it) of every segment of the chain, in order, shape (count, 2)."""
    count = sum(group.count for group in groups)
    of = np.zeros((count, 2), dtype=np.int64)
    for k, group in enumerate(groups):
        of[group.segments, 0] = k
        of[group.segments, 1] = np.arange(group.count)
    return of


@dataclass(frozen=True)
class Loads:
    """What a right-hand side g puts on a group of K segments, the states in units of `SegmentGroup.state_unit`."""

    visible: Tensor  # Qᵀg, (K, r, k)
    hidden: Tensor | None  # g⊥, (K, p, k); None where all controls are visible
    state: Tensor | None  # (1/ε) Bᵀg⊥, (K, n_in, k); None where zero


def split_load(group: SegmentGroup, g: Tensor) -> tuple[Tensor, Tensor | None]:
    """Qᵀg and g⊥ = (I − QQᵀ)g on a group, (K, r, k) and (K, p, k) or None, for g of shape (N, k)."""
    mine = group.x_slots.gather(g)
    visible = group.space.Qt(mine)
    return visible, mine - group.space.Q(visible) if group.hidden else None


def state_load(group: SegmentGroup, hidden: Tensor | None, damping: complex) -> Tensor | None:
    """(1/ε) Bᵀg⊥, what the elimination of the hidden controls leaves on the state."""
    if hidden is None or not group.is_coupled:
        return None
    push = group.control.Bt(hidden)
    return (push if group.state_unit is None else push * group.state_unit) / damping


def loads(group: SegmentGroup, g: Tensor, damping: complex) -> Loads:
    """Split g of shape (N, k) into the loads on the visible controls and states of a group."""
    visible, hidden = split_load(group, g)
    return Loads(visible, hidden, state_load(group, hidden, damping))


def put_controls(x: Tensor, group: SegmentGroup, hidden: Tensor | None, s: Tensor, d: Tensor, damping: complex) -> None:
    """Write x = Q s + h − (I − QQᵀ)B δ/ε of a group into x of shape (N, k).

    h = g⊥/ε is `hidden`, (K, p, k); s is (K, r, k); d is (K, n_in, k), in units of `SegmentGroup.state_unit`.
    """
    if hidden is None:
        mine = group.space.Q(s)
    elif not group.is_coupled:
        mine = group.space.Q(s).add_(hidden)
    else:
        pull = group.control.B(d if group.state_unit is None else d * group.state_unit)
        s = s + group.space.Qt(pull) / damping
        mine = group.space.Q(s).add_(hidden).sub_(pull, alpha=1.0 / damping)
    group.x_slots.put(x, mine)


def identity(group: SegmentGroup) -> Tensor:
    """Identity matrices on the visible controls, (K, r, r), sharing memory."""
    like = group.control
    return torch.eye(group.r, dtype=like.dtype, device=like.device).expand(group.count, group.r, group.r)
