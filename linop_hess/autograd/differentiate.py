"""First and second derivatives by reverse mode alone, in full precision.

Double backward (`autograd.grad` of a gradient) is the one route that agrees with finite differences for every module;
`torch.func.hessian` and forward-over-reverse are silently wrong for some fused operations (docs/method.md).
"""

from __future__ import annotations

import traceback
import types
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from linop_hess.autograd.untouched import ProcessWide
from linop_hess.errors import UnsupportedModelError

Gradients = Sequence[Tensor | None]

_ROWS_AT_ONCE = 256

# What torch says, in its several wordings, of an operation without a second derivative.
_NOT_TWICE = (
    "is not implemented",
    "not currently support",
    "double backward",
    "once_differentiable",
    "create_graph",
    "no autograd formula",
)


# The same of one without a derivative in forward mode.
_NOT_FORWARD = ("forward AD", "forward mode AD")


def _inside(error: BaseException) -> str:
    """In which module an error was raised, as far as the calls on the way tell."""
    frames = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = [module for module in frames if isinstance(module, nn.Module)]
    return f" in a {type(modules[-1]).__name__}" if modules else ""


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    axes = [d for d in range(v.ndim) if d != dim % v.ndim] if dim != -1 else list(range(v.ndim))
    return v * (g / v.square().sum(axes, keepdim=True).sqrt())


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` in plain operations, chosen here and not by torch's switches, which all threads share."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    grouped = {"enable_gqa": True} if enable_gqa else {}  # not among the arguments of early versions
    return torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **grouped
    )[0]


def _unasked(function: Any, **names: Any) -> Any:
    """A function of torch's in Python as it stands, with others under some names in it, and asking no mode to run it.

    A mode that is asked to run one does not see what that calls; nor does any mode further in.
    """
    names["has_torch_function"] = lambda tensors: False
    copy = types.FunctionType(function.__code__, {**function.__globals__, **names}, argdefs=function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_grad = _unasked(torch.autograd.grad)

_INSTEAD: dict[Any, Callable[..., Any]] = {
    torch._weight_norm: _weight_norm,  # the fused one is off by order one (finite differences of its gradient tell)
    functional.scaled_dot_product_attention: _attention,
    torch.ops.aten.scaled_dot_product_attention: _attention,
    torch.ops.aten.scaled_dot_product_attention.default: _attention,
    functional.multi_head_attention_forward: _unasked(
        functional.multi_head_attention_forward, scaled_dot_product_attention=_attention
    ),
}


def in_primitives(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same of operations that have second derivatives and batching rules, where torch's own has not; else the function itself."""
    return _INSTEAD.get(function, function)


class Primitives(TorchFunctionMode):
    """Operations whose second derivative torch has wrong, or not at all, written in primitive ones."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.autograd.grad:
            with self:  # a checkpoint runs its forward pass within the backward pass
                return _grad(*args, **(kwargs or {}))
        return in_primitives(func)(*args, **(kwargs or {}))


def _switch_off(library: str) -> Callable[[], bool]:
    def change() -> bool:
        was = bool(getattr(torch._C, f"_get_{library}_enabled")())
        getattr(torch._C, f"_set_{library}_enabled")(False)
        return was

    return change


# Recurrent layers choose their fused kernels, which have no second derivatives, by switches alone.
_WITHOUT_FUSED = {
    device: ProcessWide(_switch_off(library), getattr(torch._C, f"_set_{library}_enabled"))
    for device, library in (("cpu", "mkldnn"), ("cuda", "cudnn"))
}


class FusedOperation(BaseException):
    """Where a run without `Primitives` comes to an operation that this would have written in others. No model is to catch it."""


# Beginnings of the names of what torch makes of those functions.
_FUSED = (
    "_scaled_dot_product",
    "_flash_attention",
    "_efficient_attention",
    "_cudnn_attention",
    "_weight_norm",
    "_native_multi_head_attention",
    "_transform_bias_rescale_qkv",
    "_transformer_encoder",
    "_nested",
)


def is_fused(func: Any) -> bool:
    """Whether an operation is what torch makes of a function that is written in others here."""
    return str(func._schema.name).removeprefix("aten::").startswith(_FUSED)


@contextmanager
def twice_differentiable(
    what: str,
    device: torch.device,
    model: nn.Module | Collection[nn.Module] | None = None,
    in_primitives: bool = True,
) -> Iterator[None]:
    """Record graphs that can be differentiated twice, in full precision, whatever is switched on outside.

    The fused kernels of attention have no second derivatives, and those of recurrent layers neither; the plain ones
    replace them. No switch that threads share is touched, but that of the recurrent kernels where there is such a layer.

    Parameters
    ----------
    what : str
        What is recorded, for the message.
    device : torch.device
        Where it runs.
    model : torch.nn.Module or collection of torch.nn.Module, optional
        It, or all its modules: looked through for recurrent layers.
    in_primitives : bool
        Whether to write operations in others; else who runs it must raise `FusedOperation` for those that `is_fused` tells. Every call
        of a function of torch's takes a third longer with it, and few models have one.

    Raises
    ------
    UnsupportedModelError
        If an operation inside cannot be differentiated twice.
    """
    with ExitStack() as stack:
        stack.enter_context(once_differentiable_graphs(device))
        if in_primitives:
            stack.enter_context(Primitives())
        if device.type in _WITHOUT_FUSED and model is not None and _has_recurrent_layers(model):
            stack.enter_context(_WITHOUT_FUSED[device.type].changed())
        try:
            yield
        except RuntimeError as error:
            if any(hint in str(error) for hint in _NOT_FORWARD):
                raise UnsupportedModelError(
                    f"expected {what} to differentiate inside by operations that have a derivative in forward mode, got one without"
                    f"{_inside(error)} ({str(error).partition(chr(10))[0]}): use reverse mode there (torch.func.jacrev, or "
                    "torch.autograd.grad with create_graph=True), or write the operation in plain ones"
                ) from error
            if any(hint in str(error) for hint in _NOT_TWICE):
                raise UnsupportedModelError(
                    f"expected {what} to be twice differentiable, got an operation without a second derivative "
                    f"({error}): replace it by one built from differentiable operations, or pass "
                    'differentiation="finite" to linearize or lh.Hessian for differences of first derivatives'
                ) from error
            raise


def _has_recurrent_layers(model: nn.Module | Collection[nn.Module]) -> bool:
    modules = model.modules() if isinstance(model, nn.Module) else model
    return any(issubclass(kind, nn.RNNBase) for kind in set(map(type, modules)))


@contextmanager
def once_differentiable_graphs(device: torch.device) -> Iterator[None]:
    """Record graphs that can be differentiated at least once, in full precision, with the model's own kernels."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def kept_apart(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Where graphs are recorded of which leaves are moved in place before they are used: what a graph keeps of those are copies.

    Raises
    ------
    UnsupportedModelError
        If there are transforms of torch.func's inside that let nobody see what graphs keep.
    """
    mine = {p.untyped_storage().data_ptr() for p in leaves}

    def own(t: Tensor) -> Tensor:
        return t.detach().clone() if not t._is_zerotensor() and t.untyped_storage().data_ptr() in mine else t

    try:
        with saved_tensors_hooks(own, lambda t: t):
            yield
    except RuntimeError as error:
        if "saved tensor hooks" not in str(error):
            raise
        raise UnsupportedModelError(
            "expected a model and a loss whose graph is kept while parameters move, got torch.func.grad, vjp, jacrev or hessian inside, "
            "which keep theirs to themselves: differentiate there by torch.autograd.grad with create_graph=True or by forward mode "
            "(torch.func.jvp, jacfwd), or take an optimizer that linearizes (GaussNewton, or SaddleFree with a loss function)"
        ) from error


def differentiate(
    outputs: Gradients,
    by: Sequence[Tensor],
    seeds: Gradients | None = None,
    *,
    create_graph: bool = False,
    retain_graph: bool = False,
    batched: bool = False,
) -> Gradients:
    """Return Σ_i (∂output_i/∂by)ᵀ seed_i for each tensor of `by`, None where no output depends on it.

    Parameters
    ----------
    outputs : sequence of torch.Tensor or None
        None, and tensors without a graph, are constants: they add nothing.
    by : sequence of torch.Tensor
    seeds : sequence of torch.Tensor or None, optional
        One of each output's shape; may be left out for scalars.
    create_graph, retain_graph : bool, optional
        As in `torch.autograd.grad`.
    batched : bool, optional
        Whether the seeds, and so the results, have one dimension more, the first.

    Returns
    -------
    sequence of torch.Tensor or None
        As many as `by`, of the same shapes.
    """
    seeds = [None] * len(outputs) if seeds is None else seeds
    pairs = [(o, s) for o, s in zip(outputs, seeds, strict=True) if o is not None and o.requires_grad]
    if not pairs or not by:
        return [None] * len(by)
    found = torch.autograd.grad(
        [output for output, _ in pairs],
        by,
        [seed for _, seed in pairs],
        create_graph=create_graph,
        retain_graph=retain_graph or create_graph,
        allow_unused=True,
        is_grads_batched=batched,
    )
    return written_out(found)


def written_out(derivatives: Gradients) -> Gradients:
    """The same, what is identically zero with memory of its own.

    Torch gives the derivative of a sign, as in that of |x|, as a tensor of zeros without memory, and its batched backward passes read from
    where there is none: products are garbage, or the process ends.
    """
    return [d.clone() if d is not None and d._is_zerotensor() else d for d in derivatives]


def joined(derivatives: Gradients, by: Sequence[Tensor]) -> Tensor:
    """Join derivatives by some tensors to one flat tensor, with zeros for None; autograd cuts what comes back sooner."""
    return flat_copy([torch.zeros_like(b) if d is None else d for d, b in zip(derivatives, by, strict=True)])


def flat_copy(tensors: Sequence[Tensor]) -> Tensor:
    """All entries of tensors, one after the other, in memory of their own."""
    # One call, where tensors reshaped one by one take longer than their copy.
    return torch._utils._flatten_dense_tensors(tensors) if len(tensors) > 1 else tensors[0].reshape(-1).clone()


def vjps(output: Tensor, sources: Sequence[Tensor], cotangents: Tensor, at_once: int = _ROWS_AT_ONCE) -> list[Tensor]:
    """Pull k cotangents back through a recorded graph.

    Parameters
    ----------
    output : Tensor, shape (*s)
    sources : sequence of Tensor
        What to differentiate with respect to.
    cotangents : Tensor, shape (k, *s)
    at_once : int
        How many in one batched backward pass, each of which takes about as much memory as the graph.

    Returns
    -------
    list of Tensor
        For each source its (k, source.numel()) derivatives; zeros where `output` does not depend on it.
    """
    parts = [_vjps_at_once(output, sources, chunk) for chunk in cotangents.split(at_once)]
    return [torch.cat(pieces) for pieces in zip(*parts, strict=True)]


def _vjps_at_once(output: Tensor, sources: Sequence[Tensor], cotangents: Tensor) -> list[Tensor]:
    k = cotangents.shape[0]
    rows: Gradients | None = None
    if k > 1:
        with suppress(RuntimeError):  # an operation without a batching rule
            rows = differentiate([output], sources, [cotangents], retain_graph=True, batched=True)
    if rows is None:
        single = [differentiate([output], sources, [c], retain_graph=True) for c in cotangents]
        rows = [None if column[0] is None else torch.stack(column) for column in zip(*single, strict=True)]
    return [
        source.new_zeros(k, source.numel()) if row is None else row.detach().reshape(k, source.numel())
        for row, source in zip(rows, sources, strict=True)
    ]


def unit_cotangents(like: Tensor) -> Tensor:
    """All unit cotangents of a tensor, shape (numel, *shape)."""
    n = like.numel()
    return torch.eye(n, dtype=like.dtype, device=like.device).view(n, *like.shape)


def symmetric(block: Tensor, what: str, scale: float = 0.0, eps: float = 0.0) -> Tensor:
    """Return a computed second derivative, symmetric to rounding, as an exactly symmetric one.

    Parameters
    ----------
    block : Tensor, shape (..., n, n)
    what : str
        Its name, for the message.
    scale : float
        Size of the derivatives it was computed from, whose rounding it inherits even where it is small itself.
    eps : float
        Unit of rounding of what it was computed in, where that is coarser than its own (`coarsest_eps`).

    Returns
    -------
    Tensor
        The mean of `block` and its transpose.

    Raises
    ------
    ArithmeticError
        If it is not symmetric to rounding, naming `what`: torch's derivative of some operation in it is wrong.
    """
    if not block.numel():
        return block
    gap = float((block - block.mT).abs().max())
    size = max(float(block.abs().max()), scale)
    # A wrong derivative is off by order one; rounding is amplified by ill-conditioned operations such as norms.
    if gap > max(torch.finfo(block.dtype).eps, eps) ** 0.5 * size:
        raise ArithmeticError(
            f"the second derivative of {what} came out asymmetric by {gap:.1e} of {size:.1e}: torch differentiates an "
            "operation in it wrongly; rewrite it in primitive operations"
        )
    return (block + block.mT) / 2
