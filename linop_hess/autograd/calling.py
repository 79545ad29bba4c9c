"""How models and losses are called, and which of them cannot be: what `linearize` and `lh.Hessian` share."""

from __future__ import annotations

import copy
import functools
import inspect
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset

from linop_hess.autograd.backward_graph import graph_nodes
from linop_hess.errors import UnsupportedModelError

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)

# What torch says where a loss differentiates an output by tensors that it was not computed from.
_NOT_A_FUNCTION_OF = ("not have been used in the graph", "Tensors does not require grad")

# By name: some torches are built without them. The second is the base of what `fully_shard` makes.
_SHARDED = {"FullyShardedDataParallel", "FSDPModule", "PipelineStage"}
_UNSHARDED = (
    "a plain copy of it with all parameters in each process, loaded from torch.distributed.checkpoint.state_dict.get_model_state_dict(…, "
    "options=StateDictOptions(full_state_dict=True)), and group= where the samples are spread over processes"
)


def call_model(model: Callable[..., Any], inputs: Any) -> Any:
    """Call a model: ``model(*inputs)`` for a plain tuple, ``model(inputs)`` for anything else, named tuples included."""
    return model(*inputs) if type(inputs) is tuple else model(inputs)


def takes_parameters(loss_fn: Any) -> bool:
    """Tell whether a loss is one of three arguments, ``loss_fn(output, target, params)``.

    It is where it has three positional parameters without defaults; `*args` counts for none, and what `functools.partial`
    fills in does not count.
    """
    called = loss_fn.forward if isinstance(loss_fn, nn.Module) else loss_fn
    function = called.__func__ if inspect.ismethod(called) else called
    if inspect.isfunction(function) and not vars(function):  # which has no other signature than its own
        positional = function.__code__.co_argcount - (function is not called)
        return positional - len(function.__defaults__ or ()) == 3
    try:
        signature = inspect.signature(called)
    except (TypeError, ValueError):  # a builtin without one
        return False
    needed = [p for p in signature.parameters.values() if p.kind in _POSITIONAL and p.default is p.empty]
    return len(needed) == 3


