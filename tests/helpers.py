"""Networks and independent truths for the tests."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


def torch_differentiates_twice(function: Callable[[torch.Tensor], torch.Tensor], *shape: int) -> bool:
    """Whether this release of torch has first and second derivatives of an operation (2.3 has not those of all)."""
    x = torch.linspace(-0.5, 0.5, torch.Size(shape).numel(), dtype=torch.float64).view(shape).requires_grad_()
    try:
        (gradient,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        torch.autograd.grad(gradient.sum(), x)
    except RuntimeError as error:
        if "not implemented" not in str(error):
            raise
        return False
    return True


HAS_AMINMAX = torch_differentiates_twice(lambda x: torch.aminmax(x, dim=1).max, 2, 2)


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
    return dense_hessian(f, flat).numpy()


def dense_hessian(f: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Return the Hessian of a function of a vector (N,), by double backward, (N, N)."""
    leaf = at.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(f(leaf), leaf, create_graph=True, materialize_grads=True)
    return double_backward(gradient, [leaf])


def double_backward(gradient: Tensor, leaves: Sequence[Tensor], at_once: int = 64) -> Tensor:
    """Return the derivative of a gradient, (N,), by leaves of N entries together, (N, N); the graph is kept.

    Row after row takes N walks through the graph. Where torch has rules for it, many rows are one; then a walk of their random sum by
    itself tells that none of these rules is wrong.
    """
    if not gradient.requires_grad:
        return gradient.new_zeros(len(gradient), sum(leaf.numel() for leaf in leaves))
    options = {"retain_graph": True, "materialize_grads": True}

    def one_by_one() -> Tensor:
        return torch.cat(
            [_beside(torch.autograd.grad(g, leaves, **options), leaves, gradient[:1]) for g in gradient.unbind()]
        )

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            chunks = torch.eye(len(gradient), dtype=gradient.dtype).split(at_once)
            H = torch.cat(
                [
                    _beside(
                        torch.autograd.grad(gradient, leaves, chunk, is_grads_batched=True, **options), leaves, chunk
                    )
                    for chunk in chunks
                ]
            )
    except RuntimeError:
        return one_by_one()
    v = torch.randn(1, len(gradient), generator=torch.Generator().manual_seed(0), dtype=gradient.dtype)
    alone = _beside(torch.autograd.grad(gradient, leaves, v[0], **options), leaves, v)
    if not torch.allclose(v @ H, alone, rtol=0, atol=1e-13 * float(H.norm()), equal_nan=True):
        # Where all cancels, rounding shows; its truth is that of the plain walks, from which a wrong rule is farther off.
        plain = one_by_one()
        assert torch.allclose(H, plain, rtol=0, atol=1e-9 * float(plain.norm()), equal_nan=True)
        return plain
    return H


def _beside(parts: Sequence[Tensor], leaves: Sequence[Tensor], chunk: Tensor) -> Tensor:
    """Derivatives by each leaf as columns, one row for each of the chunk; those that are zero may come without rows."""
    rows = [
        part.expand(len(chunk), *leaf.shape).reshape(len(chunk), -1)
        if part.shape == leaf.shape
        else part.reshape(len(chunk), -1)
        for part, leaf in zip(parts, leaves, strict=True)
    ]
    return torch.cat(rows, 1)


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


class CountedCalls(TorchDispatchMode):
    """Counts the calls of torch within, those that give views too."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))
