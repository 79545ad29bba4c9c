"""Method "sketched": block LDLᵀ over spans of layers, what couples the samples being of low rank; for more than a dense Hessian holds.

The recursion of "riccati", with the cost-to-go as one exact block a sample and a feedback of low rank
(`lq.value.sample_low_rank`), in spans of several stages whose pivots are exact. The factors are those of a symmetric M with
MΩ = (H + ε)Ω on s directions Ω, by block Lanczos those in which H is large. M⁻¹ is no inverse of H + εI unless s = N, but a fixed,
symmetric approximation of it, with which GMRES on H + εI reaches any accuracy.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from linop_hess._display import Shown
from linop_hess._memory import available_bytes, format_bytes
from linop_hess.errors import SingularPivotError
from linop_hess.lq.accuracy import default_tolerance
from linop_hess.lq.analysis import Analysis
from linop_hess.lq.elimination.stage_factor import SegmentLoad, StageFactor, unwhiten, whiten
from linop_hess.lq.iterative.convergence import (
    LEAST,
    PROBES,
    looks,
    orthogonalizing_seconds,
    product_seconds,
    spectrum_of,
)
from linop_hess.lq.iterative.gmres import vectors_nbytes
from linop_hess.lq.iterative.options import Asked, SketchOptions
from linop_hess.lq.iterative.sizing import (
    LARGEST_FACTOR,
    LEAST_DIRECTIONS,
    Enough,
    Left,
    Patience,
    Sizing,
    at_best,
    most_directions,
)
from linop_hess.lq.iterative.sketch import Sketch, Sketches, why_no_sketch
from linop_hess.lq.methods.base import Congruence, Cost, Factorization, Method
from linop_hess.lq.methods.riccati import recursion
from linop_hess.lq.pivots.bunch_kaufman import SymmetricFactor
from linop_hess.lq.value.sample_low_rank import Coupling, MappedElimination, SampleLowRankValue, Span, White


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
    asked : Asked, optional
        What it is to be used for, by which directions are counted where none are asked for; a solve to the default tolerance.
    enough : Enough, optional
        Tells how many directions then.

    Raises
    ------
    SingularPivotError
        If a pivot is zero to working precision.
    """

    method = "sketched"
    growth = 0.0
    answers = frozenset({"solve", "positive"})

    def __init__(
        self,
        analysis: Analysis,
        damping: float,
        options: SketchOptions,
        asked: Asked | None = None,
        enough: Enough | None = None,
    ) -> None:
        self.analysis, self.damping, self.options = analysis, damping, options.for_problem(analysis)
        self._asked = (
            replace(asked, damping=damping) if asked else Asked(damping, 1, default_tolerance(analysis.problem.dtype))
        )
        self.sketch: Sketch = analysis.once(Sketches).of(
            self.options, enough or Enough(analysis, self._asked, self.options)
        )
        like = self.sketch.basis.directions
        spans = [self.sketch.span(j, damping) for j in range(len(self.sketch.sweeps))]
        value = SampleLowRankValue.zero(like, self.sketch.rank)
        self.factors: list[StageFactor] = recursion(spans, value, _divided)

    def patience(self, columns: int) -> Patience | None:
        """Tells when a larger one is worth it; None where that was not left open, or does not fit."""
        rank = self._next
        if not self.options.is_open or rank <= self.sketch.rank:
            return None
        sizing = self.analysis.once(Sizing)
        more, (_, each) = sizing.outlay(self.options, rank), sizing.iteration(self.options, self.sketch.rank, columns)
        return Patience(more.seconds / each) if more.nbytes <= available_bytes() else None

    def larger(self, rate: float) -> SketchedFactorization:
        """Factors with more directions, as many as pay where an iteration reduces residuals by e^rate."""
        seen, most = self.sketch.basis.seen, most_directions(self.analysis)
        expected = 0.0 if seen is None else Left.of(seen.lowest, seen.highest, self._asked.damping).iterations(1.0)
        if not math.isfinite(expected):  # without damping there is no bound to tell how many more pay
            most = self._next
        times = 1.0 / max(rate * expected, 1.0 / LARGEST_FACTOR)
        enough = Enough(self.analysis, self._asked, self.options, self._next, most, times)
        return SketchedFactorization(self.analysis, self._asked.damping, self.options, self._asked, enough)

    @property
    def _next(self) -> int:
        """Directions that a larger one has at least."""
        return min(2 * self.sketch.rank, most_directions(self.analysis))

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


