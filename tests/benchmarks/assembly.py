"""The dense Hessian from the stages, against autograd's, column by column, and against the GEMM rate; ratios inside one run.

Run: python tests/benchmarks/assembly.py [part of a name ...]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from common import machine, print_table, seconds
from torch import Tensor, nn

import linop_hess as lh
from linop_hess.lq.matrix.assembly import assemble, assembly_cost

LOSS = nn.CrossEntropyLoss()


def mlp(*widths: int) -> nn.Sequential:
    """A tanh network, orthogonal with gain 1.2."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in zip(widths[:-1], widths[1:], strict=True):
        linear = nn.Linear(inputs, outputs)
        nn.init.orthogonal_(linear.weight, 1.2)
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def convnet() -> nn.Sequential:
    """Two convolutions on 8 × 8 images and a linear layer."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 4, 3, padding=1),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(4, 8, 3, padding=1),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


CASES: dict[str, tuple[Callable[[], nn.Sequential], int, int, int, torch.dtype]] = {
    "20-32-32-5, 640, float32": (lambda: mlp(20, 32, 32, 5), 20, 5, 640, torch.float32),
    "64-10x6-10, 1797": (lambda: mlp(64, *[10] * 6, 10), 64, 10, 1797, torch.float64),
    "20 of width 8, 64": (lambda: mlp(*[8] * 20, 3), 8, 3, 64, torch.float64),
    "convolutions, 16": (convnet, 64, 10, 16, torch.float64),
    "50 of width 4, 1": (lambda: mlp(*[4] * 50, 3), 4, 3, 1, torch.float64),
    "20-32-32-5, 1": (lambda: mlp(20, 32, 32, 5), 20, 5, 1, torch.float64),
}


def columns(problem: lh.lq.Problem) -> Tensor:
    """H by products with unit vectors, 512 at a time."""
    eye = torch.eye(problem.size, dtype=problem.dtype)
    return torch.cat([problem.hessian_product(part) for part in eye.split(512, 1)], 1)


def row(name: str) -> list[str]:
    """One network."""
    make, inputs, outputs, size, dtype = CASES[name]
    model = make().to(dtype)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, inputs, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randint(outputs, (size,), generator=generator)
    problem = lh.linearize(model, LOSS, x, y).problem
    a = torch.randn(1024, 1024, dtype=dtype)
    gemm = 2 * 1024**3 / seconds(lambda: a @ a)
    ours = seconds(lambda: assemble(problem))
    times = []
    for form in (lambda: lh.to_dense(lh.Hessian(model, LOSS, (x, y))), lambda: columns(problem)):
        start = time.perf_counter()
        form()
        times.append(time.perf_counter() - start)
    truth = lh.to_dense(lh.Hessian(model, LOSS, (x, y)))
    error = np.abs(assemble(problem).numpy() - truth).max() / np.abs(truth).max()
    rate = assembly_cost(problem)[0] / ours
    return [
        name,
        f"{problem.size}",
        f"{ours * 1e3:.0f} ms",
        *(f"{t / ours:.0f}" for t in times),
        f"{rate / 1e9:.1f}",
        f"{gemm / 1e9:.0f}",
        f"{error:.0e}",
    ]


if __name__ == "__main__":
    print(machine(), "\n")
    chosen = [name for name in CASES if not sys.argv[1:] or any(part in name for part in sys.argv[1:])]
    header = ["network, samples", "N", "assemble", "autograd / ours", "columns / ours", "GFLOP/s", "GEMM", "difference"]
    print_table(header, [row(name) for name in chosen])
