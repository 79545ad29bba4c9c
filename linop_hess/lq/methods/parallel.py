"""Inertia of long chains: chunks of consecutive segments are eliminated in lockstep, then what is left between them.

Let the chain repeat itself with a period, and cut it into K chunks. A chunk does not know what follows it, so its last state δ_e
gets a node of its own, tied to it by a multiplier λ, and with any ρ

    value of the chunk = ½ [δ; λ]ᵀ [V, Y; Yᵀ, Λ] [δ; λ],   from   V = ρI, Y = ρI, Λ = 0   at its end,

the ρ being taken off again at the node. The backward recursion eliminates the controls of all chunks at once, segment by segment;
the nodes (λ, δ_e) are left in a matrix of order 2nK. Every step is a congruence, so the signs of all pivots are the inertia of
H + εI, but for n of each sign for each node. As ρ is free, a chunk that meets a small pivot tries another; no pivot need be delayed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from linop_hess.lq.condensed import Condensed, condensed
from linop_hess.lq.pivots.bunch_kaufman import packed_pivots
from linop_hess.lq.pivots.inertia import Inertia, hidden_inertia, inertia_of
from linop_hess.lq.problem import Problem
from linop_hess.lq.segments import order_of
from linop_hess.lq.value.dense import is_narrow

# What small pivots may make of the cost-to-go, in terms of ‖H‖: its rounding errors then move eigenvalues by 1e-12‖H‖ at most.
GROWTH = 5e3

# Fewer segments than this are no slower one after the other.
SHORTEST = 200

_LONGEST_PERIOD = 8
_ORDER = 2000  # of the matrix of the nodes
_RHOS = (1.0, 0.37, 2.9, -1.3, 11.0)


@dataclass
class _Value:
    """½ oᵀ matrix o of the states o = (δ, λ) of a batch of chunks, with the pivots met so far."""

    matrix: Tensor  # (K, n + m, n + m)
    n: int  # size of δ
    theta: list[Tensor] = field(default_factory=list)
    growth: Tensor = field(default_factory=lambda: torch.zeros(1))  # (K,)

    def pass_segment(self, T: Tensor, W: Tensor, r: int) -> None:
        """Eliminate the controls of one segment of each chunk: T (K, r + n_in, r + n_in), W (K, n, r + n_in)."""
        n, m = self.n, self.matrix.shape[1] - self.n
        n_in = T.shape[1] - r
        if m == 0:
            full = torch.baddbmm(T, W.mT @ self.matrix, W)
        else:
            full = T.new_zeros(T.shape[0], r + n_in + m, r + n_in + m)
            VW = self.matrix[:, :n, :n] @ W
            full[:, : r + n_in, : r + n_in] = torch.baddbmm(T, W.mT, VW)
            Y = W.mT @ self.matrix[:, :n, n:]
            full[:, : r + n_in, r + n_in :] = Y
            full[:, r + n_in :, : r + n_in] = Y.mT
            full[:, r + n_in :, r + n_in :] = self.matrix[:, n:, n:]
        packed, interchanges, _ = torch.linalg.ldl_factor_ex(full[:, :r, :r])
        cross = full[:, :r, r:]
        gain = torch.linalg.ldl_solve(packed, interchanges, cross.contiguous())
        self.theta.append(packed_pivots(packed, interchanges))
        self.matrix = torch.baddbmm(full[:, r:, r:], cross.mT, gain, alpha=-1.0)
        if n_in + m:
            self.growth = torch.maximum((cross.abs() * gain.abs()).sum(1).amax(1), self.growth)
        if n_in:
            self.growth = torch.maximum(self.matrix[:, :n_in, :n_in].abs().flatten(1).amax(1), self.growth)
        self.n = n_in


def periodic_stretch(kinds: np.ndarray) -> tuple[int, int, int]:
    """Start, stop and period of the longest stretch that repeats itself."""
    best = (0, 0, 1)
    for period in range(1, min(_LONGEST_PERIOD, kinds.size - 1) + 1):
        same = np.concatenate([[False], kinds[period:] == kinds[:-period], [False]])
        edges = np.flatnonzero(np.diff(same.astype(np.int8)))
        if not edges.size:
            continue
        starts, stops = edges[::2], edges[1::2]
        k = int((stops - starts).argmax())
        found = (int(starts[k]), int(stops[k]) + period, period)
        if found[1] - found[0] > 1.1 * (best[1] - best[0]):
            best = found
    return best


def serves(problem: Problem) -> bool:
    """Whether a chain is long, narrow and periodic enough."""
    groups = problem.segment_groups
    if sum(group.count for group in groups) < SHORTEST or not all(is_narrow(group) for group in groups):
        return False
    start, stop, _ = periodic_stretch(order_of(groups)[:, 0])
    return stop - start >= 0.8 * sum(group.count for group in groups)


class Lockstep:
    """The chain as a prefix, K chunks of like segments, and a suffix; inertia at any damping.

    Parameters
    ----------
    problem : Problem
        In float64; see `serves`.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._order = order_of(problem.segment_groups)
        start, stop, period = periodic_stretch(self._order[:, 0])
        groups = problem.segment_groups
        self._hidden = sum(group.split.complement * group.count for group in groups)
        self._start = start = max(start, 1)  # no state comes into the first segment
        self._n = groups[self._order[start, 0]].n_in
        self._chunks = max(1, min(_ORDER // (2 * max(self._n, 1)), int(np.sqrt(stop - start))))
        self._length = (stop - start) // (self._chunks * period) * period  # segments in a chunk
        self._stop = start + self._chunks * self._length

    def inertia(self, damping: float, zero_below: float) -> Inertia | None:
        """Inertia of H + εI; None where the cost-to-go grows too much for it to be certain.

        Raises
        ------
        SingularPivotError
            If damping = 0 and there are hidden controls.
        """
        blocks = [condensed(group, damping) for group in self.problem.segment_groups]
        scale = max(float(part.curvature.abs().max()) for part in blocks if part.curvature.numel())
        grams = [part.gram for part in blocks if part.gram is not None and part.gram.numel()]
        limit = GROWTH * max(self.problem.norm, abs(damping))
        if any(float(gram.abs().max()) > limit * abs(damping) for gram in grams):
            return None
        Ts = [part.T(damping) for part in blocks]
        suffix = self._sequential(self._stop, len(self._order), blocks, Ts, None)
        chunk, rhos = self._all_chunks(blocks, Ts, scale if scale > 0 else 1.0, limit)
        if chunk is None:
            return None
        V, of_nodes, growth = _eliminated(self._nodes(chunk.matrix, rhos, suffix.matrix[0]), self._n)
        prefix = self._sequential(0, self._start, blocks, Ts, V)
        if not max(growth, float(suffix.growth.max()), float(prefix.growth.max())) <= limit:
            return None
        count = self._n * self._chunks
        found = inertia_of([*suffix.theta, *chunk.theta, of_nodes, *prefix.theta], zero_below)
        return found - Inertia(count, 0, count) + hidden_inertia(self._hidden, damping)

    def _sequential(self, start: int, stop: int, blocks: list[Condensed], Ts: list[Tensor], V: Tensor | None) -> _Value:
        """Pass the segments [start, stop) from the last to the first, V being the cost after them."""
        if V is None:
            n = self.problem.segment_groups[self._order[stop - 1, 0]].n_out
            V = Ts[0].new_zeros(n, n)
        value = _Value(V[None], V.shape[0])
        for g, k in self._order[start:stop][::-1]:
            value.pass_segment(Ts[g][k][None], blocks[g].W[k][None], blocks[g].r)
        return value

    def _all_chunks(
        self, blocks: list[Condensed], Ts: list[Tensor], rho: float, limit: float
    ) -> tuple[_Value | None, Tensor]:
        """Eliminate all chunks, those whose cost-to-go grows too much with another ρ."""
        todo = np.arange(self._chunks)
        rhos = Ts[0].new_zeros(self._chunks)
        whole: _Value | None = None
        for factor in _RHOS:
            value = self._some_chunks(todo, blocks, Ts, factor * rho)
            rhos[todo] = factor * rho
            if whole is None:
                whole = value
            else:
                whole.matrix[todo] = value.matrix
                for mine, new in zip(whole.theta, value.theta, strict=True):
                    mine[todo] = new
            todo = todo[~(value.growth <= limit).cpu().numpy()]
            if not todo.size:
                return whole, rhos
        return None, rhos

    def _some_chunks(self, chunks: np.ndarray, blocks: list[Condensed], Ts: list[Tensor], rho: float) -> _Value:
        n, like = self._n, Ts[0]
        eye = torch.eye(n, dtype=like.dtype, device=like.device)
        terminal = torch.cat([torch.cat([rho * eye, rho * eye], 1), torch.cat([rho * eye, torch.zeros_like(eye)], 1)])
        value = _Value(terminal.repeat(chunks.size, 1, 1), n)
        first = self._start + chunks * self._length
        for step in reversed(range(self._length)):
            g = self._order[self._start + step, 0]
            where = torch.from_numpy(self._order[first + step, 1])
            value.pass_segment(Ts[g][where], blocks[g].W[where], blocks[g].r)
        return value

    def _nodes(self, values: Tensor, rhos: Tensor, after: Tensor) -> Tensor:
        """The matrix of (δ_0, λ_1, δ_1, ..., λ_K, δ_K): chunk k couples δ_{k-1} and λ_k, node k λ_k and δ_k."""
        n, K = self._n, self._chunks
        full = values.new_zeros(n * (2 * K + 1), n * (2 * K + 1))
        eye = torch.eye(n, dtype=values.dtype, device=values.device)
        for k in range(K):
            at, tied, node = 2 * k * n, (2 * k + 1) * n, (2 * k + 2) * n
            full[at : at + 2 * n, at : at + 2 * n] += values[k]
            for rows, columns in ((tied, node), (node, tied), (node, node)):
                full[rows : rows + n, columns : columns + n] = -rhos[k] * eye
        full[-n:, -n:] += after
        return full


def _eliminated(full: Tensor, n: int) -> tuple[Tensor, Tensor, float]:
    """Schur complement on the first n unknowns, the pivots of the others, and the growth."""
    packed, interchanges, _ = torch.linalg.ldl_factor_ex(full[n:, n:].contiguous())
    cross = full[n:, :n].contiguous()
    gain = torch.linalg.ldl_solve(packed, interchanges, cross)
    growth = float((cross.abs() * gain.abs()).sum(0).max())
    return full[:n, :n] - cross.mT @ gain, packed_pivots(packed[None], interchanges[None])[0], growth
