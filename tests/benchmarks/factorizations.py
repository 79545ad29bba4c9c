"""Factorizations in float32: of H + εI of trained and untrained networks, and of random symmetric matrices.

Run: python tests/benchmarks/factorizations.py [N ...], the sizes of random matrices. Processor time of one thread: OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from batches import LOSS, digits, network
from common import machine, print_table
from torch import Tensor

import linop_hess as lh
from linop_hess.lq.assembly import assemble

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
            times = [once(lambda H=H: torch.linalg.ldl_factor_ex(H)), once(lambda H=H: torch.linalg.cholesky_ex(H))]
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
            once(lambda A=A: torch.linalg.lu_factor_ex(A)),
            once(lambda A=definite: torch.linalg.cholesky_ex(A)),
        ]
        multipliers: list[float] = []
        times.append(once(lambda B=B, kept=multipliers: kept.append(blocked(B, 256))))
        rows.append([f"{N}", *(f"{t:.3f}" for t in times), f"{multipliers[0]:.0f}"])
    header = ["N", "GEMM, s", "Bunch-Kaufman, s", "LU, s", "Cholesky, s", "in blocks of 256, s", "largest multiplier"]
    print_table(header, rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("sizes", type=int, nargs="*", default=[1310, 2850, 3658, 6378])
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    of_networks()
    of_random(chosen.sizes)
