"""TrustRegion: global minimizers of the exact quadratic model within a radius, hard case included."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from linop_hess._validate import Nonsmooth, finite_real
from linop_hess.linearization import Linearization
from linop_hess.optim.damping import GainRatio
from linop_hess.optim.objective import Loss, Objective
from linop_hess.optim.quadratic.chain import ChainModel
from linop_hess.optim.record import Tally
from linop_hess.optim.trial_optimizer import LocalModel, TrialOptimizer
from linop_hess.trust_region import solve


class TrustRegion(TrialOptimizer):
    """Steps that minimize gᵀs + ½sᵀHs over ‖s‖ ≤ Δ globally, by `linop_hess.trust_region.solve`.

    For proofs of minima and the last phase before them: a step follows negative curvature as far as the radius allows, which far away
    from a minimum is slower than turning it around, as `SaddleFree` does (docs/training.md). A step takes some factorizations.

    Parameters
    ----------
    model : torch.nn.Module
    loss_fn : callable
    params : iterable, optional
        See `CurvatureOptimizer`.
    radius : float
        Δ of the first trial point. It is adapted by the gain ratio, as 1/Δ² is by `GainRatio`.
    lr : float
        By which steps are multiplied.
    max_trials : int
        Points tried in a step.
    nonsmooth, sharpness
        As in `linop_hess.linearize`.

    Raises
    ------
    ValueError, TypeError
        If an argument is not usable.

    References
    ----------
    J. J. Moré and D. C. Sorensen, "Computing a trust region step", SIAM J. Sci. Stat. Comput. 4 (1983).

    Examples
    --------
    >>> import torch, linop_hess as lh
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()
    >>> x = torch.randn(10, 2).double()
    >>> opt = lh.optim.TrustRegion(model, torch.nn.functional.mse_loss)
    >>> losses = [opt.step(x, x.prod(1, keepdim=True)) for _ in range(20)]
    >>> losses[-1] < 0.1 * losses[0]
    True
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Loss,
        params: Iterable[Any] | None = None,
        *,
        radius: float = 1.0,
        lr: float = 1.0,
        max_trials: int = 12,
        nonsmooth: Nonsmooth = "generalized",
        sharpness: float | None = None,
    ) -> None:
        if not (size := finite_real(radius, "radius")) > 0.0:
            raise ValueError(f"expected radius to be positive, got {radius!r}: pass a length of steps")
        how: dict[str, Any] = {"lr": lr, "nonsmooth": nonsmooth, "sharpness": sharpness}
        super().__init__(model, loss_fn, params, GainRatio(size**-2), max_trials, False, **how)

    @property
    def radius(self) -> float:
        """Δ of the next trial point."""
        return float(self.damping.value**-0.5)

    def _local_model(self, objective: Objective, tally: Tally) -> LocalModel:
        if not objective.has_output:
            raise TypeError(
                "expected a closure that returns (output, target) for the exact Hessian of a chain, got one that returns the loss: use "
                "SaddleFree, which takes products, or return both"
            )
        return _Ball(self._linearize(objective), tally)


class _Ball:
    """The quadratic model with its steps of limited length."""

    def __init__(self, lin: Linearization, tally: Tally) -> None:
        self._lin, self._tally = lin, tally
        self.loss, self.curvature = lin.loss, ChainModel(lin.analysis, lin.loss, lin.gradient_tensor, tally)
        self.change = self.curvature.change

    def propose(self, damping: float) -> tuple[Tensor, float]:
        step = solve(self._lin, damping**-0.5)
        self._tally.factorizations += step.factorizations
        self._tally.products += step.products
        self._tally.method, self._tally.backward_error = step.kind, step.certificate.stationarity
        return torch.from_numpy(step.s).to(self._lin.problem.device), -step.decrease
