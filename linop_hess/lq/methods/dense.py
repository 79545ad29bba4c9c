"""Method "dense": H + εI formed from the structure of its stages and factored; for few controls at any batch, and the last resort."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from linop_hess.errors import SingularPivotError
from linop_hess.lq.accuracy import ASSEMBLED
from linop_hess.lq.analysis import Analysis
from linop_hess.lq.assembly import assemble
from linop_hess.lq.assembly_plan import assembly_calls, plan_assembly
from linop_hess.lq.iterative.convergence import product_seconds
from linop_hess.lq.methods.base import EVERYTHING, Congruence, Cost, Method, Tally
from linop_hess.lq.pivots.bunch_kaufman import SymmetricFactor
from linop_hess.lq.problem import Problem
from linop_hess.lq.stages.base import common_samples

# Products that tell how far rounding moves H.
_PRODUCTS = 2

# Times that H is moved where it is brought into another order, its rows and its columns, a number at a time.
_PERMUTED = 16.0

# Times that the columns are moved at a stage that entries pass by, forth and back.
_MOVED_WIRED = 24.0

# Assemblies of chains of up to so many stages are counted column by column.
_COUNTED_UP_TO = 100

_COLUMNS_AT_ONCE = 512

# Up to so many bytes H is kept for other dampings.
_KEPT_UP_TO = 64 << 20


def assembled(analysis: Analysis) -> Tensor:
    """H as a dense matrix, shape (N, N), read only: kept for all dampings where it is small."""
    return analysis.once(_assemble) if _is_kept(analysis.problem, analysis.problem.dtype) else _assemble(analysis)


def fresh(analysis: Analysis, dtype: torch.dtype) -> Tensor:
    """H in memory that may be overwritten, in float32 or in the dtype of the problem."""
    own = dtype == analysis.problem.dtype
    if not own and analysis.has(_assemble):
        return analysis.once(_assemble).to(dtype)
    make = _assemble if own else _assemble_single
    return analysis.once(make).clone() if _is_kept(analysis.problem, dtype) else make(analysis)


def factoring_copies(problem: Problem, dtype: torch.dtype) -> float:
    """How many matrices of N² numbers exist while H is factored."""
    return 3.0 if _is_kept(problem, dtype) else 2.0


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
    return Counted(times * flops, 1.7 * N2 * item + apart, times * moved, inner, times * calls)


class DenseFactorization(Congruence):
    """Bunch-Kaufman factorization of the dense H + εI.

    Raises
    ------
    SingularPivotError
        If H + εI is singular to working precision.
    """

    method = "dense"
    growth = 0.0

    def __init__(self, analysis: Analysis, damping: complex) -> None:
        self.analysis, self.damping = analysis.over(damping), damping
        real = self.analysis.real
        H = fresh(real, real.problem.dtype).to(self.analysis.problem.dtype)
        H.diagonal().add_(damping)
        self._factor = SymmetricFactor.of(H)
        if H.numel() and self._factor.smallest_pivot_ratio <= 4 * torch.finfo(H.dtype).eps:
            raise SingularPivotError(None)

    @property
    def theta(self) -> Tensor:
        return self._factor.theta

    def whiten(self, g: Tensor) -> Tensor:
        return self._factor.whiten(g)

    def unwhiten(self, w: Tensor) -> Tensor:
        return self._factor.unwhiten(w)

    def diagonal(self) -> Tensor:
        """Diagonal of (H + εI)⁻¹, shape (N,): D⁻¹ seen through L⁻¹, some columns at a time."""
        N, theta = self.analysis.problem.size, self.theta
        parts = [theta.new_zeros(0)]
        for start in range(0, N, _COLUMNS_AT_ONCE):
            half = self.whiten(_unit_columns(theta, np.arange(start, min(start + _COLUMNS_AT_ONCE, N))))
            parts.append((half.square() / theta[:, None]).sum(0))
        return torch.cat(parts)

    def blocks(self) -> list[Tensor]:
        """Diagonal blocks of (H + εI)⁻¹, one of shape (p, p) per stage with controls."""
        layout = self.analysis.problem.layout
        halves = (self.whiten(_unit_columns(self.theta, layout.controls(l))) for l in np.flatnonzero(layout.p).tolist())
        return [half.mT @ (half / self.theta[:, None]) for half in halves]

    @property
    def nbytes(self) -> int:
        return self._factor.nbytes


def _unit_columns(like: Tensor, which: np.ndarray) -> Tensor:
    """Columns of the identity, of the order of `like`."""
    unit = like.new_zeros(like.numel(), which.size)
    unit[torch.from_numpy(which).to(like.device), torch.arange(which.size, device=like.device)] = 1.0
    return unit


def factor(analysis: Analysis, damping: complex) -> DenseFactorization:
    """Form and factor H + εI.

    Raises
    ------
    SingularPivotError
        If what is left of H after cancelling is rounding that the damping does not exceed.
    """
    scale = max(analysis.norm, abs(damping))
    if isinstance(damping, complex):
        analysis = analysis.in_float64
    if analysis.rounding > ASSEMBLED * torch.finfo(analysis.problem.dtype).eps * scale:
        raise SingularPivotError(None)
    return DenseFactorization(analysis, damping)


def estimate(analysis: Analysis) -> Cost:
    """The assembly, and N³/3 flops; in memory that of the assembly or, where more, two copies of H beside H where that is kept."""
    problem, tally = analysis.problem, Tally(analysis.problem.dtype)
    N, item = float(problem.size), problem.dtype.itemsize
    assembly = analysis.once(counted)
    tally.calls(assembly.calls)
    tally.kernel("gemm", assembly.flops, (assembly.inner * max(N, 1.0)) ** 0.5)
    tally.kernel("ldl", N**3 / 3, N)
    tally.moved(item * 16 * N**2 + assembly.moved)
    factoring = factoring_copies(problem, problem.dtype) * N**2 * item
    products = _PRODUCTS * product_seconds(analysis)
    return Cost(tally.flops, max(assembly.nbytes, factoring), tally.seconds + products)


METHOD = Method("dense", factor, estimate, EVERYTHING, is_complex=True, of_matrix=True)
