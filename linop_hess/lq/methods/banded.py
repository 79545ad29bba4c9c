"""Method "banded": the condensed KKT matrix of the whole chain as one LAPACK band matrix.

With λ the multiplier of δ⁺ = F δ + R s, the unknowns (s, λ, δ⁺) of the segments in order give a symmetric band matrix. The constraints
are weighed as much as the curvatures, so that the entries of the matrix are of like sizes.
LAPACK's gbtrf factors it with partial pivoting across stages: backward stable, with a growth bound independent of the
depth. The work grows with the cube of the state's size. Solves try the smaller band of `state_band.py` first.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from linop_hess.errors import SingularPivotError
from linop_hess.lq.analysis import Analysis
from linop_hess.lq.band_storage import BandLU, BandMatrix
from linop_hess.lq.layout import Slots
from linop_hess.lq.methods.base import SOLVES, Cost, Method, Tally
from linop_hess.lq.segments import SegmentGroup, loads, put_controls

BAND_ANSWERS = frozenset({"solve", "determinant"})
"""What factors of a band answer."""

# Exponents of two within which the constraints are weighed, by dtype: entries must neither under- nor overflow.
_REACH = {torch.float64: 500, torch.float32: 60}


class BandLayout:
    """Where each segment's s, λ and δ⁺ lie in the band system; `controls` and `states` are s and the δ before of each group."""

    def __init__(self, analysis: Analysis) -> None:
        count = len(analysis.order)
        self.r = np.zeros(count, dtype=np.int64)
        self.n = np.zeros(count, dtype=np.int64)
        for group in analysis.groups:
            self.r[group.segments] = group.r
            self.n[group.segments] = np.where(group.segments == count - 1, 0, group.n_out)
        sizes = self.r + 2 * self.n
        self.start = np.concatenate([[0], np.cumsum(sizes)])
        before = np.concatenate([[0], self.n[:-1]])
        self.state_before = self.start[:-1] - before
        self.order = int(self.start[-1])
        self.bandwidth = int(max((before + self.r + self.n - 1).max(), self.n.max(), 0)) if count else 0
        self.controls = [Slots(self.start[group.segments], group.r) for group in analysis.groups]
        self.states = [Slots(self.state_before[group.segments], group.n_in) for group in analysis.groups]


