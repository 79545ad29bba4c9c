"""Full batches of digits: what a solve with H + εI costs, in units of the strongest Hessian-vector product of the same run.

Run: python tests/benchmarks/batches.py [--quick] [section ...], with sections of `SECTIONS`; `--quick` leaves out the largest cases.
One thread: OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import math
import resource
import time
from collections.abc import Callable
from typing import Any

import torch
from common import machine, print_table, retained_hvp, seconds
from sklearn.datasets import load_digits
from torch import Tensor, nn

import linop_hess as lh
from linop_hess import lq
from linop_hess._machine import machine as speed
from linop_hess.errors import FactorizationError
from linop_hess.lq.matrix.assembly import assemble

LOSS = nn.CrossEntropyLoss()

# Depth, width, Adam steps, damping, and the total of shared measurements that is to be reached.
CASES: dict[str, tuple[int, int, int, float, int]] = {
    "6x10": (6, 10, 0, 1e-2, 78),
    "20x10": (20, 10, 0, 1e-1, 138),
    "10x16 trained": (10, 16, 200, 1e-2, 237),
    "20x16 trained": (20, 16, 200, 1e-2, 325),
    "50x16 trained": (50, 16, 200, 1e-2, 871),
}


def digits(samples: int = 1797) -> tuple[Tensor, Tensor]:
    """All digits, or so many, those beyond the first 1,797 being copies with noise."""
    X, y = load_digits(return_X_y=True)
    X, y = torch.tensor(X / 16.0), torch.tensor(y)
    copies = -(-samples // len(X))
    generator = torch.Generator().manual_seed(0)
    parts = [X] + [X + 0.1 * torch.randn(X.shape, generator=generator, dtype=X.dtype) for _ in range(copies - 1)]
    return torch.cat(parts)[:samples], y.repeat(copies)[:samples]


def network(depth: int, width: int, steps: int, x: Tensor, y: Tensor) -> nn.Sequential:
    """A tanh network of so many hidden layers, orthogonal with gain 1.2, after so many Adam steps on all data."""
    torch.manual_seed(0)
    sizes, layers = [64] + [width] * depth + [10], list[nn.Module]()
    for inputs, outputs in zip(sizes[:-1], sizes[1:], strict=True):
        linear = nn.Linear(inputs, outputs, dtype=torch.float64)
        nn.init.orthogonal_(linear.weight, 1.2)
        layers += [linear, nn.Tanh()]
    model = nn.Sequential(*layers[:-1])
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        LOSS(model(x), y).backward()
        optimizer.step()
    return model


def once(run: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> tuple[float, Any]:
    """Time of one run, and its result."""
    start = clock()
    result = run()
    return clock() - start, result


def row(name: str, gemm: float, which: str) -> list[str]:
    """One network: parts of the way, and totals to a relative residual of 1e-6 and to the certificate."""
    depth, width, steps, damping, to_reach = CASES[name]
    x, y = digits()
    model = network(depth, width, steps, x, y)
    product, v = retained_hvp(model, LOSS, x, y), [torch.randn_like(p) for p in model.parameters()]
    unit = seconds(lambda: product(v), 9)
    for dtype in (torch.float64, torch.float32):
        speed(dtype)  # measured once a process, in a few tenths of a second
    linearized, lin = once(lambda: lh.linearize(model, LOSS, x, y))
    matrix = lin.H if which == "H" else lin.gauss_newton()
    analysis, g = matrix.analysis, lin.gradient_tensor
    N = analysis.problem.size
    assembled, H = once(lambda: assemble(analysis.problem, torch.float32))
    del H
    made, solver = once(lambda: lq.Solver(analysis, damping, "dense"))
    # A residual of 1e-6‖g‖ is a backward error of this or less.
    tolerance = 1e-6 / (1.0 + analysis.rough_norm / damping)
    loose, first = once(lambda: solver.solve(g, max(tolerance, 1e-14)))
    full, second = once(lambda: solver.solve(g))
    residual = float((analysis.problem.hessian_product(first.x[:, None], damping)[:, 0] - g).norm() / g.norm())
    return [
        f"{name}, {damping:g}",
        f"{N}",
        f"{unit * 1e3:.1f}",
        f"{linearized / unit:.0f}",
        f"{assembled / unit:.0f}",
        f"{200 * len(x) * N**2 / assembled / gemm:.0f} %",
        f"{(made - assembled) / unit:.0f}",
        f"{loose / unit:.0f} ({residual:.0e})",
        f"{(made + loose) / unit:.0f} ({to_reach})",
        f"{full / unit:.0f} ({second.backward_error:.0e})",
        solver.precision,
    ]


def table(quick: bool) -> None:
    """H and Gauss-Newton of the networks, factored and solved with."""
    a = torch.randn(1024, 1024, dtype=torch.float32)
    gemm = 2 * 1024**3 / seconds(lambda: a @ a, 9)
    print(
        f"float32 GEMM: {gemm / 1e9:.0f} GFLOP/s; times in Hessian-vector products, in brackets what is to be reached"
    )
    header = [
        "network, damping",
        "N",
        "HVP, ms",
        "linearize",
        "assemble",
        "of GEMM",
        "factor",
        "to 1e-6",
        "total",
        "to 1e-14",
        "in",
    ]
    names = [name for name in CASES if not quick or CASES[name][0] * CASES[name][1] <= 200]
    for which in ("H", "Gauss-Newton"):
        print(f"\n{which}")
        print_table(header, [row(name, gemm, which) for name in names])


def batches(quick: bool) -> None:
    """Processor time, all by the clock, and memory against the number of samples, in batches of at most 1,000; rows as they come.

    "dense" by name, for one slope over all sizes: of few samples "auto" takes other ways.
    """
    header = [
        "network",
        "samples",
        "linearize, s",
        "inverse, s",
        "slope",
        "solve, s",
        "clock, s",
        "error",
        "in",
        "peak, MiB",
    ]
    for depth, width in ((6, 10),) if quick else ((6, 10), (20, 16)):
        model, rows, before = network(depth, width, 200, *digits(1797)), [], 0.0
        for samples in (500, 5000) if quick else (500, 5000, 50000):
            x, y = digits(samples)
            parts, start = list(zip(x.split(1000), y.split(1000), strict=True)), time.perf_counter()
            linearized, lin = once(lambda parts=parts: lh.linearize(model, LOSS, parts), time.process_time)
            made, inverse = once(lambda lin=lin: lin.inverse(1e-2, "dense"), time.process_time)
            solved, solution = once(
                lambda inverse=inverse, lin=lin: inverse.solve(lin.gradient_tensor), time.process_time
            )
            clock, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            slope, before = f"{math.log10(made / before):.2f}" if before else "", made
            row = [
                f"{depth}x{width}",
                f"{samples}",
                f"{linearized:.1f}",
                f"{made:.1f}",
                slope,
                f"{solved:.1f}",
                f"{clock:.1f}",
            ]
            rows.append([*row, f"{solution.backward_error:.0e}", inverse.precision, f"{peak:.0f}"])
            print(" ".join(rows[-1]), flush=True)
            del lin, inverse, solution
        print_table(header, rows)


# Blocks of 64 columns after which H is a matrix.
_BLOCKS_BEFORE = 3


def least(run: Callable[[], Any], repeats: int = 3) -> float:
    """Least processor time of some runs."""
    return min(once(run, time.process_time)[0] for _ in range(repeats))


def columns(quick: bool) -> None:
    """Processor time of 64 right-hand sides, gradients of samples, in that of one, after the factorization; and of what bounds it.

    "dense" is the first block that comes, "dense, later" one after which products have paid for H as a matrix, "dense in double" one of the
    factors that the plan takes for so many right-hand sides.
    """
    header = ["network, damping", "N", "what", "one, ms", "64, ms", "ratio", "iterations", "error"]
    rows = []
    for name in ("6x10",) if quick else ("6x10", "10x16 trained"):
        depth, width, steps, damping, _ = CASES[name]
        x, y = digits()
        lin = lh.linearize(network(depth, width, steps, x, y), LOSS, x, y)
        analysis, each = lin.analysis, lin.sample_gradients(to="torch").mT.contiguous()
        G = each[:, :64].contiguous()
        N, product = len(G), analysis.problem.hessian_product
        L = torch.linalg.cholesky(4.0 * torch.eye(N) + torch.randn(N, N) / N)
        single = G.float()
        first = [f"{name}, {damping:g}", f"{N}"]
        for what, run in (
            ("product", product),
            ("LAPACK spotrs", lambda v, L=L: torch.cholesky_solve(v.float(), L)),
        ):
            run(single.to(G.dtype))
            one, many = least(lambda run=run, G=G: run(G[:, :1])), least(lambda run=run, G=G: run(G))
            rows.append([*first, what, f"{one * 1e3:.1f}", f"{many * 1e3:.0f}", f"{many / one:.1f}", "", ""])
        for what, method in (
            ("dense", "dense"),
            ("dense, later", "dense"),
            ("dense in double", "dense"),
            ("sketched", "sketched"),
            ("iterative", "iterative"),
        ):
            precision = "double" if what == "dense in double" else "auto"
            solver = lq.Solver(analysis, damping, method, precision=precision)
            for _ in range(_BLOCKS_BEFORE if what in ("dense, later", "dense in double") else 0):
                solver.solve(G)
            try:
                alone = solver.solve(G[:, 0])
                one = f"{(took := least(lambda s=solver, G=G: s.solve(G[:, 0]), 2)) * 1e3:.0f}"
            except FactorizationError:
                alone, one, took = None, "not reached", math.nan
            many, found = once(lambda s=solver, G=G: s.solve(G), time.process_time)
            iterations = f"{alone.iterations if alone else '> 1000'}, {found.iterations}" if found.iterations else ""
            rows.append([*first, what, one, f"{many * 1e3:.0f}", f"{many / took:.1f}", iterations])
            rows[-1].append(f"{found.backward_error:.0e}")
            print(" ".join(rows[-1]), flush=True)
        solver = lq.Solver(analysis, damping, "dense")
        all_at_once, found = once(lambda s=solver, each=each: s.solve(each), time.process_time)
        rows.append(
            [
                *first,
                f"dense, all {each.shape[1]}",
                "",
                f"{all_at_once * 1e3:.0f}",
                "",
                "",
                f"{found.backward_error:.0e}",
            ]
        )
    print_table(header, rows)


SECTIONS: dict[str, Callable[[bool], None]] = {"dense": table, "batches": batches, "columns": columns}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("sections", nargs="*", choices=[[], *SECTIONS], default=[])
    parser.add_argument("--quick", action="store_true")
    chosen = parser.parse_args()
    print(machine())
    for title in chosen.sections or SECTIONS:
        print(f"\n## {title}\n")
        SECTIONS[title](chosen.quick)
