"""Factors in another precision than the problem's: any method in float64 for float32, and "dense" in float32 for float64.

In mixed precision: H + εI assembled and factored in float32, its solves refined by GMRES on products in float64. As nothing but solves is
asked of these factors, they are Cholesky's where H + εI is definite.

With M ≈ H + εI to single precision, (H + εI)M⁻¹ is I up to κ·1e-7, and GMRES takes a few products to gain seven digits where κ allows
that at all. Restarted from the residual, as refinement does, this reaches the backward error of a solve in double precision (GMRES-based
iterative refinement: Carson, Higham, SIAM J. Sci. Comput. 40, 2018), for half the memory and half the time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from scipy.linalg import lapack
from torch import Tensor

from linop_hess.errors import SingularPivotError
from linop_hess.lq.accuracy import REFINED_BY
from linop_hess.lq.analysis import Analysis
from linop_hess.lq.iterative.convergence import product_of, product_seconds
from linop_hess.lq.iterative.gmres import cycle
from linop_hess.lq.matrix.assembly import mirror
from linop_hess.lq.matrix.hessian import copies, counted_single, fresh
from linop_hess.lq.matrix.many_columns import ManyColumns
from linop_hess.lq.methods.base import Cost, Factor, Method, Tally
from linop_hess.lq.pivots.bunch_kaufman import THREADS_FROM, SymmetricFactor, is_for_scipy

# Steps of one GMRES, which keeps two vectors a step.
_STEPS = 20
# Columns are solved for at once as long as their vectors take so much.
_VECTORS_BYTES = 1 << 27
# Products that a solve takes beside those of one in double precision, and applications of the factors in single and in double precision.
_EXTRA_PRODUCTS, _SOLVES, _SOLVES_IN_DOUBLE = 4, 6, 2


@dataclass(frozen=True)
class CholeskyFactor:
    """S = L Lᵀ of a positive definite S.

    Attributes
    ----------
    L : Tensor, shape (n, n)
        Its lower triangle is read.
    """

    L: Tensor

    @classmethod
    def of(cls, S: Tensor) -> CholeskyFactor | None:
        """Factor a symmetric S, in its own memory where that can be; None where it is not positive definite, S then being as it was.

        It takes two thirds of the time of Bunch-Kaufman. An S that is not definite is told by its diagonal, or by its first leading block
        that is not, for which no more than that block is factored.
        """
        if not bool((S.diagonal() > 0).all()):
            return None
        if not is_for_scipy(S):
            L, first_indefinite = torch.linalg.cholesky_ex(S)
            return None if int(first_indefinite) or not bool(torch.isfinite(L.diagonal()).all()) else cls(L)
        diagonal = S.diagonal().clone()
        potrf = lapack.dpotrf if S.dtype == torch.float64 else lapack.spotrf
        packed, first_indefinite = potrf(S.numpy().T, lower=1, clean=0, overwrite_a=1)
        L = torch.from_numpy(packed)
        if not first_indefinite and bool(torch.isfinite(L.diagonal()).all()):
            return cls(L)
        S.diagonal().copy_(diagonal)
        mirror(S)  # by columns the lower triangle was written, which is the upper one of S
        return None

    def solve(self, X: Tensor) -> Tensor:
        """S⁻¹ X for X of shape (n, k)."""
        if not X.numel():
            return X.clone()
        # Not torch.cholesky_solve, which copies L at every call: 18 ms in place of 2.5 for one column at n = 2,900.
        half = torch.linalg.solve_triangular(self.L, X.mT.contiguous().mT, upper=False)
        return torch.linalg.solve_triangular(self.L.mT, half, upper=True)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.L.nbytes


class MixedFactorization:
    """H + εI of a float64 problem, assembled and factored in float32.

    Raises
    ------
    SingularPivotError
        If entries are beyond the range of float32, or a pivot is zero.
    """

    method = "dense"
    precision = torch.float32
    answers = frozenset({"solve"})

    def __init__(self, analysis: Analysis, damping: float) -> None:
        self.analysis, self.damping = analysis, damping
        H = fresh(analysis, torch.float32)
        H.diagonal().add_(damping)
        definite = CholeskyFactor.of(H)
        self._factor: CholeskyFactor | SymmetricFactor = definite or _indefinite(H)

    def solve(self, g: Tensor) -> Tensor:
        """(H + εI)⁻¹ g for g of shape (N, k) in float64, to `REFINED_BY`‖g‖ or as far as some steps of GMRES come."""
        at_once = max(1, _VECTORS_BYTES // (16 * (_STEPS + 1) * max(len(g), 1)))
        return torch.cat([self._refined(part) for part in g.split(at_once, 1)], 1)

    def _refined(self, g: Tensor) -> Tensor:
        enough = REFINED_BY * torch.linalg.vector_norm(g, dim=0)
        return cycle(self._product, self._approximate, g, torch.zeros_like(g), lambda sizes: enough, _STEPS)[0]

    def _product(self, x: Tensor) -> Tensor:
        return self.analysis.once(ManyColumns).product(x, self.damping)

    def _approximate(self, x: Tensor) -> Tensor:
        return self._factor.solve(x.to(torch.float32)).to(torch.float64)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._factor.nbytes


def _indefinite(H: Tensor) -> SymmetricFactor:
    # Pivoted over the whole matrix: by blocks it would be faster, but lose up to three digits, which GMRES has to make up for.
    found = SymmetricFactor.of(H, is_own=True)
    theta = found.theta
    if theta.numel() and not 0.0 < float(theta.abs().min()) <= float(theta.abs().max()) < math.inf:
        raise SingularPivotError(None)
    return found


def estimate(analysis: Analysis) -> Cost:
    """Assembly and N³/3 flops in float32, and some products more for each solve; in memory as in double, in half the bytes.

    The attempt at Cholesky's factors is that of an indefinite matrix: a leading block that is small beside N; of small ones a copy.
    """
    problem = analysis.problem
    N, tally, counted = float(problem.size), Tally(torch.float32), analysis.once(counted_single)
    tally.calls(counted.calls)
    tally.kernel("gemm", counted.flops, (counted.inner * max(N, 1.0)) ** 0.5)
    tally.kernel("ldl", N**3 / 3, N)
    tally.moved(4 * 18 * N**2 + counted.moved + _SOLVES * 8 * N**2)
    vectors = 16.0 * (_STEPS + 1) * N
    nbytes = max(counted.nbytes, (copies(problem, torch.float32) + (N < THREADS_FROM)) * 4 * N**2) + vectors
    flops = tally.flops + _EXTRA_PRODUCTS * analysis.once(product_of).flops
    return Cost(flops, nbytes, tally.seconds + _EXTRA_PRODUCTS * product_seconds(analysis), precision="single")


def definite(analysis: Analysis, cost: Cost) -> Cost:
    """The same with Cholesky's factors."""
    N, tried, saved = float(analysis.problem.size), Tally(torch.float32), Tally(torch.float32)
    tried.kernel("cholesky", N**3 / 3, N)
    saved.kernel("ldl", N**3 / 3, N)
    return replace(cost, seconds=cost.seconds + min(0.0, tried.seconds - saved.seconds))


