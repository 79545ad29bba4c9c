"""Two gloo processes, a thread each, against one: products of `lh.Hessian`, and the dense Hessian, of all 1,797 digits.

Run on two free cores: python tests/benchmarks/processes.py [part of a name ...]
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import machine, print_table
from torch import distributed as dist
from torch import multiprocessing

import linop_hess as lh
from linop_hess.cli.networks import digits_problem
from linop_hess.lq.matrix.assembly import assemble

CASES = {"6x10": (6, 10), "10x16": (10, 16), "20x16": (20, 16), "20x64": (20, 64)}  # layers x width
LARGEST_DENSE = 8_000
PRODUCTS, DENSE_REPEATS = 40, 3


def times(alone: Callable[[], object], together: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median times of what process 0 does by itself, the other waiting, and of what both do, in turns."""
    found: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats + 1):
        for seconds, work in zip(found, (alone if dist.get_rank() == 0 else lambda: None, together), strict=True):
            dist.barrier()
            start = time.perf_counter()
            work()
            if repeat:
                seconds.append(time.perf_counter() - start)
    return statistics.median(found[0]), statistics.median(found[1])


def measure(rank: int, store: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    rows = []
    for name in names:
        problem = digits_problem(*CASES[name], batch=1797)
        data = problem.inputs, problem.targets
        mine = tuple(tensor.tensor_split(2)[rank] for tensor in data)
        H, ours = (
            lh.Hessian(problem.model, problem.loss_fn, data),
            lh.Hessian(problem.model, problem.loss_fn, mine, group="world"),
        )
        v = torch.randn(H.shape[0], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        one, two = times(lambda H=H, v=v: H @ v, lambda H=ours, v=v: H @ v, PRODUCTS)
        row = [name, f"{len(v):,}", f"{1e3 * one:.2f}", f"{1e3 * two:.2f}", f"{one / two:.2f}"]
        if len(v) <= LARGEST_DENSE:
            lin = lh.linearize(problem.model, problem.loss_fn, [data])
            together = lh.linearize(problem.model, problem.loss_fn, *mine, group="world")
            one, two = times(lambda p=lin.problem: assemble(p), lambda p=together.problem: assemble(p), DENSE_REPEATS)
            row += [f"{one:.3f}", f"{two:.3f}", f"{one / two:.2f}"]
        rows.append(row + ["-"] * (8 - len(row)))
    if rank == 0:
        print(machine())
        print_table(["network", "N", "product, one ms", "two ms", "ratio", "dense, one s", "two s", "ratio"], rows)
    dist.destroy_process_group()


if __name__ == "__main__":
    chosen = [name for name in CASES if not sys.argv[1:] or any(part in name for part in sys.argv[1:])]
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(measure, (str(Path(folder) / "store"), chosen), nprocs=2)
