"""Method "sketched": block LDLᵀ over spans of layers, what couples the samples being of low rank; for more than a dense Hessian holds.

The recursion of "riccati", with the cost-to-go as one exact block a sample and a feedback of low rank (`lq.value.sample_low_rank`), in spans
of several stages whose pivots are exact. The factors are those of a symmetric M with MΩ = (H + ε)Ω on s directions Ω, by block Lanczos those
in which H is large. M⁻¹ is no inverse of H + εI unless s = N, but a fixed, symmetric approximation of it, with which GMRES on H + εI
reaches any accuracy.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from linop_hess.errors import SingularPivotError
from linop_hess.lq.analysis import Analysis
from linop_hess.lq.iterative.options import SketchOptions
from linop_hess.lq.iterative.sketch import Sketch, Sketches, why_no_sketch
from linop_hess.lq.iterative.spans import cut
from linop_hess.lq.methods.base import Congruence, Cost, Method, Tally
from linop_hess.lq.methods.riccati import recursion
from linop_hess.lq.methods.stage_factor import SegmentLoad, StageFactor, unwhiten, whiten
from linop_hess.lq.pivots.bunch_kaufman import SymmetricFactor
from linop_hess.lq.value.sample_low_rank import Coupling, MappedElimination, SampleLowRankValue, Span, White


@dataclass(frozen=True)
class SketchReport:
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
        self._sketch: Sketch = analysis.once(Sketches).of(options)
        like = self._sketch.basis.directions
        spans = [self._sketch.span(j, damping) for j in range(len(self._sketch.sweeps))]
        value = SampleLowRankValue.zero(like, self._sketch.rank)
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
    def nbytes(self) -> int:
        return self._sketch.nbytes + sum(factor.nbytes for factor in self.factors)

    def report(self) -> SketchReport:
        """What is kept and what is dropped."""
        sketch = self._sketch
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


def estimate(analysis: Analysis, options: SketchOptions | None = None) -> Cost:
    """The set-up: directions, pivots, feedback; what iterations come to is known only with a damping."""
    raise NotImplementedError


METHOD = Method("sketched", factor, estimate, SketchedFactorization.answers)
