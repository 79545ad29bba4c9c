"""Method "riccati": block LDLᵀ of H + εI along the chain, the backward Riccati recursion of LQ control with delayed pivots.

The cost-to-go ½ δᵀVδ of the state before a segment follows from that after it by eliminating the controls s of the segment,

    S = QᵀAQ + εI + RᵀVR,     E = QᵀB + RᵀVF,     V ← FᵀVF + C − (1/ε) Bᵀ(I−QQᵀ)B − EᵀS⁻¹E.

Should a pivot of S be far below |ε| (the trailing block of H + εI is nearly singular although H + εI need not be), its direction is
delayed: carried to the segment before as a further unknown. The first segment eliminates everything. Every step is a congruence, so the
pivots of all segments have the inertia of H + εI.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from linop_hess.errors import SingularPivotError
from linop_hess.lq.analysis import Analysis
from linop_hess.lq.elimination.closed_loop import ClosedLoop
from linop_hess.lq.elimination.stage_factor import SegmentLoad, StageFactor, unwhiten, whiten
from linop_hess.lq.methods.base import EVERYTHING, Congruence, Cost, Method, Tally
from linop_hess.lq.pivots.delayed import Elimination, PackedElimination, WhitenedElimination, eliminate, obey, pivots_of
from linop_hess.lq.pivots.hidden import Hidden
from linop_hess.lq.pivots.rules import PivotRule, SmallPivots
from linop_hess.lq.segments import SegmentGroup, put_controls, split_load, state_load
from linop_hess.lq.stages.base import Stage
from linop_hess.lq.value.controls import Segment, segments_at
from linop_hess.lq.value.dense import DenseValue


@dataclass(frozen=True)
class CostToGo:
    """A cost-to-go and the units of its state, (n, 1)."""

    value: DenseValue
    units: Tensor


def recursion(segments: Sequence[Any], V: Any, divide: Callable[[Any, Tensor, Any], Any]) -> list[StageFactor]:
    """Eliminate the segments of a chain from the last to the first.

    Parameters
    ----------
    segments : sequence of Segment or Span
        What the value takes as controls.
    V : ValueFunction
        The cost-to-go after the last.
    divide : callable
        ``divide(segment, S, E)`` gives the elimination; see `divided`.
    """
    factors: list[StageFactor] = []
    arrived = 0
    for segment in reversed(segments):
        for stage in reversed(segment.free):
            V = V.pull_back(stage)
        S, E, V = V.pivot(segment.control)
        V = V.downdate(elimination := divide(segment, S, E), segment.hidden).compress()
        factors.append(StageFactor(segment, elimination, arrived))
        arrived = factors[-1].delayed
    return factors[::-1]


def divided(rule: PivotRule | None, careful: bool = False) -> Callable[[Segment, Tensor, Tensor], Elimination]:
    """How `recursion` divides by dense pivots: as the rule says, without one whatever they are."""
    return partial(_divided, rule=rule, careful=careful)


# Segments that are divided by at once before their pivots are looked at: the first time, and after runs of which all could be.
_SHORTEST_RUN, _LONGEST_RUN = 8, 128


def recursion_in_runs(segments: Sequence[Segment], V: DenseValue, rule: PivotRule) -> list[StageFactor]:
    """The same with a rule for condensed segments without delayed hidden directions, their pivots looked at in runs.

    Looking at a pivot costs more than dividing by it where blocks are narrow. So a run of segments is divided by whatever their pivots
    are, and up to the first that the rule does not accept it stands; that one is eliminated by itself, and so are those that directions
    arrive at.
    """
    factors: list[StageFactor] = []  # from the last segment
    length, spare = _SHORTEST_RUN, len(segments)  # how many may be divided by in vain
    while len(factors) < len(segments):
        left = len(segments) - len(factors)
        arrived = factors[-1].delayed if factors else 0
        if not arrived and spare > 0:
            values, run = [V], list[StageFactor]()
            for segment in reversed(segments[max(0, left - length) : left]):
                S, E, V = values[-1].pivot(segment.control)
                run.append(StageFactor(segment, PackedElimination.of(S, E), 0))
                values.append(V.downdate(run[-1].elimination, segment.hidden))
            stands = _accepted(rule, run)
            spare -= len(run) - stands
            factors += run[:stands]
            V = values[stands]
            if stands == len(run):
                length = min(2 * length, _LONGEST_RUN)
                continue
            length = _SHORTEST_RUN
        segment = segments[len(segments) - len(factors) - 1]
        S, E, V = V.pivot(segment.control)
        V = V.downdate(elimination := _divided(segment, S, E, rule, False), segment.hidden)
        factors.append(StageFactor(segment, elimination, arrived))
    return factors[::-1]


def _accepted(rule: PivotRule, run: Sequence[StageFactor]) -> int:
    """How many of a run stand by a rule, up to the first that does not; of the first segment of a chain no pivot may be zero."""

    def stand(some: Sequence[StageFactor]) -> bool:
        first = [factor for factor in some if factor.segment.is_first]
        return all(map(_is_regular, first)) and _obey(rule, [factor for factor in some if not factor.segment.is_first])

    if stand(run):
        return len(run)
    return bisect_left(range(len(run)), True, key=lambda k: not stand(run[: k + 1]))


def _divided(segment: Segment, S: Tensor, E: Tensor, rule: PivotRule | None, careful: bool) -> Elimination:
    if rule is None:
        return PackedElimination.of(S, E)
    try:
        return eliminate(S, E, rule, segment.units, last=segment.is_first, careful=careful)
    except ArithmeticError:
        raise SingularPivotError(segment.stage) from None


class RiccatiFactorization(Congruence):
    """Block LDLᵀ of H + εI along the chain.

    Parameters
    ----------
    analysis : Analysis
    damping : complex
    rule : PivotRule, optional
        Which pivots are delayed; by default those that are too small for a solve.
    careful : bool
        Whether to take eigenvectors of every pivot block: the most robust way, several times slower.

    Attributes
    ----------
    factors : list of StageFactor
        One for each segment, in the order of the chain.

    Raises
    ------
    SingularPivotError
        If H + εI is singular to working precision, or ε = 0 and there are hidden controls.
    """

    method = "riccati"

    def __init__(
        self, analysis: Analysis, damping: complex, rule: PivotRule | None = None, *, careful: bool = False
    ) -> None:
        # At a complex damping pivots are bounded below by its imaginary part, whose inverses are blocks of the inverse: none is delayed.
        self.analysis, self.damping = analysis, damping = analysis.over(damping), damping
        rule = SmallPivots(damping) if rule is None else rule
        segments = segments_at(analysis, damping, rule.coupling_up_to(damping))
        self.hidden = analysis.hidden - sum(segment.hidden.delayed for segment in segments)
        self._in_runs = analysis.is_narrow and not careful and not any(segment.hidden.delayed for segment in segments)
        if self._in_runs and isinstance(damping, complex):
            self.factors = recursion(segments, _end(analysis), divided(None))
        elif self._in_runs:
            self.factors = recursion_in_runs(segments, _end(analysis), rule)
        else:
            self.factors = recursion(segments, replace(_end(analysis), is_own=True), divided(rule, careful))

    def obeys(self, rule: PivotRule) -> bool:
        """Whether by `rule` nothing need be delayed, or nothing more than is."""
        hidden = max((f.segment.hidden.largest_coupling(f.segment.units) for f in self.factors), default=0.0)
        return hidden <= rule.coupling_up_to(self.damping) and _obey(rule, self.factors[1:])

    @cached_property
    def segment_pivots(self) -> list[Tensor]:
        """θ of each segment."""
        return pivots_of([factor.elimination for factor in self.factors])

    @cached_property
    def theta(self) -> Tensor:
        like = torch.zeros(0, dtype=self.analysis.problem.dtype, device=self.analysis.problem.device)
        return torch.cat([like, *self.segment_pivots])

    @cached_property
    def largest_cost(self) -> float:
        """Largest |entry| of any cost-to-go, in units of the states."""
        return max((cost.value.largest(cost.units) for cost in self.costs_to_go()), default=0.0)

    @property
    def growth(self) -> float:
        scale = max(self.analysis.norm, abs(self.damping))
        return 10.0 * float(torch.finfo(self.theta.dtype).eps) * self.largest_cost / scale if scale else 0.0

    def costs_to_go(self) -> list[CostToGo]:
        """Return the cost-to-go before each segment, computed again: it is not kept."""
        V = _end(self.analysis)
        found: list[CostToGo] = []
        for factor in reversed(self.factors):
            segment = factor.segment
            for stage in reversed(segment.free):
                V = V.pull_back(stage)
            V = V.pull_back_state(segment.control).downdate(factor.elimination, segment.hidden)
            found.append(CostToGo(V, segment.units))
        return found[::-1]

    @cached_property
    def _closed_loop(self) -> ClosedLoop:
        return ClosedLoop(self.analysis, self.damping, self.factors)

    def solve(self, g: Tensor) -> Tensor:
        if not self.factors:
            return torch.zeros_like(g)
        return self._closed_loop.solve(g) if self._in_runs else super().solve(g)

    @cached_property
    def _whitened(self) -> list[WhitenedElimination]:
        return [factor.elimination.whitened() for factor in self.factors]

    def whiten(self, g: Tensor) -> Tensor:
        if not self.factors:
            return g.new_zeros(0, g.shape[1])
        load, hidden = self._loads(g)
        return torch.cat([*whiten(self.factors, self._whitened, load), *([hidden] if self.hidden else [])])

    def _loads(self, g: Tensor) -> tuple[list[SegmentLoad], Tensor]:
        """Return the load on each segment, and g⊥ less the directions that are delayed, (N, k)."""
        hidden = torch.zeros_like(g)
        # All segments of a group at once, but for those whose hidden directions are split: there B sees only the parts that are named.
        of_group: list[list[SegmentLoad]] = []
        for group in self.analysis.groups:
            visible, rest = split_load(group, g)
            state = state_load(group, rest, self.damping)
            pushed: list[Tensor | None] = [None] * group.count
            if state is not None:
                pushed = [*state.unbind()]
            along = [visible[k, :0] for k in range(group.count)]
            if rest is not None:
                for k, mine in enumerate(self._hidden(group)):
                    if mine.directions is not None:
                        along[k], pushed[k] = mine.directions.mT @ rest[k], mine.push(rest[k])
                        rest[k] -= mine.directions @ along[k]
                group.x_slots.put(hidden, rest)
            of_group.append([SegmentLoad(*parts) for parts in zip(visible.unbind(), pushed, along, strict=True)])
        return [of_group[g][k] for g, k in self.analysis.pairs], hidden

    def _hidden(self, group: SegmentGroup) -> list[Hidden]:
        return [self.factors[k].segment.hidden for k in group.segments]

    def unwhiten(self, w: Tensor) -> Tensor:
        problem = self.analysis.problem
        x = w.new_zeros(problem.size, w.shape[1])
        if not self.factors:
            return x
        visible = w[: -problem.size] if self.hidden else w
        white = visible.split([theta.numel() for theta in self.segment_pivots])
        s, d, c = unwhiten(self.factors, self._whitened, white)
        for group in self.analysis.groups:
            at = group.segments
            rest = None
            if group.hidden:
                of_group = group.count, group.control.p, w.shape[1]
                rest = group.x_slots.gather(w[-problem.size :]) if self.hidden else w.new_zeros(of_group)
            hidden = self._hidden(group)
            # Where hidden controls are split, B acts on their directions alone.
            states = [torch.zeros_like(d[k]) if mine.is_split else d[k] for k, mine in zip(at, hidden, strict=True)]
            put_controls(x, group, rest, torch.stack([s[k] for k in at]), torch.stack(states), self.damping)
            for i, (k, mine) in enumerate(zip(at, hidden, strict=True)):
                if mine.is_split:
                    group.x_slots.take(np.array([i])).add(x, mine.answer(c[k], d[k])[None])
        return x

    def project(self, w: Tensor) -> Tensor:
        if not self.hidden:
            return w
        size = self.analysis.problem.size
        _, hidden = self._loads(w[-size:])
        return torch.cat([w[:-size], hidden])

    @property
    def nbytes(self) -> int:
        """Bytes held by the factors."""
        return sum(factor.nbytes for factor in self.factors)

    @property
    def delayed(self) -> dict[int, int]:
        """Number of directions delayed at each stage that delayed any."""
        return {factor.segment.stage: factor.delayed for factor in self.factors if factor.delayed}


def _end(analysis: Analysis) -> DenseValue:
    """Return the cost-to-go after the last stage: none."""
    n = int(analysis.problem.layout.n_out[-1])
    return DenseValue(torch.zeros(n, n, dtype=analysis.problem.dtype, device=analysis.problem.device))


def _obey(rule: PivotRule, factors: Sequence[StageFactor]) -> bool:
    return obey(rule, [f.elimination for f in factors], [f.segment.units for f in factors])


def _is_regular(factor: StageFactor) -> bool:
    """Whether no pivot is zero or NaN."""
    theta = factor.elimination.theta.abs()
    return not theta.numel() or float(theta.min()) > 0.0


def factor(analysis: Analysis, damping: complex) -> RiccatiFactorization:
    """Factor H + εI along the chain."""
    return RiccatiFactorization(analysis, damping)


def factor_careful(analysis: Analysis, damping: complex) -> RiccatiFactorization:
    """Factor with eigenvectors at every stage: the most robust way, several times slower."""
    return RiccatiFactorization(analysis, damping, careful=True)


# Calls beside the matrix products, the Python between them counted as calls too: of a group of segments; of a segment that is condensed;
# and of a wide one, of which each control-free stage takes some more.
_CALLS_PER_GROUP = 45
_CALLS_CONDENSED = 24
_CALLS_WIDE = 130
_CALLS_FREE = 12

# Copies of V for a stage that entries pass by, in cache and beyond it (where new memory is most of what they take), and its calls.
_COPIES_WIRED = 20
_COPIES_BEYOND = 90
_CACHE = 4 << 20
_CALLS_WIRED = 70

# Numbers held for each entry of E, with what is hidden; taken by a pivot block and its coupling, whitened; and by Fᵀ V, some of it twice.
_HELD_COUPLING, _PIVOTS, _HALF = 1.4, 5.5, 1.3


def estimate(analysis: Analysis) -> Cost:
    """Flops, bytes and seconds, segment by segment (4⅔ n³ flops when all blocks of a wide one are n wide)."""
    problem, tally, held, work = analysis.problem, Tally(analysis.problem.dtype), 0.0, 0.0
    item = problem.dtype.itemsize
    for group in analysis.groups:
        K, r, n = group.count, float(group.r), float(group.n_in)
        tally.calls(_CALLS_PER_GROUP)
        one = _condensed_segment if group.is_narrow else _wide_segment
        one(tally, group, K)
        tally.kernel("ldl", K * r**3 / 3, r)
        held += K * (r**2 + _HELD_COUPLING * r * n)
        if group.is_narrow:
            held += K * (2 * (r + n) ** 2 + group.n_out * (r + n) + n**2 + r * n)
        values = max(_values(stage) for stage in (group.control, *group.free))
        work = max(work, values, float(group.control.n_out) ** 2 + _PIVOTS * r * max(r, n))
    return Cost(tally.flops, item * (held + work), tally.seconds)


def _values(stage: Stage) -> float:
    """Numbers of V after and before a stage, one of them where they are alike, and of a product between; of two where entries pass by."""
    before, after, halves = float(stage.n_in), float(stage.n_out), 1 + (stage.inputs != stage.n_in)
    between = halves * _HALF * before * after if before != after or halves > 1 else 0.0
    return before**2 + after**2 + between


def _condensed_segment(tally: Tally, group: SegmentGroup, K: int) -> None:
    r, n, after = float(group.r), float(group.n_in), float(group.n_out)
    tally.calls(K * _CALLS_CONDENSED)
    tally.kernel("gemm", K * 2 * (after**2 * (r + n) + after * (r + n) ** 2), min(after, r + n))  # Wᵀ V W
    # LAPACK solves from packed factors at two thirds of the rate.
    tally.kernel("substitution", K * 3 * r**2 * n, (r * n) ** 0.5)
    tally.kernel("gemm", K * 2 * r * n**2, (r * n) ** 0.5)


def _wide_segment(tally: Tally, group: SegmentGroup, K: int) -> None:
    r, n = float(group.r), float(group.n_in)
    item = group.control.dtype.itemsize
    tally.calls(K * (_CALLS_WIDE + _CALLS_FREE * len(group.free)))
    for stage in (group.control, *group.free):
        before, after = float(stage.n_in), float(stage.n_out)
        width = max(1.0, before / max(stage.samples, 1))
        # FᵀVF, by products of the stage's own structure on the columns of V and then on its rows: flat matrices, as long as V is wide.
        tally.thin(K * 2 * stage.entries("F") * (before + after), width, max(before, after))
        if stage.entries("F") > before:
            tally.new(item * before * after, item * before**2, item * before**2)
        # Where entries pass by, V is put together from three parts by copies.
        nbytes, copies = item * max(before, after) ** 2, 4
        if stage.inputs != stage.n_in:
            copies = _COPIES_WIRED if nbytes < _CACHE else _COPIES_BEYOND
            tally.calls(K * _CALLS_WIRED)
        tally.moved(K * nbytes * copies)
    control = group.control
    rows = control.samples if control.samples > 1 else control.n_out
    rank = r * rows / control.n_out if control.samples > 1 else r
    tally.thin(K * 2 * r * rows * (control.n_out + r), rank, control.n_out)  # V R and RᵀVR
    tally.kernel("gemm", K * 2 * control.entries("F") * r, (r * max(1.0, n / max(control.samples, 1))) ** 0.5)  # RᵀVF
    tally.moved(K * item * (6 * r * (control.n_out + n) + 40 * r**2))
    tally.kernel("substitution", K * r**2 * n, (r * n) ** 0.5)
    # A strip at a time, of which the upper triangle is left out.
    tally.kernel("gemm", K * 1.25 * r * n**2, (r * n) ** 0.5)


METHOD = Method("riccati", factor, estimate, EVERYTHING, is_complex=True)
