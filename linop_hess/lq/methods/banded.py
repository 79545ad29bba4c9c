"""Method "banded": the condensed KKT matrix of the whole chain as one LAPACK band matrix.

With λ the multiplier of δ⁺ = F δ + R s, the unknowns (s, λ, δ⁺) of the segments in order give a symmetric band matrix. The constraints
are weighed as much as the curvatures, so that the entries of the matrix are of like sizes.
LAPACK's gbtrf factors it with partial pivoting across stages: backward stable, with a growth bound independent of the
depth. For narrow chains nothing is faster; the work grows with the cube of the state's size.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.linalg import lapack
from torch import Tensor

from linop_hess.lq.band_storage import BandMatrix
from linop_hess.lq.condensed import condensed
from linop_hess.lq.layout import Slots
from linop_hess.lq.methods.cost import Cost
from linop_hess.lq.methods.singular import SingularPivotError
from linop_hess.lq.problem import Problem
from linop_hess.lq.segments import loads, put_controls


class _Layout:
    """Where each segment's s, λ and δ⁺ lie in the band system."""

    def __init__(self, problem: Problem) -> None:
        self.groups = problem.segment_groups
        count = sum(group.count for group in self.groups)
        self.r = np.zeros(count, dtype=np.int64)
        self.n = np.zeros(count, dtype=np.int64)
        for group in self.groups:
            self.r[group.segments] = group.r
            self.n[group.segments] = np.where(group.segments == count - 1, 0, group.n_out)
        sizes = self.r + 2 * self.n
        self.start = np.concatenate([[0], np.cumsum(sizes)])
        before = np.concatenate([[0], self.n[:-1]])
        self.state_before = self.start[:-1] - before
        self.order = int(self.start[-1])
        self.bandwidth = int(max((before + self.r + self.n - 1).max(), self.n.max(), 0)) if count else 0


class BandedFactorization:
    """LU of the condensed KKT band matrix of `problem` at `damping`.

    Raises
    ------
    SingularPivotError
        If the matrix is exactly singular.
    """

    method = "banded"

    def __init__(self, problem: Problem, damping: float) -> None:
        self.problem = problem
        self.damping = damping
        self._layout = _Layout(problem)
        layout = self._layout
        band = self._assemble()
        gbtrf = lapack.dgbtrf if problem.dtype == torch.float64 else lapack.sgbtrf
        kl = layout.bandwidth
        self._lu, self._pivots, info = band.storage.T, np.zeros(0, dtype=np.int32), 0
        if layout.order:
            self._lu, self._pivots, info = gbtrf(self._lu, kl, kl, overwrite_ab=1)
        if info > 0:
            segment = int(np.searchsorted(layout.start, info - 1, side="right") - 1)
            stage = next(
                int(g.stages[g.segments == segment][0]) for g in layout.groups if (g.segments == segment).any()
            )
            raise SingularPivotError(stage)

    def _assemble(self) -> BandMatrix:
        problem, layout = self.problem, self._layout
        kl = layout.bandwidth
        band = BandMatrix(layout.order, 3 * kl + 1, 2 * kl, problem.numpy_dtype)
        Ts = [condensed(group, self.damping).T(self.damping).numpy() for group in layout.groups]
        reach = 500 if problem.numpy_dtype == np.float64 else 60
        largest = max((max(float(T.max()), -float(T.min())) for T in Ts if T.size), default=0.0)
        self._weight = (
            2.0 ** float(np.clip(np.round(np.log2(largest)), -reach, reach)) if 0.0 < largest < np.inf else 1.0
        )
        for group, T in zip(layout.groups, Ts, strict=True):
            W, r = condensed(group, self.damping).W.numpy() * self._weight, group.r
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
            minus_one = np.broadcast_to(-self._weight * np.eye(n, dtype=F.dtype), (s.size, n, n))
            band.put(multiplier, state, F)
            band.put(state, multiplier, F.transpose(0, 2, 1))
            band.put(multiplier, s, R)
            band.put(s, multiplier, R.transpose(0, 2, 1))
            band.put(multiplier, multiplier + n, minus_one)
            band.put(multiplier + n, multiplier, minus_one)
        return band

    def solve(self, g: Tensor) -> Tensor:
        """(H + εI)⁻¹ g for g of shape (N, k)."""
        layout, damping = self._layout, self.damping
        rhs = g.new_zeros(layout.order, g.shape[1])
        load = [loads(group, g, damping) for group in layout.groups]
        for group, part in zip(layout.groups, load, strict=True):
            Slots(layout.start[group.segments], group.r).put(rhs, part.visible)
            if part.state is not None:
                Slots(layout.state_before[group.segments], group.n_in).add(rhs, -part.state)
        y = self._solve_band(rhs)
        x = torch.empty_like(g)
        for group, part in zip(layout.groups, load, strict=True):
            s = Slots(layout.start[group.segments], group.r).gather(y)
            d = Slots(layout.state_before[group.segments], group.n_in).gather(y) if group.n_in else None
            put_controls(x, group, part, s, d, damping)
        return x

    def _solve_band(self, rhs: Tensor) -> Tensor:
        kl = self._layout.bandwidth
        if not rhs.numel():
            return rhs
        gbtrs = lapack.dgbtrs if self.problem.dtype == torch.float64 else lapack.sgbtrs
        solution, info = gbtrs(self._lu, kl, kl, rhs.numpy(), self._pivots)
        if info != 0:
            raise ValueError(f"LAPACK gbtrs refused its argument {-info}")
        return torch.from_numpy(np.ascontiguousarray(solution))

    def logabsdet(self) -> float:
        """Logarithm of |det(H + εI)|, that of the band matrix and one ε for each hidden control."""
        hidden = sum(group.split.complement * group.count for group in self._layout.groups)
        pivots = np.abs(self._lu[2 * self._layout.bandwidth], dtype=np.float64) if self._layout.order else np.ones(0)
        of_weight = -2.0 * int(self._layout.n.sum()) * math.log(self._weight)
        of_pivots = float(np.log(pivots).sum(dtype=np.longdouble) + np.longdouble(of_weight))
        return of_pivots + (hidden * math.log(abs(self.damping)) if hidden else 0.0)

    @property
    def nbytes(self) -> int:
        """Bytes held by the factors."""
        return int(self._lu.nbytes + self._pivots.nbytes)


def factor(problem: Problem, damping: float) -> BandedFactorization:
    """Factor H + εI of a chain by LAPACK band LU."""
    return BandedFactorization(problem, damping)


def estimate(problem: Problem) -> Cost:
    """Flops, bytes and seconds of a factorization (gbtrf runs at 2 GFLOP/s on thin bands, 60 on wide ones)."""
    if problem.device.type != "cpu":
        return Cost(np.inf, np.inf, np.inf, "LAPACK band solves run on the CPU only")
    layout = _Layout(problem)
    kl = layout.bandwidth
    flops = 4.0 * layout.order * kl**2
    rate = 1e9 * min(60.0, 1.0 + 0.1 * kl)
    item = problem.numpy_dtype.itemsize
    wide = max((int(problem.n_out.max() ** 2) + 1) * item * len(layout.groups), 1)
    nbytes = layout.order * (3 * kl + 1) * item * 1.6 + wide
    return Cost(flops, nbytes, 4e-4 + flops / rate + layout.order * kl * 2e-9 + 5e-4 * len(layout.groups))
