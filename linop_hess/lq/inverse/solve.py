"""Certified solves of (H + εI)x = g: refine, measure the backward error, escalate, or raise.

The residual is computed with a product that does not use the factors. A solve that does not reach its tolerance tries
more robust factorizations in turn; if none reaches it, `FactorizationError` is raised, never a wrong answer returned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from linop_hess._display import Shown, Unpacked
from linop_hess._memory import require
from linop_hess._validate import finite_real
from linop_hess.errors import FactorizationError, SingularPivotError
from linop_hess.lq.accuracy import SINGULAR_CONDITION, STALLED, default_tolerance
from linop_hess.lq.analysis import Analysis
from linop_hess.lq.methods.base import Factor, Factorization
from linop_hess.lq.methods.plan import METHODS, Plan, ladder, make_plan
from linop_hess.lq.problem import Problem

# Exponents of two to which right-hand sides are scaled at most, by dtype.
_REACH = {torch.float64: 1000, torch.float32: 120}


class _Shown(Shown, Unpacked):
    """How a `Solution` is shown and unpacked."""

    x: Any
    backward_error: float
    refinement_steps: int
    method: str

    _order = ("x", "backward_error", "residual_norm", "refinement_steps", "method")

    def __str__(self) -> str:
        steps = self.refinement_steps
        return (
            f"Solution(x of shape {tuple(self.x.shape)}, backward error {self.backward_error:.1e}, "
            f"{steps} refinement step{'s' * (steps != 1)}, by {self.method})"
        )


# Flops of a solve for each entry of the factors, four times: what a refinement may cost is a fourth of the factorization.
_REFINEMENT_FLOPS = 4 * 4.0


@dataclass(frozen=True, repr=False)
class Solution(_Shown):
    """A solution of (H + εI)x = g and what is known of its quality.

    It can be unpacked: ``x, backward_error, residual_norm, refinement_steps, method = inverse.solve(g)``.

    Attributes
    ----------
    x : ndarray or Tensor, shape (N,) or (N, k)
        As the right-hand side came.
    backward_error : float
        max over columns of ‖g − (H+εI)x‖ / (‖H+εI‖‖x‖ + ‖g‖): how much H and g would have to be changed, relatively, for x
        to be exact. ‖H+εI‖ is estimated from below, so this errs on the large side.
    residual_norm : float
        max over columns of ‖g − (H+εI)x‖.
    refinement_steps : int
    method : str
        The method whose factors gave x.
    """

    x: Any
    backward_error: float
    residual_norm: float
    refinement_steps: int
    method: str


class Solver:
    """(H + εI)⁻¹ of an LQ problem by a chosen method, with certificate and escalation.

    Parameters
    ----------
    problem : Problem or Analysis
        An analysis is shared by all factorizations made from it.
    damping : float
        ε; may be zero or negative.
    method : {"auto", "banded", "riccati", "dense", "woodbury", "ldu"}
    tolerance : float, optional
        Backward error to reach; default 1e-14 in float64, 1e-6 in float32.
    max_refinements : int
        Refinement steps before a method is given up.

    Raises
    ------
    ValueError
        If the method is unknown or damping or tolerance is not a usable number.
    TypeError
        If damping is no real number.
    MemoryError
        If the method's estimate exceeds the memory available, before anything is allocated.
    FactorizationError
        If H + εI is singular to working precision.
    """

    def __init__(
        self,
        problem: Problem | Analysis,
        damping: float,
        method: str = "auto",
        *,
        tolerance: float | None = None,
        max_refinements: int = 6,
    ) -> None:
        if method != "auto" and method not in METHODS:
            raise ValueError(f"method must be one of {['auto', *METHODS]}, got {method!r}")
        self.analysis = problem if isinstance(problem, Analysis) else Analysis(problem)
        self.problem = self.analysis.problem
        self.damping = finite_real(damping, "damping")
        self.requested = method
        self.tolerance = default_tolerance(self.problem.dtype) if tolerance is None else float(tolerance)
        if not 0.0 < self.tolerance < 1.0:
            raise ValueError(f"tolerance is a backward error between 0 and 1, got {tolerance!r}")
        self.max_refinements = max_refinements
        self.plan: Plan = make_plan(self.analysis, self.damping)
        v, product = self.analysis.probe
        self._norm_bound = float((product + self.damping * v).double().norm())
        self._norm_is_final = False
        self._factorization: Factorization | None = None
        chosen = self.plan.choice if method == "auto" else method
        self._ladder: list[tuple[str, Factor]] = ladder(self.plan, chosen, self.problem.dtype)
        self._climb()

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
                self._factorization = factor(self.analysis, self.damping)
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
    def factorization(self) -> Factorization:
        """The factors in use."""
        assert self._factorization is not None
        return self._factorization

    @property
    def nbytes(self) -> int:
        """Bytes held by the factors."""
        return self.factorization.nbytes

    def solve(self, g: Tensor, tolerance: float | None = None) -> Solution:
        """Solve for g of shape (N, k); the Solution holds a Tensor of the same shape.

        Parameters
        ----------
        g : Tensor
        tolerance : float, optional
            Backward error to accept, by default the solver's.

        Raises
        ------
        FactorizationError
            If no method reaches the tolerance, or the solution shows that H + εI is singular to working precision.
        OverflowError
            If the solution exceeds the range of the dtype.
        """
        if not g.numel():
            return Solution(torch.zeros_like(g), 0.0, 0.0, 0, self.method)
        g, exponents = _scaled(g)
        tolerance = self.tolerance if tolerance is None else tolerance
        while True:
            x, error, residuals, steps = self._refined(g, tolerance)
            if error <= tolerance:
                break
            if not self._ladder:
                self._fail(
                    f"could not be solved to a backward error of {tolerance:.0e}; the best was "
                    f"{error:.1e} by method {self.method!r}",
                    None,
                )
            self._climb()
        # Columns have norm ≥ ½ or are zero, and a zero one has x = 0.
        if x.numel() and self._norm_bound * float((_norms(x) / _norms(g).clamp_min(0.5)).max()) > SINGULAR_CONDITION:
            self._fail("is singular to working precision", None)
        sizes = x.abs().amax(0)
        x = torch.ldexp(x, exponents)
        if bool(((sizes > 0) & (x.abs().amax(0) < torch.finfo(x.dtype).tiny)).any()):
            raise OverflowError(f"the solution is below the range of {x.dtype}: scale the right-hand side up")
        if not math.isfinite(float(x.sum())) and not bool(torch.isfinite(x).all()):
            raise OverflowError(f"the solution exceeds the range of {x.dtype}: scale the right-hand side down")
        residual = float(torch.ldexp(residuals, exponents[0]).max()) if residuals.numel() else 0.0
        return Solution(x, error, residual, steps, self.method)

    def _refined(self, g: Tensor, tolerance: float) -> tuple[Tensor, float, Tensor, int]:
        """x, its backward error, residual norms and refinement steps, for right-hand sides of size one."""
        x = self.factorization.solve(g).to(g.dtype)
        error, residuals, r = self._backward_error(g, x, tolerance)
        steps = 0
        few = g.shape[1] == 1 or g.shape[1] <= self._columns_refined
        polish = few and error > 0.0 and tolerance <= default_tolerance(g.dtype)
        while (polish or not error <= tolerance) and steps < self.max_refinements and math.isfinite(error):
            polish = False
            candidate = x + self.factorization.solve(r).to(g.dtype)
            new_error, new_residuals, new_r = self._backward_error(g, candidate, tolerance)
            steps += 1
            if not new_error < error:
                break
            stalled = new_error > STALLED * error
            x, error, residuals, r = candidate, new_error, new_residuals, new_r
            if stalled:
                break
        return x, error, residuals, steps

    @property
    def _columns_refined(self) -> float:
        """Up to so many columns are refined once whatever their error, which costs a fourth of the factorization's flops; one always is.

        Backward errors below the tolerance leave residuals of so many digits fewer as H + εI is ill-conditioned.
        """
        entries = self.nbytes / self.problem.dtype.itemsize
        return self.plan.costs[self.method].flops / (_REFINEMENT_FLOPS * max(entries, 1.0))

    def _product(self, x: Tensor) -> Tensor:
        """(H + εI) x without the factors, in the precision of the factors."""
        problem = self.factorization.analysis.problem
        return problem.hessian_product(x.to(problem.dtype), self.damping)

    def _backward_error(self, g: Tensor, x: Tensor, tolerance: float) -> tuple[float, Tensor, Tensor]:
        product = self._product(x)
        r = g - product
        residuals = _norms(r)
        sizes = torch.stack([residuals, _norms(product), _norms(x), _norms(g)]).cpu().numpy()
        size_r, size_product, size_x, size_g = sizes
        growth = size_product[size_x > 0] / size_x[size_x > 0]
        if growth.size and math.isfinite(bound := float(growth.max())):
            self._norm_bound = max(self._norm_bound, bound)
        error = self._ratio(size_r, size_x, size_g)
        if not error <= tolerance and not self._norm_is_final:
            self._norm_bound = max(self._norm_bound, self.analysis.damped_norm(self.damping))
            self._norm_is_final = True
            error = self._ratio(size_r, size_x, size_g)
        return error, residuals, r

    def _ratio(self, size_r: np.ndarray, size_x: np.ndarray, size_g: np.ndarray) -> float:
        scale = self._norm_bound * size_x + size_g
        error = float(np.divide(size_r, scale, out=size_r.copy(), where=scale > 0).max(initial=0.0))
        return error if math.isfinite(error) else math.inf

    def _fail(self, what: str, stage: int | None) -> None:
        where = None if stage is None else self.problem.name(stage)
        suggestion = damping_that_works(self.analysis, self.damping, METHODS[self.plan.choice].factor, self.tolerance)
        advice = (
            f"damping={suggestion:.1e} works"
            if suggestion is not None
            else "no damping up to the norm of H works: look at the model for saturated or dead layers"
        )
        raise FactorizationError(
            f"H + damping·I with damping={self.damping:g} {what}"
            + (f" (met at stage {where})" if where else "")
            + f"; {advice}.",
            damping=self.damping,
            stage=where,
            suggested_damping=suggestion,
        )


def damping_that_works(analysis: Analysis, damping: float, factor: Factor, tolerance: float) -> float | None:
    """Try dampings growing by decades from one that failed, each with a random right-hand side; None if none works."""
    problem, norm = analysis.problem, analysis.norm
    unit = np.finfo(problem.numpy_dtype).eps * (norm if norm > 0 else 1.0)
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(problem.size, 1, generator=generator, dtype=torch.float64, device="cpu")
    g = g.to(problem.dtype).to(problem.device)
    # What is advised must have worked: two steps of refinement and the backward error, as in a solve, but for its own norm.
    for power in range(2, 17, 2):
        trial = float(f"{max(abs(damping), unit) * 10.0**power:.0e}")
        try:
            factors = factor(analysis, trial)
        except SingularPivotError:
            continue
        x = factors.solve(g)
        for _ in range(2):
            x = x + factors.solve(g - problem.hessian_product(x, trial))
        r = g - problem.hessian_product(x, trial)
        if float(r.norm()) <= tolerance * (norm * float(x.norm()) + float(g.norm())):
            return trial
    return None


def _norms(columns: Tensor) -> Tensor:
    """Norms of columns, in float64, so that those of small or large float32 numbers neither under- nor overflow."""
    return torch.linalg.vector_norm(columns, dim=0, dtype=torch.float64)


def _scaled(g: Tensor) -> tuple[Tensor, Tensor]:
    """Scale the columns to size one by powers of two, so that norms neither under- nor overflow; also the exponents."""
    largest = _REACH[g.dtype]
    exponents = torch.frexp(g.abs().amax(0, keepdim=True)).exponent.clamp(-largest, largest)
    return torch.ldexp(g, -exponents), exponents
