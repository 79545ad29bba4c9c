"""The plan against measurement: time and memory of every method over a table of shapes, and whether "auto" chooses well.

Run: python tests/benchmarks/plan.py [--memory]. Times are of one factorization from an analysis whose row spaces, segments and norm are
there already, as every method shares them, but nothing of the method's own; least of a few runs. Memory is the growth of the process's
peak, each factorization in a process of its own.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

from common import batch, machine, network, print_table
from torch import nn

import linop_hess as lh
from linop_hess import lq

DAMPING = 1e-2
# Depth, width, batch, Gauss-Newton.
SHAPES: list[tuple[int, int, int, bool]] = [
    (3, 4, 1, False), (3, 8, 16, False), (3, 16, 64, False), (3, 32, 128, False), (3, 32, 640, False), (4, 64, 8, False),
    (4, 100, 1, False), (5, 10, 200, False), (5, 24, 24, False), (6, 8, 4, False), (6, 48, 16, False), (6, 128, 2, False),
    (8, 16, 8, False), (8, 24, 64, False), (10, 4, 100, False), (10, 32, 1, False), (10, 64, 4, False), (12, 12, 32, False),
    (16, 8, 16, False), (20, 8, 64, False), (20, 16, 4, False), (20, 48, 2, False), (20, 96, 1, False), (40, 4, 8, False),
    (50, 16, 1, False), (100, 8, 2, False), (300, 4, 1, False), (1000, 3, 1, False), (6, 64, 4, True), (4, 128, 16, True),
]  # fmt: skip
SLOWEST = 4.0  # seconds estimated, beyond which a method is not run


def linearization(shape: tuple[int, int, int, bool]) -> lh.Linearization:
    """The network of a shape, linearized."""
    depth, width, size, _ = shape
    return lh.linearize(network(depth, width), nn.CrossEntropyLoss(), *batch(size))


def prepared(problem: lq.Problem, method: str) -> lq.Analysis:
    """A fresh analysis with what methods share."""
    analysis = lq.Analysis(problem)
    lq.make_plan(analysis, DAMPING)
    assert analysis.probe
    if method == "banded":
        assert analysis.condensed
    for g, group in enumerate(analysis.groups):
        assert not group.is_narrow or analysis.condensed_group(g)
    return analysis


def seconds(problem: lq.Problem, method: str, least: float = 0.3) -> float:
    """Least time of runs that take `least` together, two at most where they are slow."""
    times: list[float] = []
    while sum(times) < least and len(times) < 30 or len(times) < 2 and sum(times) < 1.0:
        analysis = prepared(problem, method)
        start = time.perf_counter()
        lq.METHODS[method].factor(analysis, DAMPING)
        times.append(time.perf_counter() - start)
    return min(times)


def peak_growth(index: int, method: str) -> float:
    """Bytes by which one factorization raises the peak of a process of its own."""
    answer = subprocess.run(
        [sys.executable, __file__, "--one", str(index), method], capture_output=True, text=True, check=True
    )
    return float(answer.stdout)


def print_peak_growth(index: int, method: str) -> None:
    """Print it, for `peak_growth`."""
    shape = SHAPES[index]
    lin = linearization(shape)
    matrix = lin.gauss_newton() if shape[3] else lin.H
    small = lh.linearize(network(2, 3), nn.CrossEntropyLoss(), *batch(3))
    (small.gauss_newton() if method == "woodbury" else small).inverse(DAMPING, method)  # loads what it needs
    analysis = prepared(matrix.analysis.problem, method)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    factors = lq.METHODS[method].factor(analysis, DAMPING)
    assert factors.nbytes
    print(1024.0 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--one", nargs=2)
    arguments = parser.parse_args()
    if arguments.one:
        print_peak_growth(int(arguments.one[0]), arguments.one[1])
        return
    print(machine(), "\n")
    rows, ratios, regrets, memory = [], {}, [], {}
    for index, shape in enumerate(SHAPES):
        lin = linearization(shape)
        matrix = lin.gauss_newton() if shape[3] else lin.H
        plan, times, cells = matrix.plan(DAMPING), {}, []
        for method, cost in plan.costs.items():
            if cost.why_not or cost.seconds > SLOWEST or not plan.fits(method):
                cells.append("")
                continue
            times[method] = seconds(matrix.analysis.problem, method)
            ratio = cost.seconds / times[method]
            ratios.setdefault(method, []).append(ratio)
            cells.append(f"{times[method] * 1e3:.2f} ms ({ratio:.2f})")
            if arguments.memory and cost.nbytes > 8 << 20:
                found = peak_growth(index, method)
                memory.setdefault(method, []).append(cost.nbytes / max(found, 1.0))
                cells[-1] += f" {memory[method][-1]:.2f}"
        able = {m: t for m, t in times.items() if m != "ldu"}
        regret = times[plan.choice] / min(able.values())
        regrets.append(regret)
        name = f"L={shape[0]} width {shape[1]} batch {shape[2]}" + (" GN" if shape[3] else "")
        print(name, *cells, plan.choice, f"{regret:.2f}", file=sys.stderr)
        rows.append([name, f"{lin.problem.size}", *cells, plan.choice, f"{regret:.2f}"])
    print_table(["network", "N", *plan.costs, "auto", "of best"], rows)
    print("\nEstimated / measured in parentheses, for time; then for memory where it is more than 8 MiB.\n")
    for method, found in ratios.items():
        wrong = sum(not 0.5 <= ratio <= 2.0 for ratio in found)
        line = f"{method}: time {min(found):.2f} to {max(found):.2f}, {wrong} of {len(found)} beyond a factor of 2"
        if method in memory:
            beyond = sum(not 1 / 1.5 <= ratio <= 1.5 for ratio in memory[method])
            line += f"; memory {min(memory[method]):.2f} to {max(memory[method]):.2f}, {beyond} beyond 1.5"
        print(line)
    print(
        f"auto: {sum(r <= 1.25 for r in regrets)} of {len(regrets)} within 25 % of the best, worst {max(regrets):.2f}"
    )


if __name__ == "__main__":
    main()
