"""What all optimizers here share: parameters by name, objectives, trial points, records, states."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from linop_hess._validate import Nonsmooth, finite_real, require_loss_fn
from linop_hess.autograd.snapshot import select_parameters
from linop_hess.errors import FactorizationError, SingularPivotError
from linop_hess.optim.objective import Loss, Objective, objective_of
from linop_hess.optim.quadratic.chain import Linearizer
from linop_hess.optim.record import StepRecord, Tally

FAILURES = (FactorizationError, SingularPivotError, torch.linalg.LinAlgError, OverflowError)
"""How factorizations and solves fail, for which a step is refused."""


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
        rates = {id(p): _rate(group["lr"], may_be_zero=True) for group in self.param_groups for p in group["params"]}
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


def first_line(error: BaseException) -> str:
    """The first sentence of a message."""
    return str(error).split(";")[0].split("\n")[0] or type(error).__name__


def _rate(lr: Any, may_be_zero: bool = False) -> float:
    """A rate; a scheduler may set zero, where it begins or ends there."""
    rate = finite_real(lr, "lr")
    if not (rate > 0.0 or (may_be_zero and rate == 0.0)):
        raise ValueError(f"expected a positive rate lr, got {lr!r}: pass 1.0 for full steps")
    return rate
