"""Trial points of a step: where the parameters are put, and how a point that lowers the loss is bettered."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from linop_hess.autograd.differentiate import once_differentiable_graphs
from linop_hess.lq.accuracy import LOSS_REPEATS
from linop_hess.optim.damping import Damping
from linop_hess.optim.objective import Objective
from linop_hess.optim.record import Tally

# A step is made longer by this at most; and goes uphill to so many times the least loss.
_FURTHEST, _HIGHEST = 64.0, 100.0


class Point:
    """The parameters of a point, which trial points start from."""

    def __init__(self, objective: Objective, parameters: list[nn.Parameter]) -> None:
        self._objective, self._parameters = objective, parameters
        self._sizes = [p.numel() for p in parameters]
        self.keep()

    def keep(self) -> None:
        """Make the current parameters the point."""
        self._kept = [p.detach().clone() for p in self._parameters]

    def at(self, step: Tensor) -> float:
        """Move by a step from the point, and return the loss there."""
        self._move(step)
        return self._objective.loss()

    def output_at(self, step: Tensor) -> Tensor:
        """Move by a step from the point, and return the model's output there, one tensor."""
        self._move(step)
        with once_differentiable_graphs(self._parameters[0].device):
            output = self._objective.output()
        return output.detach()

    def _move(self, step: Tensor) -> None:
        for p, before, part in zip(self._parameters, self._kept, step.split(self._sizes), strict=True):
            p.copy_(before + part.view_as(p).to(p.dtype))

    def back(self) -> None:
        """Return to the point, bit for bit."""
        for p, before in zip(self._parameters, self._kept, strict=True):
            p.copy_(before)


class Trial(NamedTuple):
    """A trial point that lowers the loss.

    Attributes
    ----------
    step : Tensor, shape (N,)
    loss : float
        There.
    ratio : float
        The gain ratio.
    """

    step: Tensor
    loss: float
    ratio: float


class Course:
    """Where the last steps led: a step that goes uphill may be taken where it goes on in their direction.

    Attributes
    ----------
    least : float
        The least loss so far, of one objective.
    kept : list of Tensor
        The parameters there.
    """

    def __init__(self) -> None:
        self.least, self.kept = math.inf, list[Tensor]()
        self._loss, self._step = math.nan, torch.zeros(0, dtype=torch.float64, device="cpu")

    def begin(self, loss: float, parameters: list[nn.Parameter]) -> None:
        """Begin a step at a loss; where the last one did not end at it the objective is another, and all is forgotten."""
        if (
            not 0.0 < abs(loss)
            or not abs(loss - self._loss) <= LOSS_REPEATS * abs(loss)
            or self._size(parameters) != self._step.numel()
        ):
            self.least, self._step = math.inf, torch.zeros(0, dtype=torch.float64, device="cpu")
            self.went(self._step, loss, parameters)

    def leads(self, step: Tensor, loss: float, bold: float) -> bool:
        """Whether (1 − cos β)ᵇ times the loss is at most the least so far, β the angle to the last step, and no loss is below zero."""
        if not bold or self._step.shape != step.shape or not 0.0 <= loss <= _HIGHEST * self.least:
            return False
        cosine = float(self._step.to(step.device) @ step) / float(self._step.norm() * step.norm())
        if not math.isfinite(cosine):
            return False
        turned = min(max(1.0 - cosine, 0.0), 2.0)  # rounding leads beyond where steps are parallel
        return turned == 0.0 or bold * math.log(turned) + math.log(loss or 5e-324) <= math.log(self.least or 5e-324)

    def went(self, step: Tensor, loss: float, parameters: list[nn.Parameter]) -> None:
        """Remember a step that was taken, and where it ended."""
        self._step, self._loss = step, loss
        if loss < self.least:
            self.least, self.kept = loss, [p.detach().clone() for p in parameters]

    def back(self, parameters: list[nn.Parameter]) -> None:
        """Put parameters back to where the loss was least."""
        for p, kept in zip(parameters, self.kept, strict=True):
            p.copy_(kept)
        self._step, self._loss = torch.zeros(0, dtype=torch.float64, device="cpu"), self.least

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes."""
        return {"least": self.least, "kept": self.kept, "loss": self._loss, "step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a stored state."""
        self.least, self.kept, self._loss, self._step = (state[name] for name in ("least", "kept", "loss", "step"))

    @staticmethod
    def _size(parameters: list[nn.Parameter]) -> int:
        return sum(p.numel() for p in parameters)


Try = Callable[[], tuple[Tensor, float, float, str]]
"""Go to the trial point of the damping as it is: the step, the loss there, the gain ratio, and why it is refused."""


def searched(again: Try, point: Point, damping: Damping, best: Trial, most: int) -> Trial:
    """Change λ by the factor of its strategy while the loss falls further; be at the best of at most `most` points, and return it."""
    factor, start = damping.factor, damping.value
    for change in () if factor is None else (1.0 / factor, factor):
        while most > 0:
            most, before = most - 1, damping.value
            damping.value = before * change
            step, loss, ratio, reason = again()
            if reason or not loss < best.loss:
                damping.value = before
                break
            best = Trial(step, loss, ratio)
        if damping.value != start:
            break
    point.at(best.step)
    return best


def further(point: Point, trial: Trial, tally: Tally) -> float:
    """Double a step while the loss falls, where it fell by more than the model promised; return the loss.

    So it is at the end of a fit by cross entropy, whose logits grow without end: a Newton step takes exp(−z) to a part of 1/e alone.
    """
    factor, lowest = 1.0, trial.loss
    while trial.ratio > 1.0 and factor < _FURTHEST:
        tally.trials += 1
        longer = point.at(2.0 * factor * trial.step)
        if not longer < lowest:
            point.at(factor * trial.step)
            break
        factor, lowest = 2.0 * factor, longer
    return lowest
