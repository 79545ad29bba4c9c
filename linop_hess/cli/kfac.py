"""K-FAC of curvlinops as an optimizer, to compare with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from linop_hess.optim.damping import GainRatio
from linop_hess.optim.objective import Loss, Objective
from linop_hess.optim.quadratic.products import ProductModel
from linop_hess.optim.record import Tally
from linop_hess.optim.trial_optimizer import LocalModel, TrialOptimizer


class KFAC(TrialOptimizer):
    """Steps along −(K + λI)⁻¹g, K being the Kronecker-factored Gauss-Newton matrix, as long as the exact one says, λ by the gain ratio.

    Parameters
    ----------
    model : torch.nn.Module
    loss_fn : torch.nn.CrossEntropyLoss or torch.nn.MSELoss
    lr : float
        By which steps are multiplied.

    References
    ----------
    J. Martens and R. Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature", ICML 2015.
    """

    def __init__(self, model: nn.Module, loss_fn: Loss, *, lr: float = 1.0) -> None:
        super().__init__(model, loss_fn, None, GainRatio(), 12, False, lr=lr)

    def step(self, inputs: Any, targets: Any) -> float:  # type: ignore[override]
        """Take one step, or refuse it; see `TrialOptimizer.step`."""
        self._data = [(inputs, targets)]
        return super().step(inputs, targets)

    def _local_model(self, objective: Objective, tally: Tally) -> LocalModel:
        return _Kronecker(self, ProductModel(*objective.gauss_newton(), tally), tally)


class _Kronecker:
    """The factors of one point."""

    def __init__(self, opt: KFAC, model: ProductModel, tally: Tally) -> None:
        from curvlinops import KFACLinearOperator

        self.loss, self.curvature, self.change = model.loss, model, model.change
        self._model, self._tally = model, tally
        self._parameters = list(opt.named_parameters().values())
        with torch.enable_grad():
            self._factors = KFACLinearOperator(
                opt.model,
                opt.loss_fn,
                self._parameters,
                opt._data,
                fisher_type="type-2",
                check_deterministic=False,
                separate_weight_and_bias=False,
            )
            self._factors.compute_kronecker_factors()  # here, before trial points move the parameters

    def propose(self, damping: float) -> tuple[Tensor, float]:
        from curvlinops import KFACInverseLinearOperator

        g = self._model.gradient
        with self._tally.factoring("kfac"):
            inverse = KFACInverseLinearOperator(self._factors, damping=damping, use_heuristic_damping=True)
        parts = [
            part.view_as(p)
            for part, p in zip(g.split([p.numel() for p in self._parameters]), self._parameters, strict=True)
        ]
        step = -torch.cat([part.reshape(-1) for part in inverse @ parts])
        # The length at which the exact quadratic model, damped, is least.
        image = self._model.product(step[:, None])[:, 0]
        slope, bend = float(g @ step), float(step @ image)
        a = -slope / (bend + damping * float(step @ step))
        return a * step, a * slope + 0.5 * a * a * bend
