"""The LQ problem with all that can be eliminated exactly, stage by stage, gone.

A segment is a stage with controls and the control-free stages after it. In each segment the control component x⊥ that the
output does not see and the states between its stages are eliminated, which leaves, with s the r visible controls,

    ½ sᵀ S s + sᵀ E δ + ½ δᵀ Z δ,        δ⁺ = F δ + R s.

Segments of the same make-up are computed together, as arrays with a leading axis.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from linop_hess.lq.problem import Problem
from linop_hess.lq.rangesplit import RangeSplit
from linop_hess.lq.stages import Stages


@dataclass(frozen=True)
class SegmentGroup:
    """Segments of one make-up: which stacks they run through, and where they are."""

    segments: np.ndarray  # (K,) positions among the segments of the chain
    stages: np.ndarray  # (K,) positions of their control stages in the chain
    blocks: tuple[int, ...]  # stacks, control stage first
    positions: np.ndarray  # (K, len(blocks)) positions in those stacks
    is_first: bool  # the chain's first segment, before which δ = 0


@dataclass(frozen=True)
class Condensed:
    """The blocks of a group of K segments."""

    S: Tensor  # (K, r, r)
    E: Tensor  # (K, r, n_in)
    Z: Tensor  # (K, n_in, n_in)
    F: Tensor  # (K, n_out, n_in)
    R: Tensor  # (K, n_out, r)


def segment_groups(problem: Problem) -> list[SegmentGroup]:
    """Cut the chain into segments and group those that run through the same stacks."""
    if problem.first == problem.length:
        return []
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
                    segments=of_length[chosen],
                    stages=starts[of_length[chosen]],
                    blocks=tuple(int(b) for b in path[:-1]),
                    positions=problem.order[members[chosen], 1],
                    is_first=bool(path[-1]),
                )
            )
    return groups


def picked(problem: Problem, group: SegmentGroup, step: int) -> Stages:
    """Return the stages that the group's segments have at `step`."""
    block = problem.blocks[group.blocks[step]]
    positions = group.positions[:, step]
    if positions.size == block.count:
        return block
    return block.take(_as_slice(positions))


def picked_split(problem: Problem, group: SegmentGroup) -> RangeSplit:
    """Return the range splits of the group's control stages."""
    split = problem.blocks[group.blocks[0]].split
    positions = group.positions[:, 0]
    if positions.size == problem.blocks[group.blocks[0]].count:
        return split
    return split.take(_as_slice(positions))


def _as_slice(positions: np.ndarray) -> slice | np.ndarray:
    first, last = int(positions[0]), int(positions[-1])
    return slice(first, last + 1) if last - first + 1 == positions.size else positions


def condense(problem: Problem, group: SegmentGroup, damping: float) -> Condensed:
    """Compute the condensed blocks of a group of segments.

    Raises
    ------
    ZeroDivisionError
        If damping = 0 and a control is seen neither by its output nor eliminated by curvature (H is then most likely
        singular).
    """
    control = picked(problem, group, 0)
    split = picked_split(problem, group)
    n_in = 0 if group.is_first else control.n_in
    K, r = control.count, split.r
    S = damping * torch.eye(r, dtype=problem.dtype, device=problem.device).expand(K, r, r)
    A = split.A_range()
    if A is not None:
        S = S + A
    R = split.R(split_eye(split, problem, K))
    if n_in:
        F = control.dense_F()
        B = split.B_range()
        E = torch.zeros(K, r, n_in, dtype=problem.dtype, device=problem.device) if B is None else B
        C = control.dense_C()
        Z = torch.zeros(K, n_in, n_in, dtype=problem.dtype, device=problem.device) if C is None else C
    else:
        F, E, Z = R.new_zeros(K, control.n_out, 0), R.new_zeros(K, r, 0), R.new_zeros(K, 0, 0)
    if split.complement:
        if damping == 0.0:
            raise ZeroDivisionError
        gram = split.B_complement_gram() if n_in else None
        if gram is not None:
            Z = Z - gram / damping
    for step in range(1, len(group.blocks)):
        stage = picked(problem, group, step)
        CR = stage.C(R)
        if CR is not None:
            S = S + R.mT @ CR
            CF = stage.C(F) if n_in else None
            if CF is not None:
                E = E + R.mT @ CF
                Z = Z + F.mT @ CF
        R = stage.F(R)
        F = stage.F(F) if n_in else R.new_zeros(K, stage.n_out, 0)
    return Condensed(S, E, Z, F, R)


def split_eye(split: RangeSplit, problem: Problem, count: int) -> Tensor:
    """Identity matrices of the split's size, one per stage."""
    return torch.eye(split.r, dtype=problem.dtype, device=problem.device).expand(count, split.r, split.r)
