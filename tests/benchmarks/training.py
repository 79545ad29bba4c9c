"""One fixed batch of digits, deep narrow networks: our optimizers against SGD, Adam and L-BFGS in the same seconds.

Run: python tests/benchmarks/training.py [--cases 16x8,8x24,...] [--seeds 5] [--seconds 20] [--ours]

Rates of SGD and Adam are the best of the grid that is printed, by the median over seeds of log10 of the best loss in a third of the time.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from common import machine, print_table
from sklearn.datasets import load_digits
from torch import Tensor, nn

from linop_hess.optim import GaussNewton, SaddleFree, quadrature

GOAL = 1e-12
LOSS = nn.CrossEntropyLoss()
ADAM = (3e-4, 1e-3, 3e-3, 1e-2)
SGD = (1e-2, 3e-2, 1e-1, 3e-1)


@dataclass(frozen=True)
class Case:
    depth: int
    width: int
    batch: int
    act: type[nn.Module] = nn.Tanh
    init: str = "he"

    def __str__(self) -> str:
        return f"{self.depth}x{self.width}, batch {self.batch}, {self.act.__name__}, {self.init}"

    def make(self, seed: int) -> tuple[nn.Sequential, Tensor, Tensor]:
        """A network at its initial point, and its batch: of standardized digits."""
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        size = 64
        for _ in range(self.depth):
            layers += [nn.Linear(size, self.width), self.act()]
            size = self.width
        model = nn.Sequential(*layers, nn.Linear(size, 10)).double()
        gain = 5 / 3 if self.act is nn.Tanh else 2**0.5
        for layer in model if self.init == "he" else ():
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=gain / layer.in_features**0.5)
                nn.init.zeros_(layer.bias)
        data, classes = load_digits(return_X_y=True)
        data = data / 16.0
        data = (data - data.mean(0)) / data.std()
        chosen = np.random.default_rng(seed).permutation(len(data))[: self.batch]
        return model, torch.tensor(data[chosen]), torch.tensor(classes[chosen])


CASES = {
    "16x8": Case(16, 8, 32),
    "24x8": Case(24, 8, 32),
    "32x6": Case(32, 6, 32),
    "8x24": Case(8, 24, 64),
    "16x8-default": Case(16, 8, 32, init="default"),
    "16x8-relu": Case(16, 8, 32, nn.ReLU),
}


@dataclass
class Run:
    """Losses of one run, with the seconds of each."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    start: float = field(default_factory=time.perf_counter)

    def add(self, loss: float) -> None:
        self.losses.append(loss)
        self.seconds.append(time.perf_counter() - self.start)

    @property
    def best(self) -> float:
        return min((loss for loss in self.losses if math.isfinite(loss)), default=math.inf)

    def first_below(self, goal: float) -> tuple[int, float] | None:
        return next(
            ((k, s) for k, (loss, s) in enumerate(zip(self.losses, self.seconds, strict=True)) if loss <= goal), None
        )

    def is_over(self, seconds: float) -> bool:
        return bool(self.losses) and (
            self.losses[-1] <= GOAL or not math.isfinite(self.losses[-1]) or self.seconds[-1] > seconds
        )


def ours(kind: Callable[..., SaddleFree | GaussNewton]) -> Callable[[Case, int, float], Run]:
    def run(case: Case, seed: int, seconds: float) -> Run:
        model, x, y = case.make(seed)
        opt, found = kind(model, LOSS), Run()
        found.add(float(LOSS(model(x), y)))
        while not found.is_over(seconds):
            opt.step(x, y)
            found.add(opt.last.new_loss)
        return found

    return run


def first_order(make: Callable[..., torch.optim.Optimizer]) -> Callable[[Case, int, float], Run]:
    def run(case: Case, seed: int, seconds: float) -> Run:
        model, x, y = case.make(seed)
        opt, found = make(model.parameters()), Run()
        while not found.is_over(seconds):
            opt.zero_grad()
            loss = LOSS(model(x), y)
            found.add(float(loss))
            loss.backward()
            opt.step()
        return found

    return run


