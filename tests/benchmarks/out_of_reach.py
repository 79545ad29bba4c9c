"""What keeps GMRES and sketches from a solve: how many eigenvalues lie beyond the damping, and what as many directions would take.

``python tests/benchmarks/out_of_reach.py [--case 20x64] [--damping 1e-3] [--lr 1e-3] [--steps 1000] [--probes 220]``. Digits, all 1,797
samples, as of sketched.py; the right-hand side is the gradient. Lanczos with full reorthogonalization, products and vectors in float32:
from the gradient for the least residual in the space so far, which GMRES cannot be below, and for the eigenvalues found; from a random
vector for how many there are, by its quadrature. Processor time of one thread in products of autograd.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np
import torch
from common import print_table
from sketched import Case
from torch import Tensor

from linop_hess._machine import machine
from linop_hess.lq.iterative.lanczos import Probing
from linop_hess.lq.iterative.options import SketchOptions
from linop_hess.lq.iterative.sizing import Sizing


class Tridiagonal:
    """Lanczos from a vector, its vectors kept in float32; T is (k + 1, k)."""

    def __init__(self, product, start: Tensor, most: int) -> None:
        self._product = product
        self._Q = torch.empty(most + 1, start.numel(), dtype=torch.float32)
        self._Q[0] = (start / start.norm()).float()
        self.T = np.zeros((most + 1, most))

    def step(self, j: int) -> None:
        """Add vector j + 1."""
        known = self._Q[: j + 1]
        w = self._product(known[j][:, None])[:, 0]
        self.T[j, j] = float(w.double() @ known[j].double())
        for _ in range(2):
            w = w - known.mT @ (known @ w)
        size = float(w.double().norm())
        self.T[j + 1, j] = size
        if j + 1 < self.T.shape[1]:
            self.T[j, j + 1] = size
        self._Q[j + 1] = w / size

    def residual(self, k: int, damping: float) -> float:
        """The least residual of (H + εI)x = g, relatively, for x in the first k vectors."""
        T, begin = self.T[: k + 1, :k].copy(), np.eye(k + 1)[0]
        T[np.arange(k), np.arange(k)] += damping
        return float(np.linalg.norm(T @ np.linalg.lstsq(T, begin, rcond=None)[0] - begin))


def begun(case: Case, steps: int) -> None:
    """Least residuals and eigenvalues found, by iterations."""
    product = case.problem.to(torch.float32).hessian_product
    run, rows, spent = Tridiagonal(product, case.g[:, 0], steps), [], 0.0
    for j in range(steps):
        begin = time.process_time()
        run.step(j)
        spent += time.process_time() - begin
        if (k := j + 1) % max(1, steps // 5) == 0:
            values = np.linalg.eigvalsh(run.T[:k, :k]) / case.damping
            counts = [(values > 1.0).sum(), (values < -1.0).sum(), (np.abs(values + 1.0) < 0.5).sum()]
            row = [str(k), f"{spent / case.unit:.0f}", f"{run.residual(k, case.damping):.1e}", *map(str, counts)]
            rows.append([*row, f"{values[0]:.1f} to {values[-1]:.0f}"])
    header = ["iterations", "products", "least residual", "> ε", "< -ε", "-1.5 ε to -0.5 ε", "of all, in ε"]
    print_table(header, rows)


def needed(case: Case, probes: int) -> None:
    """How many eigenvalues there are beyond the damping, and what a sketch of so many directions would take."""
    product = case.problem.to(torch.float32).hessian_product
    found = Probing(product, torch.zeros(case.problem.size, dtype=torch.float32)).after(probes)
    sizing, options, rows = case.analysis.once(Sizing), SketchOptions().for_problem(case.analysis), []
    for times in (10.0, 3.0, 1.0, 0.5, 0.3):
        above, below = (
            found.size * float(found.weights[sign * found.nodes > times * case.damping].sum()) for sign in (1.0, -1.0)
        )
        rank = min(case.problem.size, max(1, round(above + below)))
        outlay = sizing.outlay(options, rank)
        row = [f"{times:g} ε", f"{above:.0f}", f"{below:.0f}", f"{outlay.seconds / case.unit:.0f}"]
        rows.append([*row, f"{outlay.nbytes / 2**30:.1f}"])
    print_table(["beyond", "above", "below", "a sketch of as many, products", "GiB"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", default="20x64")
    parser.add_argument("--damping", type=float, default=1e-3)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--probes", type=int, default=220)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for dtype in (torch.float64, torch.float32):
        machine(dtype)  # measured once a process, in a few tenths of a second
    depth, width = map(int, arguments.case.split("x"))
    case = Case(depth, width, arguments.damping, 200, arguments.lr)
    print(
        f"{arguments.case}, N = {case.problem.size}, loss {case.lin.loss:.3g}: the unit is {1e3 * case.unit:.1f} ms\n"
    )
    needed(case, arguments.probes)
    print()
    begun(case, arguments.steps)
    print(f"\npeak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


if __name__ == "__main__":
    main()
