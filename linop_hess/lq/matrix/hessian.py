"""H as a dense matrix, kept for all dampings where it is small, checked against a product; and what it takes to form it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from linop_hess.errors import SingularPivotError
from linop_hess.lq.accuracy import ASSEMBLED
from linop_hess.lq.analysis import Analysis
from linop_hess.lq.matrix.assembly import assemble
from linop_hess.lq.matrix.assembly_plan import assembly_calls, plan_assembly
from linop_hess.lq.problem import Problem
from linop_hess.lq.stages.base import common_samples

# Times that H is moved where it is brought into another order, its rows and its columns, a number at a time.
_PERMUTED = 16.0

# Times that the columns are moved at a stage that entries pass by, forth and back.
_MOVED_WIRED = 24.0

# Assemblies of chains of up to so many stages are counted column by column.
_COUNTED_UP_TO = 100

# Up to so many bytes H is kept for other dampings.
_KEPT_UP_TO = 64 << 20


def assembled(analysis: Analysis) -> Tensor:
    """H as a dense matrix, shape (N, N), read only: kept for all dampings where it is small."""
    return analysis.once(kept) if _is_kept(analysis.problem, analysis.problem.dtype) else _assemble(analysis)


def kept(analysis: Analysis) -> Tensor:
    """H as a dense matrix, shape (N, N), read only, for all who ask `Analysis.once`."""
    return _assemble(analysis)


def fresh(analysis: Analysis, dtype: torch.dtype) -> Tensor:
    """H in memory that may be overwritten, in float32 or in the dtype of the problem."""
    own = dtype == analysis.problem.dtype
    if analysis.has(kept):
        H = analysis.once(kept)
        return H.clone() if own else H.to(dtype)
    make = kept if own else _assemble_single
    return analysis.once(make).clone() if _is_kept(analysis.problem, dtype) else make(analysis)


def copies(problem: Problem, dtype: torch.dtype) -> float:
    """How many matrices of N² numbers exist once H may be overwritten."""
    return 2.0 if _is_kept(problem, dtype) else 1.0


def _is_kept(problem: Problem, dtype: torch.dtype) -> bool:
    return problem.size**2 * dtype.itemsize <= _KEPT_UP_TO


def _assemble_single(analysis: Analysis) -> Tensor:
    return _assemble(analysis, torch.float32)


def _assemble(analysis: Analysis, dtype: torch.dtype | None = None) -> Tensor:
    """Form H and compare it with a product, so that what is asked of its factors without a certificate is not asked of another matrix.

    Raises
    ------
    SingularPivotError
        If entries are beyond the range of the dtype.
    ArithmeticError
        If they differ.
    """
    H = assemble(analysis.problem, dtype)
    v, product = (x.to(H.dtype) for x in analysis.probe)
    if not bool(torch.isfinite(product).all()) or not math.isfinite(float(H.norm())):
        raise SingularPivotError(None)  # entries beyond the range of the dtype
    gap, bound = float((H @ v - product).norm()), ASSEMBLED * torch.finfo(H.dtype).eps * float(H.norm())
    bound = max(bound, ASSEMBLED * torch.finfo(H.dtype).eps * float(product.norm()))
    if not gap <= bound and not gap <= ASSEMBLED * analysis.rounding:
        raise ArithmeticError(
            f"the dense Hessian differs by {gap:.1e} from a product on a random vector, of {float(product.norm()):.1e}: this is a defect "
            "of its assembly; use another method, and report it"
        )
    return H


@dataclass(frozen=True)
class Counted:
    """Flops of an assembly, its peak bytes, the bytes it moves beside its products, and calls of torch.

    `inner`: what its products sum over, samples or the state of one.
    """

    flops: float
    nbytes: float
    moved: float
    inner: float
    calls: float


def _calls(analysis: Analysis) -> float:
    """Count the calls of an assembly, the same in every precision."""
    return assembly_calls(analysis.problem.typical_part()[0])


def counted_single(analysis: Analysis) -> Counted:
    """Count an assembly in float32."""
    return counted(analysis, torch.float32)


def counted(analysis: Analysis, dtype: torch.dtype | None = None) -> Counted:
    """Count the assembly of a chain, or of a sum over parts as so many as its first one."""
    problem, times = analysis.problem.typical_part()
    apart = 0.0 if problem is analysis.problem else float(problem.nbytes)
    layout, item, N2 = problem.layout, (dtype or problem.dtype).itemsize, float(problem.size) ** 2
    samples, calls, is_long = common_samples(problem.blocks), analysis.once(_calls), problem.length > _COUNTED_UP_TO
    inner = max(float(samples), float(layout.n_out[layout.first :].mean()) / samples)
    of_stacks = [
        (
            s.entries("F") + (s.entries("C") if "C" in s.nonzero else 0),
            min(s.p, s.outputs // samples),
            s.n_out * (_MOVED_WIRED if s.inputs != s.n_in else 2.0 * is_long),
        )
        for s in problem.blocks
    ]
    entries, added, copied = np.array(of_stacks, dtype=float)[layout.order[:, 0]].T
    columns = np.cumsum(added)
    moved = item * (float(columns @ copied) + (0.0 if problem.places is None else _PERMUTED * N2))
    if not is_long:
        plan = plan_assembly(problem, dtype)
        calls *= math.ceil(plan.samples / plan.chunk)
        return Counted(times * plan.flops, plan.nbytes + apart, times * moved, inner, times * calls)
    # Counting all columns of a long chain takes longer than inverting it: every pair of controls once a sample, H and work space beside it.
    # Where states are wide, as with parameters that live in them, each stage multiplies the columns of all controls before it.
    flops = max(2.0 * samples * N2, 4.0 * float(columns @ entries))
    return Counted(times * flops, 1.25 * N2 * item + apart, times * moved, inner, times * calls)
