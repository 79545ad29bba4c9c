"""GaussNewton: Levenberg–Marquardt and trust-region steps on the exact Gauss-Newton matrix."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from linop_hess._validate import Nonsmooth, finite_real
from linop_hess.lq.inverse.solve import Solver
from linop_hess.lq.methods.plan import METHODS, make_plan
from linop_hess.optim.base import LocalModel, TrialOptimizer
from linop_hess.optim.damping import TOLERANCE, Damping, GainRatio, as_damping, iterations
from linop_hess.optim.objective import Loss, Objective
from linop_hess.optim.quadratic import ChainModel
from linop_hess.optim.record import Tally

_FORMS = ("levenberg-marquardt", "trust-region")


class GaussNewton(TrialOptimizer):
    """Gauss-Newton steps s = −(G + λI)⁻¹g, G = Jᵀ(∇²ℓ)J of the batch, by the method the plan picks.

    For least squares and losses of physics-informed networks. Small batches times outputs are solved in function space ("woodbury").

    Parameters
    ----------
    model : torch.nn.Module
    loss_fn : callable
    params : iterable, optional
        See `CurvatureOptimizer`.
    lr : float
        By which steps are multiplied.
    damping : Damping or float, optional
        By default `GainRatio(0.1)`; an object is one optimizer's alone. In the trust-region form it holds 1/Δ².
    form : {"levenberg-marquardt", "trust-region"}
        Whether λ is adapted, or the radius Δ of which it is the multiplier.
    method : str
        "auto", or a method of the plan.
    tolerance : float
        Backward error of solves.
    max_trials : int
        Points tried in a step.
    extrapolate : bool
        Whether a step is doubled while the loss falls, where it fell by more than the model promised: an evaluation of the loss each.
    nonsmooth, sharpness
        As in `linop_hess.linearize`.

    Raises
    ------
    ValueError, TypeError
        If an argument is not usable.

    Examples
    --------
    >>> import torch
    >>> from linop_hess.optim import GaussNewton
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
    >>> x = torch.randn(10, 2).double()
    >>> opt = GaussNewton(model, torch.nn.functional.mse_loss)
    >>> for _ in range(40):
    ...     loss = opt.step(x, x.prod(1, keepdim=True))
    >>> loss < 1e-9
    True
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Loss,
        params: Iterable[Any] | None = None,
        *,
        lr: float = 1.0,
        damping: Damping | float | None = None,
        form: str = "levenberg-marquardt",
        method: str = "auto",
        tolerance: float = TOLERANCE,
        max_trials: int = 12,
        extrapolate: bool = True,
        nonsmooth: Nonsmooth = "generalized",
        sharpness: float | None = None,
    ) -> None:
        if form not in _FORMS:
            raise ValueError(f"expected form to be one of {list(_FORMS)}, got {form!r}: choose one")
        if method != "auto" and method not in METHODS:
            raise ValueError(f"expected method to be one of {['auto', *METHODS]}, got {method!r}: choose one")
        self.form, self.method = form, method
        self.tolerance = finite_real(tolerance, "tolerance")
        self._chosen: dict[tuple[Any, ...], str] = {}
        super().__init__(
            model,
            loss_fn,
            params,
            as_damping(damping, GainRatio(0.1)),
            max_trials,
            extrapolate,
            lr=lr,
            nonsmooth=nonsmooth,
            sharpness=sharpness,
        )

    def _local_model(self, objective: Objective, tally: Tally) -> LocalModel:
        if not objective.has_output:
            raise TypeError(
                "expected a closure that returns (output, target) for a Gauss-Newton matrix, got one that returns the loss: it tells "
                "nothing of the output; use SaddleFree, or return both"
            )
        lin = self._linearize(objective)
        chain = ChainModel(lin.gauss_newton().analysis, lin.loss, lin.gradient_tensor, tally)
        key = (lin.problem.size, lin.problem.layout.n_out.tobytes())
        if key not in self._chosen:
            self._chosen[key] = make_plan(chain.analysis, 1.0).choice if self.method == "auto" else self.method
        kind = _LevenbergMarquardt if self.form == _FORMS[0] else _TrustRegion
        return kind(chain, self._chosen[key], self.tolerance)


class _LevenbergMarquardt:
    """Certified solves at any damping."""

    def __init__(self, chain: ChainModel, method: str, tolerance: float) -> None:
        self.loss, self.curvature, self.change = chain.loss, chain, chain.change
        self._chain, self._method, self._tolerance = chain, method, tolerance
        self._refinements = iterations(chain.analysis.problem.length)

    def propose(self, damping: float) -> tuple[Tensor, float]:
        return self._with_change(-self._solver(damping)(self._chain.gradient))

    def _solver(self, damping: float) -> _Solves:
        return _Solves(self._chain, damping, self._method, self._tolerance, self._refinements)

    def _with_change(self, step: Tensor) -> tuple[Tensor, float]:
        return step, self._chain.change(step)


class _Solves:
    def __init__(self, chain: ChainModel, damping: float, method: str, tolerance: float, refinements: int) -> None:
        self._tally, self._dtype = chain.tally, chain.analysis.problem.dtype
        with self._tally.factoring(method):
            self._solver = Solver(
                chain.analysis,
                damping,
                method,
                tolerance=max(tolerance, TOLERANCES[self._dtype]),
                max_refinements=refinements,
                escalate=False,
                precision="double",
            )

    def __call__(self, g: Tensor) -> Tensor:
        found = self._solver.solve(g.to(self._dtype))
        self._tally.backward_error, self._tally.method = found.backward_error, found.method
        self._tally.products += 1 + found.refinement_steps
        return found.x.double()


TOLERANCES = {torch.float64: 1e-14, torch.float32: 1e-6}


class _TrustRegion(_LevenbergMarquardt):
    """The step of length Δ at most: λ ≥ 0 with ‖(G + λI)⁻¹g‖ = Δ, by Newton's method on 1/‖s‖ (Moré and Sorensen)."""

    def propose(self, damping: float) -> tuple[Tensor, float]:
        radius = damping**-0.5
        lam = max(float(self._chain.gradient.norm()) / radius * _FIRST, _LEAST * self._chain.norm())
        lower = 0.0
        step = None
        for _ in range(_NEWTON_STEPS):
            solve = self._solver(lam)
            step = -solve(self._chain.gradient)
            length = float(step.norm())
            if abs(length - radius) <= _ON_BOUNDARY * radius or (
                length < radius and lam <= _LEAST * self._chain.norm()
            ):
                break
            if length > radius:
                lower = lam
            slope = float(step @ solve(step))
            new = lam + (length / radius - 1.0) * length**2 / max(slope, 1e-300)
            lam = max(new, lower * (1.0 + _ON_BOUNDARY), lam * _FIRST, _LEAST * self._chain.norm())
        assert step is not None
        length = float(step.norm())
        return self._with_change(step * min(1.0, radius / length) if length else step)


# Steps of Newton's method for λ, how near to Δ is on the boundary, by how much λ falls at most in one, and the least λ in terms of ‖G‖.
_NEWTON_STEPS = 8
_ON_BOUNDARY = 0.1
_FIRST = 1e-3
_LEAST = 1e-14
