"""The figures of docs/batches.md: iterations against rank, time against samples, who wins where.

Run: python tests/benchmarks/batch_figures.py rank FILE.png | samples FILE.png | winners FILE.png OUTCOMES.json, the outcomes being those
that competitors.py --save wrote. Processor time of one thread: OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from batches import LOSS, digits, network
from competitors import CASES, Outcome, deflated
from sketched import Case

import linop_hess as lh
from linop_hess import lq
from linop_hess.lq.iterative.options import SketchOptions
from linop_hess.lq.methods.sketched import SketchedFactorization
from linop_hess.plot.figure import COLOURS

BLUE, RED, GREEN, PINK, SKY, ORANGE = COLOURS[:6]
MOST = 300


def canvas(columns: int = 1, size: tuple[float, float] = (9.6, 5.0)) -> tuple[Any, Any]:
    """A figure and its axes, large enough to be read in a talk."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.size": 13, "axes.titlesize": 14, "lines.linewidth": 2.2, "lines.markersize": 7}):
        figure = Figure(figsize=size, dpi=160, layout="constrained")
        axes = figure.subplots(1, columns)
    for ax in np.atleast_1d(axes):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="0.9", linewidth=0.8)
        ax.set_axisbelow(True)
    return figure, axes


def rank(file: str) -> None:
    """Iterations to 1e-6 against the number of directions, on 6x10 at initialization."""
    case = Case(6, 10, 1e-2, 0, 1e-3)

    def sketch(directions: int, core: int | None) -> Callable[[torch.Tensor], torch.Tensor]:
        return SketchedFactorization(case.fresh, case.damping, SketchOptions(rank=directions, core=core)).solve

    ways: list[tuple[str, str, str, Callable[[int], Callable[[torch.Tensor], torch.Tensor]]]] = [
        ("deflation of as many Lanczos directions", RED, "s", lambda s: deflated(case, s)),
        ("sketch of 600 weighted samples", SKY, "^", lambda s: sketch(s, 600)),
        ("sketch of all samples", BLUE, "o", lambda s: sketch(s, None)),
    ]
    figure, ax = canvas()
    for label, colour, marker, make in ways:
        points = []
        for directions in (16, 32, 64, 128, 256, 512):
            iterations, residual, _ = case.iterate(make(directions), MOST)
            points.append((directions, iterations, residual <= 1.01e-6))
            print(label, *points[-1], f"{residual:.0e}", flush=True)
        s, k, reached = map(np.array, zip(*points, strict=True))
        ax.plot(s, k, color=colour, marker=marker, label=label)
        ax.plot(s[~reached], k[~reached], color=colour, marker=marker, markerfacecolor="white", linestyle="none")
    ax.axhline(MOST, color="0.6", linestyle=":", linewidth=1.5)
    ax.annotate(
        f"open: 1e-6 not reached in {MOST} iterations, as by GMRES alone", (16, MOST * 1.25), color="0.35", fontsize=12
    )
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks([16, 32, 64, 128, 256, 512], ["16", "32", "64", "128", "256", "512"])
    ax.set_yticks([3, 10, 30, 100, 300], ["3", "10", "30", "100", "300"])
    ax.minorticks_off()
    ax.set(xlabel="directions", ylabel="GMRES iterations to 1e-6", ylim=(1.5, 550))
    ax.set_title(
        f"Iterations against rank: 6 × 10, {case.problem.size:,} parameters, 1,797 digits, ε = 0.01", loc="left"
    )
    ax.legend(frameon=False, loc="lower left")
    figure.savefig(file)


def seconds(run: Callable[[], object]) -> float:
    """Processor time of one run."""
    begin = time.process_time()
    run()
    return time.process_time() - begin


