"""The loss as the last stage: value, gradient, and Hessian with respect to the output, block diagonal where it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from linop_hess._validate import checked_loss
from linop_hess.autograd.differentiate import (
    refuse_direct_parameters,
    symmetric,
    twice_differentiable,
    unit_cotangents,
    vjps,
)
from linop_hess.errors import UnsupportedModelError
from linop_hess.lq.accuracy import SAMPLES_APART
from linop_hess.lq.stages.objective import ObjectiveStage

_DENSE_UP_TO = 16


def linearize_loss(
    loss_fn: Callable[[Tensor, Any], Tensor], output: Tensor, target: Any
) -> tuple[float, ObjectiveStage]:
    """Evaluate a loss with its first two derivatives.

    Parameters
    ----------
    loss_fn : callable
        ``loss_fn(output, target)`` gives a scalar.
    output : Tensor
        Output of the model.
    target : object
        Passed on.

    Returns
    -------
    float
        The loss.
    ObjectiveStage
        Its gradient and Hessian; the Hessian is kept per sample where samples do not interact, which a random probe decides.

    Raises
    ------
    ValueError
        If the loss is not a scalar, or NaN or Inf, or its derivatives are.
    TypeError
        If it is no tensor.
    UnsupportedModelError
        If it gives another value each time, or uses parameters besides the model's output.
    """
    with twice_differentiable("the loss", output.device):
        u = output.detach().clone().requires_grad_()
        value = checked_loss(loss_fn(u.clone(), target))  # which a loss may change in place
        if not value.requires_grad:
            raise ValueError(
                "the loss does not depend on the model's output: loss_fn(output, target) must compute it from output, "
                "without detach() or .item()"
            )
        refuse_direct_parameters(value)
        if not torch.equal(value, loss_fn(u.clone(), target).reshape(())):
            raise UnsupportedModelError("loss_fn gives another value each time; remove its randomness")
        (gradient,) = torch.autograd.grad(value, u, create_graph=True, allow_unused=True, materialize_grads=True)
        C = _hessian_blocks(gradient, u)
    row = gradient.detach().reshape(1, -1)
    for what, array in (("gradient", row), ("Hessian", C)):
        if not bool(torch.isfinite(array).all()):
            raise ValueError(f"the {what} of the loss with respect to the model's output holds NaN or Inf")
    return float(value.detach()), ObjectiveStage(row, symmetric(C, "the loss"))


def _hessian_blocks(gradient: Tensor, u: Tensor) -> Tensor:
    """Hessian of the loss, shape (1, m, i, i): m samples where they do not interact, else m = 1."""
    n = u.numel()
    samples = u.shape[0] if u.ndim > 1 else 1
    width = n // samples if samples else 0
    if samples > 1 and n > _DENSE_UP_TO:
        probes = torch.eye(width, dtype=u.dtype, device=u.device)
        rows = vjps(gradient, [u], probes[:, None].expand(width, samples, width).reshape(width, *u.shape))[0]
        blocks = rows.reshape(width, samples, width).transpose(0, 1)
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(n, generator=generator, dtype=torch.float64).to(u.dtype).to(u.device)
        full = vjps(gradient, [u], v.reshape(1, *u.shape))[0].reshape(-1)
        ours = (blocks @ v.reshape(samples, width, 1)).reshape(-1)
        scale = float(blocks.abs().max()) if blocks.numel() else 0.0
        if float((full - ours).abs().max()) <= SAMPLES_APART * torch.finfo(u.dtype).eps * max(
            scale, float(full.abs().max())
        ):
            return blocks[None].contiguous()
    return vjps(gradient, [u], unit_cotangents(u))[0].reshape(1, 1, n, n)
