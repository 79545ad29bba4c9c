"""(H + εI)⁻¹ of an LQ problem, and all that it can be asked; a question goes to the cheapest factors that answer it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from linop_hess._validate import require_real_damping
from linop_hess.errors import FactorizationError, SingularPivotError
from linop_hess.lq.analysis import Analysis, Change
from linop_hess.lq.inverse import determinant, sampling
from linop_hess.lq.inverse.determined import determined, looks_singular
from linop_hess.lq.inverse.entries import DiagonalEntries
from linop_hess.lq.inverse.factors import Factors, SegmentReport
from linop_hess.lq.inverse.inertia import between, dense_spectrum, inertia, inertia_of_factors
from linop_hess.lq.inverse.solver import Solver
from linop_hess.lq.iterative.options import SketchOptions
from linop_hess.lq.methods.riccati import RiccatiFactorization
from linop_hess.lq.methods.sketched import SketchReport, sketch_report
from linop_hess.lq.pivots.inertia import Inertia
from linop_hess.lq.problem import Problem
from linop_hess.lq.solve.solution import Solution

_Answer = TypeVar("_Answer")


class Inverse:
    """(H + εI)⁻¹ of an LQ problem.

    Arrays are tensors of the problem's dtype and device; `linop_hess.HessianInverse` is the same for users, as an operator.

    Parameters
    ----------
    problem : Problem or Analysis
    damping : complex
        ε; may be zero or negative. At a complex one solves are all that can be asked; all else is a TypeError.
    method : {"auto", "banded", "riccati", "dense", "woodbury", "sketched", "iterative", "ldu"}
    tolerance : float, optional
        Backward error that every solve must reach; default 1e-14 in float64, 1e-6 in float32.
    sketch : SketchOptions, optional
        What is asked of method "sketched".
    right_hand_sides : int
        For how many solves "auto" chooses.
    precision : {"auto", "single", "double"}
        What to factor in; see `Solver`. All but solves is answered by factors in double precision.

    Raises
    ------
    ValueError, TypeError
        If method, damping or tolerance is not usable.
    MemoryError
        If the method does not fit in memory; nothing has been allocated.
    FactorizationError
        If H + εI is singular to working precision.
    """

    def __init__(
        self,
        problem: Problem | Analysis,
        damping: complex,
        method: str = "auto",
        *,
        tolerance: float | None = None,
        precision: str = "auto",
        sketch: SketchOptions | None = None,
        right_hand_sides: int = 1,
    ) -> None:
        how: dict[str, Any] = {"tolerance": tolerance, "precision": precision}
        self.solver = Solver(problem, damping, method, sketch=sketch, right_hand_sides=right_hand_sides, **how)

    def __getstate__(self) -> dict[str, Solver]:
        """Pickle the solver alone."""
        return {"solver": self.solver}

    @property
    def analysis(self) -> Analysis:
        """What does not depend on the damping."""
        return self.solver.analysis

    @property
    def damping(self) -> complex:
        """ε."""
        return self.solver.damping

    def solve(self, g: Tensor, tolerance: float | None = None) -> Solution[Tensor]:
        """Solve (H + εI) x = g for g of shape (N, k); see `Solver.solve`."""
        return self.solver.solve(g, tolerance)

    @property
    def is_exact(self) -> bool:
        """Whether the factors of solves are those of H + εI; if not, solves are left to GMRES with them."""
        return self.solver.is_exact

    def product(self, g: Tensor) -> Tensor:
        """(H + εI)⁻¹ g for g of shape (N, k), certified; by "sketched", asked for by name, M⁻¹ g.

        Raises
        ------
        FactorizationError
            As of `solve`; or if M is so far off that M⁻¹ g leaves the range of its numbers.
        """
        if self.solver.requested != "sketched":
            return self.solve(g).x
        product = self.solver.approximate(g)
        if not bool(torch.isfinite(product).all()):
            raise FactorizationError(
                f"expected a sketch of H + damping·I with damping={self.damping:g} whose products are finite, got one that is so far off "
                f"that they are not: try {(self.solver.sketch or SketchOptions()).remedies}",
                damping=self.damping,
            )
        return product

    @cached_property
    def factors(self) -> Factors:
        """The factors that questions are put to.

        Raises
        ------
        TypeError
            If the damping is complex.
        """
        damping = require_real_damping(self.damping, "inertia, determinants, entries and samples")
        return Factors(self.analysis, damping, self.solver.plan.in_own_precision, self.solver.factorization)

    def _asked(self, question: Callable[[Factors], _Answer]) -> _Answer:
        try:
            return question(self.factors)
        except SingularPivotError as error:
            where = "" if error.stage is None else f" (met at stage {self.analysis.problem.name(error.stage)})"
            raise FactorizationError(
                f"H + damping·I with damping={self.damping:g} has no block LDLᵀ factorization{where}: it is singular to working "
                "precision, or damping is zero and there are parameters that the batch does not see; use another damping",
                damping=self.damping,
            ) from None

    @cached_property
    def inertia(self) -> Inertia:
        """Numbers of negative, zero and positive eigenvalues of H + εI."""
        require_real_damping(self.damping, "inertia")
        if self._determined is not None:
            return self._determined.inertia(0.0)
        found = self._of_matrix()
        if not self._looks_singular or self.analysis.problem.size == 0:
            return found
        return between(self.analysis, self.damping.real, found)

    @cached_property
    def _looks_singular(self) -> bool:
        return looks_singular(self.solver.factorization)

    def _of_matrix(self) -> Inertia:
        of_float64 = self.analysis.problem.dtype == torch.float64
        if "inertia" in self.solver.factorization.answers or (of_float64 and self.solver.precision == "single"):
            try:
                return self._asked(inertia_of_factors)
            except FactorizationError:
                return inertia(self.analysis, self.damping.real)  # other factors may tell
        return inertia(self.analysis, self.damping.real, factors=self.factors)

    @cached_property
    def _determined(self) -> RiccatiFactorization | None:
        """Factors that the blocks of the problem determine, where the matrix is singular to working precision."""
        if not self._looks_singular:
            return None
        change = self.factors.change
        return determined(change.analysis, change.damping.real, self.solver.plan)

    @property
    def is_positive_definite(self) -> bool:
        """Whether all eigenvalues of H + εI are positive."""
        return self.inertia.positive == self.analysis.problem.size

    def slogdet(self) -> tuple[float, float]:
        """Sign of det(H + εI), by inertia, and logarithm of its absolute value.

        Raises
        ------
        FactorizationError
            If H + εI is singular to working precision.
        """
        if self.inertia.zero:
            raise FactorizationError(
                f"H + damping·I with damping={self.damping:g} is singular to working precision, so its determinant is zero to rounding",
                damping=self.damping,
            )
        sign = -1.0 if self.inertia.negative % 2 else 1.0
        if self._determined is not None:
            return sign, self._determined.logabsdet()
        try:
            return sign, self._asked(lambda factors: determinant.logabsdet(factors, self.solver.plan))
        except FactorizationError:
            if (values := dense_spectrum(self.analysis.in_float64, self.damping.real)) is None:
                raise
            return sign, float(values.abs().log().sum())

    def report(self) -> list[SegmentReport]:
        """Pivots of each segment of the block LDLᵀ, in the order of the chain."""
        return self._asked(Factors.report)

    def sketch_report(self) -> SketchReport:
        """What the sketch of method "sketched" keeps and drops.

        Raises
        ------
        ValueError
            If solves are by another method.
        """
        return sketch_report(self.solver.factorization)

    def positive(self) -> Callable[[Tensor], Tensor]:
        """The product with L⁻ᵀ|D|⁻¹L⁻¹, where H + εI = L D Lᵀ; with the certified inverse itself where that is positive definite."""
        made = self.solver.factorization
        if not self.is_exact and "positive" in made.answers:
            return _Positive(cast(sampling.Answering, made), self.solver.change)
        try:
            definite = self.is_positive_definite
        except FactorizationError:  # a damping too small to tell
            definite = False
        if definite and self.analysis.problem.dtype == torch.float64:
            return _Certified(self.solver)
        factors = self._asked(Factors.bounded) if self._determined is None else self._determined
        return _Positive(factors, self.factors.change)

    @cached_property
    def entries(self) -> DiagonalEntries:
        """Diagonal and diagonal blocks, in float64."""
        return self._asked(lambda factors: DiagonalEntries(factors, self.solver))

    def blocks(self) -> list[Tensor]:
        """Diagonal blocks in float64, one per stage with controls."""
        entries = self.entries
        return self._asked(lambda _: entries.blocks())

    def blocks_at(self, sets: Sequence[np.ndarray]) -> list[Tensor]:
        """Blocks in the rows and columns of sets of places, in float64; see `DiagonalEntries.blocks_at`."""
        entries = self.entries
        return self._asked(lambda _: entries.blocks_at(sets))

    def sample(self, k: int, generator: torch.Generator | None) -> Tensor:
        """K samples of N(0, (H + εI)⁻¹), shape (N, k), in float64.

        Raises
        ------
        NotPositiveDefiniteError
            If H + εI is not positive definite; it names the inertia and a damping that works.
        """
        sampling.require_definite(self.inertia, self.analysis, self.damping.real)
        if self._determined is not None:
            drawn = sampling.sample(self._determined, k, generator, self.damping.real)
        else:
            drawn = self._asked(
                lambda factors: sampling.sample(factors.answering("sample"), k, generator, self.damping.real)
            )
        return self.factors.change.vectors(drawn)


class _Certified:
    """Certified solves as a product."""

    def __init__(self, solver: Solver) -> None:
        self._solver = solver

    def __call__(self, g: Tensor) -> Tensor:
        return self._solver.solve(g).x


class _Positive:
    """T L⁻ᵀ|D|⁻¹L⁻¹ T as a product, T the units that are factored in."""

    def __init__(self, factors: sampling.Answering, change: Change) -> None:
        self._factors, self._change = factors, change

    def __call__(self, g: Tensor) -> Tensor:
        if self._change.units is None:
            return sampling.positive(self._factors, g)
        there = self._change.vectors(g.to(torch.float64))
        return sampling.in_range(self._change.vectors(sampling.positive(self._factors, there)), g.dtype)
