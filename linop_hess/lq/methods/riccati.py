"""Method "riccati": the backward recursion over segments, with level-3 BLAS and delayed pivots. For wide chains.

The cost-to-go of a segment is ½ δᵀVδ + δᵀYc + ½ cᵀΛc, c being directions whose pivot was too small to divide by. With
u = (s, c) the unknowns at hand,

    K_uu = [εI + QᵀAQ + RᵀVR, RᵀY; YᵀR, Λ],   K_uδ = [QᵀB + RᵀVF; YᵀF],   V ← C + FᵀVF − (1/ε)Bᵀ(I−QQᵀ)B − K_δu K_uu⁻¹ K_uδ.

K_uu is factored as T θ Tᵀ. Should its smallest pivot be far below |ε| (the trailing block of H + εI is nearly singular although
H + εI need not be), its eigenvectors of eigenvalues below a tenth of |ε| are carried to the segment before, and only the others are
eliminated; the first segment eliminates everything. Every step is a congruence, so the θ of all segments have the inertia of H + εI.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import numpy as np
import torch
from torch import Tensor

from linop_hess.lq.methods.cost import Cost
from linop_hess.lq.methods.singular import SingularPivotError
from linop_hess.lq.methods.stage_factor import PackedStep, Step, WhitenedStep, stacked_by_size
from linop_hess.lq.pivots.rules import PivotRule, SmallPivots, pivots_of
from linop_hess.lq.problem import Problem
from linop_hess.lq.segments import Loads, loads, order_of, put_controls
from linop_hess.lq.value.dense import CostToGo, Segment, is_narrow, segments_of

# Up to this many directions a step is kept packed.
_NARROW = 64


class RiccatiFactorization:
    """Block LDLᵀ of H + εI along the chain.

    Attributes
    ----------
    steps : list of Step
        One per segment, in the order of the chain.
    order : list of (int, int)
        The segment group and the position in it of each.

    Raises
    ------
    SingularPivotError
        If H + εI is singular to working precision.
    """

    method = "riccati"

    def __init__(
        self, problem: Problem, damping: float, *, always_pivot: bool = False, rule: PivotRule | None = None
    ) -> None:
        self.problem = problem
        self._rule = SmallPivots(damping) if rule is None else rule
        self.damping = damping
        self.order = [(int(g), int(k)) for g, k in order_of(problem.segment_groups)]
        self._segments = [segments_of(group, damping) for group in problem.segment_groups]
        steps = None if always_pivot else self._factor_packed()
        self.steps: Sequence[Step] = steps if steps is not None else self._factor_pivoted(always_pivot)

    def _factor_packed(self) -> list[Step] | None:
        """Eliminate all directions of narrow segments at once; None if some pivot turns out too small for that."""
        if any(group.r > _NARROW for group in self.problem.segment_groups):
            return None
        V: Tensor | None = None
        steps: list[PackedStep] = []
        for g, k in reversed(self.order):
            segment = self._segments[g][k]
            K, cross, V = segment.pull_back(V)
            steps.append(PackedStep.of(segment, K, cross))
            steps[-1].eliminate_from(V)
        steps.reverse()
        if all(step.regular for step in steps[:1]) and all(
            self._rule.accepts_packed(*alike) for alike in stacked_by_size(steps[1:])
        ):
            return list(steps)
        return None

    def _factor_pivoted(self, always_pivot: bool) -> list[Step]:
        """Delay the directions whose pivots are too small."""
        V: Tensor | None = None
        after: Step | None = None
        steps: list[Step] = []
        for count, (g, k) in enumerate(reversed(self.order), 1):
            segment = self._segments[g][k]
            K, cross, V = segment.pull_back(V)
            arrived = 0
            if isinstance(after, WhitenedStep) and after.coupling is not None and after.pivots.mu is not None:
                K, cross = _with_carried(segment, K, cross, after.coupling, after.pivots.mu)
                arrived = after.delayed
            try:
                last = count == len(self.order)
                pivots, white = pivots_of(K, cross, self._rule, last=last, always_pivot=always_pivot)
            except ArithmeticError:
                raise SingularPivotError(int(self.problem.segment_groups[g].stages[k])) from None
            coupling = None if pivots.W is None or not pivots.delayed else cross.mT @ pivots.W
            after = WhitenedStep(segment, pivots, white, arrived, coupling)
            after.eliminate_from(V)
            steps.append(after)
        return steps[::-1]

    def obeys(self, rule: PivotRule) -> bool:
        """Whether by `rule` nothing need be delayed, or nothing more than is."""
        later = self.steps[1:]
        packed = [step for step in later if isinstance(step, PackedStep)]
        white = [step for step in later if isinstance(step, WhitenedStep)]
        return all(rule.accepts_packed(*alike) for alike in stacked_by_size(packed)) and all(
            rule.accepts(step.pivots.theta, step.cross) for step in white
        )

    def costs(self) -> list[CostToGo]:
        """Return the cost-to-go before each segment, computed again: it is not kept."""
        V: Tensor | None = None
        found: list[CostToGo] = []
        for step in reversed(self.steps):
            V = step.segment.pull_back_state(V)
            step.eliminate_from(V)
            found.append(CostToGo(V, step.coupling, step.pivots.mu) if isinstance(step, WhitenedStep) else CostToGo(V))
        return found[::-1]

    def solve(self, g: Tensor) -> Tensor:
        """(H + εI)⁻¹ g for g of shape (N, k)."""
        if not self.order:
            return torch.zeros_like(g)
        load = [loads(group, g, self.damping) for group in self.problem.segment_groups]
        return self.forward(load, self.backward(load))

    def backward(self, load: Sequence[Loads]) -> list[Tensor]:
        """Eliminate from the last segment to the first: what each step holds for the forward sweep."""
        visible = [part.visible.unbind() for part in load]
        push = [None if part.state is None else part.state.unbind() for part in load]
        held: list[Tensor] = []
        v: Tensor | None = None
        w: Tensor | None = None
        for (group, k), step in zip(reversed(self.order), reversed(self.steps), strict=True):
            mine, after, pushed = visible[group][k], None, push[group]
            if v is not None:
                seen, after = step.segment.adjoint(v)
                mine = mine - seen
            if w is not None:
                mine = torch.cat([mine, w])
            half, v = step.backward(mine)
            held.append(half)
            if after is not None:
                v += after
            if pushed is not None:
                v += pushed[k]
            w = step.delayed_directions.mT @ mine if step.delayed and isinstance(step, WhitenedStep) else None
        return held[::-1]

    def forward(self, load: Sequence[Loads], held: Sequence[Tensor]) -> Tensor:
        """Substitute from the first segment to the last: x, shape (N, k)."""
        groups, damping = self.problem.segment_groups, self.damping
        s: list[list[Tensor]] = [[] for _ in groups]
        states: list[list[Tensor]] = [[] for _ in groups]
        d: Tensor | None = None
        c: Tensor | None = None
        for (group, _), step, mine in zip(self.order, self.steps, held, strict=True):
            if d is not None:
                states[group].append(d)
            u = step.forward(mine, d, c if step.delayed else None)
            if step.carried_in:
                u, c = u[: step.segment.r], u[step.segment.r :]
            s[group].append(u)
            d = step.segment.forward(u, d)
        x = torch.zeros(
            self.problem.size, load[0].visible.shape[-1], dtype=self.problem.dtype, device=self.problem.device
        )
        for part, which, s_, d_ in zip(load, groups, s, states, strict=True):
            put_controls(x, which, part, torch.stack(s_), torch.stack(d_) if d_ else None, damping)
        return x

    def in_order(self, load: Sequence[Loads]) -> list[Tensor]:
        """Return the loads on visible controls, segment by segment."""
        visible = [part.visible.unbind() for part in load]
        return [visible[group][k] for group, k in self.order]

    def whitened(self) -> RiccatiFactorization:
        """Return the same factors with every pivot block as T θ Tᵀ."""
        other = copy(self)
        other.steps = [step.whitened() for step in self.steps]
        return other

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
    """Flops (4⅔ n³ a segment when all its blocks are n wide), bytes and seconds."""
    flops = seconds = numbers = widest = 0.0
    for group in problem.segment_groups:
        K, r, n = group.count, float(group.r), float(group.n_in)
        flops += K * (r**3 * 2 / 3 + 2 * r**2 * n + 2 * r * n**2)
        done = r**3 / 3 + r**2 * n + 2 * r * n**2
        if is_narrow(group):
            seconds += K * (5e-5 + done / 1e10)
            numbers += K * (2 * (r + n) ** 2 + group.n_out * (r + n) + n**2)
        else:
            m = max(min(r, n), 1.0)
            seconds += K * (2.5e-4 + done * (m + 300) / (5e10 * m))
        numbers += K * (r**2 + 2 * r * n)
        widest = max(widest, r, n, *(float(stage.n_out) for stage in group.steps))
    item = problem.numpy_dtype.itemsize
    return Cost(flops, item * (numbers + 8 * widest**2), 5e-4 + seconds)