class Watch:
    """Factors in use while GMRES goes on, replaced by larger ones once these are worth it; see `Watching`."""

    def __init__(self, factors: SketchedFactorization) -> None:
        self.factors, self._columns = factors, 1
        self._patience: Patience | None = None

    def begin(self, columns: int) -> None:
        """Look at other right-hand sides, so many, from their beginning."""
        self._columns, self._patience = columns, self.factors.patience(columns)

    def after(self, left: float) -> None:
        """Make larger factors if they are worth it after an iteration, residuals being e^left times what they may be."""
        if self._patience is not None and self._patience.is_over(left):
            rate, self._patience = self._patience.rate, None
            with contextlib.suppress(SingularPivotError, MemoryError):  # those that there are go on
                self.factors = self.factors.larger(rate)
                self._patience = self.factors.patience(self._columns)


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


def as_large(factors: Factorization | None, options: SketchOptions | None) -> SketchOptions | None:
    """The options with which a sketch begins anew with as many directions as these factors have by now, where that was left open."""
    if not isinstance(factors, SketchedFactorization) or not factors.options.is_open:
        return options
    return replace(options or SketchOptions(), least=factors.sketch.rank)


def _divided(span: Span, S: Tensor, E: Coupling) -> MappedElimination:
    """All of a pivot block eliminated; what small pivots do to M costs iterations, no more."""
    if not bool(torch.isfinite(S).all()):
        raise SingularPivotError(span.stage)
    pivots = SymmetricFactor.of(S)
    smallest = float(pivots.theta.abs().min())
    if not smallest > 0.0:
        raise SingularPivotError(span.stage)
    return MappedElimination(pivots, White(pivots, E))


def factor(analysis: Analysis, damping: float, asked: Asked | None = None) -> SketchedFactorization:
    """Factor M."""
    return SketchedFactorization(analysis, damping, asked.sketch if asked else SketchOptions(), asked)


def forecast(analysis: Analysis, asked: Asked, worth: float) -> Cost:
    """The set-up, which is counted, and iterations, which are expected (`lq.iterative.sizing`).

    The spectrum is looked at only where set-up and a few iterations take less than `worth` seconds.
    """
    options = asked.sketch.for_problem(analysis)
    if why_not := why_no_sketch(analysis, options.core):
        return Cost.impossible(why_not)
    sizing, problem, count = analysis.once(Sizing), analysis.problem, asked.right_hand_sides

    def cost(rank: int, iterations: float, at_least: bool) -> Cost:
        outlay, (a_flops, each) = sizing.outlay(options, rank), sizing.iteration(options, rank)
        nbytes = outlay.nbytes + vectors_nbytes(problem, count) + float(problem.nbytes)
        flops, seconds = (
            outlay.flops + iterations * a_flops,
            outlay.seconds + iterations * each + count * orthogonalizing_seconds(analysis, iterations / count),
        )
        told = None if at_least else round(iterations / count)
        return Cost(flops, nbytes, seconds, iterations=told, at_least=at_least, certain=outlay.seconds)

    first = cost(options.rank or LEAST_DIRECTIONS, count * LEAST, True)
    looking = 0.0 if analysis.has(spectrum_of) else PROBES * product_seconds(analysis)
    if first.seconds + looking >= worth:
        return first
    for found, least in looks(analysis):
        told = cost(*at_best(analysis, asked, options, found, least=least), least)
        if least and told.seconds > worth:
            return told
    return told


METHOD = Method("sketched", factor, None, SketchedFactorization.answers, forecast=forecast, watch=Watch)
