"""A private copy of a model, and the choice of the parameters to differentiate by."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from linop_hess._validate import NUMPY_DTYPES
from linop_hess.errors import UnsupportedModelError


def select_parameters(model: Any, params: Iterable[str] | None) -> list[str]:
    """Return the names of the parameters to differentiate by, in the order of `model.named_parameters()`.

    Parameters
    ----------
    model : torch.nn.Module
    params : iterable of str, optional
        Names to restrict to; by default every parameter that requires a gradient.

    Returns
    -------
    list of str

    Raises
    ------
    TypeError
        If `model` is not a module, `params` is a string, or a chosen parameter is neither float32 nor
        float64, or two differ in dtype.
    ValueError
        If a name is unknown or names a frozen parameter, none is chosen, or chosen ones are on several
        devices.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}.")
    named = dict(model.named_parameters())
    chosen = _chosen_names(named, params)
    if not chosen:
        frozen = f"all {len(named)} of the model are frozen: call model.requires_grad_(True)"
        what = "params names none" if params is not None else frozen if named else "the model has none"
        raise ValueError(f"second derivatives need at least one trainable parameter; {what}.")
    for name in chosen:
        if isinstance(named[name], UninitializedParameter):
            raise ValueError(f"parameter {name!r} has no shape yet. Run the model once before building the operator.")
    for name in chosen:
        parameter, first = named[name], named[chosen[0]]
        if parameter.dtype not in NUMPY_DTYPES:
            raise TypeError(
                f"parameter {name!r} is {parameter.dtype}; second derivatives need torch.float32 or "
                "torch.float64. Convert the model with .float() or .double()."
            )
        if parameter.dtype != first.dtype:
            raise TypeError(
                f"parameters {chosen[0]!r} and {name!r} are {first.dtype} and {parameter.dtype}; one dtype "
                "is needed. Convert the model with .float() or .double()."
            )
        if parameter.device != first.device:
            raise ValueError(
                f"parameters {chosen[0]!r} and {name!r} are on {first.device} and {parameter.device}; one "
                "device is needed. Move the model with .to(device)."
            )
    return chosen


def frozen_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model that shares no parameter or buffer with it and keeps its training mode.

    Raises
    ------
    UnsupportedModelError
        If the model cannot be copied.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
    for module in model.modules():
        for value in vars(module).values():
            # Left by a hook such as weight_norm's, computed anew in each forward; deepcopy refuses these.
            if isinstance(value, Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()
    try:
        twin = copy.deepcopy(model, memo)
    except Exception as error:
        raise UnsupportedModelError(
            "an operator keeps its own copy of the model, and copy.deepcopy fails on this "
            f"{type(model).__name__}: {error}. Make the model deep-copyable."
        ) from error
    for module in twin.modules():
        if getattr(module, "sparse", None) is True:  # an embedding's sparse gradient has no second derivative
            module.sparse = False  # type: ignore[assignment]
    return twin


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of a model's buffers."""
    return {name: buffer.detach().clone() for name, buffer in model.named_buffers()}


def changed_buffers(model: nn.Module, before: dict[str, Tensor]) -> list[str]:
    """Return the names of the buffers that differ from `before`."""
    return [
        name
        for name, buffer in model.named_buffers()
        if name not in before
        or buffer.shape != before[name].shape
        or not torch.allclose(buffer, before[name], rtol=0, atol=0, equal_nan=True)
    ]


def _chosen_names(named: dict[str, nn.Parameter], params: Iterable[str] | None) -> list[str]:
    if params is None:
        return [name for name, parameter in named.items() if parameter.requires_grad]
    if isinstance(params, str):
        raise TypeError(f"params must be an iterable of names; got the string {params!r}. Pass [{params!r}].")
    asked = set(params)
    unknown = sorted(str(name) for name in asked if name not in named)
    if unknown:
        raise ValueError(f"the model has no parameter {', '.join(unknown)}; it has {', '.join(named) or 'none'}.")
    frozen = [name for name in named if name in asked and not named[name].requires_grad]
    if frozen and all(named[name].is_floating_point() for name in frozen):
        raise ValueError(
            f"params names {', '.join(frozen)}, which is frozen (requires_grad=False). "
            "Leave it out, or call .requires_grad_() on it."
        )
    return [name for name in named if name in asked]
