"""GaussNewton: Levenberg–Marquardt and trust-region steps on the exact Gauss-Newton matrix."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from math import prod
from typing import Any

import torch
from torch import nn

from linop_hess._validate import Nonsmooth, finite_real, true_or_false
from linop_hess.autograd.calling import takes_parameters
from linop_hess.errors import UnsupportedModelError
from linop_hess.lq.methods.plan import METHODS, make_plan
from linop_hess.optim.damping import TOLERANCE, Damping, DelayedGratification, GainRatio, as_damping
from linop_hess.optim.objective import Loss, Objective
from linop_hess.optim.quadratic.chain import ChainModel
from linop_hess.optim.quadratic.damped import Curve, LevenbergMarquardt, Solves, TrustRegionSteps
from linop_hess.optim.quadratic.function_space import FUNCTION_SPACE, FunctionSpace, function_space
from linop_hess.optim.record import Tally
from linop_hess.optim.trial_optimizer import LocalModel, TrialOptimizer

_FORMS = ("levenberg-marquardt", "trust-region")


class GaussNewton(TrialOptimizer):
    """Gauss-Newton steps s = −(G + λI)⁻¹g, G = Jᵀ(∇²ℓ)J of the batch, by rows of J or the method the plan picks.

    For least squares and losses of physics-informed networks. Where samples do not interact, the rows of J come from one backward pass an
    output (method "function-space"), and a damping costs a Cholesky factorization of JJᵀ or JᵀJ, whichever is smaller; "auto" does that
    where the product is cheap, else it linearizes and asks the plan.

    Parameters
    ----------
    model : torch.nn.Module
    loss_fn : callable
    params : iterable, optional
        See `CurvatureOptimizer`.
    lr : float
        By which steps are multiplied.
    damping : Damping or float, optional
        By default `GainRatio(0.1)`, of geodesic steps `DelayedGratification()`; an object is one optimizer's alone. In the trust-region
        form it holds 1/Δ².
    form : {"levenberg-marquardt", "trust-region"}
        Whether λ is adapted, or the radius Δ of which it is the multiplier.
    method : str
        "auto", "function-space", or a method of the plan. Where the loss is not convex in the output, "auto" leaves function space, whose
        matrix has the positive part of the loss's curvature.
    tolerance : float
        Backward error of solves.
    max_trials : int
        Points tried in a step.
    extrapolate : bool
        Whether a step is doubled while the loss falls, where it fell by more than the model promised: an evaluation of the loss each.
    geodesic : bool
        Whether Levenberg–Marquardt steps by rows of J are bent as the output bends along them (geodesic acceleration): two evaluations of
        the output and a solve each. It pays for least squares with a narrow curved valley, as of physics-informed networks.
    nonsmooth, sharpness
        As in `linop_hess.linearize`.

    Raises
    ------
    ValueError, TypeError
        If an argument is not usable.

    References
    ----------
    M. K. Transtrum and J. P. Sethna, "Improvements to the Levenberg-Marquardt algorithm for nonlinear least-squares minimization",
    arXiv 1201.5885 (2012): geodesic acceleration, and the damping that goes with it.

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
        geodesic: bool = False,
        nonsmooth: Nonsmooth = "generalized",
        sharpness: float | None = None,
    ) -> None:
        if form not in _FORMS:
            raise ValueError(f"expected form to be one of {list(_FORMS)}, got {form!r}: choose one")
        methods = ["auto", FUNCTION_SPACE, *METHODS]
        if method not in methods:
            raise ValueError(f"expected method to be one of {methods}, got {method!r}: choose one")
        self.geodesic = true_or_false(geodesic, "geodesic")
        if self.geodesic and (form != _FORMS[0] or method not in methods[:2]):
            raise ValueError(
                f'expected geodesic=True with form="{_FORMS[0]}" and method "auto" or "{FUNCTION_SPACE}", got form={form!r} and '
                f"method={method!r}: leave it out"
            )
        self.form, self.method = form, method
        self.tolerance = finite_real(tolerance, "tolerance")
        self._chosen: dict[tuple[Any, ...], str] = {}
        self._by_rows: dict[torch.Size | None, bool] = {}
        super().__init__(
            model,
            loss_fn,
            params,
            as_damping(damping, DelayedGratification() if self.geodesic else GainRatio(0.1)),
            max_trials,
            extrapolate,
            lr=lr,
            nonsmooth=nonsmooth,
            sharpness=sharpness,
        )

    @property
    def _form(self) -> str:
        return f"{super()._form} ({self.form})"

    def _local_model(self, objective: Objective, tally: Tally) -> LocalModel:
        if not objective.has_output:
            raise TypeError(
                "expected a closure that returns (output, target) for a Gauss-Newton matrix, got one that returns the loss: it tells "
                "nothing of the output; use SaddleFree, or return both"
            )
        kind = LevenbergMarquardt if self.form == _FORMS[0] else TrustRegionSteps
        rows = self._rows(objective, tally)
        if rows is not None:
            return kind(rows, rows.factored, Curve(objective, rows) if self.geodesic else None)
        lin = self._linearize(objective)
        chain = ChainModel(lin.gauss_newton().analysis, lin.loss, lin.gradient_tensor, tally)
        key = (lin.problem.size, lin.problem.layout.n_out.tobytes())
        if key not in self._chosen:
            self._chosen[key] = make_plan(chain.analysis, 1.0).choice if self.method == "auto" else self.method
        return kind(chain, partial(Solves, chain, self._chosen[key], self.tolerance), None)

    def _rows(self, objective: Objective, tally: Tally) -> FunctionSpace | None:
        """The model by rows of the Jacobian, where that is asked for, or possible and cheap."""
        if self.method not in ("auto", FUNCTION_SPACE):
            return None
        is_asked = self.method == FUNCTION_SPACE
        if objective.shape not in self._by_rows:
            self._by_rows[objective.shape] = is_asked or self._is_cheap(objective)
        if not self._by_rows[objective.shape]:
            return None
        found, why = None, "a loss of (output, target), one tensor as output, and nonsmooth='generalized'"
        if objective.shape and not takes_parameters(self.loss_fn) and self._linearize.nonsmooth == "generalized":
            try:
                found = function_space(objective, tally, objective.shape[0])
            except MemoryError:
                if is_asked:
                    raise
            why = (
                "samples that do not interact, in the model and in the loss, along the first axis of what depends on them, and a loss of "
                "the output alone"
            )
        if found is None and is_asked:
            raise UnsupportedModelError(f'expected {why} for method="{FUNCTION_SPACE}", got others: use method="auto"')
        self._by_rows[objective.shape] = found is not None
        return found if is_asked or found is None or found.is_convex else None

    def _is_cheap(self, objective: Objective) -> bool:
        shape = objective.shape or torch.Size([0])
        rows, size = prod(shape), sum(p.numel() for p in objective.leaves)
        least = min(rows, size)
        flops = 2.0 * rows * size * least + least**3 / 3.0
        if not objective.has_layers:
            return flops <= _CHEAP
        return flops <= _CHEAP_OF_LAYERS and len(objective.leaves) + prod(shape[1:]) <= _CALLS_OF_LAYERS


# Flops of the product of a Jacobian with itself, and of a factorization, up to which rows are taken: a chain of layers, of which nothing is
# recorded, takes less time from about 1e9 on (320 rows × 1,900 and 640 × 6,000 on either side); of a run that is recorded the stages of
# 1,000 points take seconds (8,192 points of Burgers' equation, 3e10 flops: a step of 1.3 s by rows, of 26 to 39 s through a chain). Each
# parameter and each output of a sample takes about 0.6 ms by rows; in a chain of layers outputs take none and layers half of that (20
# layers of 2 outputs: 28 ms and 35; 40 layers: 51 and 35; 3 layers of 64: 43 and 22).
_CHEAP_OF_LAYERS, _CHEAP = 1e9, 2e11
_CALLS_OF_LAYERS = 42
