"""The plan against measurement: time and memory of every method over tables of shapes, and whether "auto" chooses well.

Run: OMP_NUM_THREADS=1 python tests/benchmarks/plan.py [part of a name …] [--memory | --products]. Times are processor time of one
factorization from an analysis whose row spaces, segments and norm are there already, as every method shares them, but nothing of the
method's own; least of a few runs. Memory (Linux alone) is what the process takes more at its peak, each factorization in a process of its
own, holes in its heap left out. Products are those with H and one vector. Methods that "auto" would take in single precision are measured
so, and in double too.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import assembly
import models
import torch
from common import batch, machine, network, print_table
from torch.nn import functional

import linop_hess as lh
from linop_hess import lq
from linop_hess.errors import SingularPivotError
from linop_hess.lq.iterative.convergence import product_seconds
from linop_hess.lq.methods.base import Cost, Method
from linop_hess.tasks import neural_ode

DAMPING = 1e-2
SLOWEST = 4.0  # seconds estimated, beyond which a method is not run
SMALLEST = 8 << 20  # bytes estimated, below which memory is not measured: what is loaded at a first call takes as much
# Of glibc's mallopt: from how many bytes on memory is the system's, given back at once. By default it rises to 32 MiB as a process runs,
# and what a heap has in holes is seen as taken.
_MMAP_THRESHOLD = -3

Make = Callable[[], lh.Linearization]

# Depth, width, batch.
PLAIN: list[tuple[int, int, int]] = [
    (3, 4, 1), (3, 8, 16), (3, 16, 64), (3, 32, 128), (3, 32, 640), (4, 64, 8), (4, 100, 1), (5, 10, 200), (5, 24, 24), (6, 8, 4),
    (6, 48, 16), (6, 128, 2), (8, 16, 8), (8, 24, 64), (10, 4, 100), (10, 32, 1), (10, 64, 4), (12, 12, 32), (16, 8, 16), (20, 8, 64),
    (20, 16, 4), (20, 48, 2), (20, 96, 1), (40, 4, 8), (50, 16, 1), (100, 8, 2), (300, 4, 1), (1000, 3, 1),
]  # fmt: skip
# Of products alone: full batches, of which factorizations are measured by batches.py.
FULL = [(6, 10, 1797), (20, 10, 1797), (10, 16, 1797), (50, 16, 1797), (8, 32, 1797), (20, 64, 1797)]
GAUSS_NEWTON = [(6, 64, 4), (4, 128, 16)]


def plain(depth: int, width: int, size: int) -> lh.Linearization:
    """A tanh network, linearized."""
    return lh.linearize(network(depth, width), functional.cross_entropy, *batch(size))


def recorded(make: Callable[[], torch.nn.Module], size: int, shape: tuple[int, ...]) -> lh.Linearization:
    """A recorded model, linearized."""
    torch.manual_seed(0)  # for what torch draws while a model is made
    return lh.linearize(make(), functional.cross_entropy, *models.data(size, *shape), verify=False)


def of_task() -> lh.Linearization:
    """Four Runge-Kutta steps by one vector field of 42 parameters."""
    task = neural_ode()
    return lh.linearize(task.model, task.loss_fn, task.inputs, task.targets)


CASES: dict[str, Make] = {
    f"L={depth} width {width} batch {size}": lambda s=(depth, width, size): plain(*s) for depth, width, size in PLAIN
}
CASES |= {f"L={s[0]} width {s[1]} batch {s[2]} GN": lambda s=s: plain(*s) for s in GAUSS_NEWTON}
CASES |= {
    "residual MLP width 8, 50 blocks": lambda: recorded(lambda: models.residual(50, False), 1, (4,)),
    "residual MLP width 32, 6 blocks, batch 8": lambda: recorded(lambda: models.residual(6, False, 32), 8, (4,)),
    "pre-LN width 8, 20 blocks, batch 16": lambda: recorded(lambda: models.residual(20, True), 16, (4,)),
    "transformer, batch 4": lambda: recorded(lambda: models.drawn(models.Transformer()), 4, (8, 4)),
    "GRU, batch 4": lambda: recorded(lambda: models.drawn(models.Recurrent(False)), 4, (10, 4)),
    "GRUCell, batch 4": lambda: recorded(lambda: models.drawn(models.Recurrent(True)), 4, (10, 4)),
    "convolutions, batch 4": lambda: recorded(lambda: assembly.convnet().double(), 4, (64,)),
    "convolutions, batch 16": lambda: recorded(lambda: assembly.convnet().double(), 16, (64,)),
    "neural ODE, shared, batch 40": of_task,
}


PRODUCTS = CASES | {
    f"L={depth} width {width} batch {size}": lambda s=(depth, width, size): plain(*s) for depth, width, size in FULL
}


def matrix_of(name: str) -> lh.Curvature:
    """H or the Gauss-Newton matrix of a case."""
    lin = PRODUCTS[name]()
    return lin.gauss_newton() if name.endswith("GN") else lin.H


def as_solves_do(method: Method, analysis: lq.Analysis, damping: float) -> object:
    """Factor by what a method tries first, if it applies."""
    if method.first is not None:
        with contextlib.suppress(SingularPivotError):
            return method.first(analysis, damping)
    return method.factor(analysis, damping)


def told(
    plan: lq.Plan, slowest: float = SLOWEST, *, of_memory: bool = False
) -> dict[str, tuple[Cost, Callable[..., object]]]:
    """What is to be measured: a method in the precision of the problem and, where "auto" may take it so, in single precision.

    Seconds are told of what solves try first, memory of what they may have to go on with.
    """
    found: dict[str, tuple[Cost, Callable[..., object]]] = {}
    for name, method in lq.METHODS.items():
        if not method.exact:
            continue
        cost = plan.own_costs[name]
        if not cost.why_not and cost.seconds <= slowest and cost.nbytes <= plan.available:
            found[name] = cost, method.factor if of_memory else partial(as_solves_do, method)
        if method.single is not None and plan.costs[name].precision and plan.costs[name].seconds <= slowest:
            found[f"{name}, single"] = plan.costs[name], method.single.factor
    return found


def prepared(problem: lq.Problem) -> lq.Analysis:
    """A fresh analysis with what methods share, the dense blocks of narrow segments too."""
    analysis = lq.Analysis(problem)
    lq.make_plan(analysis, DAMPING)
    assert analysis.probe and analysis.norm
    for g, group in enumerate(analysis.groups):
        assert not group.is_narrow or analysis.condensed_group(g)
    return analysis


def seconds(problem: lq.Problem, factor: Callable[..., object], least: float = 0.3) -> float:
    """Least time of runs that take `least` together, two at most where they are slow."""
    times: list[float] = []
    while sum(times) < least and len(times) < 30 or len(times) < 2 and sum(times) < 1.0:
        analysis = prepared(problem)
        start = time.process_time()
        factor(analysis, DAMPING)
        times.append(time.process_time() - start)
    return min(times)


def product(problem: lq.Problem) -> float:
    """Least time of a product with H."""
    v, times = torch.ones(problem.size, 1, dtype=problem.dtype), []
    problem.hessian_product(v)
    while len(times) < 15:
        start = time.process_time()
        problem.hessian_product(v)
        times.append(time.process_time() - start)
    return min(times)


def peak_growth(name: str, method: str) -> float:
    """Bytes that one factorization takes at its peak, in a process of its own."""
    command = [sys.executable, __file__, "--one", name, method]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def resident(line: str) -> float:
    """A line of what the system says of this process's memory, in bytes: VmRSS, or VmHWM, its peak."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * float(next(words.split()[1] for words in status if words.startswith(line)))


