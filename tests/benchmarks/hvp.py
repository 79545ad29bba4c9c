"""Products of `linop_hess.Hessian` and `GaussNewton` in units of the strongest autograd product, its graph retained.

``python tests/benchmarks/hvp.py [--threads 1] [--repeats 9]``. The columns: the unit; a product that records its graph each time;
20 products of the operators with NumPy vectors, the first of which records the graph, in 20 units; a block of 16 columns
in 16 products of one whose results are put side by side.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from common import autograd_hvp, batch, machine, network, print_table, ratio, retained_hvp, seconds
from torch import nn

import linop_hess as lh

SHAPES = ((1000, 4, 1), (200, 8, 1), (10, 32, 1), (20, 8, 64), (20, 256, 1), (20, 64, 16))
PRODUCTS, COLUMNS = 20, 16


def row(depth: int, width: int, size: int, repeats: int) -> list[str]:
    model, (x, y), loss_fn = network(depth, width), batch(size), nn.CrossEntropyLoss()
    unit = retained_hvp(model, loss_fn, x, y)
    H, G = (kind(model, loss_fn, (x, y)) for kind in (lh.Hessian, lh.GaussNewton))
    v = torch.randn(H.shape[0], dtype=torch.float64)
    pieces = [part.view_as(p) for part, p in zip(v.split([p.numel() for p in H.parameters]), H.parameters, strict=True)]
    flat, block = v.numpy(), np.random.default_rng(0).standard_normal((H.shape[0], COLUMNS))

    def many(operator: lh.Hessian | lh.GaussNewton) -> None:
        operator.release()
        for _ in range(PRODUCTS):
            operator @ flat

    def units() -> None:
        for _ in range(PRODUCTS):
            unit(pieces)

    def singles(operator: lh.Hessian | lh.GaussNewton) -> None:
        np.stack([operator @ column for column in block.T], axis=1)

    return [
        f"{depth}, {width}, {size}",
        str(H.shape[0]),
        f"{1e3 * seconds(lambda: unit(pieces), repeats):.3g}",
        f"{ratio(lambda: autograd_hvp(model, loss_fn, x, y, v), lambda: unit(pieces), repeats):.2f}",
        *(f"{ratio(lambda: many(operator), units, repeats):.2f}" for operator in (H, G)),
        *(f"{ratio(lambda: operator @ block, lambda: singles(operator), repeats):.2f}" for operator in (H, G)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(machine())
    print_table(
        ["depth, width, batch", "N", "unit, ms", "rebuilt", "H, 20 products", "G, 20 products", "H, block", "G, block"],
        [row(*shape, arguments.repeats) for shape in SHAPES],
    )


if __name__ == "__main__":
    main()