class BandedFactorization:
    """LU of the condensed KKT band matrix at a damping.

    Attributes
    ----------
    spread : float
        The largest entry of the constraints, before they are weighed; their unit is 1.

    Raises
    ------
    SingularPivotError
        If the matrix is exactly singular, or damping = 0 and there are hidden controls.
    """

    method = "banded"

    def __init__(self, analysis: Analysis, damping: complex) -> None:
        self.analysis, self.damping = analysis, damping = analysis.over(damping), damping
        if damping == 0.0 and analysis.hidden:
            raise SingularPivotError(int(next(group.stages[0] for group in analysis.groups if group.hidden)))
        self.layout = layout = analysis.once(BandLayout)
        self._lu = BandLU(self.assemble(), layout.bandwidth)
        if self._lu.singular_at is not None:
            segment = int(np.searchsorted(layout.start, self._lu.singular_at, side="right") - 1)
            g, k = analysis.order[segment]
            raise SingularPivotError(int(analysis.groups[g].stages[k]))

    @property
    def answers(self) -> frozenset[str]:
        """Solves, and at a real damping determinants."""
        return SOLVES if isinstance(self.damping, complex) else BAND_ANSWERS

    def assemble(self) -> BandMatrix:
        """Return the band matrix, in the layout of LAPACK's gbtrf."""
        analysis, layout = self.analysis, self.layout
        kl = layout.bandwidth
        band = BandMatrix(layout.order, 3 * kl + 1, 2 * kl, analysis.problem.numpy_dtype)
        Ts = [blocks.T(self.damping).numpy() for blocks in analysis.condensed]
        # Multiply the constraints by a power of two that makes them as large as the curvatures.
        reach = _REACH[analysis.real.problem.dtype]
        largest = max((float(abs(T).max()) for T in Ts if T.size), default=0.0)
        self.weight = (
            2.0 ** float(np.clip(np.round(np.log2(largest)), -reach, reach)) if 0.0 < largest < np.inf else 1.0
        )
        self.spread = max(
            (float(blocks.W.abs().max()) for blocks in analysis.condensed if blocks.W.numel()), default=0.0
        )
        for group, blocks, T in zip(analysis.groups, analysis.condensed, Ts, strict=True):
            W, r = blocks.W.numpy() * self.weight, group.r
            s = layout.start[group.segments]
            state = layout.state_before[group.segments]
            band.put(s, s, T[:, :r, :r])
            band.put(s, state, T[:, :r, r:])
            band.put(state, s, T[:, r:, :r])
            band.put(state, state, T[:, r:, r:])
            inner = layout.n[group.segments] > 0
            if not inner.any():
                continue
            s, state, R, F = s[inner], state[inner], W[inner, :, :r], W[inner, :, r:]
            n = F.shape[1]
            multiplier = s + r
            minus_one = np.broadcast_to(-self.weight * np.eye(n, dtype=F.dtype), (s.size, n, n))
            band.put(multiplier, state, F)
            band.put(state, multiplier, F.transpose(0, 2, 1))
            band.put(multiplier, s, R)
            band.put(s, multiplier, R.transpose(0, 2, 1))
            band.put(multiplier, multiplier + n, minus_one)
            band.put(multiplier + n, multiplier, minus_one)
        return band

    @property
    def precision(self) -> torch.dtype:
        """What the factors are computed in."""
        return self.analysis.problem.dtype

    def solve(self, g: Tensor) -> Tensor:
        """(H + εI)⁻¹ g for g of shape (N, k), without refinement."""
        rhs, hidden = self.band_load(g)
        return self.controls(self.solve_band(rhs), hidden)

    def band_load(self, g: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """What g of shape (N, k) puts on the unknowns of the band system, (order, k); and g⊥/ε of each group."""
        layout = self.layout
        hidden: list[Tensor | None] = []
        rhs = g.new_zeros(layout.order, g.shape[1])
        # The elimination of x⊥ leaves (1/ε) g⊥ᵀB δ in the objective, which on the right-hand side has the other sign.
        for group, controls, states in zip(self.analysis.groups, layout.controls, layout.states, strict=True):
            part = loads(group, g, self.damping)
            controls.put(rhs, part.visible)
            if part.state is not None:
                states.add(rhs, -self._in_units(group, part.state))
            hidden.append(None if part.hidden is None else part.hidden / self.damping)
        return rhs, hidden

    def controls(self, y: Tensor, hidden: list[Tensor | None]) -> Tensor:
        """Controls, (N, k), of the unknowns y of the band system, (order, k), and what is hidden of them, as of `band_load`."""
        layout = self.layout
        x = y.new_empty(self.analysis.problem.size, y.shape[1])
        for group, controls, states, mine in zip(
            self.analysis.groups, layout.controls, layout.states, hidden, strict=True
        ):
            s, d = controls.gather(y), states.gather(y)
            put_controls(x, group, mine, s, d if group.in_units else d * group.unit_in, self.damping)
        return x

    @staticmethod
    def _in_units(group: SegmentGroup, state: Tensor) -> Tensor:
        """Return a load on states in their units, in which the band keeps them; where recursions keep them so it is there already."""
        return state if group.in_units else state * group.unit_in

    def solve_band(self, rhs: Tensor) -> Tensor:
        """Solve the band system for right-hand sides of shape (order, k)."""
        return self._lu.solve(rhs)

    def logabsdet(self) -> float:
        """Logarithm of |det(H + εI)|: that of the band matrix, and one ε for each hidden control."""
        hidden = self.analysis.hidden
        pivots = np.abs(self._lu.pivots, dtype=np.float64)
        of_weight = -2.0 * int(self.layout.n.sum()) * math.log(self.weight)
        of_pivots = float(np.log(pivots).sum(dtype=np.longdouble) + np.longdouble(of_weight))
        return of_pivots + (hidden * math.log(abs(self.damping)) if hidden else 0.0)

    @property
    def nbytes(self) -> int:
        """Bytes held by the factors."""
        return self._lu.nbytes


def factor(analysis: Analysis, damping: complex) -> BandedFactorization:
    """Factor H + εI of a chain by LAPACK band LU."""
    return BandedFactorization(analysis, damping)


# Calls of a group of segments: its blocks at a damping, and their places in the band.
_CALLS_PER_GROUP = 60

# Calls of a stage of a segment that is condensed.
_CALLS_PER_STAGE = 60

# Copies of dense blocks at a time: at a damping, and weighed; of wide segments they are made too.
_BLOCKS, _BLOCKS_WIDE = 2.5, 4.0

# Times that the columns are moved there, and where entries pass by.
_COPIES, _COPIES_WIRED = 24.0, 12.0


def estimate(analysis: Analysis) -> Cost:
    """Flops, bytes and seconds of a factorization."""
    if analysis.problem.device.type != "cpu":
        return Cost.impossible("LAPACK band solves run on the CPU only")
    layout, tally, item = analysis.once(BandLayout), Tally(analysis.problem.dtype), analysis.problem.dtype.itemsize
    kl = layout.bandwidth
    tally.moved(item * (3 * kl + 1) * layout.order)
    tally.kernel("band", 4.0 * layout.order * max(kl, 1) ** 2, kl)
    return with_blocks(analysis, tally, item * layout.order * (3 * kl + 1))


def with_blocks(analysis: Analysis, band: Tally, nbytes: float) -> Cost:
    """The cost of a band, which is tallied, and of so many bytes, with that of the dense blocks which it is made of."""
    item, blocks, taken = analysis.problem.dtype.itemsize, 0.0, 0.0
    for group in analysis.groups:
        size = float(group.count * ((group.r + group.n_in) ** 2 + group.n_out * (group.r + group.n_in)))
        blocks += size
        taken += size * (_BLOCKS if group.is_narrow else _BLOCKS_WIDE)
        if not group.is_narrow:  # else its dense blocks are those of every method
            _count_condensing(band, group, item)
    band.calls(_CALLS_PER_GROUP * len(analysis.groups))
    band.moved(6.0 * item * blocks)
    return Cost(band.flops, nbytes + item * taken, band.seconds)


def _count_condensing(tally: Tally, group: SegmentGroup, item: int) -> None:
    """Products of the stages of a segment with the columns of its controls and of the state before it."""
    K, columns = group.count, float(group.r + group.n_in)
    for stage in (group.control, *group.free):
        tally.calls(_CALLS_PER_STAGE)
        tally.kernel("gemm", K * 4 * (stage.entries("F") + stage.entries("C")) * columns, columns)
        copies = _COPIES if stage.inputs == stage.n_in else _COPIES_WIRED
        tally.moved(K * item * copies * columns * max(stage.n_in, stage.n_out))


METHOD = Method("banded", factor, estimate, BAND_ANSWERS, is_complex=True)