class FunctionModule(nn.Module):
    """A function of parameters and inputs as a module; dots in names make modules inside."""

    def __init__(self, function: Callable[..., Any], params: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._function, self._names = function, tuple(params)
        for name, tensor in params.items():
            *path, key = name.split(".")
            owner: nn.Module = self
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.register_parameter(key, nn.Parameter(tensor.detach().clone()))

    def forward(self, *inputs: Any) -> Any:
        params = {name: self._at(name) for name in self._names}
        return self._function(params, inputs[0] if len(inputs) == 1 else inputs)

    def _at(self, name: str) -> Tensor:
        # Not get_parameter(), which refuses what functional_call puts in a parameter's place.
        path, _, key = name.rpartition(".")
        tensor = getattr(self.get_submodule(path), key)
        assert isinstance(tensor, Tensor)
        return tensor


def as_module(function: Any, params: Any) -> nn.Module:
    """Return a function ``function(params, inputs)`` as a model with copies of its parameters.

    Raises
    ------
    TypeError
        If it is no function, or `params` is no dict of floating tensors.
    ValueError
        If a name is empty, that of an attribute of modules, or at once that of a parameter and of what holds others.
    """
    if not callable(function):
        raise TypeError(
            f"expected model to be a torch.nn.Module or a function, got {type(function).__name__}: wrap it in one"
        )
    if not isinstance(params, Mapping) or not all(
        isinstance(k, str) and isinstance(t, Tensor) for k, t in params.items()
    ):
        raise TypeError(
            "expected params={name: tensor} with a function as the model, which is called as model(params, inputs), got "
            f"{type(params).__name__}: pass its parameters, or a torch.nn.Module"
        )
    wrong = [name for name, tensor in params.items() if not tensor.is_floating_point()]
    if wrong:
        raise TypeError(f"expected floating tensors in params, got others under {', '.join(wrong)}: leave them out")
    try:
        return FunctionModule(function, params)
    except KeyError as error:
        raise ValueError(
            f"expected params with names that a module can have, got one that cannot be ({error.args[0]}): rename it"
        ) from error


def call_loss(loss_fn: Callable[..., Any], output: Any, target: Any, params: Mapping[str, Tensor]) -> Any:
    """Call a loss of two arguments, or of three with the parameters by name as the third."""
    return loss_fn(output, target, dict(params)) if takes_parameters(loss_fn) else loss_fn(output, target)


def refuse_unusable_model(modules: Mapping[str, nn.Module]) -> None:
    """Raise where a model, its modules given by path, is wrapped in what has no second derivatives or no copy, or has no data.

    Raises
    ------
    UnsupportedModelError
        For parallel, sharded, compiled and scripted models; the message says what to pass instead.
    ValueError
        If parameters or buffers are on the meta device.
    """
    plain: set[type] = set()
    local: set[type] = set()  # kinds of tensor of which a process has all
    for path, module in modules.items():
        if type(module) not in plain:
            where = f"model.{path}" if path else "model"
            instead = _instead_of(module, where)
            if instead is not None:
                raise UnsupportedModelError(
                    f"expected a plain torch model, got {where}, a {type(module).__name__}: pass {instead}"
                )
            plain.add(type(module))
        for own in (module._parameters, module._buffers):
            for key, tensor in own.items() if own else ():
                if tensor is None:
                    continue
                if type(tensor) not in local:
                    if "DTensor" in _names(type(tensor)):
                        name = f"{path}.{key}" if path else key
                        raise UnsupportedModelError(
                            f"expected a plain torch model, got {name!r}, a DTensor, of which each process has a part: pass {_UNSHARDED}"
                        )
                    local.add(type(tensor))
                if tensor.is_meta:
                    name = f"{path}.{key}" if path else key
                    raise ValueError(
                        f"expected a model with data, got {name!r} on the meta device, which holds none: load the weights, as by "
                        "model.to_empty(device=...) and load_state_dict(...)"
                    )


def _instead_of(module: nn.Module, where: str) -> str | None:
    """What to pass instead of a wrapped module; None where it is plain."""
    kind = type(module).__name__
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return f"{where}.module, the model inside, and group= where the samples are spread over processes"
    if _SHARDED & _names(type(module)):
        return _UNSHARDED
    if kind == "OptimizedModule" and hasattr(module, "_orig_mod"):
        return f"{where}._orig_mod, the uncompiled model (torch.compile gives no second derivatives)"
    if isinstance(module, torch.jit.ScriptModule):
        return "the model before torch.jit.script or torch.jit.trace (a scripted one cannot be looked into)"
    return None


def _names(kind: type) -> set[str]:
    return {base.__name__ for base in kind.__mro__}


def refuse_sparse(value: Any, what: str) -> None:
    """Raise where a tensor, also one inside tuples, lists and dicts, is sparse.

    Raises
    ------
    TypeError
        Naming `what` it is.
    """
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor) and leaf.layout != torch.strided:
            raise TypeError(
                f"expected {what} as dense tensors, got one of layout {leaf.layout}: call .to_dense() on it"
            )


def refuse_empty(value: Any, what: str) -> None:
    """Raise where the tensors, also those inside tuples, lists and dicts, hold no sample.

    Raises
    ------
    ValueError
        Giving the shape.
    """
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor) and leaf.ndim and not leaf.shape[0]:
            raise ValueError(
                f"expected at least one sample, got an empty batch, {what} of shape {tuple(leaf.shape)}: leave empty "
                "batches out"
            )


class _NotGiven:
    """In place of an argument that was left out; None may be meant."""

    def __repr__(self) -> str:
        return "<not given>"


NOT_GIVEN = _NotGiven()


def are_batches(inputs: Any, targets: Any) -> bool:
    """Tell whether these are batches, an iterable of pairs in the place of inputs, or the inputs and targets of one.

    Raises
    ------
    TypeError
        For batches together with targets, and where targets are missing; it says what to pass.
    """
    many = isinstance(inputs, DataLoader | Dataset | Iterator)
    if targets is not NOT_GIVEN:
        if many:
            raise TypeError(
                f"expected inputs of one batch beside its targets, got a {type(inputs).__name__}: leave targets out, "
                "linearize(model, loss_fn, batches), since batches bring theirs"
            )
        return False
    of_pairs = isinstance(inputs, tuple | list) and all(_is_pair(one) for one in inputs)
    is_other = any(hasattr(inputs, name) for name in ("__iter__", "__getitem__")) and not isinstance(
        inputs, Tensor | np.ndarray | Mapping | str | tuple | list
    )
    if many or of_pairs or is_other:
        return True
    if _is_pair(inputs):
        raise TypeError(
            "expected inputs and targets, got a pair of both: pass them one by one, linearize(model, loss_fn, *batch)"
        )
    raise TypeError(
        "expected targets, got none: pass linearize(model, loss_fn, inputs, targets); None where the loss needs none"
    )


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2


