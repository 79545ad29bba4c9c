"""Any model end to end: linearize, factor and one certified solve, in units of the strongest Hessian-vector product of the same model.

Run: python tests/benchmarks/models.py [name …]. Unit: a product with the graph of the gradient retained, in the same run. "capture" is the
recorded run, the second one that shows it is deterministic, and autograd's gradient.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from common import machine, network, print_table
from torch import Tensor, nn
from torch.nn import functional

import linop_hess as lh


class Residual(nn.Module):
    """h + W₂ tanh(W₁ h), before or after a layer norm."""

    def __init__(self, width: int, norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        return h + 0.3 * self.second(torch.tanh(self.first(self.norm(h))))


class Transformer(nn.Module):
    """Two encoder layers of width 16 on 8 tokens."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 16, 0.0, batch_first=True)
        self.embed, self.encoder, self.head = nn.Linear(4, 16), nn.TransformerEncoder(layer, 2), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(1))


class Recurrent(nn.Module):
    """A GRU of width 8, as a layer or as a cell."""

    def __init__(self, cell: bool) -> None:
        super().__init__()
        self.rnn: nn.Module = nn.GRUCell(4, 8) if cell else nn.GRU(4, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.rnn, nn.GRU):
            return self.head(self.rnn(x)[0][:, -1])
        h = x.new_zeros(x.shape[0], 8)
        for step in x.unbind(1):
            h = self.rnn(step, h)
        return self.head(h)


class Wrapped(nn.Module):
    """A network as people write it, a class of its own."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True))

    def forward(self, x: Tensor) -> Tensor:
        for layer in list(self.layers)[:-1]:
            x = torch.tanh(layer(x))
        return self.layers[-1](x)


def sequential(model: Wrapped) -> nn.Sequential:
    """The same network as `nn.Sequential`, with the same parameters."""
    parts: list[nn.Module] = []
    for layer in model.layers:
        parts += [layer, nn.Tanh()]
    return nn.Sequential(*parts[:-1])


def drawn(model: nn.Module) -> nn.Module:
    """In float64, matrices orthogonal with gain 1.2; the rest as torch draws it."""
    torch.manual_seed(0)
    model = model.double()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.orthogonal_(parameter, 1.2)
    return model


def residual(blocks: int, norm: bool, width: int = 8) -> nn.Module:
    """A residual network."""
    inner = [Residual(width, norm) for _ in range(blocks)]
    return drawn(nn.Sequential(nn.Linear(4, width), *inner, nn.Linear(width, 3)))


def unit(model: nn.Module, x: Any, y: Tensor) -> float:
    """Seconds of the strongest product: least of several."""
    parameters = list(model.parameters())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        gradient = torch.autograd.grad(functional.cross_entropy(model(x), y), parameters, create_graph=True)
    v = [torch.randn_like(p) for p in parameters]
    times = []
    while len(times) < 5:
        start = time.perf_counter()
        torch.autograd.grad(gradient, parameters, v, retain_graph=True)
        times.append(time.perf_counter() - start)
    return min(times)


@dataclass(frozen=True)
class Measured:
    """Seconds of the parts, and what the solve says."""

    linearize: float
    inverse: float
    solve: float
    method: str
    error: float
    size: int

    @property
    def total(self) -> float:
        return self.linearize + self.inverse + self.solve


def measure(model: nn.Module, x: Any, y: Tensor, method: str = "auto", repeats: int = 3) -> Measured:
    """Least total of a few runs."""
    runs = []
    for _ in range(repeats):
        times = [time.perf_counter()]
        lin = lh.linearize(model, functional.cross_entropy, x, y, verify=False)
        times.append(time.perf_counter())
        inverse = lin.inverse(1e-2, method)
        times.append(time.perf_counter())
        solution = inverse.solve(lin.gradient)
        times.append(time.perf_counter())
        a, b, c = np.diff(times)
        runs.append(Measured(a, b, c, solution.method, solution.backward_error, lin.problem.size))
    return min(runs, key=lambda run: run.total)


def data(batch: int, *shape: int) -> tuple[Tensor, Tensor]:
    """Inputs and labels."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, *shape, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (batch,), generator=generator)


