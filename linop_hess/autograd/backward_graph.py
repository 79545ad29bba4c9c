"""The graph that autograd records: its nodes, what they saved and in which dtypes, what must not be among them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from linop_hess.errors import UnsupportedModelError

_ONCE_DIFFERENTIABLE = once_differentiable(lambda context: None).__code__

_ABOVE_DISPATCH = tuple(
    getattr(torch._C.DispatchKey, key)
    for key in "AutogradFunctionality AutogradOther AutogradNestedTensor ADInplaceOrView Conjugate Negative ZeroTensor".split()
)


@contextmanager
def recorded_within_dispatch() -> Iterator[None]:
    """Let autograd record what runs inside a dispatch mode's handler, which is below autograd.

    `torch.overrides.enable_reentrant_dispatch` does so too, but with a mode, torch 2.3 then finds no implementation of any operation.
    """
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in _ABOVE_DISPATCH:
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded):
        yield


def graph_nodes(*outputs: Tensor) -> Iterator[Any]:
    """Yield every node of the graph that autograd recorded on the way to some tensors, each once."""
    pending: list[Any] = [output.grad_fn for output in outputs]
    seen = {None}
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        pending.extend(following for following, _ in node.next_functions)


def _saved(graph: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield the tensors that the nodes of a graph have saved for their backward passes."""
    names: dict[type, list[str]] = {}
    for node in graph_nodes(*graph):
        kind = type(node)
        if kind not in names:
            names[kind] = [name for name in dir(kind) if name.startswith("_saved_") or name == "saved_tensors"]
        for name in names[kind]:
            try:
                value = getattr(node, name)
            except RuntimeError:  # overwritten since: a backward pass that needs it raises, and others do without
                continue
            for tensor in value if isinstance(value, tuple | list) else (value,):
                if isinstance(tensor, Tensor):
                    yield tensor


def saved_bytes(graph: Sequence[Tensor]) -> int:
    """Return the bytes of the tensors that a graph has saved for its backward passes, each memory counted once."""
    storages = {}
    for tensor in _saved(graph):
        if tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def coarsest_eps(output: Tensor) -> float:
    """Unit of rounding of the coarsest dtype that a graph goes through, as that of a loss which casts to float32."""
    dtypes = {output.dtype}
    for node in graph_nodes(output):
        dtypes.update(metadata.dtype for metadata in getattr(node, "_input_metadata", ()))
    if not hasattr(output.grad_fn, "_input_metadata"):  # torch 2.3
        dtypes.update(tensor.dtype for tensor in _saved([output]))
    return max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)


def depends_on(value: Any, leaves: Sequence[Tensor]) -> bool:
    """Tell whether a tensor, also one inside tuples, lists and dicts, is one of some leaves or was computed from one."""
    wanted = set(map(id, leaves))
    tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
    nodes = graph_nodes(*(tensor for tensor in tensors if tensor.requires_grad))
    return not wanted.isdisjoint(map(id, tensors)) or any(
        id(getattr(node, "variable", None)) in wanted for node in nodes
    )


def without_graphs(value: Any) -> Any:
    """The same with tensors without a graph, also those inside tuples, lists and dicts; leaves stay what they are."""
    return pytree.tree_map(lambda t: t if not isinstance(t, Tensor) or t.is_leaf else t.detach(), value)


def refuse_once_differentiable(output: Tensor) -> None:
    """Raise if a custom operation marked `once_differentiable` leads to `output`.

    Where unused inputs are allowed torch takes the derivative of its backward pass for zero.

    Raises
    ------
    UnsupportedModelError
        Naming the operation.
    """
    for node in graph_nodes(output):
        function = getattr(node, "_forward_cls", None)
        if function is not None and getattr(function.backward, "__code__", None) is _ONCE_DIFFERENTIABLE:
            raise UnsupportedModelError(
                f"expected operations with a second derivative, got {function.__name__}, whose backward is marked "
                "once_differentiable: replace it by one built from differentiable operations, or pass "
                'differentiation="finite" to lh.Hessian for products by differences of the gradient'
            )


def refuse_direct_parameters(loss: Tensor, known: Sequence[Tensor] = ()) -> None:
    """Raise if a loss uses parameters other than through the model, as a penalty on the weights does.

    Parameters
    ----------
    loss : Tensor
    known : sequence of Tensor
        The parameters of the model that the loss was computed with.

    Raises
    ------
    UnsupportedModelError
        Giving the parameter's shape.
    """
    through_the_model = {id(parameter) for parameter in known}
    for node in graph_nodes(loss):
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, nn.Parameter) and id(leaf) not in through_the_model:
            raise UnsupportedModelError(
                "expected a loss of the model's output and the targets alone, got one that uses a parameter of shape "
                f"{tuple(leaf.shape)} besides (a penalty on the weights?): take it out of loss_fn and add its Hessian, "
                "c/2·‖θ‖² is .damped(c) or damping=c; if it is a constant, .detach() it"
            )
