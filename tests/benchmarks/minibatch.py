"""Mini-batches of all digits: `PreconditionedSGD` and its options against tuned Adam and SGD, in epochs and in seconds.

A network of 12 layers of 12, float64, cross entropy, batches of 64, 8 epochs; the loss of all 1,797 images after each epoch. "best" is the
least of them. Rates of Adam and SGD come from a grid, by the median over the same seeds.

Run: python tests/benchmarks/minibatch.py [--seeds 3] [--activations tanh,relu] [--rows chosen,options,others,same-seconds,streams]
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from common import machine, print_table
from sklearn.datasets import load_digits
from torch import Tensor, nn

from linop_hess.optim import DelayedGratification, GainRatio, GaussNewton, PreconditionedSGD
from linop_hess.optim.base import CurvatureOptimizer

LOSS = nn.CrossEntropyLoss()
BATCH, EPOCHS = 64, 8
ADAM = (3e-3, 5e-3, 7e-3, 1e-2, 1.5e-2)
SGD = (1e-2, 2e-2, 3e-2, 5e-2)

Make = Callable[[nn.Module, int], torch.optim.Optimizer]


def digits() -> tuple[Tensor, Tensor]:
    x, y = load_digits(return_X_y=True)
    x = torch.tensor(x / 16.0, dtype=torch.float64)
    return x - x.mean(0), torch.tensor(y)


X, Y = digits()


def network(seed: int, activation: str) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for size in [64, *[12] * 10]:
        layers += [nn.Linear(size, 12), nn.Tanh() if activation == "tanh" else nn.ReLU()]
    layers.append(nn.Linear(12, 10))
    for k, layer in enumerate(layers):
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear" if k == len(layers) - 1 else activation)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers).double()


@dataclass
class Run:
    """Losses after each epoch, and seconds in steps."""

    losses: list[float]
    seconds: float

    @property
    def best(self) -> float:
        return min((loss for loss in self.losses if math.isfinite(loss)), default=math.inf)


def train(seed: int, activation: str, make: Make, seconds: float | None = None) -> Run:
    """Eight epochs, or as many as fit into some seconds."""
    model = network(seed, activation)
    opt, order, run = make(model, seed), torch.Generator().manual_seed(seed + 100), Run([], 0.0)
    while run.seconds < seconds if seconds is not None else len(run.losses) < EPOCHS:
        began, places = time.perf_counter(), torch.randperm(len(X), generator=order)
        for chosen in places[: len(X) // BATCH * BATCH].split(BATCH):
            if isinstance(opt, CurvatureOptimizer):
                opt.step(X[chosen], Y[chosen])
            else:
                opt.zero_grad()
                LOSS(model(X[chosen]), Y[chosen]).backward()
                opt.step()
        run.seconds += time.perf_counter() - began
        with torch.no_grad():
            run.losses.append(float(LOSS(model(X), Y)))
    return run


def curvature_batches(size: int, seed: int) -> Callable[[], tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed + 7)

    def draw() -> tuple[Tensor, Tensor]:
        chosen = torch.randperm(len(X), generator=generator)[:size]
        return X[chosen], Y[chosen]

    return draw


def ours(size: int = 256, **options: Any) -> Make:
    return lambda model, seed: PreconditionedSGD(model, LOSS, curvature_batch=curvature_batches(size, seed), **options)


OPTIONS: dict[str, Make] = {
    "curvature batches of 64": ours(64),
    "of 512": ours(512),
    "of 256, renewed every 28 steps": ours(256, every=28, decay=0.5),
    "no mean of curvatures": ours(256, decay=0.0),
    "no bound on steps": ours(256, clip=None),
    "no bound, damping 1, lr 0.03": ours(256, clip=None, damping=1.0, lr=0.03),
    "damping 0.03": ours(256, damping=0.03),
    "damping 0.3": ours(256, damping=0.3),
    "|H| of the mean Hessian": ours(256, curvature="absolute", every=28, decay=0.5),
    "positive()": ours(256, curvature="positive", every=28),
}


STREAMS: dict[str, Make] = {
    f"GaussNewton, {name}": lambda model, seed, damping=damping: GaussNewton(model, LOSS, damping=damping())
    for name, damping in {
        "GainRatio(0.1), its default": lambda: GainRatio(0.1),
        "DelayedGratification(1.0)": lambda: DelayedGratification(1.0),
        "DelayedGratification(1.0, bold=0.0)": lambda: DelayedGratification(1.0, bold=0.0),
    }.items()
}
"""Full steps on one mini-batch after the other."""


def adam(lr: float) -> Make:
    return lambda model, seed: torch.optim.Adam(model.parameters(), lr=lr)


def sgd(lr: float) -> Make:
    return lambda model, seed: torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def row(name: str, runs: list[Run]) -> list[str]:
    after = [f"{statistics.median(run.losses[epoch - 1] for run in runs):.3f}" for epoch in (1, 2, 4, 8)]
    best = [run.best for run in runs]
    cells = [name, *after, f"{statistics.median(best):.3f} ({max(best):.3f})"]
    return [*cells, f"{statistics.median(run.seconds for run in runs):.1f}"]


def tuned(
    grid: tuple[float, ...], make: Callable[[float], Make], activation: str, seeds: range
) -> tuple[float, list[Run]]:
    found = {lr: [train(seed, activation, make(lr)) for seed in seeds] for lr in grid}
    best = min(found, key=lambda lr: statistics.median(run.best for run in found[lr]))
    return best, found[best]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--activations", default="tanh,relu")
    parser.add_argument("--rows", default="chosen,options,others,same-seconds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    wanted, seeds = args.rows.split(","), range(args.seeds)
    for activation in args.activations.split(","):
        print(f"\n{activation}, {args.seeds} seeds; Adam's grid {ADAM}, SGD's {SGD}", flush=True)
        rows, spent = [], None
        if "chosen" in wanted:
            runs = [train(seed, activation, ours()) for seed in seeds]
            spent = statistics.median(run.seconds for run in runs)
            rows.append(row("PreconditionedSGD, its defaults, curvature batches of 256", runs))
            print(rows[-1], flush=True)
        if "others" in wanted:
            for name, grid, make in (("Adam", ADAM, adam), ("SGD, momentum 0.9", SGD, sgd)):
                lr, runs = tuned(grid, make, activation, seeds)
                rows.append(row(f"{name}, lr {lr:g}", runs))
                print(rows[-1], flush=True)
                if name == "Adam" and "same-seconds" in wanted and spent is not None:
                    longer = [train(seed, activation, make(lr), spent) for seed in seeds]
                    best, epochs = [run.best for run in longer], len(longer[0].losses)
                    cells = ["", "", "", "", f"{statistics.median(best):.3f} ({max(best):.3f})", f"{spent:.1f}"]
                    rows.append([f"{name}, lr {lr:g}, in the seconds of the first row: {epochs} epochs", *cells])
                    print(rows[-1], flush=True)
        if "options" in wanted:
            for name, make_ours in OPTIONS.items():
                rows.append(row(name, [train(seed, activation, make_ours) for seed in seeds]))
                print(rows[-1], flush=True)
        if "streams" in wanted:
            for name, make_stream in STREAMS.items():
                rows.append(row(name, [train(seed, activation, make_stream) for seed in seeds]))
                print(rows[-1], flush=True)
        print_table(["", "1 epoch", "2", "4", "8", "best, median (worst)", "s"], rows)


if __name__ == "__main__":
    main()
