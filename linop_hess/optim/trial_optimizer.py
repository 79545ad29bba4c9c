"""Optimizers that try points of a quadratic model until one is taken."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from linop_hess._validate import true_or_false, whole
from linop_hess.autograd.calling import NOT_GIVEN
from linop_hess.autograd.snapshot import buffers_of, changed_buffers
from linop_hess.errors import NotFiniteError, UnsupportedModelError
from linop_hess.lq.accuracy import LOSS_REPEATS
from linop_hess.optim.base import FAILURES, CurvatureOptimizer, first_line
from linop_hess.optim.damping import Curvature, Damping
from linop_hess.optim.objective import Loss, Objective
from linop_hess.optim.record import StepRecord, Tally
from linop_hess.optim.trials import Course, Point, Trial, further, searched

ACCEPTED = 1e-4
"""A trial point is taken where the loss falls by more than this part of what the model promised."""


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


class TrialOptimizer(CurvatureOptimizer):
    """An optimizer that tries points of a quadratic model until one lowers the loss, or goes on uphill where its damping strategy lets it.

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
        self._course = Course()
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

    def step(self, inputs: Any = NOT_GIVEN, targets: Any = NOT_GIVEN) -> float:  # type: ignore[override]
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
        objective, loss = self._at_first(inputs, targets)
        with torch.no_grad():
            return self._recorded(self._tried(objective, loss, tally), tally)

    @torch.no_grad()
    def return_to_least(self) -> float:
        """Put the parameters back to where the loss was least since the objective was another one, and return that loss.

        Of use after steps that may go uphill, as with `DelayedGratification`; after all others the loss is least where the parameters are.

        Raises
        ------
        IndexError
            Before the first step whose loss and derivatives were finite.
        ValueError
            If the model has other parameters than in the last step.
        """
        if not self._course.kept:
            raise IndexError("expected a step whose loss and derivatives were finite, got none: call step() first")
        parameters = list(self.named_parameters().values())
        if [p.shape for p in parameters] != [kept.shape for kept in self._course.kept]:
            raise ValueError("expected the parameters of the last step, got others since: call step() first")
        self._course.back(parameters)
        return self._course.least

    def _at_first(self, inputs: Any, targets: Any) -> tuple[Objective, float]:
        """The objective and its loss, of a model that leaves its buffers alone."""
        before = buffers_of(self.model)
        objective = self._objective(inputs, targets)
        loss = objective.loss()
        if changed := changed_buffers(self.model, before):
            raise UnsupportedModelError(
                f"expected a model that leaves its buffers alone, got one whose forward pass changes {', '.join(changed[:5])}: call "
                "model.eval() first"
            )
        return objective, loss

    def _tried(self, objective: Objective, loss: float, tally: Tally) -> StepRecord:
        number, rates = self._steps + 1, self._rates()
        if rates is not None and not bool(rates.any()):
            return StepRecord(number, loss, loss, reason="all rates are zero", damping=self.damping.value)
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
        parameters = list(self.named_parameters().values())
        self._course.begin(loss, parameters, objective.data)
        point = Point(objective, parameters)
        ratio, tried, reason = math.nan, self.damping.value, ""
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
                    self._course.went(trial.step, new, parameters)
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
        taken = ratio > ACCEPTED or self._course.leads(step, new, self.damping.bold)
        return step, new, ratio, "" if taken else "the loss does not fall"

    def _curvature_state(self) -> dict[str, Any]:
        return {**super()._curvature_state(), "damping": self.damping.state_dict(), "course": self._course.state_dict()}

    def _require_state(self, state: Mapping[str, Any]) -> None:
        super()._require_state(state)
        self.damping.require_state(state["damping"])

    def _load_curvature_state(self, state: Mapping[str, Any]) -> None:
        super()._load_curvature_state(state)
        self.damping.load_state_dict(state["damping"])
        self._course = Course()
        if "course" in state:
            self._course.load_state_dict(state["course"])


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
