"""Damped steps of a quadratic model: Levenberg–Marquardt, bent along the output's curve or not, and within a radius."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from linop_hess.lq.inverse.solver import Solver
from linop_hess.optim.damping import iterations
from linop_hess.optim.objective import Objective
from linop_hess.optim.quadratic.chain import ChainModel
from linop_hess.optim.quadratic.function_space import FunctionSpace, Solve
from linop_hess.optim.trials import Point

Factored = Callable[[float], Solve]
"""Makes, of a damping λ, the product of the inverse of the damped curvature with (N,)."""


class Curve:
    """How the output bends along a step: half of Jᵀ(∇²ℓ) times its second derivative, by differences."""

    def __init__(self, objective: Objective, rows: FunctionSpace) -> None:
        self._point, self._rows = Point(objective, objective.leaves), rows

    def __call__(self, step: Tensor) -> Tensor:
        here = self._rows.output
        try:
            ahead, behind = (self._point.output_at(h * step) for h in (_ALONG, -_ALONG))
        finally:
            self._point.back()
        return 0.5 * self._rows.pulled(((ahead - here) - (here - behind)) / _ALONG**2)


class LevenbergMarquardt:
    """Steps at any damping."""

    def __init__(self, model: ChainModel | FunctionSpace, factored: Factored, curve: Curve | None) -> None:
        self.loss, self.curvature, self.change = model.loss, model, model.change
        self._model, self._factored, self._curve = model, factored, curve

    def propose(self, damping: float) -> tuple[Tensor, float]:
        solve = self._factored(damping)
        step = -solve(self._model.gradient)
        promised = self._model.change(step)
        if self._curve is not None and bool(torch.isfinite(step).all()):
            turn = -solve(self._curve(step))
            if bool(turn.norm() <= _TURN * step.norm()):
                step = step + turn
        return step, promised


class Solves:
    """Certified solves with the chain's Gauss-Newton matrix at one damping."""

    def __init__(self, chain: ChainModel, method: str, tolerance: float, damping: float) -> None:
        self._tally, self._dtype = chain.tally, chain.analysis.problem.dtype
        with self._tally.factoring(method):
            self._solver = Solver(
                chain.analysis,
                damping,
                method,
                tolerance=max(tolerance, TOLERANCES[self._dtype]),
                max_refinements=iterations(chain.analysis.problem.length),
                escalate=False,
                precision="double",
            )

    def __call__(self, g: Tensor) -> Tensor:
        found = self._solver.solve(g.to(self._dtype))
        self._tally.backward_error, self._tally.method = found.backward_error, found.method
        self._tally.products += 1 + found.refinement_steps + found.iterations
        return found.x.double()


TOLERANCES = {torch.float64: 1e-14, torch.float32: 1e-6}


class TrustRegionSteps(LevenbergMarquardt):
    """The step of length Δ at most: λ ≥ 0 with ‖(G + λI)⁻¹g‖ = Δ, by Newton's method on 1/‖s‖ (Moré and Sorensen)."""

    def propose(self, damping: float) -> tuple[Tensor, float]:
        radius = damping**-0.5
        lam = max(float(self._model.gradient.norm()) / radius * _FIRST, _LEAST * self._model.norm())
        lower = 0.0
        step = None
        for _ in range(_NEWTON_STEPS):
            solve = self._factored(lam)
            step = -solve(self._model.gradient)
            length = float(step.norm())
            if abs(length - radius) <= _ON_BOUNDARY * radius or (
                length < radius and lam <= _LEAST * self._model.norm()
            ):
                break
            if length > radius:
                lower = lam
            slope = float(step @ solve(step))
            new = lam + (length / radius - 1.0) * length**2 / max(slope, 1e-300)
            lam = max(new, lower * (1.0 + _ON_BOUNDARY), lam * _FIRST, _LEAST * self._model.norm())
        assert step is not None
        length = float(step.norm())
        step = step * min(1.0, radius / length) if length else step
        return step, self._model.change(step)


# Where the output's second derivative is taken along a step, and how long a turn may be in terms of the step.
_ALONG, _TURN = 0.1, 1.5
# Steps of Newton's method for λ, how near to Δ is on the boundary, by how much λ falls at most in one, and the least λ in terms of ‖G‖.
_NEWTON_STEPS = 8
_ON_BOUNDARY = 0.1
_FIRST = 1e-3
_LEAST = 1e-14
