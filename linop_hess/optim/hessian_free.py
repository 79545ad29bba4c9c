"""HessianFree: Gauss-Newton steps by conjugate gradients on products, to compare with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from linop_hess._validate import finite_real, whole
from linop_hess.lq.pivots.inertia import Inertia
from linop_hess.optim.base import LocalModel, TrialOptimizer
from linop_hess.optim.damping import Curvature, Damping, GainRatio, as_damping
from linop_hess.optim.objective import Loss, Objective
from linop_hess.optim.record import Tally

# Power iterations for ‖G‖; what is kept of the last step as the start of the next.
_POWER, _KEPT = 20, 0.95


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

    def _local_model(self, objective: Objective, tally: Tally) -> LocalModel:
        return _Conjugate(self, ProductModel(objective, tally), tally)


class ProductModel:
    """loss + gᵀs + ½ sᵀGs with G known by products alone.

    Parameters
    ----------
    objective : Objective
        With an output.
    tally : Tally
        Where products are counted.
    """

    def __init__(self, objective: Objective, tally: Tally) -> None:
        self.loss, gradient, self._product = objective.gauss_newton()
        self.gradient, self._tally = gradient.double(), tally

    def product(self, v: Tensor) -> Tensor:
        """G times (N,)."""
        self._tally.products += 1
        return self._product(v[:, None])[:, 0]

    def change(self, step: Tensor) -> float:
        """Return gᵀs + ½ sᵀGs."""
        return float(self.gradient @ step + 0.5 * step @ self.product(step))

    @property
    def curvature(self) -> Curvature:
        """Itself."""
        return self

    def norm(self) -> float:
        """‖G‖ from below, by power iteration from the gradient."""
        v, norm = self.gradient, 0.0
        for _ in range(_POWER):
            if not (size := float(v.norm())) > 0.0:
                break
            v = self.product(v / size)
            norm = float(v.norm())
        return norm

    def smallest_convex_damping(self) -> float:
        """Zero: G is semidefinite where the loss is convex in the output."""
        return 0.0

    def inertia(self, damping: float) -> Inertia:
        """Not known from products.

        Raises
        ------
        TypeError
        """
        raise TypeError(
            "expected a damping that needs no inertia, got JustConvex: products do not tell it; use GaussNewton, or GainRatio"
        )


class _Conjugate:
    """CG on G + λI."""

    def __init__(self, opt: HessianFree, model: ProductModel, tally: Tally) -> None:
        self.loss, self.curvature, self.change = model.loss, model, model.change
        self._opt, self._model, self._tally = opt, model, tally

    def propose(self, damping: float) -> tuple[Tensor, float]:
        opt, g = self._opt, self._model.gradient
        self._tally.method = "cg"
        start = torch.zeros_like(g) if opt._start is None else _KEPT * opt._start
        step, residual = _cg(lambda v: self._model.product(v) + damping * v, g, start, opt.iterations, opt.tolerance)
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