def print_peak_growth(name: str, method: str) -> None:
    """Print it, for `peak_growth`."""
    family, allocator = method.split(",")[0], ctypes.CDLL(None)
    allocator.mallopt(_MMAP_THRESHOLD, 128 << 10)
    for small in plain(2, 3, 3), plain(3, 40, 8):
        (small.gauss_newton() if family == "woodbury" else small).inverse(DAMPING, family)  # loads what it needs
    matrix = matrix_of(name)
    _, factor = told(matrix.plan(DAMPING), float("inf"), of_memory=True)[method]
    problem = matrix.analysis.problem
    del matrix
    analysis = prepared(problem)
    gc.collect()
    allocator.malloc_trim(0)  # what is free, given back: it would be taken again, and not be seen
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    factors = factor(analysis, DAMPING)
    assert factors
    print(resident("VmHWM") - before)


def of_products(names: list[str]) -> None:
    """Table of what the plan tells of a product, and what it takes."""
    rows, ratios = [], []
    for name in names:
        analysis = matrix_of(name).analysis
        measured, estimate = product(analysis.problem), product_seconds(analysis)
        ratios.append(estimate / measured)
        sizes = [str(analysis.problem.size), str(analysis.problem.length), str(len(analysis.problem.blocks))]
        rows.append([name, *sizes, f"{1e3 * measured:.2f} ms", f"{ratios[-1]:.2f}"])
    print_table(["network", "N", "stages", "stacks", "product", "told / measured"], rows)
    print(
        f"\nproducts: {min(ratios):.2f} to {max(ratios):.2f}, {beyond(ratios, 2.0)} of {len(ratios)} beyond a factor of 2"
    )


