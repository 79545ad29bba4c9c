"""Speed against the strongest autograd Hessian-vector product, the GEMM rate, and the paper's algorithm; ratios inside one run.

The unit is a product whose gradient graph is retained, one backward pass; a product that records its graph is shown beside it.

Run: python tests/benchmarks/speed.py
"""

from __future__ import annotations

import numpy as np
import torch
from common import autograd_hvp, batch, gemm_rate, machine, network, print_table, retained_hvp, seconds
from torch import nn

import linop_hess as lh

DAMPING = 1e-3
LOSS = nn.CrossEntropyLoss()


def against_hvp() -> list[list[str]]:
    """End to end, and piece by piece, in units of one retained-graph HVP."""
    rows = []
    for depth, width, size in [(1000, 4, 1), (200, 8, 1), (10, 32, 1), (20, 8, 64), (20, 256, 1), (20, 64, 16)]:
        model, (x, y) = network(depth, width), batch(size)
        lin = lh.linearize(model, LOSS, x, y)
        v = torch.randn(lin.problem.size, dtype=torch.float64)
        g, state = v.numpy(), np.ones(lin.M.shape[0])
        inverse = lin.inverse(DAMPING)
        product = retained_hvp(model, LOSS, x, y)
        parameters = list(model.parameters())
        pieces = [part.view_as(p) for part, p in zip(v.split([p.numel() for p in parameters]), parameters, strict=True)]
        hvp = seconds(lambda: product(pieces), 20)
        rebuilt = seconds(lambda: autograd_hvp(model, LOSS, x, y, v))
        whole = seconds(lambda: lh.linearize(model, LOSS, x, y).inverse(DAMPING).solve(g))
        parts = [
            seconds(lambda: lh.linearize(model, LOSS, x, y)),
            seconds(lambda: lin.inverse(DAMPING)),
            seconds(lambda: inverse @ g),
            seconds(lambda: lin.H @ g),
            seconds(lambda: lin.M_inv @ state),
        ]
        rows.append(
            [
                f"L={depth} width {width} batch {size}",
                f"{lin.problem.size}",
                f"{hvp * 1e3:.2f} ms",
                f"{rebuilt / hvp:.2f}",
                inverse.method,
            ]
            + [f"{part / hvp:.3f}" for part in [whole, *parts]]
            + [f"{inverse.solve(g).backward_error:.0e}"]
        )
    return rows


def against_gemm() -> list[list[str]]:
    """Rates of the Riccati factorization against that of GEMM.

    Where the controls of a layer are more than its states' entries a stage counts 4⅔ n³ flops, n = batch × width. Where they are fewer,
    p = width (width + 1) of them: 4 n² width for FᵀVF by samples, 2 n² (width + 1) for V times row spaces, 2 n² p for the downdate.
    """
    rows = []
    for depth, width, size in [(20, 64, 16), (20, 8, 64)]:
        model, (x, y) = network(depth, width), batch(size)
        lin = lh.linearize(model, LOSS, x, y)
        n, p = width * size, width * (width + 1)
        each = (4 + 2 / 3) * n**3 if p > n else 2 * n**2 * (2 * width + width + 1 + p)
        factor = lh.lq.METHODS["riccati"].factor
        assert lin.analysis.groups
        gemm = gemm_rate()
        took = min(seconds(lambda: factor(lin.analysis, DAMPING), 3) for _ in range(2))
        rate = (depth - 2) * each / took
        rows.append(
            [f"L={depth} width {width} batch {size}", f"{rate / 1e9:.0f}", f"{gemm / 1e9:.0f}", f"{rate / gemm:.0%}"]
        )
    return rows


def at_the_least() -> list[list[str]]:
    """What the flops of a factorization of L=20 width 8 batch 64 take at the rate of GEMM, in HVPs, and what it took.

    Of `riccati` the downdates count half, being symmetric; of `dense` N³/3, H being there.
    """
    depth, width, size = 20, 8, 64
    model, (x, y) = network(depth, width), batch(size)
    lin = lh.linearize(model, LOSS, x, y)
    v = torch.randn(lin.problem.size, dtype=torch.float64)
    parameters = list(model.parameters())
    pieces = [part.view_as(q) for part, q in zip(v.split([q.numel() for q in parameters]), parameters, strict=True)]
    product = retained_hvp(model, LOSS, x, y)
    hvp = seconds(lambda: product(pieces), 20)
    rebuilt = seconds(lambda: autograd_hvp(model, LOSS, x, y, v), 20)
    n, p, N = width * size, width * (width + 1), lin.problem.size
    stages = (depth - 2) * 2 * n**2 * (2 * width + width + 1 + p / 2)
    rows = []
    for method, precision, flops, dtype in (
        ("riccati", "double", stages, torch.float64),
        ("dense", "double", N**3 / 3, torch.float64),
        ("dense", "single", N**3 / 3, torch.float32),
    ):
        least = flops / gemm_rate(dtype=dtype)
        took = seconds(lambda m=method, q=precision: lin.inverse(DAMPING, m, precision=q), 5)
        times = [f"{t / unit:.1f}" for unit in (hvp, rebuilt) for t in (least, took)]
        rows.append([f"{method}, {precision}", f"{flops / 1e9:.2f}", *times])
    return rows


def against_ldu() -> list[list[str]]:
    """Factor and certified solve against method "ldu"."""
    rows = []
    for depth, width in [(200, 8), (10, 32)]:
        model, (x, y) = network(depth, width), batch(1)
        lin = lh.linearize(model, LOSS, x, y)
        g = np.random.default_rng(0).normal(size=lin.problem.size)
        ours = seconds(lambda: lin.inverse(DAMPING).solve(g), 9)
        theirs = seconds(lambda: lin.inverse(DAMPING, "ldu").solve(g), 3)
        rows.append(
            [f"L={depth} width {width}", f"{theirs * 1e3:.0f} ms", f"{ours * 1e3:.2f} ms", f"{theirs / ours:.0f}"]
        )
    return rows


if __name__ == "__main__":
    print(machine(), "\n")
    print("In units of one retained-graph autograd HVP of the same network:\n")
    print_table(
        [
            "network",
            "N",
            "HVP",
            "rebuilt",
            "method",
            "end to end",
            "linearize",
            "inverse",
            "inv @ g",
            "H @ v",
            "M_inv @ v",
            "η",
        ],
        against_hvp(),
    )
    print("\nRiccati factorization, GFLOP/s:\n")
    print_table(["network", "factor", "GEMM", "ratio"], against_gemm())
    print("\nL=20 width 8 batch 64, one factorization, in HVPs:\n")
    print_table(
        ["method", "GFLOP", "at GEMM's rate", "took", "at GEMM's rate, rebuilt HVPs", "took, rebuilt HVPs"],
        at_the_least(),
    )
    print("\nFactor and one certified solve against the paper's LDU:\n")
    print_table(["network", "ldu", "ours", "ratio"], against_ldu())
