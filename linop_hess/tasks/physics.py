"""Physics-informed networks: models whose outputs are the residuals of a differential equation, so that the loss is a sum of squares."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from linop_hess._validate import whole
from linop_hess.tasks.learning import LearningTask
from linop_hess.tasks.viscous import viscous_burgers

VISCOSITY = 0.01 / math.pi
"""Of the Burgers equation, as in the literature on these networks."""


class Jets(nn.Module):
    """A tanh network and its derivatives by the input, by Taylor's rules: plain torch operations, each parameter used once.

    Parameters
    ----------
    sizes : sequence of int
        Of the input, of hidden layers, of the output.
    second : sequence of int
        Coordinates by which it is differentiated twice.
    """

    def __init__(self, sizes: Sequence[int], second: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))
        self._inputs, self._second = sizes[0], list(second)

    def forward(self, x: Tensor) -> Tensor:
        """Return the value, the first derivatives and the second ones, of shape (points, 1 + inputs + second, outputs)."""
        d = self._inputs
        unit = torch.eye(d, dtype=x.dtype, device=x.device).expand(len(x), d, d)
        jet = torch.cat([x[:, None, :], unit, torch.zeros_like(unit[:, self._second])], 1)
        for k, layer in enumerate(self.layers):
            weight, bias = layer.parameters()
            jet = jet @ weight.T
            jet = torch.cat([jet[:, :1] + bias, jet[:, 1:]], 1)
            if k + 1 < len(self.layers):
                value, first, second = torch.tanh(jet[:, :1]), jet[:, 1 : 1 + d], jet[:, 1 + d :]
                slope = 1.0 - value * value
                bend = slope * second - 2.0 * value * slope * first[:, self._second].square()
                jet = torch.cat([value, slope * first, bend], 1)
        return jet

    def value(self, x: Tensor) -> Tensor:
        """Return the value alone, (points, outputs)."""
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(x))
        return self.layers[-1](x)


class Poisson(nn.Module):
    """Residuals of Δu + f = 0 inside a square and of u = 0 on its boundary, for u = sin πx sin πy.

    Parameters
    ----------
    width : int
        Of the hidden layer.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.network = Jets([2, width, 1], (0, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the residuals at points of the closed square, (points,), so weighted that their squares add up to integrals."""
        jet = self.network(x)[:, :, 0]
        on_boundary = ((x == 0.0) | (x == 1.0)).any(1)
        inside = float((~on_boundary).sum())
        laplacian = jet[:, 3] + jet[:, 4] + 2.0 * math.pi**2 * self.solution(x)
        weights = torch.where(
            on_boundary, x.new_tensor((4.0 / max(len(x) - inside, 1.0)) ** 0.5), x.new_tensor(inside**-0.5)
        )
        return weights * torch.where(on_boundary, jet[:, 0], laplacian)

    @staticmethod
    def solution(x: Tensor) -> Tensor:
        """Return sin πx sin πy, (points,)."""
        return torch.sin(math.pi * x).prod(1)

    def value(self, x: Tensor) -> Tensor:
        """Return u, (points,)."""
        return self.network.value(x)[:, 0]


class Burgers(nn.Module):
    """Residuals of u_t + u u_x = ν u_xx for |x| < 1 and 0 < t < 1, where u = −sin πx + t (1 − x²) N(x, t) holds all other conditions.

    Parameters
    ----------
    depth, width : int
        Hidden layers and their neurons.
    """

    def __init__(self, depth: int = 4, width: int = 20) -> None:
        super().__init__()
        self.network = Jets([2, *[width] * depth, 1], (0,))

    def forward(self, x: Tensor) -> Tensor:
        """Return residuals at points (x, t), (points,), so weighted that their squares add up to the mean."""
        n, n_x, n_t, n_xx = self.network(x)[:, :, 0].unbind(1)
        (x, t), sine = x.unbind(1), torch.sin(math.pi * x[:, 0])
        room = t * (1.0 - x * x)
        u = room * n - sine
        u_t = (1.0 - x * x) * n + room * n_t
        u_x = room * n_x - 2.0 * t * x * n - math.pi * torch.cos(math.pi * x)
        u_xx = room * n_xx - 4.0 * t * x * n_x - 2.0 * t * n + math.pi**2 * sine
        return (u_t + u * u_x - VISCOSITY * u_xx) * len(x) ** -0.5

    def value(self, x: Tensor) -> Tensor:
        """Return u, (points,)."""
        return x[:, 1] * (1.0 - x[:, 0].square()) * self.network.value(x)[:, 0] - torch.sin(math.pi * x[:, 0])


def squares(residuals: Tensor, nothing: object = None) -> Tensor:
    """Return the sum of the squares of residuals."""
    return residuals.square().sum()


def poisson(seed: int = 0, *, width: int = 32, points: int = 30) -> LearningTask:
    """Make the Poisson problem of Müller and Zeinhofer: 129 parameters, 900 points inside and 120 on the boundary.

    Parameters
    ----------
    seed : int
        Of the parameters, which are normal with deviation 0.1.
    width : int
        Of the one hidden layer.
    points : int
        Along a side.

    Returns
    -------
    LearningTask
        With the relative L2 error on 200 x 200 points as a measure.

    Raises
    ------
    ValueError, TypeError
        If a size is no positive integer, or the seed a negative one or none.

    References
    ----------
    J. Müller and M. Zeinhofer, "Achieving high accuracy with PINNs via energy natural gradient descent", ICML 2023.
    """
    seed, points = whole(seed, "seed", least=0), whole(points, "points", least=1)
    along = (torch.arange(points, dtype=torch.float64, device="cpu") + 0.5) / points
    zero, one = torch.zeros_like(along), torch.ones_like(along)
    sides = [torch.stack(side, 1) for side in ((along, zero), (along, one), (zero, along), (one, along))]
    x = torch.cat([torch.cartesian_prod(along, along), *sides])
    with torch.random.fork_rng(devices=[]):
        model = Poisson(whole(width, "width", least=1)).double()
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.from_numpy(0.1 * rng.standard_normal(tuple(p.shape))))
    fine = (torch.arange(200, dtype=torch.float64, device="cpu") + 0.5) / 200
    everywhere = torch.cartesian_prod(fine, fine)
    truth = Poisson.solution(everywhere)
    return LearningTask("poisson", model, squares, x, None, {"relative L2 error": _error(everywhere, truth)})


def burgers(seed: int = 0, *, depth: int = 4, width: int = 20, points: int = 96) -> LearningTask:
    """Make the Burgers problem: ν = 0.01/π, 1,341 parameters, points denser about the layer at x = 0 and about both ends in time.

    Parameters
    ----------
    seed : int
        Of the parameters, Glorot's.
    depth, width : int
        Hidden layers and their neurons.
    points : int
        Along x, and half as many along t.

    Returns
    -------
    LearningTask
        With the relative L2 error against the solution by Cole and Hopf as a measure.

    Raises
    ------
    ValueError, TypeError
        If a size is no positive integer, or the seed a negative one or none.
    """
    seed, points = whole(seed, "seed", least=0), whole(points, "points", least=2)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = Burgers(whole(depth, "depth", least=1), whole(width, "width", least=1)).double()
        for p in model.parameters():
            if p.ndim == 2:
                nn.init.xavier_normal_(p)
            else:
                nn.init.zeros_(p)
    even = (torch.arange(points, dtype=torch.float64, device="cpu") + 0.5) / points * 2.0 - 1.0
    across = 0.1 * even + 0.9 * even**3  # a third of them within 0.06 of the layer
    even = (torch.arange(points // 2, dtype=torch.float64, device="cpu") + 0.5) / (points // 2)
    # Of even ones the residual is greatest just after the start, where they hold it on one side only, and what is wrong there stays.
    along = 0.5 * even + 0.25 * (1.0 - torch.cos(math.pi * even))
    x = torch.cartesian_prod(across, along)
    fine = torch.cartesian_prod(
        torch.from_numpy(np.linspace(-1.0, 1.0, 257)[1:-1]), torch.from_numpy(np.linspace(0.0, 1.0, 11)[1:])
    )
    truth = torch.from_numpy(viscous_burgers(fine[:, 0].numpy(), fine[:, 1].numpy(), VISCOSITY))
    return LearningTask("burgers", model, squares, x, None, {"relative L2 error": _error(fine, truth)})


def _error(x: Tensor, truth: Tensor) -> Callable[[nn.Module], float]:
    def relative(model: nn.Module) -> float:
        value: Callable[[Tensor], Tensor] = model.value  # type: ignore[assignment]
        return float((value(x) - truth).norm() / truth.norm())

    return relative
