"""Inertia of long chains: legs of consecutive segments are eliminated side by side, then what is left between them.

Let the chain repeat itself with a period, and cut it into K legs. A leg does not know what follows it, so its last state δ_e
gets a node of its own, tied to it by a multiplier λ, and with any ρ

    value of the leg = ½ [δ; λ]ᵀ [V, Y; Yᵀ, Λ] [δ; λ],   from   V = ρI, Y = ρI, Λ = 0   at its end,

the ρ being taken off again at the node. The backward recursion eliminates the controls of all legs at once, segment by segment, λ passing
by; the nodes (λ, δ_e) are left in a matrix of order 2nK. Every step is a congruence, so the signs of all pivots are the inertia of
H + εI, but for n of each sign for each node. As ρ is free, a leg that meets a small pivot tries another; no pivot need be delayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from linop_hess.lq.accuracy import GROWTH_PARALLEL
from linop_hess.lq.analysis import Analysis
from linop_hess.lq.condensed import Condensed
from linop_hess.lq.pivots.delayed import PackedElimination
from linop_hess.lq.pivots.hidden import Hidden
from linop_hess.lq.pivots.inertia import Inertia, hidden_inertia, inertia_of
from linop_hess.lq.value.controls import CondensedControl
from linop_hess.lq.value.dense import DenseValue

# Fewer segments than this are no slower one after the other.
SHORTEST = 200

_LONGEST_PERIOD = 8
_REPEATING = 0.8  # part of the chain that must repeat itself
_ORDER = 2000  # of the matrix of the nodes
_RHOS = (1.0, 0.37, 2.9, -1.3, 11.0)


@dataclass
class _Legs:
    """The cost-to-go of a batch of legs, with the pivots met so far."""

    value: DenseValue
    theta: list[Tensor] = field(default_factory=list)
    # The largest number met, (K,).
    growth: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64, device="cpu"))

    def take_back(self, control: CondensedControl) -> None:
        """Eliminate the controls of one segment of each leg."""
        S, E, value = self.value.pivot(control)
        elimination = PackedElimination.of(S, E.contiguous())
        self.value = value.downdate(elimination, Hidden())
        self.theta.append(elimination.theta)
        met = [
            (E.abs() * elimination.gain.abs()).sum(1),
            self.value.V[:, : control.n_in, : control.n_in].abs().flatten(1),
        ]
        for numbers in met:
            if numbers.numel():
                self.growth = torch.maximum(numbers.amax(1), self.growth.to(numbers))


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


def legs_of(analysis: Analysis) -> Parallel | None:
    """The legs of a chain in float64; None where it is not long, narrow and periodic enough."""
    if not analysis.is_narrow or len(analysis.order) < SHORTEST:
        return None
    start, stop, _ = periodic_stretch(analysis.order[:, 0])
    return Parallel(analysis) if stop - start >= _REPEATING * len(analysis.order) else None


class Parallel:
    """The chain as a prefix, K legs of like segments, and a suffix; inertia at any damping.

    Parameters
    ----------
    analysis : Analysis
        Of a problem in float64; see `legs_of`.
    """

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        self._order = analysis.order
        start, stop, period = periodic_stretch(self._order[:, 0])
        self._start = start = max(start, 1)  # no state comes into the first segment
        self._n = analysis.groups[self._order[start, 0]].n_in
        self._legs = max(1, min(_ORDER // (2 * max(self._n, 1)), int(np.sqrt(stop - start))))
        self._length = (stop - start) // (self._legs * period) * period  # segments in a leg
        self._stop = start + self._legs * self._length

    def inertia(self, damping: float, zero_below: float) -> Inertia | None:
        """Inertia of H + εI; None where the cost-to-go grows too much for it to be certain, or ε = 0 and controls are hidden."""
        if damping == 0.0 and self.analysis.hidden:
            return None
        blocks = self.analysis.condensed
        scale = max(float(part.curvature.abs().max()) for part in blocks if part.curvature.numel())
        grams = [part.gram for part in blocks if part.gram is not None and part.gram.numel()]
        limit = GROWTH_PARALLEL * max(self.analysis.norm, abs(damping))
        if any(float(gram.abs().max()) > limit * abs(damping) for gram in grams):
            return None
        Ts = [part.T(damping) for part in blocks]
        suffix = self._sequential(self._stop, len(self._order), blocks, Ts, None)
        legs, rhos = self._all_legs(blocks, Ts, scale if scale > 0 else 1.0, limit)
        if legs is None:
            return None
        V, of_nodes, growth = _eliminated(self._nodes(legs.value.V, rhos, suffix.value.V[0]), self._n)
        prefix = self._sequential(0, self._start, blocks, Ts, V)
        if not max(growth, float(suffix.growth.max()), float(prefix.growth.max())) <= limit:
            return None
        count = self._n * self._legs
        found = inertia_of([*suffix.theta, *legs.theta, of_nodes, *prefix.theta], zero_below)
        return found - Inertia(count, 0, count) + hidden_inertia(self.analysis.hidden, damping)

    def _sequential(
        self, start: int, stop: int, blocks: Sequence[Condensed], Ts: Sequence[Tensor], V: Tensor | None
    ) -> _Legs:
        """Take a cost V back through the segments [start, stop), one after the other."""
        if V is None:
            n = self.analysis.groups[self._order[stop - 1, 0]].n_out
            V = Ts[0].new_zeros(n, n)
        legs = _Legs(DenseValue(V[None]))
        for g, k in self._order[start:stop][::-1]:
            legs.take_back(CondensedControl(blocks[g].W[k][None], Ts[g][k][None], blocks[g].r))
        return legs

    def _all_legs(
        self, blocks: Sequence[Condensed], Ts: Sequence[Tensor], rho: float, limit: float
    ) -> tuple[_Legs | None, Tensor]:
        """Eliminate all legs, those whose cost-to-go grows too much with another ρ."""
        # Nothing can be delayed in a batch, so only the legs that grew too much are done again, each round with another ρ for all of them.
        todo = np.arange(self._legs)
        rhos = Ts[0].new_zeros(self._legs)
        whole: _Legs | None = None
        for factor in _RHOS:
            legs = self._some_legs(todo, blocks, Ts, factor * rho)
            rhos[todo] = factor * rho
            if whole is None:
                whole = legs
            else:
                whole.value.V[todo] = legs.value.V
                for mine, new in zip(whole.theta, legs.theta, strict=True):
                    mine[todo] = new
            todo = todo[~(legs.growth <= limit).cpu().numpy()]
            if not todo.size:
                return whole, rhos
        return None, rhos

    def _some_legs(self, legs: np.ndarray, blocks: Sequence[Condensed], Ts: Sequence[Tensor], rho: float) -> _Legs:
        n, like = self._n, Ts[0]
        eye = torch.eye(n, dtype=like.dtype, device=like.device)
        terminal = torch.cat([torch.cat([rho * eye, rho * eye], 1), torch.cat([rho * eye, torch.zeros_like(eye)], 1)])
        found = _Legs(DenseValue(terminal.repeat(legs.size, 1, 1)))
        first = self._start + legs * self._length
        for step in reversed(range(self._length)):
            g = self._order[self._start + step, 0]
            where = torch.from_numpy(self._order[first + step, 1])
            found.take_back(CondensedControl(blocks[g].W[where], Ts[g][where], blocks[g].r))
        return found

    def _nodes(self, values: Tensor, rhos: Tensor, after: Tensor) -> Tensor:
        """The matrix of (δ_0, λ_1, δ_1, ..., λ_K, δ_K): leg k couples δ_{k-1} and λ_k, node k λ_k and δ_k."""
        n, K = self._n, self._legs
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
    elimination = PackedElimination.of(full[n:, n:].contiguous(), full[n:, :n].contiguous())
    V = full[:n, :n].clone()
    elimination.take_off(V)
    growth = float((elimination.E.abs() * elimination.gain.abs()).sum(0).max())
    return V, elimination.theta, growth
