"""Solves with narrow factors: the closed loop, whose sweeps are one product a segment.

With the gain K = S⁻¹E of each segment, s = k − K δ and δ⁺ = F̄ δ + R k, F̄ = F − R K. So the backward sweep of a solve is
v ← F̄ᵀv + Kᵀ load, the forward one δ ← F̄ δ + R k, and all else, S⁻¹(load − Rᵀv) included, is computed for all segments of a group at
once. Narrow blocks cost calls rather than flops, and this makes the fewest. The few segments that directions were delayed at, or arrived
at, take the steps of the halves (`lq.elimination.stage_factor`) in between.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from linop_hess.lq.analysis import Analysis
from linop_hess.lq.elimination.stage_factor import SegmentLoad, StageFactor, unwhiten_one, whiten_one
from linop_hess.lq.pivots.delayed import packed_among
from linop_hess.lq.segments import loads, put_controls


class ClosedLoop:
    """Factors of condensed segments, of which few delayed anything.

    Parameters
    ----------
    analysis : Analysis
    damping : float
    factors : sequence of StageFactor
        One for each segment, in the order of the chain.
    """

    def __init__(self, analysis: Analysis, damping: complex, factors: Sequence[StageFactor]) -> None:
        self._analysis, self._damping = analysis, damping
        self._factors: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # packed, interchanges, gain, R of each group
        packed = packed_among(factor.elimination for factor in factors)
        # The others, whose place in their group is taken by the identity.
        self._alone = {
            k: (factor, factor.elimination.whitened()) for k, factor in enumerate(factors) if k not in packed
        }
        loops: list[list[tuple[Tensor, Tensor]]] = []  # F̄ and F̄ᵀ
        for group, blocks in zip(analysis.groups, analysis.condensed, strict=True):
            R, F = blocks.W[..., : blocks.r], blocks.W[..., blocks.r :]
            eye = torch.eye(blocks.r, dtype=R.dtype, device=R.device)
            order = torch.arange(1, blocks.r + 1, dtype=torch.int32, device=R.device)
            none = R.new_zeros(blocks.r, group.n_in)
            mine = [packed.get(int(k)) for k in group.segments]
            gain = torch.stack([none if e is None else e.gain for e in mine])
            loop = torch.baddbmm(F, R, gain, alpha=-1.0)
            loops.append(list(zip(loop.unbind(), loop.mT.unbind(), strict=True)))
            left = torch.stack([eye if e is None else e.packed for e in mine])
            interchanges = torch.stack([order if e is None else e.interchanges for e in mine])
            self._factors.append((left, interchanges, gain, R))
        self._loops = [loops[g][k] for g, k in analysis.pairs]

    def solve(self, g: Tensor) -> Tensor:
        """(H + εI)⁻¹ g for g of shape (N, k)."""
        groups, order = self._analysis.groups, self._analysis.pairs
        load = [loads(group, g, self._damping) for group in groups]
        # Backward: the multiplier v of the state after each segment.
        lifted, after = [], []
        for part, group, (_, _, gain, _) in zip(load, groups, self._factors, strict=True):
            lift = torch.bmm(gain.mT, part.visible)
            lifted.append((lift if part.state is None else lift.add_(part.state)).unbind())
            after.append(g.new_zeros(group.count, group.n_out, g.shape[1]))
        multipliers = [part.unbind() for part in after]
        white: dict[int, Tensor] = {}
        carried = g[:0]  # the load on directions that were delayed
        for i in range(len(order) - 1, -1, -1):
            group_, k = order[i]
            if i in self._alone:
                state = load[group_].state
                mine = SegmentLoad(load[group_].visible[k], None if state is None else state[k], g[:0])
                w, v, carried = whiten_one(*self._alone[i], mine, multipliers[group_][k], carried)
                white[i] = w / self._alone[i][1].theta[:, None]
                if i:
                    before, j = order[i - 1]
                    multipliers[before][j].copy_(v)
            elif i:
                before, j = order[i - 1]
                torch.addmm(lifted[group_][k], self._loops[i][1], multipliers[group_][k], out=multipliers[before][j])
        # Forward: the state before each segment.
        half, pushed, states = [], [], []
        for part, v, group, (packed, interchanges, _, R) in zip(load, after, groups, self._factors, strict=True):
            half.append(torch.linalg.ldl_solve(packed, interchanges, torch.baddbmm(part.visible, R.mT, v, alpha=-1.0)))
            pushed.append(torch.bmm(R, half[-1]).unbind())
            states.append(g.new_zeros(group.count, group.n_in, g.shape[1]))
        d = [part.unbind() for part in states]
        for i in range(len(order)):
            (group_, k), (next_, j) = order[i], order[min(i + 1, len(order) - 1)]
            if i in self._alone:
                half[group_][k], after_, carried = unwhiten_one(*self._alone[i], white[i], d[group_][k], carried)
                if i + 1 < len(order):
                    d[next_][j].copy_(after_)
            elif i + 1 < len(order):
                torch.addmm(pushed[group_][k], self._loops[i][0], d[group_][k], out=d[next_][j])
        x = torch.empty_like(g)
        for part, u, state, group, (_, _, gain, _) in zip(load, half, states, groups, self._factors, strict=True):
            hidden = None if part.hidden is None else part.hidden / self._damping
            put_controls(x, group, hidden, torch.baddbmm(u, gain, state, alpha=-1.0), state, self._damping)
        return x

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(a.nbytes for part in self._factors for a in part) + sum(loop.nbytes for loop, _ in self._loops)
