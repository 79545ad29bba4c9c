"""Runs of neighbouring segments of a chain, as short as they can be so that their controls reach every state after them.

With u = (s_q, …, s_1, δ), δ the state before a run and s_j the visible controls of its segments, a run is

    ½ uᵀ T u,        δ⁺ = W u,

the states between its segments eliminated by forward substitution. With s_b as many of the first controls as there are states after the
run, W = [R_b, …], s_b = K v, v = (δ, the other controls, δ⁺), solves the constraint where R_b is well conditioned; a run is then ½ vᵀ T' v,
and neither s_b nor a multiplier is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from linop_hess.errors import SingularPivotError
from linop_hess.lq.accuracy import REACHED
from linop_hess.lq.analysis import Analysis
from linop_hess.lq.condensed import Condensed
from linop_hess.lq.segments import SegmentGroup, identity
from linop_hess.lq.stacked import neighbours

# Segments of a run at most: what rounding does to the states between them grows with each.
_LONGEST = 6


@dataclass(frozen=True)
class Runs:
    """K runs through segments of the same groups.

    Attributes
    ----------
    places : ndarray of int, shape (K,)
        Their positions among the runs of the chain.
    groups : tuple of int
        The group of each of their segments.
    at : tuple of ndarray of int, each of shape (K,)
        The positions of these segments in their groups.
    """

    places: np.ndarray
    groups: tuple[int, ...]
    at: tuple[np.ndarray, ...]

    @property
    def count(self) -> int:
        """K."""
        return self.places.size

    def part(self, which: slice) -> Runs:
        """Return some of the runs."""
        return Runs(self.places[which], self.groups, tuple(at[which] for at in self.at))

    def segments(self) -> list[tuple[int, slice | np.ndarray]]:
        """Group and positions in it of each segment, a slice where they are neighbours."""
        return [(g, neighbours(at)) for g, at in zip(self.groups, self.at, strict=True)]

    def blocks(self, condensed: Sequence[Condensed], damping: complex) -> tuple[Tensor, Tensor]:
        """T at a damping, (K, Σ r + n_in, Σ r + n_in), and W of the runs, (K, n_out, Σ r + n_in), from the dense blocks of all groups."""
        (g, which), *others = self.segments()
        first = condensed[g].part(which)
        T, W = first.T(damping), first.W
        for g, which in others:
            more = condensed[g].part(which)
            r, own = more.r, more.T(damping)
            seen = own[:, :, r:] @ W  # what its curvature on the state is, seen from u
            size = r + T.shape[1]
            longer = T.new_empty(self.count, size, size)
            longer[:, :r, :r] = own[:, :r, :r]
            longer[:, :r, r:] = seen[:, :r]
            longer[:, r:, :r] = seen[:, :r].mT
            torch.baddbmm(T, W.mT, seen[:, r:], out=longer[:, r:, r:])
            T, W = longer, torch.cat([more.W[:, :, :r], more.W[:, :, r:] @ W], 2)
        return T, W


def eliminated(T: Tensor, W: Tensor, n_in: int) -> tuple[Tensor, Tensor]:
    """T' and K of runs: s_b eliminated by the constraint.

    Raises
    ------
    SingularPivotError
        If an R_b is exactly singular.
    """
    n, columns = W.shape[1], W.shape[2]
    b, a, d = slice(0, n), slice(n, columns - n_in), slice(columns - n_in, columns)
    others = columns - n
    try:
        back = torch.linalg.inv(W[:, :, b])
    except torch.linalg.LinAlgError:
        raise SingularPivotError from None
    K = torch.cat([-(back @ torch.cat([W[:, :, d], W[:, :, a]], 2)), back], 2)
    # K' T_bb K and the coupling to the other controls and δ, in one product: half of it, the other half is its transpose.
    half = (T[:, b, b] @ K).mul_(0.5)
    half[:, :, :n_in] += T[:, b, d]
    half[:, :, n_in:others] += T[:, b, a]
    out = K.mT @ half
    out = out + out.mT
    out[:, :others, :others] += state_first(T[:, n:, n:], n_in)
    return out, K


def state_first(T: Tensor, n_in: int) -> Tensor:
    """T on (δ, s) from that on (s, δ)."""
    r = T.shape[1] - n_in
    T = torch.cat([T[:, r:], T[:, :r]], 1)
    return torch.cat([T[:, :, r:], T[:, :, :r]], 2)


def cut(analysis: Analysis) -> list[Runs]:
    """Cut a chain into runs, those through the same groups together; none, where a segment is wide or no controls reach some states."""
    if not analysis.is_narrow:
        return []
    groups = analysis.groups
    last = int(analysis.order[-1, 0])
    if groups[last].count == 1 and all(_reaches(groups, [(g, 0)]) for g in range(len(groups)) if g != last):
        return [Runs(group.segments, (g,), (np.arange(group.count),)) for g, group in enumerate(groups)]
    starts = _starts(groups, analysis.pairs)
    order, found = analysis.order, []
    for kind, where in starts.items():
        places, first = np.array(where).T
        found.append(Runs(places, kind, tuple(order[first + j, 1] for j in range(len(kind)))))
    return found


def _starts(
    groups: Sequence[SegmentGroup], pairs: Sequence[tuple[int, int]]
) -> dict[tuple[int, ...], list[tuple[int, int]]]:
    """Position among the runs, and first segment, of each run, by the groups that it goes through."""
    reaches: dict[tuple[int, ...], bool] = {}
    starts: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    count, start, total = 0, 0, len(pairs)
    while start < total:
        kind: tuple[int, ...] = ()
        for end in range(start, min(start + _LONGEST, total)):
            kind = (*kind, pairs[end][0])
            if end == total - 1:
                break
            if kind not in reaches:
                reaches[kind] = _reaches(groups, pairs[start : end + 1])
            if reaches[kind]:
                break
        else:
            return {}
        starts.setdefault(kind, []).append((count, start))
        count, start = count + 1, end + 1
    return starts


def _reaches(groups: Sequence[SegmentGroup], run: Sequence[tuple[int, int]]) -> bool:
    """Whether the last controls of a run reach every state after it; of all runs like it, told by this one."""
    n = groups[run[-1][0]].n_out
    if sum(groups[g].r for g, _ in run) < n:
        return False
    R: Tensor | None = None
    for g, k in run:
        group = groups[g]
        mine = group.space.at(k).R(identity(group)[:1])
        R = mine if R is None else torch.cat([mine, group.control.at(k).F(R)], 2)
        for stage in group.free:
            R = stage.at(k).F(R)
    assert R is not None
    reached = R[0, :, :n]
    rows = torch.linalg.vector_norm(reached, dim=1, keepdim=True)
    if not n or not bool((rows > 0.0).all()):
        return not n
    values = torch.linalg.svdvals(reached / rows)
    return bool(values[-1] * REACHED >= values[0])
