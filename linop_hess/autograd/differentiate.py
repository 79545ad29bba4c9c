"""Reverse-mode derivatives, in full precision and through operations that can be differentiated twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from linop_hess.errors import UnsupportedModelError

Gradients = Sequence[Tensor | None]

# What torch says, in its several wordings, of an operation without a second derivative.
_NOT_TWICE = (
    "is not implemented",
    "not currently support",
    "double backward",
    "once_differentiable",
    "create_graph",
)

_ONCE_DIFFERENTIABLE = once_differentiable(lambda context: None).__code__


def differentiate(
    outputs: Gradients,
    by: Sequence[Tensor],
    seeds: Gradients | None = None,
    *,
    create_graph: bool = False,
    retain_graph: bool = False,
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

    Returns
    -------
    sequence of torch.Tensor or None
        As many as `by`, of the same shapes.
    """
    seeds = [None] * len(outputs) if seeds is None else seeds
    pairs = [(o, s) for o, s in zip(outputs, seeds, strict=True) if o is not None and o.requires_grad]
    if not pairs or not by:
        return [None] * len(by)
    return torch.autograd.grad(
        [output for output, _ in pairs],
        list(by),
        [seed for _, seed in pairs],
        create_graph=create_graph,
        retain_graph=retain_graph or create_graph,
        allow_unused=True,
    )


def refuse_once_differentiable(output: Tensor) -> None:
    """Raise if a custom operation marked `once_differentiable` leads to `output`.

    Where unused inputs are allowed torch takes the derivative of its backward pass for zero.

    Raises
    ------
    UnsupportedModelError
        Naming the operation.
    """
    seen: set[object] = set()
    stack = [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack.extend(following for following, _ in node.next_functions)
        function = getattr(node, "_forward_cls", None)
        if function is not None and getattr(function.backward, "__code__", None) is _ONCE_DIFFERENTIABLE:
            raise UnsupportedModelError(
                f"the operation {function.__name__} has no second derivative: its backward is marked "
                "once_differentiable. Replace it by one built from differentiable operations."
            )


@contextmanager
def differentiating(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Switch differentiation on, mixed precision off, and operations without second derivatives to others.

    The fused kernels of attention have none, and cuDNN's recurrent ones neither; the plain ones replace them.

    Raises
    ------
    UnsupportedModelError
        If an operation inside cannot be differentiated twice.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if device.type == "cuda" and any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        try:
            yield
        except RuntimeError as error:
            if any(hint in str(error) for hint in _NOT_TWICE):
                raise UnsupportedModelError(
                    f"the model or the loss has an operation without a second derivative: {error}. "
                    "Replace it by one built from differentiable operations."
                ) from error
            raise
