"""What the benchmark scripts share: networks, an autograd Hessian-vector product, clocks, a table."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def network(depth: int, width: int, *, inputs: int = 4, outputs: int = 3, seed: int = 0) -> nn.Sequential:
    """A tanh network with `depth` linear layers, orthogonal with gain 1.2, in float64."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    size = inputs
    for _ in range(depth - 1):
        linear = nn.Linear(size, width, dtype=torch.float64)
        nn.init.orthogonal_(linear.weight, 1.2)
        nn.init.normal_(linear.bias, std=0.1)
        layers += [linear, nn.Tanh()]
        size = width
    layers.append(nn.Linear(size, outputs, dtype=torch.float64))
    return nn.Sequential(*layers)


def batch(size: int, *, inputs: int = 4, outputs: int = 3, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Random inputs and labels."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, inputs, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, outputs, (size,), generator=generator)


def autograd_hvp(model: nn.Module, loss_fn: Callable[..., Tensor], x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    """One Pearlmutter product, written as leanly as autograd allows."""
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss_fn(model(x), y), parameters, create_graph=True)
    pieces = [piece.view_as(p) for piece, p in zip(v.split([p.numel() for p in parameters]), parameters, strict=True)]
    return torch.cat([h.reshape(-1) for h in torch.autograd.grad(gradients, parameters, pieces)])


def retained_hvp(
    model: nn.Module, loss_fn: Callable[..., Tensor], x: Tensor, y: Tensor
) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
    """The strongest product of autograd: the graph of the gradient is recorded once, a product is one backward pass.

    It takes and gives tensors of the parameters' shapes; nothing is cut, joined or checked.
    """
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss_fn(model(x), y), parameters, create_graph=True)
    return lambda pieces: torch.autograd.grad(gradients, parameters, pieces, retain_graph=True)


def ratio(run: Callable[[], object], unit: Callable[[], object], repeats: int = 7) -> float:
    """Median of the time of `run` in that of `unit`, each pair measured one after the other after a warm-up."""
    run(), unit()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        middle = time.perf_counter()
        unit()
        found.append((middle - start) / (time.perf_counter() - middle))
    return statistics.median(found)


def seconds(run: Callable[[], object], repeats: int = 7) -> float:
    """Median time of `run` after one warm-up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def gemm_rate(n: int = 1024, repeats: int = 20, dtype: torch.dtype = torch.float64) -> float:
    """Flops per second of an n × n × n product."""
    a = torch.randn(n, n, dtype=torch.float64).to(dtype)
    return 2 * n**3 / seconds(lambda: a @ a, repeats)


def machine() -> str:
    """One line about where this runs."""
    return (
        f"{platform.machine()}, {torch.get_num_threads()} threads, Python {platform.python_version()}, "
        f"torch {torch.__version__}"
    )


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table."""
    widths = [max(len(row[c]) for row in [header, *rows]) for c in range(len(header))]
    for row in [header, ["-" * w for w in widths], *rows]:
        print("| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |")
