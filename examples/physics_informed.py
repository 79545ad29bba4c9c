"""A physics-informed network: Poisson's equation on a square by Gauss-Newton steps, Adam and L-BFGS, for the same seconds.

The model returns the residuals of the equation at points inside, and of the boundary condition at points on the boundary; the loss is their
sum of squares. It differentiates by its inputs by `torch.autograd.grad`, as such models do. Each point's residual is a function of that
point alone, so `GaussNewton` has the rows of the Jacobian from one backward pass, and solves least squares with them: at 129 parameters
and 1,020 points a step takes some hundredths of a second, and after ten seconds the error is near 1e-9, and that of L-BFGS 2e-4.

Run it with ``python examples/physics_informed.py --figure physics_informed.png``.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

import linop_hess as lh


class Poisson(nn.Module):
    """Residuals of Δu + f = 0 inside the unit square and of u = 0 on its boundary, for u = sin πx sin πy."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.u = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 1))

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            u = self.u(x)
            (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
            laplacian = torch.zeros_like(u[:, 0])
            for k in range(2):
                (bend,) = torch.autograd.grad(slope[:, k].sum(), x, create_graph=True)
                laplacian = laplacian + bend[:, k]
        on_boundary = ((x == 0) | (x == 1)).any(1)
        return weight * torch.where(on_boundary, u[:, 0], laplacian + 2 * math.pi**2 * exact(x))


def exact(x: Tensor) -> Tensor:
    return torch.sin(math.pi * x).prod(1)


def squares(residuals: Tensor, nothing: None = None) -> Tensor:
    return residuals.square().sum()


def points(side: int) -> tuple[Tensor, Tensor]:
    """Points of a grid inside and on the boundary, and weights with which squares add up to integrals."""
    along = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    zero, one = torch.zeros_like(along), torch.ones_like(along)
    edges = [torch.stack(edge, 1) for edge in ((along, zero), (along, one), (zero, along), (one, along))]
    weights = torch.cat([torch.full((side**2,), 1.0 / side), torch.full((4 * side,), side**-0.5)])
    return torch.cat([torch.cartesian_prod(along, along), *edges]), weights.double()


Training = tuple[Callable[[], object], Callable[[], object]]
"""What makes a step, and what ends the run."""


def with_adam(model: nn.Module, inputs: tuple[Tensor, Tensor]) -> Training:
    opt = torch.optim.Adam(model.parameters(), lr=1e-2)
    return lambda: first_order(opt, model, inputs), lambda: None


def with_lbfgs(model: nn.Module, inputs: tuple[Tensor, Tensor]) -> Training:
    opt = torch.optim.LBFGS(
        model.parameters(), history_size=100, tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe"
    )
    return lambda: first_order(opt, model, inputs), lambda: None


def first_order(opt: torch.optim.Optimizer, model: nn.Module, inputs: tuple[Tensor, Tensor]) -> object:
    def closure() -> Tensor:
        opt.zero_grad()
        loss = squares(model(*inputs))
        loss.backward()
        return loss

    return opt.step(closure)


def with_gauss_newton(model: nn.Module, inputs: tuple[Tensor, Tensor]) -> Training:
    opt = lh.optim.GaussNewton(model, squares, geodesic=True)
    return lambda: opt.step(inputs, None), opt.return_to_least  # as its steps may go uphill


def error(model: nn.Module, side: int = 100) -> tuple[float, np.ndarray]:
    """Relative L2 error, and the error at each point of a finer grid."""
    x, _ = points(side)
    x = x[: side**2]
    with torch.no_grad():
        difference = model.u(x)[:, 0] - exact(x)  # type: ignore[operator]
    return float(difference.norm() / exact(x).norm()), difference.reshape(side, side).numpy()


def main(
    width: int = 32,
    side: int = 30,
    seconds: float = 10.0,
    steps: int = 1_000_000,
    seed: int = 0,
    figure: str | None = None,
) -> dict[str, float]:
    """Train from the same parameters by each of three optimizers; return their errors."""
    curves, found, inputs = {}, {}, points(side)
    model = Poisson(width).double()
    for name, make in (("Adam", with_adam), ("L-BFGS", with_lbfgs), ("GaussNewton", with_gauss_newton)):
        torch.manual_seed(seed)
        for p in model.parameters():
            nn.init.normal_(p, std=0.1)
        step, end = make(model, inputs)
        spent, at, count = 0.0, [(0.0, error(model)[0])], 0
        while spent < seconds and count < steps:
            start = time.perf_counter()
            step()
            spent, count = spent + time.perf_counter() - start, count + 1
            if spent > 1.02 * at[-1][0] or count == steps:
                at.append((spent, error(model)[0]))
        end()
        curves[name], found[name] = np.array(at), error(model)[0]
        print(f"{name:<12} relative L2 error {found[name]:.1e} after {count} steps, {spent:.1f} s")
    if figure is not None:
        draw(figure, curves, model)
    return found


def draw(path: str, curves: dict[str, np.ndarray], model: nn.Module) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", width_ratios=(3, 2))
    for name, curve in curves.items():
        (line,) = left.semilogy(curve[:, 0], curve[:, 1])
        left.annotate(name, curve[-1], xytext=(5, 0), textcoords="offset points", va="center", color=line.get_color())
    left.set_xlim(0, 1.3 * max(curve[-1, 0] for curve in curves.values()))
    left.spines[["top", "right"]].set_visible(False)
    left.set(xlabel="seconds", ylabel="relative L2 error of u", title="Poisson's equation, the same seconds")
    _, difference = error(model)
    most = float(np.abs(difference).max())
    drawn = right.imshow(difference.T, origin="lower", extent=(0, 1, 0, 1), cmap="RdBu_r", vmin=-most, vmax=most)
    fig.colorbar(drawn, ax=right, label="error of u, GaussNewton")
    right.set(xlabel="x", ylabel="y", title="where it is off")
    fig.savefig(path, dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each optimizer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figure", help="write the picture here")
    torch.set_num_threads(1)
    main(**vars(parser.parse_args()))
