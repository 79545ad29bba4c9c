"""What a case of the zoo (`tests/graph/zoo.py`) is: a model with its loss and data, and how they are called."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as f


@dataclass(frozen=True)
class Case:
    """A model with its loss and data.

    Attributes
    ----------
    model : torch.nn.Module or callable
        A module, called as ``model(*inputs)`` where `inputs` is a tuple and else as ``model(inputs)``; or a function
        ``model(params, inputs)``.
    loss_fn : callable
        ``loss_fn(output, target)``, or with three positional arguments ``loss_fn(output, target, params)``.
    inputs, targets : object
    params : dict of str to Tensor, sequence of str, or None
        The parameters of a function; names and glob patterns to select those of a module; or None, all trainable.
    size : int
        Number of parameters differentiated by, counted by hand.
    notes : str
        What is special.
    """

    model: Any
    loss_fn: Callable[..., Tensor]
    inputs: Any
    targets: Any
    size: int
    params: dict[str, Tensor] | Sequence[str] | None = None
    notes: str = ""
    name: str = ""

    def to(self, dtype: torch.dtype) -> Case:
        """Return a copy in another precision."""
        model = _copied(self.model).to(dtype) if isinstance(self.model, nn.Module) else self.model
        inputs, targets, params = (_cast(part, dtype) for part in (self.inputs, self.targets, self.params))
        return replace(self, model=model, inputs=inputs, targets=targets, params=params)

    def chosen(self) -> dict[str, Tensor]:
        """Return the parameters to differentiate by, in order, each once."""
        if isinstance(self.params, dict):
            return self.params
        patterns = ["*"] if self.params is None else self.params
        return {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and any(fnmatchcase(name, pattern) for pattern in patterns)
        }

    def loss(self, values: dict[str, Tensor]) -> Tensor:
        """Return the loss with other values of the chosen parameters. Buffers are copies, so nothing is changed."""
        if isinstance(self.model, nn.Module):
            state = {name: buffer.clone() for name, buffer in self.model.named_buffers()} | values
            arguments = self.inputs if isinstance(self.inputs, tuple) else (self.inputs,)
            output = torch.func.functional_call(self.model, state, arguments)
        else:
            output = self.model(values, self.inputs)
        extra = (values,) if positional(self.loss_fn) == 3 else ()
        return self.loss_fn(output, self.targets, *extra)


def normal(*shape: int) -> Tensor:
    """Draw in float64 from torch's generator."""
    return torch.randn(shape, dtype=torch.float64)


def labels(*shape: int, classes: int = 3) -> Tensor:
    return torch.randint(classes, shape)


def drawn(model: nn.Module, gain: float = 1.4) -> nn.Module:
    """Return the model in float64, its matrices drawn anew with `gain`, its vectors and numbers moved."""
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(gain / parameter[0].numel() ** 0.5 * torch.randn_like(parameter))
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def classifier(model: nn.Module, inputs: Any, samples: int, size: int, notes: str = "", gain: float = 1.4) -> Case:
    return Case(drawn(model, gain), f.cross_entropy, inputs, labels(samples), size, notes=notes)


def mlp(*widths: int, act: Callable[[], nn.Module] = nn.Tanh) -> nn.Sequential:
    parts: list[nn.Module] = []
    for columns, rows in zip(widths[:-1], widths[1:], strict=True):
        parts += [nn.Linear(columns, rows), act()]
    return nn.Sequential(*parts[:-1])


def _copied(model: nn.Module) -> nn.Module:
    # What a hook computes anew in each forward may be left with its graph, and deepcopy refuses that.
    left = (value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor))
    return copy.deepcopy(model, {id(value): value.detach().clone() for value in left if value.grad_fn is not None})


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _cast(part, dtype) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_cast(part, dtype) for part in value)
    return value


def positional(function: Callable[..., Any]) -> int:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return sum(p.kind in kinds and p.default is inspect.Parameter.empty for p in parameters)
