"""Which inverse of *another* matrix is worth having as ``M``: from some steps before, or of another batch; and at which damping.

A network is trained by Adam on two batches. A is a matrix of the first batch at the last step, M an inverse

    of that batch k steps before,
    of the other batch at the last step,
    of the Gauss-Newton matrix of the same batch and step, where A is a Hessian,

each at the damping ε of A and at multiples of it. Three A: the Gauss-Newton matrix, the Hessian damped just enough to be
positive definite (both solved by cg), and the Hessian at a small damping, which is indefinite (gmres without restarts).
Printed are iterations to a true residual of ``rtol``, the larger of those for the gradient and for a random right-hand side.

Run it with ``python examples/near_inverses.py``.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

import linop_hess as lh

BEFORE, TIMES = (1, 5, 20), (1, 3, 10, 30, 100)
Table = dict[str, dict[tuple[str, float], float]]


def batches(count: int, features: int, classes: int) -> list[tuple[Tensor, Tensor]]:
    """Two batches of points around a centre for each class."""
    centres = 1.5 * torch.randn(classes, features, dtype=torch.float64)
    targets = torch.randint(classes, (2, count))
    points = centres[targets] + torch.randn(2, count, features, dtype=torch.float64)
    return [(points[0], targets[0]), (points[1], targets[1])]


def trained(model: nn.Module, data: Sequence[tuple[Tensor, Tensor]], steps: int, rate: float) -> list[nn.Module]:
    """The model after each step of Adam on all data."""
    inputs, targets = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    adam, models = torch.optim.Adam(model.parameters(), rate), [copy.deepcopy(model)]
    for _ in range(steps):
        adam.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        adam.step()
        models.append(copy.deepcopy(model))
    return models


def iterations(
    A: lh.operators.Operator, sides: list[np.ndarray], M: object, solver: str, rtol: float, maxiter: int
) -> float:
    """The most of any right-hand side; infinite where one is not solved."""
    options = {"restart": maxiter} if solver == "gmres" else {}
    records = [lh.krylov.run(solver, A, b, M=M, rtol=rtol, maxiter=maxiter, **options) for b in sides]
    return max(record.iterations if record.converged else float("inf") for record in records)


def main(
    width: int = 6, batch: int = 32, damping: float = 1e-2, steps: int = 60, rate: float = 3e-3,
    rtol: float = 1e-6, maxiter: int = 400,
) -> Table:  # fmt: skip
    torch.manual_seed(0)
    features, classes, loss_fn = 20, 5, nn.CrossEntropyLoss()
    data = batches(batch, features, classes)
    layers: list[nn.Module] = [nn.Linear(features, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()]
    models = trained(nn.Sequential(*layers, nn.Linear(width, classes)).double(), data, steps, rate)
    lin = lh.linearize(models[-1], loss_fn, *data[0])
    near = {f"{k} steps before": lh.linearize(models[-1 - k], loss_fn, *data[0]) for k in BEFORE}
    near["another batch"] = lh.linearize(models[-1], loss_fn, *data[1])
    convex = lin.smallest_convex_damping(margin=0.1)
    sides = [lin.gradient, np.random.default_rng(0).standard_normal(len(lin.gradient))]
    print(f"{len(lin.gradient)} parameters, loss {lin.loss:.2f}; iterations to a true residual of {rtol:g}")
    found: Table = {}
    for title, epsilon, newton in (
        ("Gauss-Newton", damping, True), ("Hessian, positive definite", convex, False), ("Hessian, indefinite", damping, False),
    ):  # fmt: skip
        A = (lin.gauss_newton() if newton else lin.H).damped(epsilon)
        solver = "cg" if newton or not lin.inertia(epsilon).negative else "gmres"
        rows = found[title] = {("none", 1.0): iterations(A, sides, None, solver, rtol, maxiter)}
        others = {name: other.gauss_newton() if newton else other.H for name, other in near.items()}
        for name, other in others.items() if newton else [*others.items(), ("Gauss-Newton", lin.gauss_newton())]:
            for times in TIMES:
                inverse = other.inverse(times * epsilon)
                # cg needs a positive definite M, which an inverse of another Hessian need not be.
                M = inverse.positive() if solver == "cg" else inverse
                rows[name, times] = iterations(A, sides, M, solver, rtol, maxiter)
        show(title, epsilon, solver, rows)
    return found


def show(title: str, epsilon: float, solver: str, rows: dict[tuple[str, float], float]) -> None:
    print(f"\n{title}, ε = {epsilon:.3g}: {solver} takes {rows['none', 1.0]:g} without M\n")
    print(f"{'M: the inverse':20}" + "".join(f"{f'{times} ε':>8}" for times in TIMES))
    for name in dict.fromkeys(name for name, _ in rows if name != "none"):
        cells = (rows[name, times] for times in TIMES)
        print(f"{name:20}" + "".join(f"{'-' if cell == float('inf') else f'{cell:g}':>8}" for cell in cells))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Inverses of other matrices as preconditioners.")
    parser.add_argument("--damping", type=float, default=1e-2)
    parser.add_argument("--batch", type=int, default=32)
    main(**vars(parser.parse_args()))
