"""Method "banded" with the controls eliminated that reach the states: what solves of chains try first.

Along a chain the runs of `runs.py` leave, in order, the other controls of a run and the state after it, in a symmetric band matrix of as
many rows as there are visible controls. Beside the condensed KKT matrix, of r + 2n rows a segment, it is a third or less of the size, and
a tenth of the work to factor. What it costs is digits: R_b⁻¹, and with it the differences of neighbouring states that controls are found
from, may be large. Solves refine, measure, and fall back on `banded.py` where that does not do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from linop_hess.errors import SingularPivotError
from linop_hess.lq.accuracy import GROWTH_DETERMINANT
from linop_hess.lq.analysis import Analysis
from linop_hess.lq.band_storage import BandLU, BandMatrix
from linop_hess.lq.layout import Slots
from linop_hess.lq.methods import banded
from linop_hess.lq.methods.banded import BAND_ANSWERS, BandLayout
from linop_hess.lq.methods.base import SOLVES, Cost, Tally
from linop_hess.lq.methods.runs import Runs, cut, eliminated, state_first
from linop_hess.lq.segments import loads, put_controls
from linop_hess.lq.stacked import parts

# Where the KKT matrix has a smaller bandwidth, or takes fewer flops, the calls take longer that eliminate controls from it; these take the
# time of as many flops as this is a multiple of, too.
_NARROWEST, _FEWEST_FLOPS, _GAIN = 16, 8e6, 2.0


class StateLayout:
    """Where the unknowns of each run lie in the band system: other controls, then the state after it.

    Attributes
    ----------
    runs : list of Runs
        Empty, where the method does not apply: by flops, so that all processes choose alike.
    n_in, n_out, r : ndarray of int
        States before each run of the chain and after it, 0 after the last, and its visible controls, as many as unknowns.
    start : ndarray of int
        Where the unknowns of each run begin, and at last their number.
    bandwidth : int
    """

    def __init__(self, analysis: Analysis) -> None:
        whole = analysis.once(BandLayout)
        flops = 4.0 * whole.order * whole.bandwidth**2
        self._lay_out(analysis, cut(analysis) if whole.bandwidth >= _NARROWEST and flops >= _FEWEST_FLOPS else [])
        if self.runs and _GAIN * 4.0 * self.order * self.bandwidth**2 > flops:
            self._lay_out(analysis, [])

    def _lay_out(self, analysis: Analysis, cuts: list[Runs]) -> None:
        self.runs = cuts
        count = sum(runs.count for runs in self.runs)
        self.r, self.n_out = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
        for runs in self.runs:
            self.r[runs.places] = sum(analysis.groups[g].r for g in runs.groups)
            self.n_out[runs.places] = analysis.groups[runs.groups[-1]].n_out
        self.n_out[count - 1 :] = 0
        self.n_in = np.concatenate([[0], self.n_out[:-1]]) if count else self.n_out
        self.start = np.concatenate([[0], np.cumsum(self.r)])
        self.order = int(self.start[-1])
        self.bandwidth = int((self.n_in + self.r - 1).max(initial=0))

    def sizes(self, runs: Runs) -> tuple[int, int, int]:
        """n_in, r and n_out of runs through the same groups."""
        first = runs.places[0]
        return int(self.n_in[first]), int(self.r[first]), int(self.n_out[first])


@dataclass(frozen=True)
class _Eliminated:
    """Runs with what gives the eliminated controls.

    Attributes
    ----------
    runs : Runs
    n_in : int
    K : Tensor, shape (K, n_out, n_in + r)
        s_b = K v; of no rows after the last run.
    before, own, all : Slots
        Where δ, the unknowns of the runs, and v lie.
    """

    runs: Runs
    n_in: int
    K: Tensor
    before: Slots
    own: Slots
    all: Slots


class StateBand:
    """LU of the band matrix of states and other controls at a damping.

    Attributes
    ----------
    spread : float
        The square of the largest entry of R_b⁻¹, which is how much larger than curvatures what comes of them may be.

    Raises
    ------
    SingularPivotError
        If the method does not apply or meets a singular matrix, or damping = 0 and there are hidden controls.
    """

    method = "banded"

    def __init__(self, analysis: Analysis, damping: complex) -> None:
        self.analysis, self.damping = analysis, damping = analysis.over(damping), damping
        self.layout = analysis.once(StateLayout)
        if not self.layout.runs or (damping == 0.0 and analysis.hidden):
            raise SingularPivotError
        self._runs: list[_Eliminated] = []
        self._lu = BandLU(self._assemble(), self.layout.bandwidth)
        if self._lu.singular_at is not None:
            raise SingularPivotError

    @property
    def answers(self) -> frozenset[str]:
        """Solves, and at a real damping determinants where few digits are lost."""
        return BAND_ANSWERS if self.spread <= GROWTH_DETERMINANT and not isinstance(self.damping, complex) else SOLVES

    @cached_property
    def spread(self) -> float:
        backs = [mine.K[:, :, -mine.K.shape[1] :] for mine in self._runs if mine.K.numel()]
        # By NumPy, whose maximum is NaN where there is one; squared by a product, which may overflow.
        largest = float(np.max([float(back.abs().max()) for back in backs], initial=0.0))
        return largest * largest

    def logabsdet(self) -> float:
        """Logarithm of |det(H + εI)|: that of the band matrix, of R_b twice, and one ε for each hidden control."""
        pivots = np.abs(self._lu.pivots, dtype=np.float64)
        found = float(np.log(pivots).sum(dtype=np.longdouble))
        for mine in self._runs:
            if n := mine.K.shape[1]:
                found -= 2.0 * float(torch.linalg.slogdet(mine.K[:, :, -n:].double())[1].sum())
        return found + (self.analysis.hidden * math.log(abs(self.damping)) if self.analysis.hidden else 0.0)

    @property
    def precision(self) -> torch.dtype:
        """What the factors are computed in."""
        return self.analysis.problem.dtype

    def _assemble(self) -> BandMatrix:
        layout, kl, condensed = self.layout, self.layout.bandwidth, self.analysis.condensed
        band = BandMatrix(layout.order, 3 * kl + 1, 2 * kl, self.analysis.problem.numpy_dtype)
        for runs in layout.runs:
            n, r, n_out = layout.sizes(runs)
            start = layout.start[runs.places]
            K = condensed[runs.groups[0]].W.new_empty(runs.count, n_out, n + r)
            for part in parts(runs.count, K.element_size() * (n + r) ** 2):
                T, W = runs.part(part).blocks(condensed, self.damping)
                if n_out:
                    T, K[part] = eliminated(T, W, n)
                else:
                    T = state_first(T, n)
                at, block = start[part], T.numpy()
                band.add(at - n, at, block[:, :, n:])
                band.add(at, at - n, block[:, n:, :n])
                band.add(at - n, at - n, block[:, :n, :n])
            self._runs.append(_Eliminated(runs, n, K, Slots(start - n, n), Slots(start, r), Slots(start - n, n + r)))
        return band

    def solve(self, g: Tensor) -> Tensor:
        """(H + εI)⁻¹ g for g of shape (N, k), without refinement."""
        rhs, hidden = self._load(g)
        return self._controls(self._lu.solve(rhs), hidden)

    def _load(self, g: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """What g of shape (N, k) puts on the unknowns, and g⊥/ε of each group."""
        analysis, condensed = self.analysis, self.analysis.condensed
        split = [loads(group, g, self.damping) for group in analysis.groups]
        rhs = g.new_zeros(self.layout.order, g.shape[1])
        for mine in self._runs:
            on_s: list[Tensor] = []
            on_state: Tensor | None = None  # after a segment
            for index, which in reversed(mine.runs.segments()):
                blocks, load = condensed[index], split[index]
                s, d = load.visible[which], None if load.state is None else -load.state[which]
                if on_state is not None:
                    back = blocks.W[which].mT @ on_state
                    s, d = s + back[:, : blocks.r], back[:, blocks.r :] if d is None else d + back[:, blocks.r :]
                on_s.append(s)
                on_state = d
            n = mine.K.shape[1]
            s = torch.cat(on_s, 1)
            v = s.new_zeros(s.shape[0], mine.K.shape[2], s.shape[2])
            if on_state is not None:
                v[:, : mine.n_in] = on_state
            v[:, mine.n_in : mine.n_in + s.shape[1] - n] = s[:, n:]
            v.baddbmm_(mine.K.mT, s[:, :n])
            mine.own.add(rhs, v[:, mine.n_in :])
            mine.before.add(rhs, v[:, : mine.n_in])
        return rhs, [None if load.hidden is None else load.hidden / self.damping for load in split]

    def _controls(self, y: Tensor, hidden: list[Tensor | None]) -> Tensor:
        """Controls, (N, k), of the unknowns y and what is hidden of them."""
        groups, condensed = self.analysis.groups, self.analysis.condensed
        visible = [y.new_empty(group.count, group.r, y.shape[1]) for group in groups]
        states = [y.new_empty(group.count, group.n_in, y.shape[1]) for group in groups]
        for mine in self._runs:
            v, n = mine.all.gather(y), mine.n_in
            s = torch.cat([mine.K @ v, v[:, n : v.shape[1] - mine.K.shape[1]]], 1)
            d, end = v[:, :n], s.shape[1]
            for position, (index, which) in enumerate(segments := mine.runs.segments()):
                blocks = condensed[index]
                own = s[:, end - blocks.r : end]
                visible[index][which], states[index][which] = own, d
                end -= blocks.r
                if position + 1 < len(segments):
                    d = blocks.W[which] @ torch.cat([own, d], 1)
        x = y.new_empty(self.analysis.problem.size, y.shape[1])
        for group, s, d, of_hidden in zip(groups, visible, states, hidden, strict=True):
            put_controls(x, group, of_hidden, s, d, self.damping)
        return x

    @property
    def nbytes(self) -> int:
        """Bytes held by the factors."""
        return self._lu.nbytes + sum(mine.K.nbytes for mine in self._runs)


# Calls of runs through the same groups, and of each segment of them.
_CALLS_PER_RUNS, _CALLS_PER_SEGMENT = 30, 15

# Times that blocks are copied.
_COPIES = 8.0


def estimate(analysis: Analysis) -> Cost:
    """Flops and seconds of what solves try first; bytes of the KKT matrix, which may have to take its place."""
    whole = banded.estimate(analysis)
    if whole.why_not or not analysis.once(StateLayout).runs:
        return whole
    return replace(banded.with_blocks(analysis, _tallied(analysis), 0.0), nbytes=whole.nbytes)


def _tallied(analysis: Analysis) -> Tally:
    """What the band of the states takes."""
    layout, tally = analysis.once(StateLayout), Tally(analysis.problem.dtype)
    item, kl = analysis.problem.dtype.itemsize, layout.bandwidth
    for runs in layout.runs:
        (n, r, n_out), count = layout.sizes(runs), float(runs.count)
        tally.calls(_CALLS_PER_RUNS + _CALLS_PER_SEGMENT * len(runs.groups))
        tally.moved(item * count * _COPIES * (n + r) ** 2)
        states = n_out + sum(analysis.groups[g].n_out for g in runs.groups[:-1])
        tally.kernel("gemm", 4.0 * count * states * (n + r) ** 2, n + r)
        tally.kernel("lu", 2.0 * count * n_out**3, n_out)
    tally.moved(item * (3 * kl + 1) * layout.order)
    tally.kernel("band", 4.0 * layout.order * max(kl, 1) ** 2, kl)
    return tally


def factor(analysis: Analysis, damping: complex) -> StateBand:
    """Factor H + εI by the band of the states."""
    return StateBand(analysis, damping)


METHOD = replace(banded.METHOD, estimate=estimate, first=factor)
