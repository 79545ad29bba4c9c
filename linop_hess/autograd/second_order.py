"""First and second derivatives by reverse mode alone.

Double backward (`autograd.grad` of a gradient) is the one route that agrees with finite differences for every module;
`torch.func.hessian` and forward-over-reverse are silently wrong for some fused operations (docs/method.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from linop_hess.errors import UnsupportedModelError

_ROWS_AT_ONCE = 256


# What torch says, in its several wordings, of an operation without a second derivative.
_NOT_TWICE = ("is not implemented", "not currently support", "double backward", "once_differentiable", "create_graph")


@contextmanager
def double_backward(what: str) -> Iterator[None]:
    """Record graphs that can be differentiated twice; attention's fused kernels cannot, and give way to the plain one.

    Raises
    ------
    UnsupportedModelError
        If an operation inside cannot be differentiated twice; the message names `what`.
    """
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        try:
            yield
        except RuntimeError as error:
            if any(hint in str(error) for hint in _NOT_TWICE):
                raise UnsupportedModelError(
                    f"{what} has an operation without a second derivative: {error}. Replace it by one built from "
                    "differentiable operations"
                ) from error
            raise


def vjps(output: Tensor, sources: Sequence[Tensor], cotangents: Tensor) -> list[Tensor]:
    """Pull k cotangents back through a recorded graph.

    Parameters
    ----------
    output : Tensor, shape (*s)
    sources : sequence of Tensor
        What to differentiate with respect to.
    cotangents : Tensor, shape (k, *s)

    Returns
    -------
    list of Tensor
        For each source its (k, source.numel()) derivatives; zeros where `output` does not depend on it.
    """
    k = cotangents.shape[0]
    if not output.requires_grad:
        return [source.new_zeros(k, source.numel()) for source in sources]
    parts = []
    for start in range(0, k, _ROWS_AT_ONCE):
        chunk = cotangents[start : start + _ROWS_AT_ONCE]
        parts.append(_vjps_at_once(output, sources, chunk))
    return [torch.cat([part[s] for part in parts]) for s in range(len(sources))]


def _vjps_at_once(output: Tensor, sources: Sequence[Tensor], cotangents: Tensor) -> list[Tensor]:
    k = cotangents.shape[0]
    try:
        rows = torch.autograd.grad(
            output, sources, cotangents, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
    except RuntimeError:  # an operation without a batching rule
        single = [
            torch.autograd.grad(output, sources, c, retain_graph=True, allow_unused=True, materialize_grads=True)
            for c in cotangents
        ]
        rows = tuple(torch.stack(column) for column in zip(*single, strict=True))
    return [
        source.new_zeros(k, source.numel()) if row is None else row.detach().reshape(k, source.numel())
        for row, source in zip(rows, sources, strict=True)
    ]


def unit_cotangents(like: Tensor) -> Tensor:
    """All unit cotangents of a tensor, shape (numel, *shape)."""
    n = like.numel()
    return torch.eye(n, dtype=like.dtype, device=like.device).view(n, *like.shape)


def symmetric(block: Tensor, what: str, scale: float = 0.0) -> Tensor:
    """Return a computed second derivative, symmetric to rounding, as an exactly symmetric one.

    Parameters
    ----------
    block : Tensor, shape (..., n, n)
    what : str
        Its name, for the message.
    scale : float
        Size of the derivatives it was computed from, whose rounding it inherits even where it is small itself.

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
    if gap > torch.finfo(block.dtype).eps ** 0.5 * size:
        raise ArithmeticError(
            f"the second derivative of {what} came out asymmetric by {gap:.1e} of {size:.1e}: torch differentiates an "
            "operation in it wrongly; rewrite it in primitive operations"
        )
    return (block + block.mT) / 2
