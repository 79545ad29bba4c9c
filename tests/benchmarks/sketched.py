"""Full batches beyond a dense Hessian: method "sketched", in units of the strongest autograd product.

``python tests/benchmarks/sketched.py [--case 50x16] [--damping 1e-2] [--lr 1e-3] [--rank 256] [--core 0] [--columns 64]
[--slope]``. Digits, all 1,797 samples, tanh, cross entropy, orthogonal of gain 1.2, 200 full-batch Adam steps; the right-hand side is the
gradient. Processor time of one thread, to a relative residual of 1e-6, set-up apart. A rank of 0 is left to the method; the last rows are
GMRES without a preconditioner, and what the plan, printed above, chooses. ``--slope``: set-up and a product from depth 5 to 100 at
width 16.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable

import numpy as np
import torch
from common import print_table, retained_hvp
from scipy.sparse.linalg import LinearOperator
from sklearn.datasets import load_digits
from torch import nn

import linop_hess as lh
from linop_hess import lq
from linop_hess._machine import machine
from linop_hess.lq.iterative.gmres import gmres
from linop_hess.lq.iterative.options import Asked, SketchOptions
from linop_hess.lq.methods.sketched import SketchedFactorization, sketch_report

RTOL = 1e-6


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Least processor time of some runs, after one to warm up."""
    run()
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        run()
        times.append(time.process_time() - begin)
    return min(times)


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    X, y = load_digits(return_X_y=True)
    return torch.tensor(X / 16.0), torch.tensor(y)


def trained(depth: int, width: int, steps: int, lr: float) -> nn.Sequential:
    torch.manual_seed(0)
    sizes = [64] + [width] * depth + [10]
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        linear = nn.Linear(a, b, dtype=torch.float64)
        nn.init.orthogonal_(linear.weight, 1.2)
        layers += [linear, nn.Tanh()] if i < depth else [linear]
    model = nn.Sequential(*layers)
    (x, y), optimizer = digits(), torch.optim.Adam(model.parameters(), lr)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


class Case:
    """A linearization, its gradient, and the unit."""

    def __init__(self, depth: int, width: int, damping: float, steps: int, lr: float) -> None:
        self.damping, self.data, loss = damping, digits(), nn.CrossEntropyLoss()
        self.model = model = trained(depth, width, steps, lr)
        x, y = self.data
        product = retained_hvp(model, loss, x, y)
        parts = [torch.randn_like(p) for p in model.parameters()]
        self.unit = seconds(lambda: product(parts), 5)
        self.lin = lh.linearize(model, loss, x, y)
        self.analysis, self.problem = self.lin.analysis, self.lin.problem
        self.g = self.lin.gradient_tensor[:, None]

    @property
    def fresh(self) -> lh.lq.Analysis:
        """An analysis in which nothing is known yet."""
        return lh.lq.Analysis(self.problem)

    def iterate(self, M: Callable[[torch.Tensor], torch.Tensor], most: int) -> tuple[int, float, float]:
        """Iterations of GMRES, the relative residual, and the time in units."""
        begin = time.process_time()
        found = gmres(
            lambda X: self.problem.hessian_product(X, self.damping), M, self.g, lambda _, of_g: RTOL * of_g, most
        )
        spent = time.process_time() - begin
        r = self.g - self.problem.hessian_product(found.x, self.damping)
        return found.iterations, float(r.norm() / self.g.norm()), spent / self.unit

    def row(self, name: str, setup: float, M: Callable[[torch.Tensor], torch.Tensor], most: int) -> list[str]:
        iterations, residual, spent = self.iterate(M, most)
        total = f"{setup + spent:.0f}" if residual <= 1.01 * RTOL else "not reached"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return [name, f"{setup:.0f}", str(iterations), f"{residual:.0e}", total, f"{peak:.1f}"]


def sketched(case: Case, rank: int, core: int | None, most: int) -> list[str]:
    begin = time.process_time()
    asked = Asked(case.damping, 1, RTOL)
    factors = SketchedFactorization(case.fresh, case.damping, SketchOptions(rank=rank or None, core=core), asked)
    setup = (time.process_time() - begin) / case.unit
    print(factors.report())
    return case.row(
        f"sketched, rank {factors.sketch.rank}{'' if rank else ' as it pays'}, {core or 'all'} samples",
        setup,
        factors.solve,
        most,
    )


