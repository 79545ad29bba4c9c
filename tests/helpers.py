"""Networks and independent truths for the tests."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn


def make_mlp(
    widths: Sequence[int],
    act: Callable[[], nn.Module] = nn.Tanh,
    seed: int = 0,
    gain: float = 1.2,
    dtype: torch.dtype = torch.float64,
    bias: bool = True,
) -> nn.Sequential:
    """Return Linear layers of the given widths with `act` between them.

    Orthogonal weights with a gain above one keep the Hessian of a deep network away from zero.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for rows, columns in zip(widths[1:], widths[:-1], strict=True):
            layer = nn.Linear(columns, rows, bias=bias, dtype=torch.float64)
            nn.init.orthogonal_(layer.weight, gain=gain)
            if bias:
                nn.init.normal_(layer.bias, std=0.3)
            layers += [layer, act()]
    return nn.Sequential(*layers[:-1]).to(dtype)


def make_batch(
    features: int, classes: int, samples: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Return normal inputs (samples, features) and class targets (samples,)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, features, generator=generator, dtype=torch.float64).to(dtype)
    return x, torch.randint(classes, (samples,), generator=generator)


def oracle_hessian(
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    params: Iterable[str] | None = None,
) -> np.ndarray:
    """Return the dense Hessian in float64, whatever the model's precision, by double backward."""
    f, flat = _flat_loss(model, loss_fn, x, y, params)
    return torch.autograd.functional.hessian(f, flat).numpy()


def oracle_gradient(
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    params: Iterable[str] | None = None,
) -> np.ndarray:
    """Return the gradient in float64, whatever the model's precision."""
    f, flat = _flat_loss(model, loss_fn, x, y, params)
    return torch.autograd.functional.jacobian(f, flat).numpy()


def differenced_hessian(
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    params: Iterable[str] | None = None,
    step: float = 1e-5,
) -> np.ndarray:
    """Return the Hessian by central differences of the gradient: good to about 1e-8."""
    f, flat = _flat_loss(model, loss_fn, x, y, params)
    rows = []
    for shift in step * torch.eye(flat.numel(), dtype=torch.float64):
        up = torch.autograd.functional.jacobian(f, flat + shift)
        down = torch.autograd.functional.jacobian(f, flat - shift)
        rows.append((up - down) / (2 * step))
    return torch.stack(rows).numpy()


def oracle_jacobian(model: nn.Module, x: Tensor) -> np.ndarray:
    """Return ∂z/∂θ, shape (outputs, parameters), one backward pass an output."""
    model = copy.deepcopy(model).double()
    output = model(_double(x)).reshape(-1)
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = [torch.autograd.grad(z, parameters, retain_graph=True, materialize_grads=True) for z in output]
    return np.stack([torch.cat([g.reshape(-1) for g in row]).numpy() for row in rows])


def _flat_loss(
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    params: Iterable[str] | None,
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    model = copy.deepcopy(model).double()
    wanted = None if params is None else set(params)
    named = {
        name: p.detach()
        for name, p in model.named_parameters()
        if (p.requires_grad if wanted is None else name in wanted)
    }
    sizes = [p.numel() for p in named.values()]

    def loss_of(flat: Tensor) -> Tensor:
        parts = zip(named.items(), flat.split(sizes), strict=True)
        values = {name: part.reshape(p.shape) for (name, p), part in parts}
        return loss_fn(torch.func.functional_call(model, values, (_double(x),)), _double(y))

    return loss_of, torch.cat([p.reshape(-1) for p in named.values()])


def _double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value
