"""A private copy of a model, and the choice of the parameters to differentiate by."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from linop_hess._validate import require_dtype
from linop_hess.autograd.calling import refuse_unusable_model
from linop_hess.errors import UnsupportedModelError
from linop_hess.operators.parameters import matching, patterns_of


@dataclass(frozen=True)
class Contents:
    """What a model consists of, found in one walk through it.

    Attributes
    ----------
    model : nn.Module
    modules : dict of str to nn.Module
        By path, each once, as `named_modules` has them.
    """

    model: nn.Module
    modules: dict[str, nn.Module]

    @classmethod
    def of(cls, model: nn.Module) -> Contents:
        """Look through a model."""
        return cls(model, dict(model.named_modules()))

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """As `named_parameters` has them."""
        if type(self.model).named_parameters is not nn.Module.named_parameters:
            return dict(self.model.named_parameters())
        return _each_once((path, module._parameters) for path, module in self.modules.items() if module._parameters)

    @cached_property
    def buffers(self) -> dict[str, Tensor]:
        """As `named_buffers` has them."""
        if type(self.model).named_buffers is not nn.Module.named_buffers:
            return dict(self.model.named_buffers())
        return _each_once((path, module._buffers) for path, module in self.modules.items() if module._buffers)

    @cached_property
    def places(self) -> list[tuple[dict[str, Any], str, Tensor]]:
        """Where modules hold parameters and buffers, tied ones in each place."""
        return [
            (own, key, tensor)
            for module in self.modules.values()
            for own in (module._parameters, module._buffers)
            if own
            for key, tensor in own.items()
            if tensor is not None
        ]

    def has_all(self) -> bool:
        """Whether the model still has no other modules."""
        inside = chain.from_iterable(module._modules.values() for module in self.modules.values())
        known = set(map(id, self.modules.values()))
        return all(module is None or id(module) in known for module in inside)


def _each_once(held: Iterable[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """Tensors that modules hold, by path and name; of tied ones the first."""
    named, seen = {}, set()
    for path, own in held:
        for key, tensor in own.items():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                named[f"{path}.{key}" if path else key] = tensor
    return named


def select_parameters(model: Any, params: str | Iterable[str] | None, contents: Contents | None = None) -> list[str]:
    """Return the names of the parameters to differentiate by, in the order of `model.named_parameters()`.

    Parameters
    ----------
    model : torch.nn.Module
    params : str or iterable of str, optional
        A name, a glob pattern (``*`` matches dots too) or several to restrict to; by default every parameter that requires a
        gradient. A frozen parameter may not be named, and a pattern passes it over.
    contents : Contents, optional
        The model's, where they are known.

    Returns
    -------
    list of str

    Raises
    ------
    TypeError
        If `model` is not a module, `params` holds something else than strings, or a chosen parameter is neither
        float32 nor float64, or two differ in dtype.
    ValueError
        If a name is unknown or a pattern matches nothing (the nearest names are given), a name or all that a pattern matches
        is frozen, none is chosen, or chosen ones are on several devices,
        or the model is on the meta device.
    UnsupportedModelError
        If the model is parallel, sharded, compiled or scripted.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected model to be a torch.nn.Module, got {type(model).__name__}: wrap it in one")
    contents = Contents.of(model) if contents is None else contents
    refuse_unusable_model(contents.modules)
    named = contents.parameters
    chosen = _chosen_names(named, params)
    if not chosen:
        frozen = f"{len(named)}, all frozen: call model.requires_grad_(True)"
        none = "a model without any: give it some"
        came = (
            "params that name none: name one, or leave params out" if params is not None else frozen if named else none
        )
        raise ValueError(f"expected at least one trainable parameter, got {came}")
    _require_alike({name: named[name] for name in chosen})
    return chosen


def _require_alike(chosen: dict[str, nn.Parameter]) -> None:
    """Raise unless parameters have shapes, and are of one usable dtype on one device."""
    kinds = {(type(p), p.dtype, p.device) for p in chosen.values()}
    first_name, first = next(iter(chosen.items()))
    one_for_all = len(kinds) == 1 and type(first) is nn.Parameter
    looked_at = {first_name: first} if one_for_all else chosen
    for name, parameter in looked_at.items():
        if isinstance(parameter, UninitializedParameter):
            raise ValueError(
                f"expected parameters with shapes, got {name!r}, which has no shape yet: run the model once"
            )
    for name, parameter in looked_at.items():
        require_dtype(parameter.dtype, f"parameter {name!r}")
        if parameter.dtype != first.dtype:
            raise TypeError(
                f"expected parameters of one dtype, got {first_name!r} in {first.dtype} and {name!r} in {parameter.dtype}: "
                "convert the model with .float() or .double()"
            )
        if parameter.device != first.device:
            raise ValueError(
                f"expected parameters on one device, got {first_name!r} on {first.device} and {name!r} on "
                f"{parameter.device}: move the model with .to(device)"
            )


def more_than_functions(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """The modules that have what `as_a_function` takes off."""
    of_class = {kind for kind in set(map(type, modules)) if hasattr(kind, "sparse")}
    may_be = [m for m in modules if "sparse" in vars(m) or type(m) in of_class]  # nn.Module takes its time to say no
    sparse = {id(m) for m in may_be if getattr(m, "sparse", None) is True}
    return [m for m in modules if m._backward_hooks or m._backward_pre_hooks or id(m) in sparse]


def as_a_function(module: nn.Module) -> None:
    """Take off a module what changes gradients and no loss: backward hooks, and sparse gradients, which have no second derivative."""
    if module._backward_hooks:
        module._backward_hooks.clear()
    if module._backward_pre_hooks:
        module._backward_pre_hooks.clear()
    if more_than_functions([module]):
        module.sparse = False  # type: ignore[assignment]


def frozen_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model that shares no parameter or buffer with it, keeps its training mode, and has no backward hooks.

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
            "expected a model that can be copied, as an operator keeps its own, got this error of copy.deepcopy on the "
            f"{type(model).__name__}: {error}: make the model deep-copyable"
        ) from error
    for module in twin.modules():
        as_a_function(module)
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


def put_buffers_back(model: nn.Module, before: dict[str, Tensor]) -> None:
    """Write copies made by `buffers_of` into the buffers that differ from them in their entries."""
    own = dict(model.named_buffers())
    with torch.no_grad():
        for name in changed_buffers(model, before):
            if name in before and own[name].shape == before[name].shape:
                own[name].copy_(before[name])


def _chosen_names(named: dict[str, nn.Parameter], params: str | Iterable[str] | None) -> list[str]:
    if params is None:
        return [name for name, parameter in named.items() if parameter.requires_grad]
    patterns = patterns_of(params)
    if all(pattern in named and named[pattern].requires_grad for pattern in patterns):  # names: nothing to search for
        listed = set(patterns)
        return [name for name in named if name in listed]
    chosen: set[str] = set()
    frozen: list[str] = []
    for pattern in patterns:
        matched = matching(named, [pattern])
        trainable = [name for name in matched if named[name].requires_grad]
        chosen.update(trainable)
        if not trainable:
            frozen.append(pattern)
            chosen.update(matched)
    if frozen and all(named[name].is_floating_point() for name in matching(named, frozen)):
        raise ValueError(
            f"expected trainable parameters in params, got {', '.join(frozen)}, which is frozen (requires_grad=False): "
            "leave it out, or call .requires_grad_() on it"
        )
    return [name for name in named if name in chosen]
