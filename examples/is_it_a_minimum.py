"""Is it a minimum? A point where every first-order method stands still, and the way from there to a certified minimum.

With all parameters zero and centred targets a tanh network has no gradient: SGD, momentum and Adam never move, and a small gradient
looks like the end of training. `certify_minimum` counts directions of descent by inertia and says "saddle point".
`trust_region.solve` leaves it: with g = 0 every step is the hard case, an eigenvector of the most negative curvature. The same
steps, each the proven global minimizer of its model, then end at a point that is certified as a strict minimum.

Run it with ``python examples/is_it_a_minimum.py --figure is_it_a_minimum.png``.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import linop_hess as lh

DECAY = 1e-3


def loss_fn(output: Tensor, target: Tensor, params: dict[str, Tensor]) -> Tensor:
    """Mean squared error with weight decay, without which a network has flat directions."""
    return nn.functional.mse_loss(output, target) + DECAY * sum(p.square().sum() for p in params.values())  # type: ignore[return-value]


def problem(hidden: int, points: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A network of zeros, and a wave with mean zero."""
    model = nn.Sequential(nn.Linear(1, hidden), nn.Tanh(), nn.Linear(hidden, 1)).double()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    x = torch.linspace(-1, 1, points, dtype=torch.float64)[:, None]
    return model, x, torch.sin(2.5 * x) + 0.3 * (x.square() - x.square().mean())


def descend(model: nn.Module, x: Tensor, y: Tensor, gtol: float, most: int = 200) -> list[tuple[float, float, str]]:
    """Trust-region steps by the gain ratio; loss, gradient norm and kind of step of each."""
    rows, radius, lin = [], 1.0, lh.linearize(model, loss_fn, x, y)
    for _ in range(most):
        step = lh.trust_region.solve(lin, radius)
        rows.append((lin.loss, float(np.linalg.norm(lin.gradient)), step.kind))
        if rows[-1][1] <= gtol and step.multiplier == 0.0:
            break
        old = parameters_to_vector(model.parameters()).detach()
        vector_to_parameters(old + torch.from_numpy(step.s), model.parameters())
        trial = lh.linearize(model, loss_fn, x, y)
        fall, rounding = lin.loss - trial.loss, 1e-14 * abs(lin.loss)
        ratio = 1.0 if step.decrease <= rounding and abs(fall) <= 10 * rounding else fall / step.decrease
        if ratio < 0.25:
            radius = step.length / 4
        elif ratio > 0.75 and step.kind != "interior":
            radius *= 2
        if ratio > 1e-4:
            lin = trial
        else:
            vector_to_parameters(old, model.parameters())
    return rows


def along(
    model: nn.Module, lin: lh.Linearization, x: Tensor, y: Tensor, at: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The loss along the eigenvector of the lowest eigenvalue, and its second-order model there; both of the shape of `at`."""
    values, vectors = lh.spectrum.eigsh(lin, 1, which="SA")
    centre, v = parameters_to_vector(model.parameters()).detach(), torch.from_numpy(vectors[:, 0].copy())
    losses = []
    for t in at:
        vector_to_parameters(centre + t * v, model.parameters())
        with torch.no_grad():
            losses.append(float(loss_fn(model(x), y, dict(model.named_parameters()))))
    vector_to_parameters(centre, model.parameters())
    return np.array(losses), lin.loss + (lin.gradient @ vectors[:, 0]) * at + 0.5 * values[0] * at**2


def main(hidden: int = 4, points: int = 40, gtol: float = 1e-10, figure: str | None = None) -> dict[str, Any]:
    """Certify the point of zeros, leave it, and certify where that ends."""
    model, x, y = problem(hidden, points)
    at, curves = np.linspace(-1, 1, 81), {}
    lin = lh.linearize(model, loss_fn, x, y)
    start = lh.certify_minimum(lin)
    print(f"all parameters zero, loss {lin.loss:.6f}\n{start}\n")
    curves[f"all parameters zero: {start.verdict}"] = along(model, lin, x, y, at)
    leave = lh.trust_region.solve(lin, 1.0)
    print(f"{leave}\n")
    rows = descend(model, x, y, gtol)
    lin = lh.linearize(model, loss_fn, x, y)
    end = lh.certify_minimum(lin)
    print(f"after {len(rows)} trust-region steps, loss {lin.loss:.6f}\n{end}")
    curves[f"after {len(rows)} steps: {end.verdict}"] = along(model, lin, x, y, at)
    if figure:
        draw(at, curves, figure)
    return {"start": start, "leave": leave, "rows": rows, "end": end, "lin": lin}


def draw(at: np.ndarray, curves: dict[str, tuple[np.ndarray, np.ndarray]], file: str) -> None:
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(9, 3.8), dpi=160, layout="constrained")
    for axes, (title, (loss, model)), colour in zip(
        canvas.subplots(1, 2), curves.items(), lh.plot.COLOURS, strict=False
    ):
        axes.plot(at, loss, color=colour, linewidth=2, label="loss")
        axes.plot(at, model, color="0.4", linestyle="--", linewidth=1.2, label="second-order model")
        axes.set_title(title, fontsize=10)
        axes.set(xlabel="along the lowest eigenvector", ylabel="loss", xticks=[-1, -0.5, 0, 0.5, 1])
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.92")
        axes.legend(frameon=False)
    canvas.savefig(file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="A saddle point that looks like the end of training, and a certified minimum."
    )
    parser.add_argument("--hidden", type=int, default=4, help="hidden units")
    parser.add_argument("--points", type=int, default=40, help="points of the wave")
    parser.add_argument("--figure", metavar="FILE", help="draw it there, for instance is_it_a_minimum.png")
    main(**vars(parser.parse_args()))
