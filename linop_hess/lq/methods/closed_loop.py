"""Solves with narrow factors: the closed loop, whose sweeps are one product a segment.

With the gain K = S⁻¹E of each segment, s = k − K δ and δ⁺ = F̄ δ + R k, F̄ = F − R K. So the backward sweep of a solve is
v ← F̄ᵀv + Kᵀ load, the forward one δ ← F̄ δ + R k, and all else, S⁻¹(load − Rᵀv) included, is computed for all segments of a group at
once. Narrow blocks cost calls rather than flops, and this makes the fewest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from linop_hess.lq.analysis import Analysis
from linop_hess.lq.pivots.delayed import PackedElimination
from linop_hess.lq.segments import loads, put_controls


class ClosedLoop:
    """Factors of condensed segments of which nothing was delayed.

    Parameters
    ----------
    analysis : Analysis
    damping : float
    eliminations : sequence of PackedElimination
        One for each segment, in the order of the chain.
    """

    def __init__(self, analysis: Analysis, damping: complex, eliminations: Sequence[PackedElimination]) -> None:
        self._analysis, self._damping = analysis, damping
        self._factors: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # packed, interchanges, gain, R of each group
        loops: list[list[Tensor]] = []
        for group, blocks in zip(analysis.groups, analysis.condensed, strict=True):
            mine = [eliminations[k] for k in group.segments]
            gain = torch.stack([e.gain for e in mine])
            R, F = blocks.W[..., : blocks.r], blocks.W[..., blocks.r :]
            loops.append(list(torch.baddbmm(F, R, gain, alpha=-1.0).unbind()))
            packed = torch.stack([e.packed for e in mine]), torch.stack([e.interchanges for e in mine])
            self._factors.append((*packed, gain, R))
        self._loops = [loops[g][k] for g, k in analysis.pairs]

    def solve(self, g: Tensor) -> Tensor:
        """(H + εI)⁻¹ g for g of shape (N, k)."""
        groups, order = self._analysis.groups, self._analysis.pairs
        load = [loads(group, g, self._damping) for group in groups]
        # Backward: the multiplier v of the state after each segment.
        lifted, after = [], []
        for part, group, (_, _, gain, _) in zip(load, groups, self._factors, strict=True):
            lift = gain.mT @ part.visible
            lifted.append((lift if part.state is None else lift.add_(part.state)).unbind())
            after.append(g.new_zeros(group.count, group.n_out, g.shape[1]))
        multipliers = [part.unbind() for part in after]
        for i in range(len(order) - 1, 0, -1):
            (group_, k), (before, j) = order[i], order[i - 1]
            torch.addmm(lifted[group_][k], self._loops[i].mT, multipliers[group_][k], out=multipliers[before][j])
        # Forward: the state before each segment.
        half, pushed, states = [], [], []
        for part, v, group, (packed, interchanges, _, R) in zip(load, after, groups, self._factors, strict=True):
            half.append(torch.linalg.ldl_solve(packed, interchanges, part.visible - R.mT @ v))
            pushed.append((R @ half[-1]).unbind())
            states.append(g.new_zeros(group.count, group.n_in, g.shape[1]))
        d = [part.unbind() for part in states]
        for i in range(len(order) - 1):
            (group_, k), (next_, j) = order[i], order[i + 1]
            torch.addmm(pushed[group_][k], self._loops[i], d[group_][k], out=d[next_][j])
        x = torch.empty_like(g)
        for part, u, state, group, (_, _, gain, _) in zip(load, half, states, groups, self._factors, strict=True):
            hidden = None if part.hidden is None else part.hidden / self._damping
            put_controls(x, group, hidden, u - gain @ state, state, self._damping)
        return x

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(a.nbytes for part in self._factors for a in part) + sum(loop.nbytes for loop in self._loops)
