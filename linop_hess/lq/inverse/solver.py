"""Certified solves of (H + εI)x = g: refine, measure the backward error without the factors, try more robust ones, or raise."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from linop_hess._memory import available_bytes, require
from linop_hess._validate import finite_damping, true_or_false, whole
from linop_hess.errors import FactorizationError, SingularPivotError
from linop_hess.lq.accuracy import (
    DENSE_CONDITION,
    DETERMINED,
    NEARLY_SINGULAR,
    SINGULAR_CONDITION,
    STALLED,
    UNDETERMINED,
    default_tolerance,
)
from linop_hess.lq.analysis import Analysis
from linop_hess.lq.inverse.counting import damping_that_works
from linop_hess.lq.iterative.gmres import MOST_ITERATIONS, gmres
from linop_hess.lq.iterative.options import Asked, SketchOptions
from linop_hess.lq.methods.base import Factor, Factorization
from linop_hess.lq.methods.mixed import further_columns
from linop_hess.lq.methods.plan import METHODS, Plan, ladder, make_plan, plan_for, with_first
from linop_hess.lq.methods.sketched import as_large
from linop_hess.lq.problem import Problem
from linop_hess.lq.solve.certificate import Certificate
from linop_hess.lq.solve.right_hand_side import checked, norms, times_power_of_two, to_size_one
from linop_hess.lq.solve.solution import Found, Solution, not_converged
from linop_hess.lq.solve.structured import StructuredSolver

PRECISIONS = ("auto", "single", "double")

# A solution that looks singular is worth so many times the fastest factorization to tell; one that is nearly so is worth less.
_WORTH, _WORTH_A_LOOK = 100.0, 4.0

# Flops of a solve for each entry of the factors, four times: what a refinement may cost is a fourth of the factorization.
_REFINEMENT_FLOPS = 4 * 4.0


class Solver:
    """(H + εI)⁻¹ of an LQ problem by a chosen method, with certificate and escalation.

    At a complex ε, as H + iδI of rational approximations, it is complex symmetric, and solutions are complex128 whatever the precision of
    the problem.

    Parameters
    ----------
    problem : Problem or Analysis
        An analysis is shared by all factorizations made from it.
    damping : complex
        ε; may be zero, negative, or complex, then for "banded", "riccati" and "dense".
    method : {"auto", "banded", "riccati", "dense", "woodbury", "sketched", "iterative", "ldu"}
    tolerance : float, optional
        Backward error to reach; default 1e-14 in float64, 1e-6 in float32.
    sketch : SketchOptions, optional
        What is asked of method "sketched".
    right_hand_sides : int
        For how many solves "auto" chooses.
    max_refinements : int
        Refinement steps before a method is given up.
    precision : {"auto", "single", "double"}
        What to factor in, whatever the precision of the problem: "auto" takes float32 for a float64 problem where the plan finds that
        faster and ‖H‖/|ε| allows it, float64 coming next, and for a sketch of a rank below N; "single" takes nothing else.
    escalate : bool
        Whether more robust methods are tried then, and a damping that works is looked for; else the method is all there is, for callers
        who change the damping themselves.

    Raises
    ------
    ValueError
        If the method or precision is unknown, or damping or tolerance is not a usable number.
    TypeError
        If damping is no number, or `escalate` no bool.
    MemoryError
        If the method's estimate exceeds the memory available, before anything is allocated.
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
        max_refinements: int = 6,
        precision: str = "auto",
        sketch: SketchOptions | None = None,
        right_hand_sides: int = 1,
        escalate: bool = True,
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {list(PRECISIONS)}, got {precision!r}")
        if method != "auto" and method not in METHODS:
            raise ValueError(f"method must be one of {['auto', *METHODS]}, got {method!r}")
        self.analysis = problem if isinstance(problem, Analysis) else Analysis(problem)
        self.damping = finite_damping(damping)
        self.is_complex = isinstance(self.damping, complex)
        self.problem = self.analysis.in_float64.problem if self.is_complex else self.analysis.problem
        if abs(self.damping) > torch.finfo(self.problem.dtype).max:
            raise ValueError(
                f"expected a damping within the range of {self.problem.dtype}, got {self.damping:g}: compute in float64"
            )
        self.requested, self.requested_precision = method, precision
        self.tolerance = default_tolerance(self.problem.dtype) if tolerance is None else float(tolerance)
        if not 0.0 < self.tolerance < 1.0:
            raise ValueError(f"tolerance is a backward error between 0 and 1, got {tolerance!r}")
        self.max_refinements, self.escalate = max_refinements, true_or_false(escalate, "escalate")
        self.change = self.analysis.at(self.damping)
        if self.problem.dtype == torch.float64:
            sketch = (sketch or SketchOptions()).in_precision(precision)
        self.sketch, self.right_hand_sides = sketch, whole(right_hand_sides, "right_hand_sides", least=1)
        if self._is_alone:
            self.plan: Plan = plan_for(self.analysis, self.damping.real, method)
        else:
            how = self.right_hand_sides, self.tolerance, sketch, precision, method
            self.plan = make_plan(self.analysis, self.damping, *how)
        self._certificate = Certificate(self.analysis, self.damping)
        self._factorization: Factorization | None = None
        self._judge: StructuredSolver | None = None
        self._columns = 0
        # Threads that solve at once would each climb to the next factors, past each other.
        self._lock = threading.RLock()
        chosen = self.plan.choice if method == "auto" else method
        asked = Asked(self.damping.real, self.right_hand_sides, self.tolerance, sketch or SketchOptions())
        rungs = ladder(self.plan, chosen, self.problem.dtype, precision, asked)
        if not escalate or (method != "auto" and not METHODS[method].exact):
            # Asked for by name: none that takes more memory may stand in.
            rungs = [rung for rung in rungs if rung[0] == chosen]
        self._ladder: list[tuple[str, Factor]] = with_first(rungs)
        self._climb()

    @property
    def _is_alone(self) -> bool:
        """Whether nothing but one exact method in own precision is to be tried, so that no other cost matters."""
        is_own = self.requested_precision == "double" and not self.is_complex and not self.escalate
        return is_own and self.requested != "auto" and METHODS[self.requested].exact

    def __reduce__(self) -> tuple[Callable[..., Solver], tuple[Any, ...]]:
        """Pickle problem, damping and method, no factors: they are made again when it is loaded, a sketch as large as it is by now."""
        names = ("tolerance", "max_refinements", "right_hand_sides", "escalate")
        options: dict[str, Any] = {name: getattr(self, name) for name in names}
        options |= {"precision": self.requested_precision, "sketch": as_large(self._factorization, self.sketch)}
        return _again, (self.analysis, self.damping, self.requested, options)

    def _climb(self) -> None:
        """Factor by the next method of the ladder that does not meet a singular pivot."""
        stage: int | None = None
        asked = self._factorization is None
        while self._ladder:
            method, factor = self._ladder.pop(0)
            if asked:
                self._check_feasible(method)
                asked = False
            try:
                self._factorization = factor(self.change.analysis, self.change.damping)
                self.is_exact = METHODS[method].exact
                return
            except SingularPivotError as error:
                stage = error.stage if error.stage is not None else stage
        self._factorization = None
        self._fail("is singular to working precision", stage)

    def _check_feasible(self, method: str) -> None:
        cost = self.plan.costs[method]
        if cost.why_not:
            raise ValueError(f'method "{method}" cannot be used here: {cost.why_not}')
        require(cost.nbytes, f'method "{method}" for {self.problem.size} parameters', self.plan.available)

    @property
    def method(self) -> str:
        """The method whose factors are in use."""
        return self.factorization.method

    @property
    def precision(self) -> str:
        """What the factors in use are computed in, "single" or "double"."""
        return "single" if self.factorization.precision == torch.float32 else "double"

    @property
    def factorization(self) -> Factorization:
        """The factors in use: of what `Analysis.at` changes H + εI to."""
        assert self._factorization is not None
        return self._factorization

    @property
    def nbytes(self) -> int:
        """Bytes held by the factors."""
        return self.factorization.nbytes

    def solve(self, g: Any, tolerance: float | None = None) -> Solution[Tensor]:
        """Solve (H + εI) x = g.

        Parameters
        ----------
        g : Tensor or array_like, shape (N,) or (N, k)
            A floating tensor must have the problem's dtype and device.
        tolerance : float, optional
            Backward error to accept, by default the solver's.

        Returns
        -------
        Solution
            With x as a Tensor of the shape of `g`. A column so small that its solution underflows is exact to the smallest normal number.

        Raises
        ------
        ValueError, TypeError
            If `g` is no real, finite array of that shape.
        FactorizationError
            If no method reaches the tolerance, or the solution shows that H + εI is singular to working precision.
        OverflowError
            If the solution exceeds the range of the dtype.
        """
        with self._lock:
            return self._solution(checked(g, self.analysis.problem, self.is_complex), tolerance)

    def _solution(self, operand: Tensor, tolerance: float | None) -> Solution[Tensor]:
        if not operand.numel():
            return Solution(torch.zeros_like(operand), 0.0, 0.0, 0, self.method)
        columns, exponents = to_size_one(operand[:, None] if operand.ndim == 1 else operand)
        self._columns_come(columns.shape[1])
        tolerance = self.tolerance if tolerance is None else tolerance
        found = self._determined(columns, self._solved(columns, tolerance), tolerance)
        x = times_power_of_two(found.x, exponents)
        if not bool(torch.isfinite(x.sum())) and not bool(torch.isfinite(x).all()):
            raise OverflowError(f"the solution exceeds the range of {x.dtype}: scale the right-hand side down")
        residual = float(times_power_of_two(found.residuals, exponents).max())
        how = found.steps, found.method, found.structured_error, found.iterations
        return Solution(x.reshape(operand.shape), found.backward_error, residual, *how)

    def _columns_come(self, columns: int) -> None:
        """Factor in double precision once what solves in single take longer has come to as much as that, for another such time."""
        self._columns += columns
        method = METHODS.get(self.method)
        if method is None or method.single is None or self.problem.dtype != torch.float64 or self.precision == "double":
            return
        if not self._ladder or self._ladder[0][0] != self.method:  # single is all that was asked for, or can be had
            return
        cost, processes, made = self.plan.own_costs[self.method], self.problem.processes, None
        is_due = further_columns(self.analysis, self._columns) > cost.seconds
        if not (is_due and processes.all_of(cost.nbytes <= available_bytes())):
            return
        with contextlib.suppress(SingularPivotError, MemoryError):  # those that there are solve all the same
            made = self._ladder.pop(0)[1](self.change.analysis, self.change.damping)
        if processes.all_of(made is not None):
            self._factorization = made

    def _solved(self, g: Tensor, tolerance: float) -> Found:
        """A solution of this backward error for columns of size one, by the first method that reaches it."""
        while True:
            found = self._refined(g, tolerance) if self.is_exact else self._iterated(g, tolerance)
            if (error := found.backward_error) <= tolerance:
                return found
            if not self._ladder:
                if not self.is_exact:
                    raise not_converged(self.damping, tolerance, found, norms(g), self.sketch)
                self._fail(
                    f"could not be solved to a backward error of {tolerance:.0e}; the best was "
                    f"{error:.1e} by method {self.method!r}",
                    None,
                )
            self._climb()

    def _determined(self, g: Tensor, found: Found, tolerance: float) -> Found:
        """The solution where the matrix determines it, or the blocks of the stages do.

        A large ‖H + εI‖‖x‖/‖g‖ is no proof that the problem is singular: a matrix as ill-conditioned as that, rounded, has another
        solution, but nothing here rounds it. Factors of the KKT system tell whether rounding in what is there moves x.
        """
        # A zero column has x = 0. What rounding does is to be measured by ‖H‖, which may exceed ‖H + εI‖, but by no more than |ε|.
        condition = max(self._certificate.norm, abs(self.damping)) * float(
            (norms(found.x) / norms(g).clamp_min(torch.finfo(g.dtype).tiny)).max()
        )
        formed = found.method in ("dense", "woodbury")
        if condition <= (DENSE_CONDITION if formed else NEARLY_SINGULAR):
            return found
        looks_singular = condition > SINGULAR_CONDITION
        structured = None if self.is_complex else self._structured(_WORTH if looks_singular else _WORTH_A_LOOK)
        if structured is not None:
            x, errors = structured.solve(self.change.vectors(g.double()))
            error, x = float(errors.max()), self.change.vectors(x).to(g.dtype)
            backward_error, residuals, _ = self._measured(g, x, tolerance)
            if error <= DETERMINED and backward_error <= tolerance:
                gap = float((norms(x - found.x) / norms(x).clamp_min(torch.finfo(g.dtype).tiny)).max())
                if gap <= max(error, tolerance):
                    return replace(found, structured_error=max(error, gap))
                if METHODS[self.plan.choice if self.requested == "auto" else self.requested].is_automatic:
                    return Found(x, backward_error, residuals, found.steps, "banded", error)
            looks_singular |= error > UNDETERMINED
        if looks_singular and self._ladder and self.factorization.analysis.problem.dtype == torch.float32:
            self._climb()  # singular to single precision it may be; what comes is in float64
            return self._determined(g, self._solved(g, tolerance), tolerance)
        if looks_singular:
            self._fail("is singular to working precision", None)
        return found

    def _structured(self, worth: float) -> StructuredSolver | None:
        """The KKT system as a judge, made once; None where it is singular, does not fit, or takes more than `worth` of the fastest way."""
        if self._judge is None:
            costs = self.plan.costs
            affordable = costs["banded"].seconds <= worth * costs[self.plan.choice].seconds
            with contextlib.suppress(SingularPivotError):
                if self.plan.fits("banded", 3) and affordable:
                    self._judge = StructuredSolver(self.change.analysis, self.change.damping.real)
        return self._judge

    def _refined(self, g: Tensor, tolerance: float) -> Found:
        """What refinement reaches, for right-hand sides of size one."""
        x = self._by_factors(g)
        few = g.shape[1] == 1 or g.shape[1] <= self._columns_refined
        polish = few and tolerance <= default_tolerance(g.real.dtype) and self.max_refinements > 0
        # What is refined in any case need not be judged before: ‖H + εI‖, most of a solve, may not be needed then.
        error, residuals, r = self._measured(g, x, tolerance, is_judged=not polish)
        steps, polish = 0, polish and error > 0.0
        while (polish or not error <= tolerance) and steps < self.max_refinements and math.isfinite(error):
            polish = False
            candidate, by_norm = x + self._by_factors(r).to(g.dtype), self._certificate.is_settled
            by_trusted = not self._certificate.lost_trust
            new_error, new_residuals, new_r = self._measured(g, candidate, tolerance)
            steps += 1
            if by_trusted and self._certificate.lost_trust:  # x was measured by another matrix
                x, error, residuals, r = candidate, new_error, new_residuals, new_r
                continue
            if self._certificate.is_settled and not by_norm:
                error = self._measured(g, x, tolerance)[0]  # by the same norm
            if not new_error < error:
                break
            stalled = new_error > STALLED * error
            x, error, residuals, r = candidate, new_error, new_residuals, new_r
            if stalled:
                break
        return Found(x, error, residuals, steps, self.method)

    def _iterated(self, g: Tensor, tolerance: float) -> Found:
        """What GMRES reaches with the factors as preconditioner."""
        self._certificate.settle()
        bound, product = self._certificate.norm, partial(self._certificate.product, factors=self.factorization)
        make = METHODS[self.method].watch
        watch = None if make is None else make(self.factorization)

        def precondition(v: Tensor) -> Tensor:
            return self.change.solve(self.factorization if watch is None else watch.factors, v).to(v.dtype)

        found = gmres(
            product, precondition, g, lambda of_x, of_g: tolerance * (bound * of_x + of_g), MOST_ITERATIONS, watch
        )
        if watch is not None:
            self._factorization = watch.factors
        error, residuals, _ = self._measured(g, found.x, tolerance)
        return Found(found.x, error, residuals, 0, self.method, iterations=found.iterations)

    def approximate(self, g: Tensor) -> Tensor:
        """The factors in use alone, a symmetric operator: of "sketched" M⁻¹ g, for g of shape (N, k)."""
        columns, exponents = to_size_one(g)
        return times_power_of_two(self._by_factors(columns), exponents)

    def _by_factors(self, g: Tensor) -> Tensor:
        return self.change.solve(self.factorization, g).to(g.dtype)

    def _measured(self, g: Tensor, x: Tensor, tolerance: float, **how: bool) -> tuple[float, Tensor, Tensor]:
        return self._certificate.measured(g, x, self.factorization, tolerance, **how)

    @property
    def _columns_refined(self) -> float:
        """Up to so many columns are refined once whatever their error, for a fourth of the factorization's flops; one always is."""
        entries = self.nbytes / self.problem.dtype.itemsize
        return self.plan.costs[self.method].flops / (_REFINEMENT_FLOPS * max(entries, 1.0))

    def _fail(self, what: str, stage: int | None) -> None:
        where = None if stage is None else self.problem.name(stage)
        analysis, damping, tolerance = self.analysis, self.damping, self.tolerance
        suggest = partial(damping_that_works, analysis, damping, METHODS[self.plan.choice].factor, tolerance)
        raise FactorizationError(
            f"H + damping·I with damping={damping:g} {what}" + (f" (met at stage {where})" if where else ""),
            damping=damping,
            stage=where,
            suggested_damping=suggest if self.escalate else None,
        )


def _again(analysis: Analysis, damping: complex, method: str, options: dict[str, Any]) -> Solver:
    """Factor anew, when unpickled."""
    with torch.no_grad():
        return Solver(analysis, damping, method, **options)
