"""All that the damping does not change, made once: what sparse direct solvers call the analysis.

Every factorization, at any damping and by any method, starts from it. What only one method needs it keeps for that method, by `once`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from linop_hess.lq.condensed import Condensed, condense
from linop_hess.lq.problem import Problem
from linop_hess.lq.scaling import state_scales
from linop_hess.lq.segments import SegmentGroup, order_of, segment_groups
from linop_hess.lq.stages.base import common_samples
from linop_hess.lq.stages.row_space import RowSpace

_Made = TypeVar("_Made")

# Steps of power iteration for ‖H‖: to within some per cent, which is all that a bound needs.
_POWER_STEPS = 7


class Analysis:
    """Row spaces, units, segments and norms of a problem.

    Parameters
    ----------
    problem : Problem

    Attributes
    ----------
    problem : Problem
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._made: dict[Callable[..., Any], Any] = {}
        self._condensed: dict[int, Condensed] = {}

    def __reduce__(self) -> tuple[type, tuple[Problem]]:
        """Pickle the problem alone."""
        return type(self), (self.problem,)

    def once(self, make: Callable[[Analysis], _Made]) -> _Made:
        """Return what `make` makes of this analysis, made at the first call; `make` is a function or class of a module."""
        if make not in self._made:
            self._made[make] = make(self)
        return cast(_Made, self._made[make])

    @cached_property
    def row_spaces(self) -> list[RowSpace | None]:
        """The row space of each stack; None where it has no controls."""
        return [block.row_space() if block.p else None for block in self.problem.blocks]

    @cached_property
    def groups(self) -> list[SegmentGroup]:
        """The segments of the chain, those of the same make-up together."""
        return segment_groups(self.problem, self.row_spaces, state_scales(self.problem, self.row_spaces))

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

    @cached_property
    def is_narrow(self) -> bool:
        """Whether all segments are worked on as dense blocks."""
        return all(group.is_narrow for group in self.groups)

    @cached_property
    def hidden(self) -> int:
        """Number of hidden controls of the chain."""
        return sum(group.hidden * group.count for group in self.groups)

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
    def norm(self) -> float:
        """‖H‖₂ to within some per cent, from below."""
        return self.damped_norm(0.0)

    def damped_norm(self, damping: float) -> float:
        """‖H + εI‖₂ to within some per cent, from below, by power iteration on a fixed start."""
        v, product = self.probe
        v = product + damping * v
        norm = float(v.double().norm())
        for _ in range(_POWER_STEPS):
            if norm == 0.0:
                break
            v = self.problem.hessian_product((v.double() / v.double().norm()).to(v.dtype), damping)
            norm = max(norm, float(v.double().norm()))
        return norm

    @cached_property
    def in_float64(self) -> Analysis:
        """The analysis of the problem in float64, itself where it is."""
        return self if self.problem.dtype == torch.float64 else Analysis(self.problem.to(torch.float64))

    def gauss_newton(self) -> Analysis:
        """Analysis of the Gauss-Newton problem: only the curvature of the objective remains."""
        return Analysis(self.problem.gauss_newton())
