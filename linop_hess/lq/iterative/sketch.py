"""What a sketch of H + εI has before any damping is known: samples, spans, open-loop values, directions and the lower part of H on them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from linop_hess.lq.analysis import Analysis
from linop_hess.lq.iterative.core import weighted_core
from linop_hess.lq.iterative.lanczos import OPEN_BLOCK, Basis, BlockLanczos, Seen, block_for, falls_below
from linop_hess.lq.iterative.options import MOST_DIRECTIONS, SketchOptions
from linop_hess.lq.iterative.spans import Cut, cut
from linop_hess.lq.matrix.assembly import assemble
from linop_hess.lq.problem import Problem
from linop_hess.lq.stages.base import Stage
from linop_hess.lq.stages.objective import ObjectiveStage
from linop_hess.lq.transition import Sweep, pulled_back, times_blocks
from linop_hess.lq.value.sample_low_rank import Part, Span

# Numbers that the states of a chunk of samples may take in products with many columns.
_CHUNK_NUMBERS = 1 << 20


def why_no_sketch(analysis: Analysis, core: int | None) -> str:
    """Why a chain cannot be sketched; empty if it can."""
    problem = analysis.problem
    if analysis.samples < 2:
        return (
            "the states of all samples interact (as with parameters that several operations share, or statistics of a batch), or there "
            "is one sample alone: nothing of the Hessian is block diagonal over samples"
        )
    if len(problem.layout.p.nonzero()[0]) < 2:
        return "there is one stage with parameters alone, and nothing to sketch between stages"
    if core is not None and core < analysis.samples:
        kinds = {type(b).__name__ for b in problem.blocks if b.of_chosen(*_probe(), analysis.samples) is None}
        if kinds:
            return f"a core of samples cannot be drawn with stages of kind {', '.join(sorted(kinds))}: leave core out"
    return ""


def _probe() -> tuple[Tensor, Tensor]:
    return torch.zeros(1, dtype=torch.int64, device="cpu"), torch.ones(1, dtype=torch.float64, device="cpu")


class Start:
    """The samples that sketches are made of, and the run of block Lanczos on them, with which sketches of other ranks go on.

    Parameters
    ----------
    analysis : Analysis
        Without a diagonal apart.
    options : SketchOptions
        With nothing but the rank left open.
    """

    def __init__(self, analysis: Analysis, options: SketchOptions) -> None:
        assert options.core is not None and options.dtype is not None
        whole = analysis.problem if options.dtype == analysis.problem.dtype else analysis.problem.to(options.dtype)
        problem: Problem | None = whole
        if options.core < analysis.samples:
            problem = weighted_core(whole, analysis.samples, options.core)
        assert problem is not None
        self.problem, self.whole, self.key = problem, whole, self.key_of(analysis, options)
        first = whole.layout.first
        self.samples = int(problem.layout.n_out[first]) * analysis.samples // int(whole.layout.n_out[first])
        like = torch.zeros(problem.size, dtype=problem.dtype, device=problem.device)
        self._lanczos = BlockLanczos(
            lambda X: problem.layout.in_chain_order(problem.hessian_product(problem.layout.in_flat_order(X))),
            like,
            self.key[-1],
        )

    @staticmethod
    def key_of(analysis: Analysis, options: SketchOptions) -> tuple[int | None, torch.dtype | None, int]:
        """What sketches that begin alike agree in: samples, precision, columns of a block."""
        most = MOST_DIRECTIONS if options.rank is None else options.rank
        return (
            options.core,
            options.dtype,
            OPEN_BLOCK if options.is_open else block_for(min(most, analysis.problem.size)),
        )

    def basis(self, options: SketchOptions, enough: Callable[[Seen], bool] | None) -> Basis:
        """The directions that are asked for; where no number and no tolerance is, until it is enough."""
        if options.rank is not None:
            return self._lanczos.until(options.rank)
        return self._lanczos.until(MOST_DIRECTIONS, enough if options.tol is None else falls_below(options.tol))


class Sketch:
    """Everything of a sketch that no damping changes.

    Parameters
    ----------
    analysis : Analysis
        Without a diagonal apart.
    options : SketchOptions
        With nothing but the rank left open.
    start : Start
    basis : Basis
    """

    def __init__(self, analysis: Analysis, options: SketchOptions, start: Start, basis: Basis) -> None:
        self.analysis, self.options, self.basis = analysis, options, basis
        problem, whole = start.problem, start.whole
        self.problem, self.samples, stages = problem, start.samples, problem.stages
        share = self.samples / analysis.samples
        self.cut: Cut = cut(whole, analysis.samples, share, self.rank)
        self.sweeps = [Sweep(stages[start:stop]) for start, stop in self.cut.bounds]
        self.values = self._open_loop_values(stages)
        offsets = problem.layout.x_offsets
        self.omega = [self.basis.directions[offsets[start] : offsets[stop]] for start, stop in self.cut.bounds]
        self.parts = [self._parts(j) for j in range(len(self.sweeps))]
        self.lower = self._lower_part()

    @property
    def rank(self) -> int:
        """Number of directions s."""
        return self.basis.directions.shape[1]

    def _open_loop_values(self, stages: Sequence[Stage]) -> list[Tensor | None]:
        """V₀ before each span but the first, and after the last: None; (samples, n, n)."""
        values: list[Tensor | None] = [None] * (len(self.sweeps) + 1)
        V: Tensor | None = None
        begins = {start: j for j, (start, _) in enumerate(self.cut.bounds)}
        for l in range(len(stages) - 1, self.cut.bounds[1][0] - 1, -1):
            stage = stages[l]
            if V is not None:
                V = pulled_back(stage, V, self.samples)
            elif "C" in stage.nonzero:
                V = stage.C_of_samples(self.samples)[0].clone()
            if l in begins:
                n = stage.n_in // self.samples
                V = stage.C_of_samples(self.samples)[0].new_zeros(self.samples, n, n) if V is None else V
                values[begins[l]] = V
        return values

    def _parts(self, j: int) -> tuple[Part, ...]:
        """Span j on chunks of samples."""
        sweep, samples = self.sweeps[j], self.samples
        widest = max(max(stage.n_in, stage.n_out) for stage in sweep.stages)
        states = widest // samples * self.rank
        at_once = max(1, min(samples, _CHUNK_NUMBERS // max(1, states)))
        before, after = (0 if V is None else V.shape[1] for V in (self.values[j], self.values[j + 1]))
        return tuple(
            Part(
                sweep.of_samples(start, stop, samples),
                slice(start * before, stop * before),
                slice(start * after, stop * after),
                slice(start, stop),
            )
            for start in range(0, samples, at_once)
            for stop in [min(start + at_once, samples)]
        )

    def _lower_part(self) -> list[Tensor | None]:
        """Rows of the strictly lower part of HΩ, span by span, a chunk of samples after another."""
        first, *rest = self.omega
        lower: list[Tensor | None] = [None, *(torch.zeros_like(rows) for rows in rest)]
        chunks = max(len(parts) for parts in self.parts)
        bounds = [self.samples * c // chunks for c in range(chunks + 1)]
        for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
            Y: Tensor | None = None
            for j, sweep in enumerate(self.sweeps):
                part, rows, after = sweep.of_samples(start, stop, self.samples), lower[j], self.values[j + 1]
                if rows is not None:
                    through = None if after is not None else len(part.stages) - 1
                    states = part.forward(None, Y, through=through)
                    seed = None if after is None or states[-1] is None else times_blocks(after[start:stop], states[-1])
                    part.back(seed, states=states, rows=rows, down=False)
                if after is not None:
                    Y = part.forward(self.omega[j], Y)[-1]
        return lower

    def pivot_block(self, j: int) -> Tensor:
        """H of span j, the controls that follow left alone, (p, p): assembled, the open-loop value after it as objective."""
        stages = list(self.sweeps[j].stages)
        V = self.values[j + 1]
        if V is not None:
            m, n, _ = V.shape
            stages.append(ObjectiveStage(V.new_zeros(1, m * n), V[None]))
        return assemble(Problem.stacked(stages))

    def span(self, j: int, damping: float) -> Span:
        """Span j at a damping."""
        tol = self.options.tol
        return Span(
            self.sweeps[j],
            self.parts[j],
            partial(self.pivot_block, j),
            self.values[j + 1],
            self.values[j],
            self.omega[j],
            self.lower[j],
            damping,
            self.cut.bounds[j][0],
            0.0 if tol is None else tol * tol,
        )

    @property
    def nbytes(self) -> int:
        """Bytes held, stages included where they are no longer those of the analysis."""
        own = 0 if self.problem is self.analysis.problem else self.problem.nbytes
        return self.basis.nbytes + own + sum(t.nbytes for t in (*self.values, *self.lower) if t is not None)


class Sketches:
    """The sketches of an analysis, the last one kept; threads take turns, as all inverses of an analysis go on with one run."""

    def __init__(self, analysis: Analysis) -> None:
        self._analysis = analysis
        self._start: Start | None = None
        self._last: Sketch | None = None
        self._lock = threading.Lock()

    def of(self, options: SketchOptions, enough: Callable[[Seen], bool] | None = None) -> Sketch:
        """The sketch of these options, of as many directions as are enough where that is open."""
        with self._lock:
            return self._of(options, enough)

    def _of(self, options: SketchOptions, enough: Callable[[Seen], bool] | None) -> Sketch:
        if self._start is None or self._start.key != Start.key_of(self._analysis, options):
            self._start = Start(self._analysis, options)
        basis = self._start.basis(options, enough)
        last = self._last
        if last is None or (last.options, last.rank) != (options, basis.directions.shape[1]):
            last = self._last = Sketch(self._analysis, options, self._start, basis)
        return last
