"""The graph that autograd records: its nodes, what they saved, what must not be among them, and what is put in its place."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from linop_hess.autograd.untouched import DispatchMode
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
        if tensor.layout == torch.strided and not tensor._is_zerotensor():
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def in_memory(func: Any) -> Any:
    """The operation itself, but for that which makes zeros without memory, in whose place one that makes them in memory.

    Forward mode has such zeros for the derivatives of constants. What reads or writes memory, as batched backward passes and modes do,
    gets garbage from them or ends the process.
    """
    return torch.ops.aten.zeros.default if func is torch.ops.aten._efficientzerotensor.default else func


class InMemory(DispatchMode):
    """No zeros without memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return in_memory(func)(*args, **(kwargs or {}))


def has_zeros_without_memory(*graph: Tensor) -> bool:
    """Whether a graph has saved some, as each has that forward mode led to."""
    return any(tensor._is_zerotensor() for tensor in _saved(graph))


def normalize(x: Tensor, run: int, eps: float, centred: bool = True) -> Tensor:
    """(x − mean x)/√(mean (x − mean x)² + eps) within runs of that many consecutive entries.

    In primitive operations: torch's second derivative of the fused ones is not trusted (docs/method.md).
    """
    rows = x.reshape(-1, run)
    if centred:
        rows = rows - rows.mean(1, keepdim=True)
    return (rows * (rows.square().mean(1, keepdim=True) + eps).rsqrt()).reshape(x.shape)


def scale_shift(u: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return w ∘ u + b, the affine part of normalizations."""
    y = u if weight is None else u * weight
    return y if bias is None else y + bias


_Optional = Tensor | None
_Computed = TypeVar("_Computed")


def _layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: _Optional = None, bias: _Optional = None, eps: float = 1e-5
) -> Tensor:
    return scale_shift(normalize(input, torch.Size(normalized_shape).numel(), eps), weight, bias)


def _by_channel(u: Tensor, weight: _Optional, bias: _Optional) -> Tensor:
    shape = [-1] + [1] * (u.ndim - 2)
    return scale_shift(u, *(None if parameter is None else parameter.view(shape) for parameter in (weight, bias)))


def _group_norm(
    input: Tensor, num_groups: int, weight: _Optional = None, bias: _Optional = None, eps: float = 1e-5
) -> Tensor:
    return _by_channel(normalize(input, input[0].numel() // num_groups, eps), weight, bias)


def _batch_norm(
    input: Tensor, running_mean: _Optional, running_var: _Optional, weight: _Optional = None, bias: _Optional = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    if not training or running_mean is not None:  # fixed statistics, or some that are changed
        return functional.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    rows = input.transpose(0, 1)
    return _by_channel(normalize(rows, rows[0].numel(), eps).transpose(0, 1), weight, bias)


def _instance_norm(
    input: Tensor, running_mean: _Optional = None, running_var: _Optional = None, weight: _Optional = None, bias: _Optional = None,
    use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    if not use_input_stats or running_mean is not None:
        return functional.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    return _by_channel(normalize(input, input[0, 0].numel(), eps), weight, bias)


_NORMS: dict[Any, Callable[..., Tensor]] = {
    functional.layer_norm: _layer_norm,
    functional.group_norm: _group_norm,
    functional.batch_norm: _batch_norm,
    functional.instance_norm: _instance_norm,
}


class PrimitiveNorms(TorchFunctionMode):
    """Norms in primitive operations: torch's derivatives of the fused ones' derivatives lose digits, or are wrong."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _NORMS.get(func, func)(*args, **(kwargs or {}))


@contextmanager
def differentiating_inside() -> Iterator[None]:
    """Record what differentiates inside, by forward mode or through norms, so that it can be differentiated twice more."""
    with PrimitiveNorms(), InMemory():
        yield


class Inside(TorchFunctionMode):
    """Sees whether a model or a loss differentiates, and how.

    Attributes
    ----------
    forward : bool
        Whether there is forward mode.
    backward : bool
        Whether there is reverse mode.
    norms : bool
        Whether there are norms.
    """

    def __init__(self) -> None:
        super().__init__()
        self.forward = self.backward = self.norms = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.forward = self.forward or func is torch._make_dual
        self.backward = self.backward or func in _DERIVATIVES
        self.norms = self.norms or func in _NORMS
        return func(*args, **(kwargs or {}))

    @property
    def has_norms_differentiated(self) -> bool:
        """Whether torch may have derivatives of what it gives wrong."""
        return self.norms and (self.forward or self.backward)

    @property
    def needs_care(self) -> bool:
        """Whether it is to be done within `differentiating_inside`."""
        return self.forward or self.has_norms_differentiated


def carefully(compute: Callable[[], _Computed], told: Callable[[_Computed], Any]) -> tuple[_Computed, bool]:
    """Compute; once more, within `differentiating_inside`, where that is seen to be needed, and tell whether it was.

    Parameters
    ----------
    compute : callable
    told : callable
        The tensor, of what is computed, that must be the same in both.

    Raises
    ------
    UnsupportedModelError
        If torch has it wrong; see `require_same`.
    """
    with Inside() as inside:
        found = compute()
    if not inside.needs_care:
        return found, False
    with differentiating_inside():
        again = compute()
    if isinstance(told(found), Tensor) and isinstance(told(again), Tensor):  # what else it may be is refused elsewhere
        require_same(told(found), told(again))
    return again, True


_DERIVATIVES = frozenset({torch.autograd.grad, torch.autograd.backward, Tensor.backward})


# Fused norms that torch differentiates wrongly from the second time on, by their names among operations: mean and variance are constants
# in the derivatives that it has of them. Instance norms are batch norms there; group and RMS norms are right.
_FUSED_NORM = re.compile("(layer|batch)_norm")


def is_fused_norm(operation: str) -> bool:
    """Whether an operation is a norm, or the backward pass of one, of which torch has further derivatives wrong."""
    return bool(_FUSED_NORM.search(operation))


def require_same(fused: Tensor, written: Tensor) -> None:
    """Raise unless a loss, or an output, is the same with norms as torch has them and with their formulas.

    Raises
    ------
    UnsupportedModelError
    """
    sizes = [float(torch.linalg.vector_norm(x.detach().double())) for x in (fused, written, fused - written)]
    if sizes[2] > torch.finfo(fused.dtype).eps ** 0.5 * max(sizes[:2]):
        of = [f"{float(x.detach()):.6g}" if x.numel() == 1 else f"norm {float(x.norm()):.6g}" for x in (fused, written)]
        raise UnsupportedModelError(
            f"expected derivatives inside the model or the loss that torch has right, got one of {of[0]}, and of {of[1]} with "
            "layer and batch norms written out: torch has the derivative of such a norm's derivative in forward mode wrong; differentiate "
            "there by reverse mode (torch.func.jacrev, torch.autograd.grad with create_graph=True), or write the norm in plain operations"
        )


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
                f"{tuple(leaf.shape)} besides (a penalty on the weights? torch.func.linearize, which hides them from autograd?): take it "
                "out of loss_fn and add its Hessian, c/2·‖θ‖² is .damped(c) or damping=c; if it is a constant, .detach() it; use "
                "torch.func.jvp for linearize"
            )
