"""HessianFree: Gauss-Newton steps by conjugate gradients on products, to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from linop_hess._validate import finite_real, whole
from linop_hess.optim.damping import Damping, GainRatio, as_damping
from linop_hess.optim.objective import Loss, Objective
from linop_hess.optim.quadratic.products import ProductModel
from linop_hess.optim.record import Tally
from linop_hess.optim.trial_optimizer import LocalModel, TrialOptimizer

# What is kept of the last step as the start of the next.
_KEPT = 0.95


class HessianFree(TrialOptimizer):
    """Steps s ≈ −(G + λI)⁻¹g by conjugate gradients on products with the Gauss-Newton matrix, by double backward, as Martens has them.

    What others use where curvature is not factored: the yardstick for `GaussNewton` and `SaddleFree`, and of use where a model is too large
    for them. CG starts from the last step and ends where the quadratic model falls by little.

    Parameters
    ----------
    model : torch.nn.Module
        With one tensor as its output.
    loss_fn : callable
        Of ``(output, target)``.
    params : iterable, optional
        See `CurvatureOptimizer`.
    lr : float
        By which steps are multiplied.
    damping : Damping or float, optional
        By default `GainRatio()`; an object is one optimizer's alone.
    iterations : int
        Of CG, at most.
    tolerance : float
        CG ends where the model falls by less than this part in an iteration, on average over the last tenth of them.
    max_trials : int
        Points tried in a step.

    Raises
    ------
    ValueError, TypeError
        If an argument is not usable.

    References
    ----------
    J. Martens, "Deep learning via Hessian-free optimization", ICML 2010.

    Examples
    --------
    >>> import torch
    >>> from linop_hess.optim import HessianFree
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
    >>> x = torch.randn(10, 2).double()
    >>> opt = HessianFree(model, torch.nn.functional.mse_loss)
    >>> losses = [opt.step(x, x.prod(1, keepdim=True)) for _ in range(30)]
    >>> losses[-1] < 1e-3 * losses[0]
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
        iterations: int = 250,
        tolerance: float = 5e-4,
        max_trials: int = 12,
    ) -> None:
        self.iterations, self.tolerance = whole(iterations, "iterations", least=1), finite_real(tolerance, "tolerance")
        if not self.tolerance > 0.0:
            raise ValueError(f"expected a tolerance that is positive, got {tolerance!r}: pass 5e-4")
        self._start: Tensor | None = None
        super().__init__(model, loss_fn, params, as_damping(damping, GainRatio()), max_trials, False, lr=lr)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; CG starts from zero again. Raises as `CurvatureOptimizer.add_param_group`."""
        super().add_param_group(param_group)
        self._start = None

    def _curvature_state(self) -> dict[str, Any]:
        return {**super()._curvature_state(), "start": self._start}

    def _load_curvature_state(self, state: Mapping[str, Any]) -> None:
        super()._load_curvature_state(state)
        self._start = state.get("start")

    def _local_model(self, objective: Objective, tally: Tally) -> LocalModel:
        return _Conjugate(self, ProductModel(*objective.gauss_newton(), tally), tally)


class _Conjugate:
    """CG on G + λI."""

    def __init__(self, opt: HessianFree, model: ProductModel, tally: Tally) -> None:
        self.loss, self.curvature, self.change = model.loss, model, model.change
        self._opt, self._model, self._tally = opt, model, tally

    def propose(self, damping: float) -> tuple[Tensor, float]:
        opt, g = self._opt, self._model.gradient
        self._tally.method = "cg"
        start = torch.zeros_like(g) if opt._start is None else _KEPT * opt._start
        step, residual = _cg(
            lambda v: self._model.product(v[:, None])[:, 0] + damping * v, g, start, opt.iterations, opt.tolerance
        )
        opt._start = step
        # gᵀs + ½ sᵀGs, with Gs = −g − λs − r.
        return step, 0.5 * float(step @ (g - damping * step - residual))


def _cg(
    product: Callable[[Tensor], Tensor], g: Tensor, start: Tensor, most: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Minimize ½ sᵀAs + gᵀs from a start, or from zero where that is lower; return s and the residual −g − As."""
    s, r = torch.zeros_like(g), -g
    if bool(start.any()):
        image = product(start)
        if float(start @ (0.5 * image + g)) < 0.0:
            s, r = start.clone(), -g - image
    p, rr = r.clone(), float(r @ r)
    values = [-0.5 * float(s @ (r - g))]
    for k in range(1, most + 1):
        if rr == 0.0:
            break
        image = product(p)
        curvature = float(p @ image)
        if not curvature > 0.0:
            break
        a = rr / curvature
        s, r = s + a * p, r - a * image
        before, rr = rr, float(r @ r)
        p = r + (rr / before) * p
        values.append(-0.5 * float(s @ (r - g)))
        back = max(10, k // 10)
        if k > back and values[-1] < 0.0 and values[-1 - back] - values[-1] < -back * tolerance * values[-1]:
            break
    return s, r
