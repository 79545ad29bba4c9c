"""What all optimizers here share: parameters by name, objectives, trial points, records, states."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from linop_hess._validate import Nonsmooth, finite_real, require_loss_fn, true_or_false, whole
from linop_hess.autograd.calling import NOT_GIVEN
from linop_hess.autograd.snapshot import select_parameters
from linop_hess.errors import FactorizationError, NotFiniteError, SingularPivotError, UnsupportedModelError
from linop_hess.lq.accuracy import LOSS_REPEATS
from linop_hess.optim.damping import Curvature, Damping
from linop_hess.optim.objective import Loss, Objective, objective_of
from linop_hess.optim.quadratic import Linearizer
from linop_hess.optim.record import StepRecord, Tally
from linop_hess.optim.trials import Point, Trial, further, searched

ACCEPTED = 1e-4
"""A trial point is taken where the loss falls by more than this part of what the model promised."""

FAILURES = (FactorizationError, SingularPivotError, torch.linalg.LinAlgError, OverflowError)
"""How factorizations and solves fail, for which a step is refused."""


class LocalModel(Protocol):
    """The quadratic model of one point.

    Attributes
    ----------
    loss : float
    """

    loss: float

    @property
    def curvature(self) -> Curvature:
        """What a damping strategy may ask."""

    def propose(self, damping: float) -> tuple[Tensor, float]:
        """The step at a damping, (N,) in float64, and the change of the loss that the model promises, negative.

        What is raised where the damped curvature cannot be inverted is one of `FAILURES`.
        """

    def change(self, step: Tensor) -> float:
        """The change of the loss that the model promises for any step."""


class CurvatureOptimizer(torch.optim.Optimizer):
    """An optimizer that knows the model and the loss, and so their curvature.

    Parameters
    ----------
    model : torch.nn.Module
    loss_fn : callable or None
        ``loss_fn(output, target)``, or with the dict of parameters as a third argument. None where closures return the loss.
    params : iterable, optional
        Parameters of the model, or groups of them as dicts, as of any torch optimizer; by default all that require a gradient.
    lr : float
        By which steps are multiplied, of each group its own; a scheduler may change it.
    nonsmooth, sharpness
        Of kinks, as in `linop_hess.linearize`.

    Attributes
    ----------
    records : list of StepRecord
        One for each step.

    Raises
    ------
    ValueError
        If there is no parameter, one is not the model's, or a rate is not positive.
    TypeError
        If the model or the loss function is none.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Loss | None,
        params: Iterable[Any] | None = None,
        *,
        lr: float = 1.0,
        nonsmooth: Nonsmooth = "generalized",
        sharpness: float | None = None,
        **defaults: Any,
    ) -> None:
        names = select_parameters(model, None)
        if loss_fn is not None:
            require_loss_fn(loss_fn)
        self.model, self.loss_fn = model, loss_fn
        self._linearize = Linearizer(nonsmooth, sharpness)
        self.records: list[StepRecord] = []
        self._steps = 0
        self._all = params is None
        self._shapes: dict[int, tuple[str, torch.Size]] = {}
        if params is None:
            params = [model.get_parameter(name) for name in names]
        super().__init__(params, {"lr": _rate(lr), **defaults})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters of the model; see `torch.optim.Optimizer.add_param_group`.

        Raises
        ------
        ValueError
            If the group is empty, a parameter is not the model's, or its rate is not positive.
        """
        if isinstance(param_group, dict) and "params" in param_group and not isinstance(param_group["params"], Tensor):
            param_group = {**param_group, "params": list(param_group["params"])}
            if not param_group["params"]:
                raise ValueError("expected parameters in each group, got an empty one: leave it out")
        super().add_param_group(param_group)
        _rate(self.param_groups[-1]["lr"])
        names = {id(p): name for name, p in self.model.named_parameters()}
        for p in self.param_groups[-1]["params"]:
            if id(p) not in names:
                self.param_groups.pop()
                raise ValueError(
                    f"expected parameters of the model, got one of shape {tuple(p.shape)} that is not: pass some of model.parameters()"
                )
            self._shapes[id(p)] = names[id(p)], p.shape

    @property
    def last(self) -> StepRecord:
        """The record of the last step.

        Raises
        ------
        IndexError
            Before the first step.
        """
        if not self.records:
            raise IndexError("expected a step before its record is asked for, got none: call step() first")
        return self.records[-1]

    @property
    def sharpness(self) -> float | None:
        """Of the surrogates of kinks, None where there are none; with ``nonsmooth="smooth"`` it may be set between steps."""
        return self._linearize.sharpness

    @sharpness.setter
    def sharpness(self, value: float | None) -> None:
        self._linearize = Linearizer(self._linearize.nonsmooth, value)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that are optimized, by name, in the order of the model, which is that of flat vectors.

        Raises
        ------
        ValueError
            If the model has other parameters than those the optimizer was made with.
        """
        mine = {id(p): p for group in self.param_groups for p in group["params"]}
        found = {name: p for name, p in self.model.named_parameters() if id(p) in mine}
        if len(found) < len(mine):
            gone = [self._shapes[key][0] for key in mine if key not in {id(p) for p in found.values()}]
            raise ValueError(
                f"expected the parameters that the optimizer was made with, got a model without its {', '.join(gone[:5])}: they were "
                "replaced; make a new optimizer"
            )
        for name, p in found.items():
            if p.shape != self._shapes[id(p)][1]:
                raise ValueError(
                    f"expected {name} of shape {tuple(self._shapes[id(p)][1])}, got {tuple(p.shape)}: make a new optimizer"
                )
        if self._all:
            new = [name for name, p in self.model.named_parameters() if p.requires_grad and id(p) not in mine]
            if new:
                raise ValueError(
                    f"expected the parameters that the optimizer was made with, got new ones, {', '.join(new[:5])}: add them by "
                    "add_param_group, freeze them, or make a new optimizer"
                )
        return found

    def _objective(self, data: Any, targets: Any) -> Objective:
        return objective_of(self.named_parameters(), self.model, self.loss_fn, data, targets)

    def _rates(self) -> Tensor | None:
        """The rate of each entry of a flat vector; None where all are 1."""
        rates = {id(p): _rate(group["lr"]) for group in self.param_groups for p in group["params"]}
        if all(rate == 1.0 for rate in rates.values()):
            return None
        parts = [
            torch.full((p.numel(),), rates[id(p)], dtype=torch.float64, device=p.device)
            for p in self.named_parameters().values()
        ]
        return torch.cat(parts).to(next(iter(self.named_parameters().values())).device)

    def _recorded(self, record: StepRecord, tally: Tally) -> float:
        self._steps += 1
        self.records.append(tally.completed(record))
        return record.loss

    def state_dict(self) -> dict[str, Any]:
        """As of any optimizer, and under "curvature" what the damping has come to; records are not stored."""
        return {**super().state_dict(), "curvature": self._curvature_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a stored state.

        Raises
        ------
        KeyError
            If it is that of another optimizer.
        """
        if "curvature" not in state_dict:
            raise KeyError(
                f"expected the state of a {type(self).__name__}, got one without its damping: it was stored by another optimizer"
            )
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "curvature"})
        self._load_curvature_state(state_dict["curvature"])

    def _curvature_state(self) -> dict[str, Any]:
        return {"steps": self._steps}

    def _load_curvature_state(self, state: dict[str, Any]) -> None:
        self._steps = int(state["steps"])


class TrialOptimizer(CurvatureOptimizer):
    """An optimizer that tries points of a quadratic model until one lowers the loss.

    A point whose loss is not finite, or whose damped curvature cannot be inverted, is refused like one where the loss rises: the damping
    is raised, and the parameters are put back bit for bit. A step all of whose points are refused changes nothing but the damping.

    Parameters
    ----------
    model, loss_fn, params
        As of `CurvatureOptimizer`.
    damping : Damping
    max_trials : int
        Points tried in a step.
    extrapolate : bool
        Whether a step is doubled while the loss falls, where it fell by more than the model promised.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Loss | None,
        params: Iterable[Any] | None,
        damping: Damping,
        max_trials: int,
        extrapolate: bool,
        **how: Any,
    ) -> None:
        super().__init__(model, loss_fn, params, **how)
        self.damping, self.max_trials = damping, whole(max_trials, "max_trials", least=1)
        self.extrapolate = true_or_false(extrapolate, "extrapolate")

    @abstractmethod
    def _local_model(self, objective: Objective, tally: Tally) -> LocalModel:
        """The quadratic model at the current parameters.

        Raises
        ------
        NotFiniteError
            If a derivative is NaN or infinite.
        """

    def step(self, inputs: Any, targets: Any = NOT_GIVEN) -> float:  # type: ignore[override]
        """Take one step, or refuse it.

        Parameters
        ----------
        inputs : object or callable
            Of one batch; or a closure that returns ``(output, target)``, or the loss itself where products alone are needed. It is called
            several times, without side effects that change what it returns.
        targets : object
            Of the same batch; left out with a closure.

        Returns
        -------
        float
            The loss before the step; `last` is its record.

        Raises
        ------
        TypeError, ValueError
            If the model is random, or changes its buffers (`UnsupportedModelError`; call ``model.eval()``), a closure returns something
            else, or the model has other parameters than before.
        """
        tally = Tally()
        objective = self._objective(inputs, targets)
        with torch.no_grad():
            return self._recorded(self._tried(objective, tally), tally)

    def _tried(self, objective: Objective, tally: Tally) -> StepRecord:
        number = self._steps + 1
        loss = objective.loss()
        if not math.isfinite(loss):
            self.damping.refused()
            return StepRecord(number, loss, reason="the loss is not finite", damping=self.damping.value)
        try:
            model = self._local_model(objective, tally)
            _require_same(loss, model.loss, objective)
            tally.inertia = self.damping.begin(model.curvature)
        except (NotFiniteError, *FAILURES) as error:
            self.damping.refused()
            return StepRecord(number, loss, loss, reason=first_line(error), damping=self.damping.value)
        point = Point(objective, list(self.named_parameters().values()))
        rates, ratio, tried, reason = self._rates(), math.nan, self.damping.value, ""
        try:
            for _ in range(self.max_trials):
                tried = self.damping.value
                step, new, ratio, reason = self._try(model, point, rates, tally)
                if not reason:
                    trial = Trial(step, new, ratio)
                    if self.damping.factor is not None:
                        again = partial(self._try, model, point, rates, tally)
                        trial = searched(again, point, self.damping, trial, self.max_trials)
                        tried, ratio = self.damping.value, trial.ratio
                    new = further(point, trial, tally) if self.extrapolate else trial.loss
                    self.damping.accepted(ratio, tally.backward_error)
                    point.keep()
                    return StepRecord(number, loss, new, True, ratio, tried)
                self.damping.refused()
                if reason == _NO_SLOPE:
                    break
        finally:
            point.back()
        return StepRecord(number, loss, loss, False, ratio, tried, reason=reason)

    def _try(
        self, model: LocalModel, point: Point, rates: Tensor | None, tally: Tally
    ) -> tuple[Tensor, float, float, str]:
        """Go to a trial point: the step, the loss there, the gain ratio, and why it is refused."""
        tally.trials += 1
        nowhere = torch.zeros(0, dtype=torch.float64, device="cpu")
        try:
            step, promised = model.propose(self.damping.value)
        except FAILURES as error:
            return nowhere, math.nan, math.nan, first_line(error)
        if rates is not None:
            step = rates * step
            promised = model.change(step)
        if not bool(torch.isfinite(step).all()):
            return nowhere, math.nan, math.nan, "the step is not finite"
        if not bool(step.any()):
            return nowhere, model.loss, math.nan, _NO_SLOPE
        new = point.at(step)
        if not math.isfinite(new):
            return step, new, -math.inf, "the loss is not finite at the trial point"
        if not promised < 0.0:
            return step, new, math.nan, "the model promises no decrease"
        ratio = (model.loss - new) / -promised
        return step, new, ratio, "" if ratio > ACCEPTED else "the loss does not fall"

    def _curvature_state(self) -> dict[str, Any]:
        return {**super()._curvature_state(), "damping": self.damping.state_dict()}

    def _load_curvature_state(self, state: dict[str, Any]) -> None:
        super()._load_curvature_state(state)
        self.damping.load_state_dict(state["damping"])


_NO_SLOPE = "the gradient is zero"


def _require_same(loss: float, of_model: float, objective: Objective) -> None:
    """Refuse a loss that is another one when it is computed again, in the same way.

    In another way it may be off by all of its digits: near its least value it is rounding.

    Raises
    ------
    UnsupportedModelError
        If it is off by more than sums in another order explain.
    """
    if of_model == loss:
        return
    again = objective.loss()
    if abs(loss - again) > LOSS_REPEATS * max(abs(loss), abs(again)):
        raise UnsupportedModelError(
            f"expected a model and a loss that give the same value each time, got {loss!r} and {again!r}: call model.eval(), or remove "
            "what is random"
        )


def first_line(error: BaseException) -> str:
    """The first sentence of a message."""
    return str(error).split(";")[0].split("\n")[0] or type(error).__name__


def _rate(lr: Any) -> float:
    rate = finite_real(lr, "lr")
    if not rate > 0.0:
        raise ValueError(f"expected a positive rate lr, got {lr!r}: pass 1.0 for full steps")
    return rate