def chosen(case: Case) -> list[str]:
    """What the plan chooses, for a backward error that a residual of 1e-6 has at least; choosing is a part of the set-up."""
    norm = case.analysis.rough_norm
    analysis, tolerance = case.fresh, RTOL / (1.0 + norm / case.damping)
    begin = time.process_time()
    solver = lq.Solver(analysis, case.damping, tolerance=tolerance)
    setup = (time.process_time() - begin) / case.unit
    begin = time.process_time()
    found = solver.solve(case.g[:, 0])
    spent = (time.process_time() - begin) / case.unit
    r = case.g - case.problem.hessian_product(found.x[:, None], case.damping)
    print(solver.plan)
    if found.method == "sketched":
        print(sketch_report(solver.factorization))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    residual = f"{float(r.norm() / case.g.norm()):.0e}"
    name = f"chosen: {found.method}"
    return [name, f"{setup:.0f}", str(found.iterations), residual, f"{setup + spent:.0f}", f"{peak:.1f}"]


def columns(case: Case, rank: int, count: int, most: int) -> None:
    """What more right-hand sides take, after the factorization."""
    inverse = case.lin.inverse(case.damping, "sketched", rank=rank)
    G = np.random.default_rng(0).standard_normal((case.problem.size, count))
    tolerance = {"rtol": RTOL, "restart": most, "maxiter": most}
    A = LinearOperator(inverse.shape, matvec=case.lin.damped(case.damping).matvec, dtype=float)
    alone = lh.krylov.run("gmres", A, G[:, 0], M=inverse, **tolerance)
    begin = time.process_time()
    inverse.solve(G)
    print(f"one column {alone.seconds:.2f} s; {count} columns certified {time.process_time() - begin:.2f} s")


def slope(damping: float, rank: int) -> None:
    """Set-up and one product by depth."""
    rows, logs = [], []
    for depth in (5, 10, 25, 50, 100):
        case = Case(depth, 16, damping, 0, 1e-3)
        begin = time.process_time()
        factors = SketchedFactorization(
            case.analysis, damping, SketchOptions(rank=rank or None), Asked(damping, 1, RTOL)
        )
        setup = time.process_time() - begin
        applied = seconds(lambda f=factors, c=case: f.solve(c.g), 3)
        sizes = [str(depth), str(len(factors.factors)), str(factors.sketch.rank)]
        rows.append([*sizes, f"{setup:.2f}", f"{1e3 * applied:.1f}", f"{1e3 * applied / depth:.2f}"])
        logs.append((np.log(depth), np.log(setup), np.log(applied)))
    print_table(["depth", "spans", "directions", "set-up, s", "product, ms", "a layer, ms"], rows)
    x, *ys = np.array(logs).T
    for begin in (0, 1):
        slopes = ", ".join(f"{np.polyfit(x[begin:], y[begin:], 1)[0]:.2f}" for y in ys)
        print(f"slopes from {rows[begin][0]} layers on: {slopes}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", default="50x16")
    parser.add_argument("--damping", type=float, default=1e-2)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, nargs="*", default=[256])
    parser.add_argument("--core", type=int, nargs="*", default=[0])
    parser.add_argument("--most", type=int, default=200)
    parser.add_argument("--columns", type=int, default=0)
    parser.add_argument("--slope", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for dtype in (torch.float64, torch.float32):
        machine(dtype)  # measured once a process, in a few tenths of a second
    if arguments.slope:
        slope(arguments.damping, arguments.rank[0])
        return
    depth, width = map(int, arguments.case.split("x"))
    case = Case(depth, width, arguments.damping, arguments.steps, arguments.lr)
    print(
        f"{arguments.case}, N = {case.problem.size}, damping {case.damping:g}, loss {case.lin.loss:.3g}: "
        f"the unit is {1e3 * case.unit:.1f} ms"
    )
    rows = [sketched(case, rank, core or None, arguments.most) for core in arguments.core for rank in arguments.rank]
    rows.append(case.row("GMRES alone", 0.0, lambda v: v, arguments.most))
    rows.append(chosen(case))
    print_table(["method", "set-up", "iterations", "residual", "total", "peak, GiB"], rows)
    if arguments.columns:
        columns(case, arguments.rank[0], arguments.columns, arguments.most)


if __name__ == "__main__":
    main()