CASES: dict[str, tuple[Callable[[], nn.Module], int, tuple[int, ...]]] = {
    "residual MLP width 8, 50 blocks": (lambda: residual(50, False), 1, (4,)),
    "residual MLP width 8, 500 blocks": (lambda: residual(500, False), 1, (4,)),
    "residual MLP width 8, 5000 blocks": (lambda: residual(5000, False), 1, (4,)),
    "residual MLP width 8, 500 blocks, batch 4": (lambda: residual(500, False), 4, (4,)),
    "pre-LN residual blocks, 500": (lambda: residual(500, True), 1, (4,)),
    "transformer d=16, 8 tokens, 2 layers, batch 4": (lambda: drawn(Transformer()), 4, (8, 4)),
    "GRU hidden 8, 10 steps, batch 4": (lambda: drawn(Recurrent(False)), 4, (10, 4)),
    "GRUCell unrolled, the same": (lambda: drawn(Recurrent(True)), 4, (10, 4)),
}


def end_to_end(names: list[str]) -> None:
    """Table of total times in products."""
    rows = []
    for name, (make, batch, shape) in CASES.items():
        if names and not any(n in name for n in names):
            continue
        torch.manual_seed(0)  # for what torch draws while a model is made
        model, (x, y) = make(), data(batch, *shape)
        hvp = unit(model, x, y)
        run = measure(model, x, y)
        parts = [f"{part / hvp:.2f}" for part in (run.linearize, run.inverse, run.solve, run.total)]
        rows.append([name, str(run.size), f"{1e3 * hvp:.2f} ms", *parts, run.method, f"{run.error:.0e}"])
    print_table(["model", "N", "one HVP", "linearize", "inverse", "solve", "total", "method", "η"], rows)


def methods(names: list[str]) -> None:
    """Each method against what "auto" picks, and the plan's estimates."""
    rows = []
    for name in (
        "transformer d=16, 8 tokens, 2 layers, batch 4",
        "GRU hidden 8, 10 steps, batch 4",
        "pre-LN residual blocks, 500",
    ):
        make, batch, shape = CASES[name]
        if names and not any(n in name for n in names):
            continue
        torch.manual_seed(0)  # for what torch draws while a model is made
        model, (x, y) = make(), data(batch, *shape)
        lin = lh.linearize(model, functional.cross_entropy, x, y, verify=False)
        plan = lin.plan(1e-2)
        found = {}
        for method in ("banded", "riccati", "dense"):
            if plan.costs[method].seconds < 20:
                start = time.perf_counter()
                lh.linearize(model, functional.cross_entropy, x, y, verify=False).inverse(1e-2, method)
                total = time.perf_counter() - start
                start = time.perf_counter()
                lh.linearize(model, functional.cross_entropy, x, y, verify=False)
                found[method] = total - (time.perf_counter() - start)
        best = min(found, key=lambda m: found[m])
        for method, measured in found.items():
            estimate = plan.costs[method].seconds
            mark = " <- chosen" if method == plan.choice else ""
            rows.append([name, method + mark, f"{estimate:.3g}", f"{measured:.3g}", f"{measured / found[best]:.2f}"])
    print_table(["model", "method", "estimated s", "measured s", "of the best"], rows)


def classes() -> None:
    """A class of one's own against the same as nn.Sequential."""
    rows = []
    for name, widths, batch in (
        ("784-100-10, batch 1", (784, 100, 10), 1),
        ("20-32-32-5, 640 samples", (20, 32, 32, 5), 640),
        ("depth 10, width 32, batch 1", (4, *[32] * 9, 3), 1),
        ("depth 2000, width 4, batch 1", (4, *[4] * 1999, 3), 1),
    ):
        model = drawn(Wrapped(*widths))
        x, y = data(batch, widths[0])
        theirs, ours = measure(sequential(model), x, y), measure(model, x, y)
        rows.append(
            [
                name,
                f"{theirs.total:.3g} s",
                f"{ours.total:.3g} s",
                f"{ours.total / theirs.total:.2f}",
                f"{ours.linearize / theirs.linearize:.2f}",
            ]
        )
    print_table(["network", "nn.Sequential", "class", "total, ratio", "linearize, ratio"], rows)


def main() -> None:
    """Print all tables."""
    names = sys.argv[1:]
    print(machine())
    network(2, 4)
    end_to_end(names)
    print()
    methods(names)
    if not names:
        print()
        classes()


if __name__ == "__main__":
    main()
