"""Swing-up of a pendulum: exact Newton with a certificate against Gauss-Newton (iLQR's matrix) and L-BFGS.

A thousand torques are the controls of a chain of a thousand stages. Hanging at rest without torque is a stationary point, so that
first-order methods never move; Newton's method sees by inertia that it is no minimum, leaves along negative curvature, and ends
quadratically at a point that is certified as one. The others start from a small torque.

Run it with ``python examples/pendulum.py --figure pendulum.png``.
"""

from __future__ import annotations

import argparse

import numpy as np

import linop_hess as lh
from linop_hess.tasks import ControlResult, Pendulum, lbfgs, newton


def main(length: int = 1000, most: int = 150, figure: str | None = None) -> dict[str, ControlResult]:
    """Swing up by three methods; print and draw how they get there."""
    task = Pendulum(length)
    push = np.full(length, 0.1)
    found = {
        "exact Newton": newton(task),
        "Gauss-Newton (iLQR)": newton(task, push, most=most, curvature="gauss-newton"),
        "L-BFGS": lbfgs(task, push, most=most),
    }
    print(f"{length} control stages")
    for name, result in found.items():
        print(
            f"{name:>20}: {result.iterations} iterations, {result.records[-1].seconds:.1f} s, cost {result.trajectory.cost:.6f}, "
            f"gradient {result.records[-1].gradient_norm:.1e}, "
            + ("a certified minimum" if result.is_minimum else "no certificate")
        )
    print("the last steps of Newton's method:")
    for record in found["exact Newton"].records[-5:]:
        print(f"{'':>4}gradient {record.gradient_norm:.1e}, damping {record.damping:.1e}, step {record.length:g}")
    if figure:
        draw(task, found, figure)
    return found


def draw(task: Pendulum, found: dict[str, ControlResult], file: str) -> None:
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(9, 3.8), dpi=160, layout="constrained")
    left, right = canvas.subplots(1, 2)
    time = task.h * np.arange(task.length + 1)
    for (name, result), colour in zip(found.items(), lh.plot.COLOURS, strict=False):
        left.loglog(
            1 + np.arange(len(result.records)),
            [record.gradient_norm for record in result.records],
            color=colour,
            linewidth=1.5,
            label=name,
        )
        right.plot(time, result.trajectory.x[:, 0] / np.pi, color=colour, linewidth=1.5, label=name)
    left.set(xlabel="1 + iteration", ylabel="gradient norm")
    left.axhline(1e-10, color="0.4", linestyle="--", linewidth=1)
    right.set(xlabel="seconds", ylabel="angle / π (even: upright)")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.92")
    left.legend(frameon=False, fontsize=8)
    canvas.savefig(file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Swing-up of a pendulum by three methods.")
    parser.add_argument("--length", type=int, default=1000, help="control stages")
    parser.add_argument("--most", type=int, default=150, help="iterations of Gauss-Newton, evaluations of L-BFGS")
    parser.add_argument("--figure", metavar="FILE", help="draw it there, for instance pendulum.png")
    main(**vars(parser.parse_args()))
