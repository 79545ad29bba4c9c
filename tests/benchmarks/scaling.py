"""Time and peak memory of linearize + inverse + one certified solve as the depth grows at width 4.

Run: python tests/benchmarks/scaling.py
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time

import numpy as np
from common import batch, machine, network, print_table
from torch import nn

import linop_hess as lh

DEPTHS = [1_000, 10_000, 100_000]


def measure(depth: int) -> dict[str, float]:
    """Run once in this process; memory is the growth of the peak over what the model itself takes."""
    model, (x, y) = network(depth, 4), batch(1)
    small = network(10, 4)
    lh.linearize(small, nn.CrossEntropyLoss(), x, y).inverse(1e-3).solve(
        np.ones(sum(p.numel() for p in small.parameters()))
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = [time.perf_counter()]
    lin = lh.linearize(model, nn.CrossEntropyLoss(), x, y)
    times.append(time.perf_counter())
    inverse = lin.inverse(1e-3)
    times.append(time.perf_counter())
    solution = inverse.solve(np.random.default_rng(0).normal(size=lin.problem.size))
    times.append(time.perf_counter())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lap = np.diff(times)
    return {
        "N": lin.problem.size,
        "linearize": lap[0],
        "inverse": lap[1],
        "solve": lap[2],
        "total": times[-1] - times[0],
        "peak": peak * 1024.0,
        "growth": (peak - before) * 1024.0,
        "eta": solution.backward_error,
    }


def main() -> None:
    """Measure each depth in a process of its own and print the table with log-log slopes."""
    print(machine(), "\n")
    runs = []
    for depth in DEPTHS:
        out = subprocess.run([sys.executable, __file__, str(depth)], capture_output=True, text=True, check=True)
        runs.append(json.loads(out.stdout))
    rows = [
        [f"{depth}", f"{r['N']}", *(f"{r[k]:.3f}" for k in ("linearize", "inverse", "solve", "total"))]
        + [f"{r['growth'] / 2**20:.0f}", f"{r['peak'] / 2**20:.0f}", f"{r['eta']:.0e}"]
        for depth, r in zip(DEPTHS, runs, strict=True)
    ]
    header = ["L", "N", "linearize s", "inverse s", "solve s", "total s", "memory MiB", "process peak MiB", "η"]
    print_table(header, rows)
    x = np.log(DEPTHS)
    for key in ("total", "growth"):
        slope = np.polyfit(x, np.log([max(r[key], 1e-9) for r in runs]), 1)[0]
        print(f"\nlog-log slope of {'time' if key == 'total' else 'memory'}: {slope:.2f}", end="")
    print()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(int(sys.argv[1]))))
    else:
        main()
