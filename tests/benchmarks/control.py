"""Swing-ups as chains of control stages: iterations and certificates, quadratic convergence, and time a step against length.

Run: python tests/benchmarks/control.py [--lengths 1000,10000,100000] [--most 300] [--parts swing,quadratic,scaling,network,longer]
"""

from __future__ import annotations

import argparse
import math
import time

import numpy as np
import torch
from common import machine, print_table

import linop_hess as lh
from linop_hess.lq import Analysis, Inverse
from linop_hess.tasks import (
    CartPole,
    ControlResult,
    ControlTask,
    Pendulum,
    as_network,
    lbfgs,
    newton,
    refined,
    regulator,
)

HEADER = ["task", "method", "iterations", "cost", "gradient", "backward error", "certified", "s"]


def row(name: str, method: str, found: ControlResult) -> list[str]:
    errors = [record.backward_error for record in found.records if not math.isnan(record.backward_error)]
    return [
        name,
        method,
        str(found.iterations),
        f"{found.trajectory.cost:.6f}",
        f"{found.records[-1].gradient_norm:.1e}",
        f"{max(errors):.1e}" if errors else "-",
        "yes" if found.is_minimum else "no",
        f"{found.records[-1].seconds:.1f}",
    ]


def swing(most: int) -> None:
    rows = []
    cases: list[tuple[str, ControlTask]] = [
        (f"pendulum 1000, {start:g} rad", Pendulum(1000, start=(start, 0.0))) for start in (math.pi, 3.04, 3.2)
    ]
    for name, task in [*cases, ("cart-pole 500", CartPole(500))]:
        push = np.full(task.length, 0.1)  # zeros are stationary where it hangs
        rows.append(row(name, "exact Newton", newton(task, most=most)))
        rows.append(row(name, "Gauss-Newton", newton(task, push, most=most, curvature="gauss-newton")))
        rows.append(row(name, "L-BFGS", lbfgs(task, push, most=10 * most)))
        print(*rows[-3:], sep="\n", flush=True)
    print_table(HEADER, rows)


def quadratic() -> None:
    for task in (Pendulum(1000), CartPole(500)):
        found = newton(task).records[-6:]
        print_table(
            [type(task).__name__, "damping", "step"],
            [[f"{r.gradient_norm:.2e}", f"{r.damping:.0e}", f"{r.length:g}"] for r in found],
        )


def step_seconds(task: ControlTask) -> tuple[float, float]:
    """Seconds of one step, everything included, at a point where H in the closed loop is positive definite; and its backward error."""
    time_of = task.h * np.arange(task.length)
    at = task.rollout(np.sin(3.0 * time_of))
    began = time.perf_counter()
    K = regulator(task.expand(at, gauss_newton=True), task.h * np.array(task.weight))
    closed = task.expand(at, K)
    inverse = Inverse(Analysis(closed.problem), 1e-3)
    _ = inverse.is_positive_definite
    solution = inverse.solve(torch.from_numpy(-closed.gradient)[:, None])
    task.rollout(at.u + 1e-3 * solution.x[:, 0].numpy(), at, K)
    return time.perf_counter() - began, solution.backward_error


def scaling(lengths: list[int]) -> None:
    for name, make in (("pendulum", Pendulum), ("cart-pole", CartPole)):
        step_seconds(make(200))
        found = [(L, *min(step_seconds(make(L)) for _ in range(2))) for L in lengths]
        rows = [[name, str(L), f"{s:.3f}", f"{e:.1e}"] for L, s, e in found]
        print_table(["task", "stages", "s a step", "backward error"], rows)
        slope = np.polyfit(np.log([L for L, *_ in found]), np.log([s for _, s, _ in found]), 1)[0]
        print(f"slope {slope:.2f} (goal 1.1)", flush=True)


def longer(lengths: list[int]) -> None:
    """Cart-pole swing-ups cut into more and more stages, each from the solution of the cut before."""
    rows, u = [], None
    for L in [500, *lengths]:
        found = newton(CartPole(L), None if u is None else refined(u, L))
        u = found.trajectory.u
        rows.append(row(f"cart-pole {L}", "from zero" if L == 500 else "from the one before", found))
        print(rows[-1], flush=True)
    print_table(HEADER, rows)


def network(length: int = 500) -> None:
    for task in (Pendulum(length), CartPole(length)):
        u = newton(task).trajectory.u
        _compare(task, u)


def _compare(task: ControlTask, u: np.ndarray) -> None:
    began = time.perf_counter()
    lin = lh.linearize(*as_network(task, [float(value) for value in u]))
    seconds = time.perf_counter() - began
    alone = task.expand(task.rollout(u))
    v = np.random.default_rng(0).standard_normal(task.length)
    truth = alone.problem.hessian_product(torch.from_numpy(v)[:, None])[:, 0].numpy()
    gap = np.linalg.norm(lin.H @ v - truth) / np.linalg.norm(truth)
    signs = lin.inertia(0.0)
    print(
        f"linearize, a layer a stage, {type(task).__name__} of {task.length}: {seconds:.1f} s; product against lq alone {gap:.1e}, "
        f"gradient {np.linalg.norm(lin.gradient):.1e}, {signs.negative} negative and {signs.zero} zero eigenvalues",
        flush=True,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", default="1000,10000,100000")
    parser.add_argument("--most", type=int, default=300)
    parser.add_argument("--parts", default="swing,quadratic,scaling,network,longer")
    args = parser.parse_args()
    print(machine())
    parts = args.parts.split(",")
    if "swing" in parts:
        swing(args.most)
    if "quadratic" in parts:
        quadratic()
    if "scaling" in parts:
        scaling([int(L) for L in args.lengths.split(",")])
    if "network" in parts:
        network()
    if "longer" in parts:
        longer([int(L) for L in args.lengths.split(",")])
