"""All that the damping does not change, made once: what sparse direct solvers call the analysis.

Every factorization, at any damping and by any method, starts from it. What only one method needs it keeps for that method, by `once`.

What the damping does change, where H = H_c + D has a diagonal D apart from its stages, are the variables in which it is factored. With
d = ε + D and one sign of it, T = (|η|/|d|)^½ and η of that sign,

    H + εI = T⁻¹ (T H_c T + ηI) T⁻¹,

so that the factors of a chain without a diagonal, whose controls are in units T, at the damping η, answer everything: no p × p pivot
anywhere. Where signs are mixed, controls of the rarer one keep their unit, and d − η as a curvature of their own. |η| is the geometric
mean of |d|, which makes det T = 1: then this is a congruence with the same signs and the same determinant.
Where D is one number c, T = 1 and η = ε + c. This is the one place that knows of it; see `Change`.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from linop_hess.lq.condensed import Condensed, block_sizes, condense, moved
from linop_hess.lq.problem import Problem
from linop_hess.lq.segments import SegmentGroup, order_of, segment_groups
from linop_hess.lq.stages.base import Stage, common_samples
from linop_hess.lq.stages.penalized import CurvedStage, scaled
from linop_hess.lq.stages.row_space import RowSpace

_Made = TypeVar("_Made")

# Steps of power iteration for ‖H‖: to within some per cent, which is all that a bound needs.
_POWER_STEPS = 7
_FEW_POWER_STEPS = 2


class Solves(Protocol):
    """Factors, as far as solves need them; see `lq.methods.base.Factorization`."""

    @property
    def analysis(self) -> Analysis: ...
    def solve(self, g: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Change:
    """H + εI = T⁻¹(H̃ + ηI)T⁻¹, T diagonal and positive with det T = 1: what is factored at ε, and how its answers are read.

    Inertia and determinant are the same; (H + εI)⁻¹ = T(H̃ + ηI)⁻¹T.

    Attributes
    ----------
    analysis : Analysis
        Of H̃, a chain without a diagonal.
    damping : complex
        η.
    asked : complex
        ε.
    units : Tensor or None, shape (N, 1)
        T in float64; None: 1.
    """

    analysis: Analysis
    damping: complex
    asked: complex
    units: Tensor | None = None

    def vectors(self, x: Tensor) -> Tensor:
        """T x for x of shape (N, k)."""
        return x if self.units is None else self.units * x

    def solve(self, factors: Solves, g: Tensor) -> Tensor:
        """(H + εI)⁻¹ g for g of shape (N, k) by factors of H̃ + ηI, in their precision or more."""
        if self.units is None:
            return factors.solve(g)
        return self.units * factors.solve((self.units * g).to(factors.analysis.problem.dtype))

    def diagonal(self, entries: Tensor) -> Tensor:
        """The diagonal of T X T from that of X, (N,)."""
        return entries if self.units is None else entries * self.units[:, 0].square()

    def blocks(self, blocks: list[Tensor]) -> list[Tensor]:
        """The diagonal blocks of T X T from those of X, one for each stage with controls."""
        if self.units is None:
            return blocks
        layout = self.analysis.problem.layout
        own = [self.units[torch.from_numpy(layout.controls(int(l)))] for l in np.flatnonzero(layout.p)]
        return [block * t * t.mT for block, t in zip(blocks, own, strict=True)]

    def to_asked(self, damping: float) -> float:
        """Return about the ε that another η belongs to."""
        return self.asked.real + (damping - self.damping.real)


class Analysis:
    """Row spaces, units, segments and norms of a problem.

    Parameters
    ----------
    problem : Problem
    in_float64 : Analysis, optional
        That of the same problem in float64; by default it is made when it is needed.

    Attributes
    ----------
    problem : Problem
    """

    def __init__(self, problem: Problem, in_float64: Analysis | None = None) -> None:
        self.problem = problem
        self._twin = in_float64
        self._change: Change | None = None
        self._made: dict[Callable[..., Any], Any] = {}
        self._condensed: dict[int, Condensed] = {}
        # What is made may ask for more of the same analysis.
        self._lock = threading.RLock()

    @property
    def real(self) -> Analysis:
        """Itself; that in real arithmetic, of one in complex arithmetic."""
        return self

    def over(self, damping: complex) -> Analysis:
        """Return the analysis in the arithmetic of a damping: at a complex one in complex double precision."""
        return self.in_complex if isinstance(damping, complex) else self

    @cached_property
    def in_complex(self) -> Analysis:
        """The analysis in float64, cast to complex128."""
        return ComplexAnalysis(self.in_float64)

    def __reduce__(self) -> tuple[type, tuple[Problem]]:
        """Pickle the problem alone."""
        return type(self), (self.problem,)

    def once(self, make: Callable[[Analysis], _Made]) -> _Made:
        """Return what `make` makes of this analysis, made at the first call, for all threads; `make` is a function or class of a module."""
        if make not in self._made:
            with self._lock:
                if make not in self._made:
                    self._made[make] = make(self)
        return cast(_Made, self._made[make])

    def has(self, make: Callable[[Analysis], Any]) -> bool:
        """Whether `once` has made this already."""
        return make in self._made

    @cached_property
    def row_spaces(self) -> list[RowSpace | None]:
        """The row space of each stack; None where it has no controls.

        Raises
        ------
        ValueError
            If the problem has a diagonal, which no stage knows of.
        """
        if self.problem.diagonal is not None:
            raise ValueError(
                "expected a problem without a diagonal, got one with it: factor `analysis.at(damping)`, or ask `lq.Inverse`"
            )
        return [block.row_space() if block.p else None for block in self.problem.blocks]

    @cached_property
    def groups(self) -> list[SegmentGroup]:
        """The segments of the chain, those of the same make-up together."""
        return segment_groups(self.problem, self.row_spaces)

    @cached_property
    def order(self) -> np.ndarray:
        """(group, position in it) of every segment, in the order of the chain, shape (count, 2)."""
        return order_of(self.groups)

    @cached_property
    def pairs(self) -> list[tuple[int, int]]:
        """The same as pairs of int."""
        return [(g, k) for g, k in self.order.tolist()]

    def condensed_group(self, g: int) -> Condensed:
        """Dense blocks of group g, made once: of a wide one they are large."""
        if g not in self._condensed:
            self._condensed[g] = condense(self.groups[g])
        return self._condensed[g]

    @property
    def condensed(self) -> list[Condensed]:
        """Dense blocks of every group."""
        return [self.condensed_group(g) for g in range(len(self.groups))]

    def moved(self, damping: float, share: float, seed: int) -> Analysis:
        """Analysis of a problem whose condensed blocks are moved by random errors of that share of what they are made of."""
        other, generator = copy.copy(self), torch.Generator().manual_seed(seed)
        other._made, other._condensed = {}, {}
        for g, group in enumerate(self.groups):
            other._condensed[g] = moved(self.condensed_group(g), block_sizes(group), damping, share, generator)
        return other

    @cached_property
    def is_narrow(self) -> bool:
        """Whether there are segments, and all are worked on as dense blocks."""
        return not self.problem.why_no_chain and all(group.is_narrow for group in self.groups)

    @cached_property
    def hidden(self) -> int:
        """Number of hidden controls of the chain; none are known of where there is no chain."""
        return 0 if self.problem.why_no_chain else sum(group.hidden * group.count for group in self.groups)

    @cached_property
    def samples(self) -> int:
        """Into how many independent samples the states of all stages split; 1: they interact."""
        return common_samples(self.problem.blocks)

    @cached_property
    def probe(self) -> tuple[Tensor, Tensor]:
        """A random unit vector v and Hv, each of shape (N, 1)."""
        problem = self.problem
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(problem.size, 1, generator=generator, dtype=torch.float64, device="cpu")
        v = v.to(problem.dtype).to(problem.device)
        v = v / float(v.norm())
        return v, problem.hessian_product(v)

    @cached_property
    def rounding(self) -> float:
        """By how much H(v + w) differs from Hv + Hw for unit vectors: rounding in what cancels in products, however small they are."""
        v, product = self.probe
        w = v.flip(0)
        both = self.problem.hessian_product(v + w)
        return float((both - product - self.problem.hessian_product(w)).double().norm())

    @cached_property
    def rough_norm(self) -> float:
        """‖H‖₂ to within a small factor, from below, by few products: all that choosing a precision takes."""
        return self.damped_norm(0.0, _FEW_POWER_STEPS)

    @cached_property
    def norm(self) -> float:
        """‖H‖₂ to within some per cent, from below."""
        return self.damped_norm(0.0)

    def damped_norm(self, damping: complex, steps: int = _POWER_STEPS, settled: float | None = None) -> float:
        """‖H + εI‖₂ to within some per cent, from below, by power iteration on a fixed start.

        It ends sooner where two steps have added no more than a share of `settled` each, as they soon do where eigenvalues stand far out.
        """
        v, product = self.probe
        v = product + damping * v
        norm, still = _length(v), 0
        for _ in range(steps):
            if norm == 0.0 or still == 2:
                break
            wide = v.to(torch.promote_types(v.dtype, torch.float64))
            v = self.problem.hessian_product((wide / wide.norm()).to(v.dtype), damping)
            length = _length(v)
            still = still + 1 if settled is not None and length <= (1.0 + settled) * norm else 0
            norm = max(norm, length)
        return norm

    @cached_property
    def in_float64(self) -> Analysis:
        """The analysis of the problem in float64, itself where it is."""
        if self._twin is not None:
            return self._twin
        return self if self.problem.dtype == torch.float64 else Analysis(self.problem.to(torch.float64))

    def gauss_newton(self) -> Analysis:
        """Analysis of the Gauss-Newton problem: only the curvature of the objective remains."""
        return Analysis(self.problem.gauss_newton())

    def at(self, damping: complex) -> Change:
        """Return what is factored at a damping; itself where the problem has no diagonal. The last one is kept.

        At a complex damping d has no sign: of a diagonal of several values the most common one is added to the damping, and what others
        differ from it is a curvature of their own.
        """
        if self.problem.diagonal is None:
            return Change(self, damping, damping)
        if self._change is None or self._change.asked != damping:
            self._change = self._changed(damping)
        return self._change

    def _changed(self, damping: complex) -> Change:
        diagonal = self.problem.diagonal
        assert diagonal is not None
        if bool((diagonal == diagonal[:1]).all()):
            c = float(diagonal[0]) if diagonal.numel() else 0.0
            return Change(self.once(_without_diagonal), damping + c, damping)
        if isinstance(damping, complex):
            return Change(*_with_common_value(self.in_float64, damping), damping)
        if self.problem.dtype != torch.float64:
            # Units are not rounded to single precision, where they would no longer be those of D.
            twin = self.in_float64.at(damping)
            mine = Analysis(twin.analysis.problem.to(self.problem.dtype), twin.analysis)
            return Change(mine, twin.damping, damping, twin.units)
        return _in_units(self.problem, diagonal + damping, damping)


class ComplexAnalysis(Analysis):
    """An analysis for complex arithmetic: row spaces, units and dense blocks are those of the real one, cast.

    Parameters
    ----------
    real : Analysis
        In float64.
    """

    def __init__(self, real: Analysis) -> None:
        super().__init__(real.problem.to(torch.complex128))
        self._real = real

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        """Pickle the real one."""
        return type(self), (self._real,)

    @property
    def real(self) -> Analysis:
        return self._real

    @cached_property
    def row_spaces(self) -> list[RowSpace | None]:
        return [None if space is None else space.to(self.problem.dtype) for space in self._real.row_spaces]

    @cached_property
    def groups(self) -> list[SegmentGroup]:
        return [group.to(self.problem.dtype) for group in self._real.groups]

    def condensed_group(self, g: int) -> Condensed:
        if g not in self._condensed:
            self._condensed[g] = self._real.condensed_group(g).to(self.problem.dtype)
        return self._condensed[g]

    @cached_property
    def norm(self) -> float:
        return self._real.norm


def _length(v: Tensor) -> float:
    """Norm in float64, so that squares neither under- nor overflow."""
    return float(v.to(torch.promote_types(v.dtype, torch.float64)).norm())


def _without_diagonal(analysis: Analysis) -> Analysis:
    return Analysis(analysis.problem.with_curvature(analysis.problem.blocks))


def _in_units(problem: Problem, d: Tensor, damping: float) -> Change:
    """Change of variables for H_c + diag(d), in float64, d of more than one value.

    Controls of the sign that most have get units. Of the others d − η stays in A, which makes them visible, each in a pivot of its stage.
    """
    sign = 1.0 if int((d > 0.0).sum()) >= int((d < 0.0).sum()) else -1.0
    alike = sign * d > 0.0
    eta = sign * math.exp(float(d[alike].abs().log().mean()))
    units = torch.where(alike, eta / torch.where(alike, d, eta), 1.0).sqrt()[:, None]
    rest = torch.where(alike, 0.0, d - eta)[:, None]
    blocks: list[Stage] = []
    for block, slots in zip(problem.blocks, problem.layout.x_slots, strict=True):
        changed = block
        if block.p:
            changed = scaled(block, slots.gather(units)[..., 0].contiguous())
            curvature = slots.gather(rest)[..., 0].contiguous()
            changed = CurvedStage(changed, curvature) if bool(curvature.any()) else changed
        blocks.append(changed)
    return Change(Analysis(problem.with_curvature(blocks)), eta, damping, units)


def _with_common_value(analysis: Analysis, damping: complex) -> tuple[Analysis, complex]:
    """H_c + diag(D − c) as a chain, and ε + c, c being the value that most of D has."""
    problem = analysis.problem
    assert problem.diagonal is not None
    values, counts = problem.diagonal.unique(return_counts=True)
    c = float(values[counts.argmax()])
    rest = (problem.diagonal - c)[:, None]
    blocks: list[Stage] = []
    for block, slots in zip(problem.blocks, problem.layout.x_slots, strict=True):
        curvature = slots.gather(rest)[..., 0].contiguous() if block.p else rest[:0]
        blocks.append(CurvedStage(block, curvature) if bool(curvature.any()) else block)
    return Analysis(problem.with_curvature(blocks)), damping + c
