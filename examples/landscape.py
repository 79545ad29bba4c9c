"""The loss landscape along a training run: inertia, extreme eigenvalues and determinant of the exact Hessian.

Gradient descent at a constant rate fits a few of scikit-learn's digits. Counts and determinants come from
factorizations of the chain; no matrix of parameters by parameters is formed.

With more parameters than data the Hessian has a large null space, and eigenvalues near it whose signs mean little. So
the eigenvalues within ``damping`` of zero count as flat: those below −damping are the negative ones of H + damping I,
those above damping the positive ones of H − damping I, and the flat ones are all others. Where the data are fitted
exactly only the Gauss-Newton part of H is left, with no negative eigenvalue and at most images × outputs positive ones.

Run it with ``python examples/landscape.py``; ``--figure landscape.png`` also draws it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import linop_hess as lh

CLASSES = 10


class Point(NamedTuple):
    """What the Hessian looks like after some steps."""

    step: int
    loss: float
    negative: int
    flat: int
    positive: int
    smallest: float
    largest: float
    log_determinant: float  # of |H + damping I|


def network(depth: int, width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in in [64] + [width] * (depth - 1):
        layers += [nn.Linear(fan_in, width), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Linear(width, CLASSES)).double()
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight, gain=1.2)
    return model


def digits(batch: int) -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)
    chosen = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))[:batch]
    labels = torch.from_numpy(classes)[chosen]
    return torch.from_numpy(pixels / 8 - 1)[chosen], nn.functional.one_hot(labels, CLASSES).double()


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum(1).mean() / 2


def descend(model: nn.Module, data: tuple[Tensor, Tensor], rate: float, steps: int, points: int) -> Iterator[int]:
    """Train for that many steps, pausing at about `points` of them, evenly spread on a logarithmic scale."""
    pauses = set(np.geomspace(1, steps + 1, points).round().astype(int) - 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for step in range(steps + 1):
        if step in pauses:
            yield step
        optimizer.zero_grad()
        squared_error(model(data[0]), data[1]).backward()
        optimizer.step()


def look(model: nn.Module, data: tuple[Tensor, Tensor], step: int, damping: float) -> Point:
    lin = lh.linearize(model, squared_error, *data)
    raised, lowered = lin.inverse(damping), lin.inverse(-damping)
    negative, positive = raised.inertia().negative, lowered.inertia().positive
    smallest, largest = lin.extreme_eigenvalues()
    flat = lin.H.shape[0] - negative - positive
    return Point(step, lin.loss, negative, flat, positive, smallest, largest, raised.slogdet()[1])


def main(
    depth: int = 8,
    width: int = 10,
    batch: int = 12,
    rate: float = 0.04,
    steps: int = 5000,
    points: int = 30,
    damping: float = 1e-3,
    figure: str | None = None,
) -> list[Point]:
    torch.manual_seed(0)
    model, data = network(depth, width), digits(batch)
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {batch} images with {CLASSES} outputs each;")
    print(f"flat: eigenvalues within {damping:g} of zero; steps are stable along those below 2/rate = {2 / rate:g}\n")
    print(" step      loss  negative   flat  positive   smallest  largest  log |det|")
    path: list[Point] = []
    for step in descend(model, data, rate, steps, points):
        p = look(model, data, step, damping)
        path.append(p)
        print(f"{p.step:5d} {p.loss:9.2e} {p.negative:9d} {p.flat:6d} {p.positive:9d} {p.smallest:10.4f}", end=" ")
        print(f"{p.largest:8.3f} {p.log_determinant:10.3f}")
    if figure:
        draw(path, batch * CLASSES, 2 / rate, damping, figure)
    return path


def draw(path: list[Point], data: int, stable: float, damping: float, file: str) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    canvas = Figure(figsize=(7.2, 9.6), dpi=160, layout="constrained")
    loss, counts, extremes, determinant = panels = canvas.subplots(4, 1, sharex=True)
    blue, red, green = lh.plot.COLOURS[:3]
    steps = [p.step for p in path]
    loss.plot(steps, [p.loss for p in path], "o-", color="0.3")
    loss.set(yscale="log", ylabel="loss")
    counts.plot(steps, [p.negative for p in path], "o-", color=red, label="negative: the saddle index")
    counts.plot(steps, [p.positive for p in path], "o-", color=blue, label="positive")
    counts.axhline(data, color="0.4", linestyle="--", linewidth=1, label=f"images × outputs = {data}")
    counts.set(ylim=(0, None), ylabel=f"eigenvalues beyond ±{damping:g}")
    extremes.plot(steps, [p.largest for p in path], "o-", color=blue, label="largest")
    extremes.plot(steps, [p.smallest for p in path], "o-", color=red, label="smallest")
    extremes.axhline(stable, color="0.4", linestyle="--", linewidth=1, label=f"2/rate = {stable:g}")
    extremes.set(ylabel="extreme eigenvalues")
    determinant.plot(steps, [p.log_determinant for p in path], "o-", color=green)
    determinant.set(ylabel=f"log |det(H + {damping:g} I)|", xlabel="steps of gradient descent")
    determinant.set_xscale("symlog", linthresh=1, linscale=0.4)  # logarithmic, but for a place for step 0
    determinant.set_xticks([0, *(10**k for k in range(len(str(steps[-1]))))])
    determinant.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:,.0f}"))
    determinant.xaxis.set_minor_locator(NullLocator())
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.92")
        for line in axes.lines:
            line.set_markersize(3.5)
            line.set_clip_on(False)
    lowest = f"{path[-1].smallest:.2g}".replace("-", "−")
    extremes.annotate(lowest, (steps[-1], path[-1].smallest), (0, -14), textcoords="offset points", ha="right")
    counts.legend(frameon=False, loc="center left")
    extremes.legend(frameon=False, loc="center right", bbox_to_anchor=(1, 0.56))
    canvas.align_ylabels()
    canvas.savefig(file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The Hessian along a training run on digits.")
    parser.add_argument("--figure", metavar="FILE", help="draw it there, for instance landscape.png")
    main(figure=parser.parse_args().figure)
