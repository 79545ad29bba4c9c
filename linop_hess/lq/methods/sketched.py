"""Method "sketched": block LDLᵀ over spans of layers, what couples the samples being of low rank; for more than a dense Hessian holds.

The recursion of "riccati", with the cost-to-go as one exact block a sample and a feedback of low rank
(`lq.value.sample_low_rank`), in spans of several stages whose pivots are exact. The factors are those of a symmetric M with
MΩ = (H + ε)Ω on s directions Ω, by block Lanczos those in which H is large. M⁻¹ is no inverse of H + εI unless s = N, but a fixed,
symmetric approximation of it, with which GMRES on H + εI reaches any accuracy.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from linop_hess._display import Shown
from linop_hess._memory import format_bytes
from linop_hess.errors import SingularPivotError
from linop_hess.lq.analysis import Analysis
from linop_hess.lq.elimination.stage_factor import SegmentLoad, StageFactor, unwhiten, whiten
from linop_hess.lq.iterative.convergence import (
    LEAST,
    PROBES,
    expected_iterations,
    least_iterations,
    product_seconds,
)
from linop_hess.lq.iterative.gmres import vectors_nbytes
from linop_hess.lq.iterative.options import Asked, SketchOptions
from linop_hess.lq.iterative.sketch import Sketch, Sketches, why_no_sketch
from linop_hess.lq.iterative.spans import SWEEPS_A_DIRECTION, Cut, cut, product_flops
from linop_hess.lq.methods.base import Congruence, Cost, Factorization, Method, Tally
from linop_hess.lq.methods.riccati import recursion
from linop_hess.lq.pivots.bunch_kaufman import SymmetricFactor
from linop_hess.lq.value.sample_low_rank import Coupling, MappedElimination, SampleLowRankValue, Span, White

# Products with H that one with M⁻¹ takes as long as, of the samples that it is made of: three sweeps forward and three back, in float32.
_APPLIED = 1.5


@dataclass(frozen=True, repr=False)
class SketchReport(Shown):
    """What a sketch keeps and drops.

    Attributes
    ----------
    directions : int
        Number of directions Ω.
    remaining : float
        Size of H on the last of them, relative to the largest.
    samples : int
        Samples the sketch was made of.
    spans : tuple of (int, int)
        Stages of each span, the last not included.
    ranks : tuple of int
        Rank of the feedback after each span but the last; what it has more than that, up to `directions`, is dropped.
    pivots : tuple of int
        Size of each span's pivot block.
    dtype : str
        Precision of the factors.
    nbytes : int
        Bytes held by the factors.
    """

    directions: int
    remaining: float
    samples: int
    spans: tuple[tuple[int, int], ...]
    ranks: tuple[int, ...]
    pivots: tuple[int, ...]
    dtype: str
    nbytes: int

    def __str__(self) -> str:
        """Return it in a line."""
        kept = f"{min(self.ranks, default=0)} to {max(self.ranks, default=0)} of {self.directions} directions"
        return (
            f"sketch of {self.samples} samples in {self.dtype}: {len(self.spans)} spans of up to {max(self.pivots)} parameters, "
            f"feedback of {kept}, {format_bytes(self.nbytes)}; H on the last direction is {self.remaining:.1e} of the largest"
        )


class SketchedFactorization(Congruence):
    """Factors of M.

    Parameters
    ----------
    analysis : Analysis
    damping : float
    options : SketchOptions

    Raises
    ------
    SingularPivotError
        If a pivot is zero to working precision.
    """

    method = "sketched"
    growth = 0.0
    answers = frozenset({"solve", "positive"})

    def __init__(self, analysis: Analysis, damping: float, options: SketchOptions) -> None:
        self.analysis, self.damping = analysis, damping
        options = options.for_problem(analysis)
        self.sketch: Sketch = analysis.once(Sketches).of(options)
        like = self.sketch.basis.directions
        spans = [self.sketch.span(j, damping) for j in range(len(self.sketch.sweeps))]
        value = SampleLowRankValue.zero(like, self.sketch.rank)
        self.factors: list[StageFactor] = recursion(spans, value, _divided)

    @cached_property
    def theta(self) -> Tensor:
        return torch.cat([factor.elimination.theta for factor in self.factors])

    @property
    def _eliminations(self) -> list[Any]:
        return [factor.elimination for factor in self.factors]

    def whiten(self, g: Tensor) -> Tensor:
        layout = self.analysis.problem.layout
        parts = layout.in_chain_order(g).to(self.theta.dtype).split([factor.segment.r for factor in self.factors])
        loads = [SegmentLoad(part, None, part[:0]) for part in parts]
        return torch.cat(whiten(self.factors, self._eliminations, loads))

    def unwhiten(self, w: Tensor) -> Tensor:
        parts = w.split([factor.segment.r for factor in self.factors])
        controls, _, _ = unwhiten(self.factors, self._eliminations, parts)
        return self.analysis.problem.layout.in_flat_order(torch.cat(controls))

    @property
    def precision(self) -> torch.dtype:
        return self.theta.dtype

    @property
    def nbytes(self) -> int:
        return self.sketch.nbytes + sum(factor.nbytes for factor in self.factors)

    def report(self) -> SketchReport:
        """What is kept and what is dropped."""
        sketch = self.sketch
        ranks = [e.white.coupling.felt for e in self._eliminations[:-1]]
        return SketchReport(
            sketch.rank,
            sketch.basis.remaining,
            sketch.samples,
            sketch.cut.bounds,
            tuple(0 if felt is None else felt.T.numel() for felt in ranks),
            tuple(factor.segment.r for factor in self.factors),
            str(self.theta.dtype).removeprefix("torch."),
            self.nbytes,
        )


def sketch_report(factors: Factorization) -> SketchReport:
    """What a sketch keeps and drops.

    Raises
    ------
    ValueError
        If the factors are of another method.
    """
    if not isinstance(factors, SketchedFactorization):
        raise ValueError(
            f'expected factors of method "sketched", got those of "{factors.method}": ask for method="sketched"'
        )
    return factors.report()


def _divided(span: Span, S: Tensor, E: Coupling) -> MappedElimination:
    """All of a pivot block eliminated; what small pivots do to M costs iterations, no more."""
    if not bool(torch.isfinite(S).all()):
        raise SingularPivotError(span.stage)
    pivots = SymmetricFactor.of(S)
    smallest = float(pivots.theta.abs().min())
    if not smallest > 0.0:
        raise SingularPivotError(span.stage)
    return MappedElimination(pivots, White(pivots, E))


def factor(analysis: Analysis, damping: float, options: SketchOptions | None = None) -> SketchedFactorization:
    """Factor M."""
    return SketchedFactorization(analysis, damping, options or SketchOptions())


def forecast(analysis: Analysis, asked: Asked, worth: float) -> Cost:
    """The set-up, which is counted, and iterations, which are expected (`lq.iterative.convergence`).

    The spectrum is looked at only where set-up and a few iterations take less than `worth` seconds.
    """
    options = asked.sketch.for_problem(analysis)
    if why_not := why_no_sketch(analysis, options.core):
        return Cost.impossible(why_not)
    assert options.rank is not None and options.core is not None and options.dtype is not None
    problem, rank = analysis.problem, options.rank
    share = options.core / analysis.samples
    plan = analysis.once(Cuts).of(share, rank)
    tally, item = Tally(options.dtype), options.dtype.itemsize
    p = float(plan.controls.max())
    tally.kernel("gemm", plan.assembly + 4.0 * problem.size * rank**2, p)
    tally.kernel("ldl", plan.elimination, p)
    tally.kernel("substitution", 4.0 * rank * float((plan.controls.astype(float) ** 2).sum()), min(p, rank))
    setting_up = tally.seconds + SWEEPS_A_DIRECTION * product_seconds(analysis, share, rank)
    state = share * float(problem.layout.n_out.max())
    states = [problem.layout.n_out[start - 1] for start, _ in plan.bounds[1:]]
    width = problem.layout.n_out.max() / analysis.samples
    nbytes = item * (
        float((plan.controls.astype(float) ** 2).sum()) + 3.0 * p**2 + 3.0 * problem.size * rank
        + share * float(sum(states)) * (width + rank) + 4.0 * state * rank
    )  # fmt: skip
    nbytes += vectors_nbytes(problem, asked.right_hand_sides) + float(problem.nbytes)
    each = product_seconds(analysis) * (1.0 + _APPLIED * share)
    count = asked.right_hand_sides
    flops = plan.assembly + plan.elimination + plan.sweeps
    if setting_up + (PROBES + count * LEAST) * each >= worth:
        return Cost(flops, nbytes, setting_up + count * LEAST * each, at_least=True)
    most = (worth - setting_up) / (count * each)
    told = count * least_iterations(analysis, asked.damping, asked.tolerance, rank, most)
    if setting_up + told * each > worth:
        return Cost(flops, nbytes, setting_up + told * each, at_least=True)
    iterations = expected_iterations(analysis, asked.damping, asked.tolerance, rank)
    total = count * iterations
    flops += total * (1.0 + _APPLIED * share) * product_flops(problem)
    return Cost(flops, nbytes, setting_up + total * each, iterations=round(iterations))


class Cuts:
    """The spans of an analysis by what they are cut for, each counted once."""

    def __init__(self, analysis: Analysis) -> None:
        self._analysis = analysis
        self._known: dict[tuple[float, int], Cut] = {}

    def of(self, share: float, rank: int) -> Cut:
        """The spans for a share of the samples and a number of directions."""
        if (share, rank) not in self._known:
            self._known[share, rank] = cut(self._analysis.problem, self._analysis.samples, share, rank)
        return self._known[share, rank]


METHOD = Method("sketched", factor, None, SketchedFactorization.answers, forecast=forecast)