def checksum(batch: Any) -> int:
    """Of all leaves of a nest: shapes and bytes of tensors and arrays, and numbers and texts."""
    found = 1
    for leaf in pytree.tree_leaves(batch):
        data: Any = repr(leaf).encode() if isinstance(leaf, bool | int | float | complex | str) else b""
        if isinstance(leaf, Tensor) and leaf.layout == torch.strided and not leaf.is_meta:
            flat = leaf.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
            data = flat.view(torch.uint8).numpy()
        elif isinstance(leaf, np.ndarray | np.generic) and not leaf.dtype.hasobject:
            data = leaf.tobytes()
        found = zlib.adler32(data, zlib.adler32(str(tuple(getattr(leaf, "shape", ()))).encode(), found))
    return found


def as_data(value: Any, device: torch.device | None = None, copy: bool = False) -> Any:
    """Return data with every tensor, also inside tuples, lists and dicts, such that autograd can use it as data.

    Tensors of inference mode are copied; graphs that lead to parameters are cut off. Other leaves that require a gradient, and
    what is computed from them, are kept as they are: a loss may differentiate by them. One tensor in two places stays one.

    Parameters
    ----------
    value : object
    device : torch.device, optional
        Where to move tensors.
    copy : bool
        Whether to copy those that require no gradient, so that they may be changed in place.
    """
    seen: dict[int, Any] = {}

    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in seen:
            data = leaf
            if isinstance(leaf, nn.Parameter):  # a leaf like any other here
                data = leaf.detach().requires_grad_(leaf.requires_grad)
            elif leaf.grad_fn is not None and _leads_to_a_parameter(leaf):
                data = leaf.detach()
            anew = leaf.is_inference() or copy and not data.requires_grad
            seen[id(leaf)] = data.to(device or leaf.device, copy=anew)
        return seen[id(leaf)]

    with torch.inference_mode(False):
        return _mapped(convert, value)


def constant(value: Any, copy: bool = False) -> Any:
    """Return data with no graph in it: every tensor detached, those of inference mode, or all, copied."""

    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.detach().clone() if copy or leaf.is_inference() else leaf.detach()

    with torch.inference_mode(False):
        return _mapped(convert, value)


def in_double(value: Any) -> Any:
    """Return data, or a loss with the tensors it holds, with floating tensors in float64; what it came from is not changed."""
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).double()
    if isinstance(value, functools.partial):
        return functools.partial(in_double(value.func), *in_double(value.args), **in_double(value.keywords))
    if callable(value):
        return value
    return _mapped(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, value)


@contextmanager
def explained(inputs: Any, parameter: Tensor) -> Iterator[None]:
    """Tell, in place of torch's message, that inputs do not go with the parameters.

    Raises
    ------
    TypeError
        If a computation failed and inputs have another dtype than the parameters.
    ValueError
        If a computation failed and inputs are on another device.
    """
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        for leaf in pytree.tree_leaves(inputs):
            if isinstance(leaf, Tensor) and leaf.device != parameter.device and "device" in str(error):
                raise ValueError(
                    f"expected inputs on the parameters' device, {parameter.device}, got some on {leaf.device}: move one of them"
                ) from error
            if isinstance(leaf, Tensor) and leaf.dtype != parameter.dtype and _ABOUT_DTYPES.search(str(error)):
                raise TypeError(
                    f"expected inputs of the parameters' dtype, {parameter.dtype}, got some in {leaf.dtype}: cast inputs to that"
                ) from error
        raise


_ABOUT_DTYPES = re.compile("dtype|scalar type|ScalarType|not implemented for")


@contextmanager
def of_the_output_alone() -> Iterator[None]:
    """Tell, in place of torch's message, that a loss differentiates the model where only its output is given to it.

    Raises
    ------
    UnsupportedModelError
        Naming `linop_hess.Hessian`, which takes such losses.
    """
    try:
        yield
    except RuntimeError as error:
        if any(hint in str(error) for hint in _NOT_A_FUNCTION_OF):
            raise UnsupportedModelError(
                "expected a loss of the model's output and the targets alone, got one that differentiates the output by "
                "something it was computed from, as physics-informed losses do: use linop_hess.Hessian, or return the "
                "derivatives from the model as outputs"
            ) from error
        raise


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to all that tuples, lists and dicts hold; a dict of another class comes back as a plain one."""

    def at(leaf: Any) -> Any:
        return (
            {key: _mapped(function, item) for key, item in leaf.items()} if isinstance(leaf, dict) else function(leaf)
        )

    leaves, nest = pytree.tree_flatten(value)
    return pytree.tree_unflatten([at(leaf) for leaf in leaves], nest)


def _leads_to_a_parameter(tensor: Tensor) -> bool:
    return any(isinstance(getattr(node, "variable", None), nn.Parameter) for node in graph_nodes(tensor))
