"""Factorizations in float32: of H + εI of trained and untrained networks, of random symmetric matrices, and recursions along chains.

Run: python tests/benchmarks/factorizations.py [N ...], the sizes of random matrices. Processor time of one thread: OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from batches import LOSS, digits, network
from common import batch, machine, print_table
from common import network as chain
from torch import Tensor

import linop_hess as lh
from linop_hess import lq
from linop_hess.lq.iterative.gmres import gmres
from linop_hess.lq.matrix.assembly import assemble
from linop_hess.lq.methods.base import Factorization
from linop_hess.lq.methods.mixed import CholeskyFactor
from linop_hess.lq.pivots.bunch_kaufman import packed_factor

DAMPING = 1e-2
CASES = [(6, 10, 0, 1e-2), (6, 10, 200, 1e-2), (20, 10, 0, 1e-1), (10, 16, 200, 1e-2), (10, 16, 200, 1e-1)]


def once(run: Callable[[], object]) -> float:
    """Processor time of one run."""
    start = time.process_time()
    run()
    return time.process_time() - start


def of_networks() -> None:
    """Cholesky, which fails where H + εI is indefinite, and Bunch-Kaufman."""
    rows, (x, y) = [], digits()
    for depth, width, steps, damping in CASES:
        lin = lh.linearize(network(depth, width, steps, x, y), LOSS, x, y)
        for name, matrix in (("H", lin.H), ("Gauss-Newton", lin.gauss_newton())):
            H = assemble(matrix.analysis.problem, torch.float32)
            H.diagonal().add_(damping)
            failed = int(torch.linalg.cholesky_ex(H).info)
            times = [once(lambda H=H: packed_factor(H)), once(lambda H=H: CholeskyFactor.of(H))]
            row = [f"{depth}x{width}, {steps} steps, {damping:g}", name, f"{len(H)}", *(f"{t:.3f}" for t in times)]
            rows.append([*row, f"fails at {failed}" if failed else ""])
    print_table(["network, damping", "matrix", "N", "Bunch-Kaufman, s", "Cholesky, s", ""], rows)


def blocked(A: Tensor, size: int) -> float:
    """LDLᵀ of A in blocks, whose pivots are their eigenvalues; A is overwritten. Returns the largest multiplier."""
    largest = 0.0
    for start in range(0, len(A), size):
        end = min(start + size, len(A))
        values, vectors = torch.linalg.eigh(A[start:end, start:end])
        panel = A[end:, start:end] @ vectors
        L = panel / values
        largest = max(largest, float(L.abs().max())) if len(L) else largest
        for j in range(0, len(L), 1024):  # the lower triangle alone
            k = min(j + 1024, len(L))
            A[end + j :, end + j : end + k].addmm_(L[j:], panel[j:k].mT, alpha=-1.0)
        A[end:, start:end] = L
    return largest


def of_random(sizes: list[int]) -> None:
    """What the ways to factor a symmetric matrix take, beside a product."""
    rows = []
    for N in sizes:
        A = torch.randn(N, N, generator=torch.Generator().manual_seed(0))
        A = A + A.mT
        definite, B = A / (4 * N**0.5) + torch.eye(N), A.clone()
        times = [
            once(lambda A=A, B=B: A @ B),
            once(lambda A=A: torch.linalg.ldl_factor_ex(A)),
            once(lambda A=A: packed_factor(A)),
            once(lambda A=A: torch.linalg.lu_factor_ex(A)),
            once(lambda A=definite: torch.linalg.cholesky_ex(A)),
            once(lambda A=definite: CholeskyFactor.of(A)),
        ]
        multipliers: list[float] = []
        times.append(once(lambda B=B, kept=multipliers: kept.append(blocked(B, 256))))
        rows.append([f"{N}", *(f"{t:.3f}" for t in times), f"{multipliers[0]:.0f}"])
    names = [
        "GEMM",
        "Bunch-Kaufman, torch's",
        "SciPy's",
        "LU, torch's",
        "Cholesky, torch's",
        "SciPy's",
        "in blocks of 256",
    ]
    header = ["N", *(f"{name}, s" for name in names), "largest multiplier"]
    print_table(header, rows)


def of_chains() -> None:
    """The recursions in float64 and float32, the products that refinement by GMRES takes with the latter, and what those cost."""
    rows = []
    for method, depth, width, samples in (
        ("riccati", 6, 48, 16), ("riccati", 20, 16, 32), ("riccati", 4, 100, 8), ("banded", 100, 8, 2), ("banded", 20, 8, 8),
    ):  # fmt: skip
        x, y = batch(samples)
        problem = lh.linearize(chain(depth, width), LOSS, x, y).problem
        times, g = [], torch.ones(problem.size, 1, dtype=torch.float64)
        for dtype in (torch.float64, torch.float32):
            analysis = lq.Analysis(problem.to(dtype))
            factors = lq.METHODS[method].factor(analysis, DAMPING)
            times.append(min(once(lambda a=analysis: lq.METHODS[method].factor(a, DAMPING)) for _ in range(2)))

        def product(v: Tensor, problem: lq.Problem = problem) -> Tensor:
            return problem.hessian_product(v, DAMPING)

        def reached(of_x: Tensor, of_g: Tensor) -> Tensor:
            return 1e-14 * (of_x + of_g)

        def inexact(v: Tensor, factors: Factorization = factors) -> Tensor:
            return factors.solve(v.float())

        found = gmres(product, inexact, g, reached, 100)
        applied = min(once(lambda g=g, f=inexact: f(g)) for _ in range(5))
        refining = found.iterations * (min(once(lambda g=g, p=product: p(g)) for _ in range(5)) + applied)
        rows.append([f"{method}, {depth}x{width}, {samples} samples", f"{problem.size}"])
        rows[-1] += [f"{1e3 * t:.1f}" for t in (*times, refining)] + [f"{found.iterations}" + "+" * (not found.reached)]
    print_table(["method, network", "N", "float64, ms", "float32, ms", "refining, ms", "iterations"], rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("sizes", type=int, nargs="*", default=[1310, 2850, 3658, 6378])
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    of_networks()
    of_random(chosen.sizes)
    of_chains()
