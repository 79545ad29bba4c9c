"""What of the time to a solution cannot be avoided for deep residual networks, in units of the strongest Hessian-vector product.

Each part by itself: two plain runs of the model (one to record, one to show that it is deterministic) and one backward pass, the band LU of
the states alone, its two substitutions (every first solve is refined once), and the two products with H that measure its backward errors.
Beside their sum what is taken, as of `models.py`.

Run: python tests/benchmarks/floor.py
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from common import machine, network, print_table
from models import CASES, data, measure, unit
from torch.nn import functional

import linop_hess as lh
from linop_hess import lq
from linop_hess.lq.band_storage import BandLU, BandMatrix
from linop_hess.lq.methods.state_band import StateLayout

NAMES = (
    "residual MLP width 8, 50 blocks",
    "residual MLP width 8, 500 blocks",
    "residual MLP width 8, 5000 blocks",
    "pre-LN residual blocks, 500",
)


def fastest(run: Callable[[], object], repeats: int = 5) -> float:
    """Seconds of the fastest of some runs."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def band_alone(layout: StateLayout) -> tuple[float, float]:
    """Seconds of LU and of one substitution with random band matrices of a layout, memory that is touched before included in neither."""
    times, rhs = [], torch.ones(layout.order, 1, dtype=torch.float64)
    kl = layout.bandwidth
    for _ in range(3):
        band = BandMatrix(layout.order, 3 * kl + 1, 2 * kl, np.dtype(float))
        band.storage[:] = np.random.default_rng(0).standard_normal(band.storage.shape)
        start = time.perf_counter()
        lu = BandLU(band, kl)
        times.append(time.perf_counter() - start)
    return min(times), fastest(lambda: lu.solve(rhs))


def main() -> None:
    """Print a table of what cannot be avoided, in products, beside what is taken."""
    print(machine())
    network(2, 4)
    rows = []
    for name in NAMES:
        make, batch, shape = CASES[name]
        torch.manual_seed(0)  # for what torch draws while a model is made
        model, (x, y) = make(), data(batch, *shape)
        hvp, parameters = unit(model, x, y), list(model.parameters())
        lin = lh.linearize(model, functional.cross_entropy, x, y, verify=False)
        forward = fastest(lambda: functional.cross_entropy(model(x), y))
        both = fastest(lambda: torch.autograd.grad(functional.cross_entropy(model(x), y), parameters))
        problem, v = lin.problem, torch.randn(lin.problem.size, 1, dtype=torch.float64)
        problem.hessian_product(v)  # what it makes once
        lu, substitution = band_alone(StateLayout(lq.Analysis(problem)))
        parts = [2 * forward, both - forward, lu, 2 * substitution, 2 * fastest(lambda: problem.hessian_product(v))]
        total = measure(model, x, y).total
        rows.append([name, f"{1e3 * hvp:.2f} ms", *(f"{part / hvp:.2f}" for part in [*parts, sum(parts), total])])
    parts_of = ["two runs", "backward", "band LU", "two substitutions", "two products"]
    print_table(["model", "one HVP", *parts_of, "floor", "total"], rows)


if __name__ == "__main__":
    main()
