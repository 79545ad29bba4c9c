"""A chain cut into segments: a stage with controls and the control-free stages after it.

Segments of the same make-up form a group and are computed together, as arrays with a leading axis. In each segment the
control component x⊥ that the output does not see is eliminated exactly (see `lq.rangesplit`), which leaves r visible controls s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from linop_hess.lq.layout import Slots
from linop_hess.lq.stages.base import Stages
from linop_hess.lq.stages.row_space import RangeSplit

if TYPE_CHECKING:
    from linop_hess.lq.problem import Problem


@dataclass(frozen=True)
class SegmentGroup:
    """K segments of one make-up: which stacks they run through, and where they are."""

    problem: Problem
    segments: np.ndarray  # (K,) positions among the segments of the chain
    stages: np.ndarray  # (K,) positions of their control stages in the chain
    blocks: tuple[int, ...]  # stacks, control stage first
    positions: np.ndarray  # (K, len(blocks)) positions in those stacks
    is_first: bool  # the chain's first segment, before which δ = 0
    extended: bool = False  # whether controls that only B sees count as visible

    @cached_property
    def steps(self) -> list[Stages]:
        """The stages the segments run through, each as a stack of K."""
        return [self._picked(step) for step in range(len(self.blocks))]

    def _picked(self, step: int) -> Stages:
        block, positions = self.problem.blocks[self.blocks[step]], self.positions[:, step]
        return block if positions.size == block.count else block.take(_as_slice(positions))

    @cached_property
    def split(self) -> RangeSplit:
        """The range splits of the control stages."""
        block, positions = self.problem.blocks[self.blocks[0]], self.positions[:, 0]
        split = block.split if positions.size == block.count else block.split.take(_as_slice(positions))
        return split.extended(self.steps[0]) if self.extended else split

    @cached_property
    def x_slots(self) -> Slots:
        """Where the controls lie."""
        return self.problem.x_slots[self.blocks[0]].take(self.positions[:, 0])

    @cached_property
    def scale_in(self) -> Tensor:
        """The unit of each entry of the state before a segment, (K, n_in, 1); see `lq.scaling`."""
        slots = self.problem.in_slots[self.blocks[0]].take(self.positions[:, 0])
        return slots.gather(self.problem.state_scales[:, None])[:, : self.n_in]

    @cached_property
    def scale_out(self) -> Tensor:
        """The same of the state after it, (K, n_out, 1)."""
        slots = self.problem.out_slots[self.blocks[-1]].take(self.positions[:, -1])
        return slots.gather(self.problem.scales_after[:, None])

    @property
    def count(self) -> int:
        """K."""
        return self.segments.size

    @property
    def r(self) -> int:
        """Number of visible controls of a segment."""
        return self.split.r

    @property
    def n_in(self) -> int:
        """Size of the state before a segment; before the first there is none."""
        return 0 if self.is_first else self.steps[0].n_in

    @property
    def n_out(self) -> int:
        """Size of the state after a segment."""
        return self.steps[-1].n_out


def segment_groups(problem: Problem) -> list[SegmentGroup]:
    """Cut the chain into segments and group those that run through the same stacks."""
    starts = np.flatnonzero(problem.p)
    lengths = np.diff(np.append(starts, problem.length))
    groups: list[SegmentGroup] = []
    for length in np.unique(lengths):
        of_length = np.flatnonzero(lengths == length)
        members = starts[of_length][:, None] + np.arange(length)
        paths = problem.order[members, 0]
        paths_and_first = np.column_stack([paths, of_length == 0])
        kinds, kind_of = np.unique(paths_and_first, axis=0, return_inverse=True)
        for kind, path in enumerate(kinds):
            chosen = np.flatnonzero(kind_of.ravel() == kind)
            groups.append(
                SegmentGroup(
                    problem,
                    segments=of_length[chosen],
                    stages=starts[of_length[chosen]],
                    blocks=tuple(int(b) for b in path[:-1]),
                    positions=problem.order[members[chosen], 1],
                    is_first=bool(path[-1]),
                )
            )
    return groups


def _as_slice(positions: np.ndarray) -> slice | np.ndarray:
    first, last = int(positions[0]), int(positions[-1])
    return slice(first, last + 1) if last - first + 1 == positions.size else positions


@dataclass(frozen=True)
class Loads:
    """What a right-hand side g puts on a group of K segments, the states in units of `SegmentGroup.scale_in`."""

    visible: Tensor  # Qᵀg, (K, r, k)
    hidden: Tensor | None  # g⊥, (K, p, k); None where all controls are visible
    state: Tensor | None  # (1/ε) Bᵀg⊥, (K, n_in, k); None where zero


def loads(group: SegmentGroup, g: Tensor, damping: float) -> Loads:
    """Split g of shape (N, k) into the loads on the visible controls and states of a group."""
    mine = group.x_slots.gather(g)
    visible = group.split.Qt(mine)
    if not group.split.complement:
        return Loads(visible, None, None)
    hidden = mine - group.split.Q(visible)
    push = group.steps[0].Bt(hidden) if group.n_in and group.split.coupled else None
    return Loads(visible, hidden, None if push is None else push * group.scale_in / damping)


def put_controls(x: Tensor, group: SegmentGroup, load: Loads, s: Tensor, d: Tensor | None, damping: float) -> None:
    """Write x = Q s + (g⊥ − (I − QQᵀ)B δ)/ε of a group into x of shape (N, k); s is (K, r, k), d (K, n_in, k), in its units."""
    if load.hidden is None:
        mine = group.split.Q(s)
    else:
        rest = load.hidden
        pull = group.steps[0].B(d * group.scale_in) if d is not None and group.n_in and group.split.coupled else None
        if pull is not None:
            rest = rest - pull
            s = s + group.split.Qt(pull) / damping
        mine = group.split.Q(s) + rest / damping
    group.x_slots.put(x, mine)


def order_of(groups: Sequence[SegmentGroup]) -> np.ndarray:
    """(group, position in it) of every segment of the chain, in order, shape (count, 2)."""
    count = sum(group.count for group in groups)
    of = np.zeros((count, 2), dtype=np.int64)
    for k, group in enumerate(groups):
        of[group.segments, 0] = k
        of[group.segments, 1] = np.arange(group.count)
    return of


def identity(group: SegmentGroup) -> Tensor:
    """Identity matrices on the visible controls, (K, r, r), sharing memory."""
    q = group.problem
    return torch.eye(group.r, dtype=q.dtype, device=q.device).expand(group.count, group.r, group.r)
