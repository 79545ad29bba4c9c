"""PreconditionedSGD: gradients of mini-batches times the inverse curvature of a curvature batch."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from linop_hess._validate import Nonsmooth, finite_real, whole
from linop_hess.autograd.calling import NOT_GIVEN
from linop_hess.errors import NotFiniteError
from linop_hess.lq.inverse.inverse import Inverse
from linop_hess.lq.inverse.solver import Solver
from linop_hess.optim.absolute import AbsoluteInverse
from linop_hess.optim.base import FAILURES, CurvatureOptimizer, first_line
from linop_hess.optim.damping import MOST, TOLERANCE
from linop_hess.optim.objective import Loss, Objective
from linop_hess.optim.quadratic.averaged import DENSE_UP_TO, AveragedCurvature
from linop_hess.optim.record import StepRecord, Tally

DECAY = 0.9
"""Of the mean of curvatures, where it is dense by default."""

_CURVATURES = ("gauss_newton", "positive", "absolute")

Preconditioner = Callable[[Tensor], Tensor]


class PreconditionedSGD(CurvatureOptimizer):
    """SGD with momentum and decoupled weight decay on preconditioned gradients.

    The curvature is that of a batch of its own, of any size, and is kept for several steps. A step whose loss or gradient is not finite
    is refused, and the damping of the next curvature doubled; so is a curvature that cannot be inverted, the last one staying in use.
    Each one that can be halves it again, down to the given one.
    What makes it work (docs/training.md): curvature batches that are larger than those of the gradients, their mean over steps, and a
    bound on what a step changes by that curvature.

    A stored state has momentum and damping and no inverses: loaded, it makes one at the next step.

    Parameters
    ----------
    model : torch.nn.Module
    loss_fn : callable
    params : iterable, optional
        See `CurvatureOptimizer`.
    lr : float
    momentum : float
        Between 0 and 1.
    weight_decay : float
        Each step takes this part of a parameter, times lr, from it.
    curvature : {"gauss_newton", "positive", "absolute"}
        (G + λI)⁻¹ of Gauss-Newton; `HessianInverse.positive` of H + λI; (H² + λ²I)^(−½), by quadrature, or of the mean by eigenvalues.
    damping : float
        λ.
    every : int
        Steps for which a curvature is kept.
    clip : float or None
        The most that sᵀP⁻¹s may be of a step s = −lr·Pg without momentum, where P is the inverse: longer ones are shortened. None: any.
    decay : float or None
        Of the mean of curvatures over steps, as a dense matrix: the part of the old one that is kept, 0 for none. By default 0.9 up to
        4096 parameters, else 0; always 0 for "positive".
    average : int
        The mean of the inverses of this many last curvatures preconditions, where there is no mean of curvatures.
    curvature_batch : callable, optional
        ``curvature_batch()`` gives inputs and targets for the curvature; by default those of the step where it is renewed.
    poles : int
        Of the quadrature.
    nonsmooth, sharpness
        As in `linop_hess.linearize`.

    Raises
    ------
    ValueError, TypeError
        If an argument is not usable.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Loss,
        params: Iterable[Any] | None = None,
        *,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        curvature: str = "gauss_newton",
        damping: float = 0.1,
        every: int = 7,
        clip: float | None = 3e-4,
        decay: float | None = None,
        average: int = 1,
        curvature_batch: Callable[[], tuple[Any, Any]] | None = None,
        poles: int = 6,
        nonsmooth: Nonsmooth = "generalized",
        sharpness: float | None = None,
    ) -> None:
        if curvature not in _CURVATURES:
            raise ValueError(f"expected curvature to be one of {list(_CURVATURES)}, got {curvature!r}: choose one")
        momentum, weight_decay = finite_real(momentum, "momentum"), finite_real(weight_decay, "weight_decay")
        if not 0.0 <= momentum < 1.0 or weight_decay < 0.0:
            raise ValueError(
                f"expected a momentum in [0, 1) and a weight_decay of at least 0, got {momentum!r} and {weight_decay!r}: change them"
            )
        self.damping_value = finite_real(damping, "damping")
        if not self.damping_value > 0.0:
            raise ValueError(f"expected damping to be positive, got {damping!r}: pass a positive number")
        self._given = self.damping_value
        self.clip = None if clip is None else finite_real(clip, "clip")
        if self.clip is not None and not self.clip > 0.0:
            raise ValueError(
                f"expected clip to be positive, got {clip!r}: pass a positive number, or None for no bound"
            )
        self.decay = None if decay is None else finite_real(decay, "decay")
        if self.decay is not None and not 0.0 <= self.decay < 1.0:
            raise ValueError(f"expected decay in [0, 1), got {decay!r}: pass 0.0 for no mean of curvatures")
        if self.decay and (curvature == "positive" or average != 1):
            raise ValueError(
                f"expected decay=0.0 with {'curvature=' + repr(curvature) if curvature == 'positive' else 'an average of inverses'}, got "
                f'{decay!r}: a mean of curvatures is inverted once, as Gauss-Newton\'s or "absolute"'
            )
        self.kind, self.every, self.poles = curvature, whole(every, "every", least=1), whole(poles, "poles", least=1)
        self._curvature_batch = curvature_batch
        self._inverses: deque[Preconditioner] = deque(maxlen=whole(average, "average", least=1))
        self._mean: AveragedCurvature | None = None
        super().__init__(
            model,
            loss_fn,
            params,
            lr=lr,
            nonsmooth=nonsmooth,
            sharpness=sharpness,
            momentum=momentum,
            weight_decay=weight_decay,
        )

    def step(self, inputs: Any = NOT_GIVEN, targets: Any = NOT_GIVEN) -> float:  # type: ignore[override]
        """Take one step on a mini-batch, or refuse it.

        Parameters
        ----------
        inputs : object or callable
            As of `SaddleFree.step`; with a closure that returns the loss, the curvature must come from `curvature_batch`.
        targets : object

        Returns
        -------
        float
            The loss before the step.

        Raises
        ------
        UnsupportedModelError
            If the model is random, or changes its buffers, where a curvature is made: call ``model.eval()``.
        TypeError, ValueError
            If a closure returns something else, or the model has other parameters than before.
        """
        tally = Tally()
        objective = self._objective(inputs, targets)
        number = self._steps + 1
        loss, gradient, _ = objective.gradient(products=False)
        record = StepRecord(number, loss, loss, damping=self.damping_value)
        if not (math.isfinite(loss) and bool(torch.isfinite(gradient).all())):
            self.damping_value = min(2.0 * self.damping_value, MOST)
            return self._recorded(_refused(record, "the loss or its gradient is not finite"), tally)
        with torch.no_grad():
            reason = self._renewed(objective, tally) if self._is_due() else ""
            if not self._inverses:
                return self._recorded(_refused(record, reason), tally)
            direction = sum((inverse(gradient) for inverse in self._inverses), torch.zeros_like(gradient))
            direction = direction / len(self._inverses)
            if not bool(torch.isfinite(direction).all()):
                self._forget()
                self.damping_value = min(2.0 * self.damping_value, MOST)
                return self._recorded(_refused(record, "the preconditioned gradient is not finite"), tally)
            self._move(self._clipped(direction, gradient))
        return self._recorded(StepRecord(number, loss, accepted=True, damping=self.damping_value, reason=reason), tally)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; the curvature of all of them is made anew. Raises as `CurvatureOptimizer.add_param_group`."""
        super().add_param_group(param_group)
        self._forget()

    def _forget(self) -> None:
        self._inverses.clear()
        self._mean = None

    def _is_due(self) -> bool:
        return not self._inverses or self._steps % self.every == 0

    def _renewed(self, objective: Objective, tally: Tally) -> str:
        """Make the inverse of a new curvature; why not, where that fails."""
        if self._curvature_batch is not None:
            objective = self._objective(*self._curvature_batch())
        try:
            with tally.factoring(self.kind):
                self._inverses.append(self._inverse(objective))
        except (NotFiniteError, *FAILURES) as error:
            self.damping_value = min(2.0 * self.damping_value, MOST)
            return first_line(error)
        # What was refused in between, as some bad batches, does not stay.
        self.damping_value = max(self.damping_value / 2.0, min(self.damping_value, self._given))
        return ""

    def _inverse(self, objective: Objective) -> Preconditioner:
        lin, damping = self._linearize(objective), self.damping_value
        decay = self._decay_of(lin.problem.size)
        if decay:
            self._mean = self._mean or AveragedCurvature(decay, self.kind == "absolute")
            self._mean.add(lin, damping)
            return self._mean
        if self.kind == "positive":
            product = Inverse(lin.analysis, damping).positive()
            return lambda g: product(g[:, None])[:, 0]
        if self.kind == "absolute":
            absolute = AbsoluteInverse(lin, damping, poles=self.poles, tolerance=TOLERANCE)
            return lambda g: absolute(g).to(g.dtype)
        tolerance = TOLERANCE if lin.problem.dtype == torch.float64 else None
        solver = Solver(lin.gauss_newton().analysis, damping, tolerance=tolerance)
        return lambda g: solver.solve(g).x

    def _decay_of(self, size: int) -> float:
        if self.decay is not None:
            return self.decay
        one = self._inverses.maxlen == 1 and self.kind != "positive"
        return DECAY if one and size <= DENSE_UP_TO else 0.0

    def _clipped(self, direction: Tensor, gradient: Tensor) -> Tensor:
        """The direction, shorter where the step would change too much by its own curvature: (lr·Pg)ᵀP⁻¹(lr·Pg) = lr² gᵀPg."""
        if self.clip is None:
            return direction
        rates = self._rates()
        scaled = direction if rates is None else direction * rates.square().to(direction)
        change = float(gradient @ scaled)
        return direction if change <= self.clip else direction * math.sqrt(self.clip / change)

    def _move(self, direction: Tensor) -> None:
        groups = {id(p): group for group in self.param_groups for p in group["params"]}
        parameters = list(self.named_parameters().values())
        for p, part in zip(parameters, direction.split([p.numel() for p in parameters]), strict=True):
            group, state = groups[id(p)], self.state[p]
            part = part.view_as(p)
            if group["momentum"]:
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                part = state["momentum_buffer"].mul_(group["momentum"]).add_(part)
            if group["weight_decay"]:
                p.mul_(1.0 - group["lr"] * group["weight_decay"])
            p.add_(part, alpha=-group["lr"])

    def _curvature_state(self) -> dict[str, Any]:
        return {**super()._curvature_state(), "damping": self.damping_value}

    def __getstate__(self) -> dict[str, Any]:
        """As of all optimizers here; inverses are made anew, as after `load_state_dict`."""
        return {**super().__getstate__(), "_inverses": deque(maxlen=self._inverses.maxlen), "_mean": None}

    def _require_state(self, state: Mapping[str, Any]) -> None:
        super()._require_state(state)
        if isinstance(state["damping"], Mapping):
            raise KeyError(
                f"expected the state of a {self._form}, got one whose damping is a strategy: it was stored by another optimizer"
            )

    def _load_curvature_state(self, state: Mapping[str, Any]) -> None:
        super()._load_curvature_state(state)
        self.damping_value = float(state["damping"])
        self._forget()


def _refused(record: StepRecord, reason: str) -> StepRecord:
    return StepRecord(record.step, record.loss, record.new_loss, damping=record.damping, reason=reason)
