"""Physics-informed networks: `GaussNewton` against L-BFGS, Adam and SciPy's BFGS, each for the same seconds.

Run: python tests/benchmarks/physics.py [--task poisson|burgers] [--seeds 5] [--seconds 10] [--methods geodesic,bfgs,...]

Seconds are the processor's, of one thread.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.optimize
import torch
from common import machine, print_table
from torch import Tensor

from linop_hess.optim import GaussNewton, Searched
from linop_hess.tasks import LearningTask, burgers, poisson

MAKE = {"poisson": poisson, "burgers": burgers}
ERROR = "relative L2 error"
ADAM = (1e-3, 3e-3, 1e-2)
FIRST_DAMPING = 1e-2


class OutOfTime(Exception):
    """The seconds are used up."""


@dataclass
class Run:
    """A task that is trained, and where its loss was least."""

    task: LearningTask
    seconds: float
    limit: int
    start: float = field(default_factory=time.process_time)
    steps: int = 0
    least: float = math.inf
    best: list[Tensor] = field(default_factory=list)
    used: float = 0.0

    def step(self, loss: float) -> None:
        """Count a step that ended at the present parameters with `loss`."""
        self.steps += 1
        self.used = time.process_time() - self.start
        if loss < self.least:
            self.least, self.best = loss, [p.detach().clone() for p in self.task.model.parameters()]
        if self.used > self.seconds or self.steps >= self.limit:
            raise OutOfTime

    def error(self) -> float:
        """Return the relative L2 error where the loss was least."""
        if not self.best:
            return math.inf
        with torch.no_grad():
            for p, value in zip(self.task.model.parameters(), self.best, strict=True):
                p.copy_(value)
        return self.task.measured()[ERROR]


def get(task: LearningTask) -> Tensor:
    return torch.nn.utils.parameters_to_vector(task.model.parameters()).detach()


def put(task: LearningTask, vector: Tensor) -> None:
    with torch.no_grad():
        torch.nn.utils.vector_to_parameters(vector, task.model.parameters())


def gauss_newton(searched: bool = False, **how: Any) -> Callable[[Run], None]:
    def train(run: Run) -> None:
        damping = {"damping": Searched(FIRST_DAMPING)} if searched else {}
        opt = GaussNewton(run.task.model, run.task.loss_fn, **damping, **how)
        while True:
            opt.step(run.task.inputs, run.task.targets)
            run.step(opt.last.new_loss)

    return train


def lbfgs(run: Run) -> None:
    opt = torch.optim.LBFGS(
        run.task.model.parameters(),
        max_iter=10**6,
        max_eval=10**7,
        history_size=100,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        opt.zero_grad()
        loss = run.task.loss()
        loss.backward()
        run.step(float(loss.detach()))
        return loss

    opt.step(closure)


def adam(rate: float) -> Callable[[Run], None]:
    def train(run: Run) -> None:
        opt = torch.optim.Adam(run.task.model.parameters(), lr=rate)
        while True:
            opt.zero_grad()
            loss = run.task.loss()
            loss.backward()
            run.step(float(loss.detach()))
            opt.step()

    return train


def bfgs(run: Run) -> None:
    """SciPy's, with full memory; begun again from a unit matrix where its line search fails. Steps are evaluations."""
    task = run.task
    parameters = list(task.model.parameters())

    def value_and_gradient(x: np.ndarray) -> tuple[float, np.ndarray]:
        put(task, torch.from_numpy(x.copy()))
        loss = task.loss()
        g = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
        run.step(float(loss.detach()))
        return float(loss.detach()), g.numpy()

    found = float(task.loss().detach())
    before, x = math.inf, get(task).numpy()
    while found < before:
        before = found
        end = scipy.optimize.minimize(
            value_and_gradient, x, jac=True, method="BFGS", options={"gtol": 0.0, "maxiter": 10**7}
        )
        found, x = float(end.fun), end.x


METHODS: dict[str, tuple[str, Callable[[Run], None]]] = {
    "adam": ("Adam", adam(0.0)),
    "lbfgs": ("L-BFGS (torch, strong Wolfe, memory 100)", lbfgs),
    "bfgs": ("BFGS (SciPy)", bfgs),
    "chain": ("`GaussNewton` through a chain", gauss_newton(method="dense")),
    "gauss-newton": ("`GaussNewton`", gauss_newton()),
    "searched": ("`GaussNewton`, geodesic, `Searched`", gauss_newton(searched=True, geodesic=True)),
    "geodesic": ("`GaussNewton`, geodesic", gauss_newton(geodesic=True)),
}


def trained(options: argparse.Namespace, train: Callable[[Run], None], seed: int, seconds: float) -> Run:
    sizes = {} if options.points is None else {"points": options.points}
    run = Run(MAKE[options.task](seed, **sizes), seconds, options.steps)
    try:
        train(run)
    except OutOfTime:
        pass
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=list(MAKE), default="poisson")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--steps", type=int, default=10**9, help="at most so many")
    parser.add_argument("--points", type=int, help="along a side, or along x; by default the task's")
    parser.add_argument("--methods", default=",".join(METHODS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for key in options.methods.split(","):
        label, train = METHODS[key]
        if key == "adam":
            tried = {r: trained(options, adam(r), 0, options.seconds / 3).least for r in ADAM}
            rate = min(tried, key=tried.__getitem__)
            label, train = f"Adam, lr {rate:g} of {', '.join(f'{r:g}' for r in ADAM)}", adam(rate)
        runs = [trained(options, train, seed, options.seconds) for seed in range(options.seeds)]
        errors = [run.error() for run in runs]
        row = [label]
        for values in (errors, [run.least for run in runs]):
            row.append(f"{statistics.median(values):.1e} ({min(values):.1e}, {max(values):.1e})")
        row += [f"{statistics.median(run.steps for run in runs):.0f}", f"{max(run.used for run in runs):.1f}"]
        rows.append(row)
        print(" | ".join(row), flush=True)
    print(f"\n{options.task}, {options.seeds} seeds, {options.seconds:g} s each; {machine()}\n")
    print_table(["", ERROR + ": median (best, worst)", "loss: median (best, worst)", "steps", "s, worst"], rows)


if __name__ == "__main__":
    main()