def samples(file: str) -> None:
    """Time of an inverse and a solve against the number of samples, 6x10 trained."""
    model = network(6, 10, 200, *digits(1797))
    exact, dense = [], []
    for count in (8, 8, 16, 32, 64, 128, 256, 512):  # the first time to warm up
        lin = lh.linearize(model, LOSS, *digits(count))
        exact.append(
            (count, seconds(lambda lin=lin: lq.Inverse(lin.analysis, 1e-2, "riccati").solve(lin.gradient_tensor)))
        )
        print("recursion", *exact[-1], flush=True)
    for count in (128, 500, 1797, 5000, 15000, 50000):
        x, y = digits(count)
        parts = list(zip(x.split(1000), y.split(1000), strict=True))
        lin = lh.linearize(model, LOSS, parts)
        dense.append((count, seconds(lambda lin=lin: lin.inverse(1e-2, method="dense").solve(lin.gradient_tensor))))
        print("dense", *dense[-1], flush=True)
    exact = exact[1:]
    figure, ax = canvas()
    for points, colour, marker in ((exact, RED, "s"), (dense, BLUE, "o")):
        ax.loglog(*zip(*points, strict=True), color=colour, marker=marker)
    n, t = map(np.array, zip(*dense[-3:], strict=True))
    slope = np.polyfit(np.log(n), np.log(t), 1)[0]
    steep = np.diff(np.log([t for _, t in exact[-2:]]))[0] / np.log(2.0)
    ax.annotate(f"recursion over the batch: ∝ batch$^{{{steep:.1f}}}$", exact[-2], (-14, 0), "data", "offset points",
                color=RED, ha="right", va="center")  # fmt: skip
    ax.annotate(f"dense, in batches of 1,000: ∝ batch$^{{{slope:.2f}}}$", dense[-2], (-14, 8), "data", "offset points",
                color=BLUE, ha="right", va="center")  # fmt: skip
    ticks = [8, 64, 500, 5000, 50000]
    ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    ax.set_yticks([0.01, 0.1, 1, 10], ["0.01", "0.1", "1", "10"])
    ax.minorticks_off()
    ax.set(xlabel="samples", ylabel="inverse and a solve to 1e-14, s")
    ax.set_title("Time against samples: 6 × 10, 1,310 parameters, one thread", loc="left")
    figure.savefig(file)


def winners(file: str, outcomes: str) -> None:
    """Totals of all ways in all cases, in products; those that do not reach it at the top."""
    with open(outcomes) as lines:
        cases = {found["case"]: [Outcome(*o) for o in found["outcomes"]] for found in map(json.loads, lines)}
    colours = dict(zip(["plain GMRES", "Lanczos deflation", "K-FAC", "sub-batch inverse", "sketched", "dense in float32"],
                       ["0.75", PINK, ORANGE, GREEN, SKY, BLUE], strict=True))  # fmt: skip
    figure, ax = canvas(size=(11.0, 5.6))
    width = 0.8 / len(colours)
    ceiling = 1.2 * max(o.total for found in cases.values() for o in found if o.is_reached)
    for i, found in enumerate(cases.values()):
        of = {o.way: o for o in found}
        for j, (way, colour) in enumerate(colours.items()):
            if way not in of:
                continue
            o, at = of[way], i + (j - (len(colours) - 1) / 2) * width
            if o.is_reached:
                ax.bar(at, o.total, 0.9 * width, color=colour, label=way if i == 0 else None)
                ax.annotate(f"{o.total:.0f}", (at, o.total), (0, 3), "data", "offset points", ha="center", fontsize=11)
            else:
                ax.bar(at, ceiling, 0.9 * width, color="white", edgecolor=colour, hatch="///", linewidth=1.2,
                       label=way if i == 0 else None)  # fmt: skip
                ax.annotate(f"{o.residual:.0e}".replace("e-0", "e-"), (at, ceiling), (0, 3), "data", "offset points",
                            ha="center", fontsize=9.5, color="0.35")  # fmt: skip
    labels = [f"{name}, ε = {CASES[name][3]:g}\n{_size(name)} parameters" for name in cases]
    ax.set_xticks(range(len(cases)), labels)
    ax.set(ylabel="Hessian-vector products to 1e-6", ylim=(0, 1.1 * ceiling))
    ax.set_xlabel("hatched: did not reach 1e-6; above, the residual at which it ended", fontsize=12, color="0.35")
    ax.tick_params(axis="x", length=0)
    ax.set_title("Who wins where: all 1,797 digits, each at its best setting", loc="left", pad=34)
    ax.legend(frameon=False, ncols=6, loc="lower left", bbox_to_anchor=(-0.02, 1.0), fontsize=11, columnspacing=1.2,
              handlelength=1.4)  # fmt: skip
    figure.savefig(file)


def _size(name: str) -> str:
    depth, width = map(int, name.split()[0].split("x"))
    return f"{65 * width + (depth - 1) * width * (width + 1) + 10 * (width + 1):,}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("figure", choices=["rank", "samples", "winners"])
    parser.add_argument("file")
    parser.add_argument("outcomes", nargs="?", default="")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.figure == "winners":
        winners(chosen.file, chosen.outcomes)
    else:
        {"rank": rank, "samples": samples}[chosen.figure](chosen.file)