def lbfgs(case: Case, seed: int, seconds: float) -> Run:
    """With a strong Wolfe line search, started again where it stops; a step is an evaluation."""
    model, x, y = case.make(seed)
    found = Run()

    class Over(Exception):
        pass

    def closure() -> Tensor:
        opt.zero_grad()
        loss = LOSS(model(x), y)
        loss.backward()
        found.add(float(loss))
        if found.is_over(seconds):
            raise Over
        return loss

    try:
        while True:
            opt = torch.optim.LBFGS(
                model.parameters(),
                max_iter=10**6,
                max_eval=10**7,
                history_size=10,
                tolerance_grad=0,
                tolerance_change=0,
                line_search_fn="strong_wolfe",
            )
            before = len(found.losses)
            opt.step(closure)
            if len(found.losses) - before < 3:
                break
    except Over:
        pass
    return found


def tuned(
    name: str,
    make: Callable[..., torch.optim.Optimizer],
    grid: tuple[float, ...],
    case: Case,
    seeds: range,
    seconds: float,
) -> list[str]:
    def score(lr: float) -> float:
        runs = [first_order(lambda p: make(p, lr=lr))(case, seed, seconds / 3) for seed in seeds]
        return float(np.median([math.log10(max(run.best, GOAL)) for run in runs]))

    best = min(grid, key=score)
    return row(f"{name}, lr {best:g} of {grid}", first_order(lambda p: make(p, lr=best)), case, seeds, seconds)


def row(name: str, run: Callable[[Case, int, float], Run], case: Case, seeds: range, seconds: float) -> list[str]:
    runs = [run(case, seed, seconds) for seed in seeds]
    cells = [name, f"{np.median([r.best for r in runs]):.1e} ({max(r.best for r in runs):.1e})"]
    for goal in (1e-6, GOAL):
        hits = [hit for r in runs if (hit := r.first_below(goal))]
        worst = f", worst {max(k for k, _ in hits)} steps, {max(s for _, s in hits):.1f} s" if hits else ""
        cells.append(f"{len(hits)}/{len(runs)}{worst}")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--ours", action="store_true", help="without the others")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    for name in args.cases.split(","):
        case, seeds = CASES[name], range(args.seeds)
        print(f"\n{case}, {args.seeds} seeds, {args.seconds:g} s each", flush=True)
        print_table(
            ["", "best loss, median (worst)", "<= 1e-6", "<= 1e-12"], rows_of(case, seeds, args.seconds, args.ours)
        )
    print("\n(λ² + δ²)^(−1/2) by quadrature: largest relative error for |λ| ≤ ‖H‖")
    poles = (4, 8, 12, 16, 20, 24)
    print_table(
        ["‖H‖/δ", *map(str, poles)],
        [[f"{r:.0e}", *(f"{quadrature_error(r, n):.0e}" for n in poles)] for r in (1e1, 1e2, 1e3, 1e4, 1e6)],
    )


def rows_of(case: Case, seeds: range, seconds: float, only_ours: bool) -> list[list[str]]:
    rows = [
        row("SaddleFree", ours(SaddleFree), case, seeds, seconds),
        row("GaussNewton", ours(GaussNewton), case, seeds, seconds),
    ]
    if not only_ours:
        rows.append(tuned("Adam", torch.optim.Adam, ADAM, case, seeds, seconds))
        rows.append(tuned("SGD 0.9", lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9), SGD, case, seeds, seconds))
        rows.append(row("L-BFGS", lbfgs, case, seeds, seconds))
    return rows


def quadrature_error(ratio: float, poles: int) -> float:
    sigma, weights = quadrature(ratio, poles)
    values = np.concatenate([[0.0], np.geomspace(1e-3, ratio, 20_000)])
    return float(abs((weights / (values[:, None] ** 2 + sigma**2)).sum(1) * np.sqrt(values**2 + 1) - 1).max())


if __name__ == "__main__":
    main()
