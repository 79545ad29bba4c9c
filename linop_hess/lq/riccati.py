"""Method "riccati": the backward recursion over segments, with level-3 BLAS and delayed pivots. For wide chains.

The cost-to-go of a segment is ½ δᵀVδ + δᵀYc + ½ cᵀΛc, c being directions whose pivot was too small to divide by. With
u = (s, c) the unknowns at hand,

    K_uu = [εI + QᵀAQ + RᵀVR, RᵀY; YᵀR, Λ],   K_uδ = [QᵀB + RᵀVF; YᵀF],   V ← C + FᵀVF − (1/ε)Bᵀ(I−QQᵀ)B − K_δu K_uu⁻¹ K_uδ.

K_uu is factored as T θ Tᵀ. Should its smallest pivot be far below |ε| (the trailing block of H + εI is nearly singular although
H + εI need not be), its eigenvectors of eigenvalues below a tenth of |ε| are carried to the segment before, and only the others are
eliminated; the first segment eliminates everything. Every step is a congruence, so the θ of all segments have the inertia of H + εI.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from linop_hess.lq.cost import Cost
from linop_hess.lq.pivots import Eigenpivots, pivots_of
from linop_hess.lq.problem import Problem
from linop_hess.lq.pullback import Segment, segments_of
from linop_hess.lq.segments import in_order, loads, put_controls
from linop_hess.lq.singular import SingularPivotError
from linop_hess.lq.symmetric import Congruence


@dataclass(frozen=True)
class Step:
    """What one segment leaves behind for the solves."""

    segment: Segment
    pivots: Congruence | Eigenpivots
    cross: Tensor  # T⁻¹ K_uδ, (eliminated, n_in)
    carried_in: int  # size of c that came from the segment after

    @property
    def delayed(self) -> int:
        """Size of c that goes to the segment before."""
        return self.pivots.delayed if isinstance(self.pivots, Eigenpivots) else 0

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.pivots.nbytes + self.cross.nbytes


class RiccatiFactorization:
    """Block LDLᵀ of H + εI along the chain.

    Attributes
    ----------
    steps : list of Step
        One per segment, in the order of the chain.

    Raises
    ------
    SingularPivotError
        If H + εI is singular to working precision.
    """

    method = "riccati"

    def __init__(self, problem: Problem, damping: float, *, always_pivot: bool = False) -> None:
        self.problem = problem
        self.damping = damping
        self._order = in_order(problem.segment_groups)
        self.steps = self._factor(always_pivot)

    def _factor(self, always_pivot: bool) -> list[Step]:
        groups = self.problem.segment_groups
        segments = [segments_of(group, self.damping) for group in groups]
        V: Tensor | None = None
        carried: tuple[Tensor, Tensor] | None = None
        steps: list[Step] = []
        for count, (g, k) in enumerate(reversed(self._order), 1):
            segment = segments[g][k]
            K, cross, V = segment.pull_back(V)
            if carried is not None:
                K, cross = _with_carried(segment, K, cross, *carried)
            try:
                pivots = pivots_of(K, self.damping, last=count == len(self._order), always_pivot=always_pivot)
            except ArithmeticError:
                raise SingularPivotError(int(groups[g].stages[k])) from None
            white = pivots.whiten(cross)
            V.addmm_(white.mT, white / pivots.theta[:, None], alpha=-1.0)
            steps.append(Step(segment, pivots, white, 0 if carried is None else carried[1].numel()))
            carried = None
            if isinstance(pivots, Eigenpivots) and pivots.W is not None and pivots.mu is not None and pivots.delayed:
                carried = cross.mT @ pivots.W, pivots.mu
        return steps[::-1]

    def solve(self, g: Tensor) -> Tensor:
        """(H + εI)⁻¹ g for g of shape (N, k)."""
        groups, damping = self.problem.segment_groups, self.damping
        x = torch.zeros_like(g)
        load = [loads(group, g, damping) for group in groups]
        visible = [part.visible.unbind() for part in load]
        push = [None if part.state is None else part.state.unbind() for part in load]
        white = self._backward(visible, push)
        s: list[list[Tensor]] = [[] for _ in groups]
        states: list[list[Tensor]] = [[] for _ in groups]
        d: Tensor | None = None
        c = g.new_zeros(0, g.shape[1])
        for (group, _), step, half in zip(self._order, self.steps, white, strict=True):
            if d is not None:
                states[group].append(d)
                half = half - step.cross @ d
            u = step.pivots.unwhiten_adjoint(half / step.pivots.theta[:, None])
            if step.delayed:
                assert isinstance(step.pivots, Eigenpivots) and step.pivots.W is not None
                u = u + step.pivots.W @ c
            r = step.segment.r
            if step.carried_in:
                u, c = u[:r], u[r:]
            s[group].append(u)
            d = step.segment.forward(u, d)
        for part, group_, s_, d_ in zip(load, groups, s, states, strict=True):
            put_controls(x, group_, part, torch.stack(s_), torch.stack(d_) if d_ else None, damping)
        return x

    def _backward(self, visible: list[tuple[Tensor, ...]], push: list[tuple[Tensor, ...] | None]) -> list[Tensor]:
        """T⁻¹ of the loads on (s, c), segment by segment."""
        white: list[Tensor] = []
        v: Tensor | None = None
        w: Tensor | None = None
        for (group, k), step in zip(reversed(self._order), reversed(self.steps), strict=True):
            load, after = visible[group][k], None
            if v is not None:
                seen, after = step.segment.adjoint(v)
                load = load - seen
            if w is not None:
                load = torch.cat([load, -w])
            half = step.pivots.whiten(load)
            white.append(half)
            v = step.cross.mT @ (half / step.pivots.theta[:, None])
            if after is not None:
                v += after
            mine = push[group]
            if mine is not None:
                v += mine[k]
            w = None
            if step.delayed:
                assert isinstance(step.pivots, Eigenpivots) and step.pivots.W is not None
                w = -step.pivots.W.mT @ load
        return white[::-1]

    @property
    def nbytes(self) -> int:
        """Bytes held by the factors."""
        return sum(step.nbytes for step in self.steps)

    @property
    def delayed(self) -> dict[int, int]:
        """Number of directions delayed at each stage that delayed any."""
        starts = np.flatnonzero(self.problem.p)
        return {int(l): step.delayed for l, step in zip(starts, self.steps, strict=True) if step.delayed}


def _with_carried(segment: Segment, K: Tensor, cross: Tensor, Y: Tensor, mu: Tensor) -> tuple[Tensor, Tensor]:
    """K_uu and K_uδ with the directions c that came from the segment after."""
    coupling, carried = segment.adjoint(Y)
    K = torch.cat([torch.cat([K, coupling], 1), torch.cat([coupling.mT, torch.diag(mu)], 1)])
    return K, torch.cat([cross, carried.mT])


def factor(problem: Problem, damping: float) -> RiccatiFactorization:
    """Factor H + εI stage by stage."""
    return RiccatiFactorization(problem, damping)


def factor_pivoted(problem: Problem, damping: float) -> RiccatiFactorization:
    """Factor with the eigenvalue route at every stage: the most careful way, several times slower."""
    return RiccatiFactorization(problem, damping, always_pivot=True)


def estimate(problem: Problem) -> Cost:
    """Flops (4⅔ n³ a stage when all its blocks are n wide), bytes and seconds."""
    item = problem.numpy_dtype.itemsize
    visible = np.array([float(block.split.r) if block.p else 0.0 for block in problem.blocks])
    with_controls = np.flatnonzero(problem.p)
    r = visible[problem.order[with_controls, 0]]
    n = np.where(with_controls == problem.first, 0, problem.n_in[with_controls]).astype(float)
    flops = r**3 * 2 / 3 + 2 * r**2 * n + 2 * r * n**2
    done = r**3 / 3 + r**2 * n + 2 * r * n**2
    rate = np.where(np.maximum(r, n) > 256, 5e10, 1e10)
    widest = float(max(r.max(initial=0), problem.n_out.max(), problem.n_in[problem.first :].max(initial=0)))
    seconds = float((done / rate).sum()) + 4e-4 * with_controls.size + 5e-5 * problem.length
    nbytes = item * float((r**2 + r * n).sum())
    return Cost(float(flops.sum()), nbytes + 8.0 * item * widest**2, seconds)