def of_factorizations(names: list[str], with_memory: bool) -> None:
    """Table of all methods: time, or time and memory."""
    rows: list[list[str]] = []
    ratios: dict[str, list[float]] = {}
    memory: dict[str, list[float]] = {}
    regrets: list[float] = []
    columns = ["banded", "riccati", "dense", "dense, single", "woodbury", "ldu"]
    for name in names:
        matrix = matrix_of(name)
        plan, times, cells = matrix.plan(DAMPING), {}, dict.fromkeys(columns, "")
        for method, (cost, factor) in told(plan, of_memory=with_memory).items():
            if with_memory:
                if cost.nbytes < SMALLEST:
                    continue
                found = peak_growth(name, method)
                ratio = cost.nbytes / max(found, 1.0)
                memory.setdefault(method, []).append(ratio)
                cells[method] = f"{found / 2**20:.0f} MiB ({ratio:.2f})"
                continue
            times[method] = seconds(matrix.analysis.problem, factor)
            ratio = cost.seconds / times[method]
            ratios.setdefault(method, []).append(ratio)
            cells[method] = f"{times[method] * 1e3:.2f} ms ({ratio:.2f})"
        row = [name, f"{matrix.analysis.problem.size}", *cells.values()]
        if not with_memory:
            choice = plan.choice + (", single" if plan.costs[plan.choice].precision else "")
            best = min(t for m, t in times.items() if m != "ldu")
            regrets.append(times[choice] / best if choice in times else float("nan"))
            row += [choice, f"{regrets[-1]:.2f}"]
        print(*row, file=sys.stderr)
        rows.append(row)
    print_table(["network", "N", *columns, *([] if with_memory else ["auto", "of best"])], rows)
    print("\nEstimated / measured in parentheses.\n")
    bound = 1.5 if with_memory else 2.0
    for method, found in (memory if with_memory else ratios).items():
        print(
            f"- {method}: {min(found):.2f} to {max(found):.2f}, {beyond(found, bound)} of {len(found)} beyond a factor of {bound:g}"
        )
    if regrets:
        print(
            f"- auto: {sum(r <= 1.25 for r in regrets)} of {len(regrets)} within 25 % of the best, worst {max(regrets):.2f}"
        )


def beyond(ratios: list[float], factor: float) -> int:
    """How many are not within a factor of one."""
    return sum(not 1 / factor <= ratio <= factor for ratio in ratios)


def main() -> None:
    """Print the tables asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--products", action="store_true")
    parser.add_argument("--one", nargs=2)
    arguments = parser.parse_args()
    if arguments.one:
        print_peak_growth(*arguments.one)
        return
    cases = PRODUCTS if arguments.products else CASES
    names = [name for name in cases if not arguments.names or any(part in name for part in arguments.names)]
    print(machine(), "\n")
    if arguments.products:
        of_products(names)
    else:
        of_factorizations(names, arguments.memory)


if __name__ == "__main__":
    main()