def further_columns(analysis: Analysis, columns: int) -> float:
    """Modelled seconds that solves of so many columns after the first one take more than with factors in double precision."""
    N, tally, single = float(analysis.problem.size), Tally(torch.float64), Tally(torch.float32)
    further = max(0, columns - 1)
    tally.kernel("gemm", _EXTRA_PRODUCTS * 2.0 * N**2 * further, N)
    single.kernel("gemm", (_SOLVES - _SOLVES_IN_DOUBLE) * 2.0 * N**2 * further, N)
    return float(analysis.problem.processes.from_first(tally.seconds + single.seconds))


def factor(analysis: Analysis, damping: float) -> MixedFactorization:
    """Form H + εI in float32 and factor it."""
    return MixedFactorization(analysis, damping)


METHOD = Method("dense", factor, estimate, MixedFactorization.answers, of_matrix=True, definite=definite)


def promoted(factor: Factor) -> Factor:
    """Return the method that factors in float64, whatever the precision of the problem."""
    return partial(PromotedFactorization, factor)


class PromotedFactorization:
    """Factors of a float32 problem's H + εI, computed and applied in float64.

    Parameters
    ----------
    factor : Factor
        The method.
    analysis : Analysis
        Of the problem in float32; its twin in float64 is made once for all dampings.
    damping : float

    Raises
    ------
    SingularPivotError
        If H + εI is singular to double precision.
    """

    answers = frozenset({"solve"})

    def __init__(self, factor: Factor, analysis: Analysis, damping: complex) -> None:
        self.analysis, self.damping = analysis.in_float64, damping
        self.inner = factor(self.analysis, damping)
        self.method = self.inner.method

    @property
    def precision(self) -> torch.dtype:
        """What the factors are computed in."""
        return self.analysis.problem.dtype

    def solve(self, g: Tensor) -> Tensor:
        """(H + εI)⁻¹ g for g of shape (N, k), in float64 whatever comes."""
        return self.inner.solve(g.to(torch.float64))

    @property
    def nbytes(self) -> int:
        """Bytes held by the factors and the promoted problem."""
        return self.inner.nbytes + self.analysis.problem.nbytes
