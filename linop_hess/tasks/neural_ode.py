"""A neural ordinary differential equation: a vector field by a network, fitted to where a flow takes points."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor, nn

from linop_hess._validate import true_or_false, whole
from linop_hess.tasks.learning import LearningTask

_SPIRAL = np.array([[-0.1, 2.0], [-2.0, -0.1]])
_TIME = 0.5


class Flow(nn.Module):
    """Runge and Kutta's steps of ẋ = f(x): a network deep in steps.

    Parameters
    ----------
    steps : int
    width : int
        Hidden neurons of f.
    shared : bool
        Whether all steps have one f, or each its own.
    """

    def __init__(self, steps: int, width: int, shared: bool) -> None:
        super().__init__()
        self.fields = nn.ModuleList(
            nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 2)) for _ in range(1 if shared else steps)
        )
        self._steps = steps

    def forward(self, x: Tensor) -> Tensor:
        """Return where points (n, 2) are after the time."""
        h = _TIME / self._steps
        for k in range(self._steps):
            f = self.fields[k % len(self.fields)]
            a = f(x)
            b = f(x + h / 2 * a)
            c = f(x + h / 2 * b)
            d = f(x + h * c)
            x = x + h / 6 * (a + 2 * b + 2 * c + d)
        return x


def neural_ode(seed: int = 0, *, depth: int = 4, width: int = 8, batch: int = 40, shared: bool = True) -> LearningTask:
    """Make the fit of a cubic spiral, ẋ = A x³: from where points are now to where they will be.

    Parameters
    ----------
    seed : int
        Of the parameters and of the points.
    depth : int
        Runge-Kutta steps.
    width : int
        Hidden neurons of the vector field.
    batch : int
        Points.
    shared : bool
        Whether all steps have the same vector field.

    Returns
    -------
    LearningTask
        With the root mean square error at 500 other points as a measure.

    Raises
    ------
    ValueError, TypeError
        If a size is no positive integer, the seed a negative one or none, or `shared` no bool.
    """
    seed = whole(seed, "seed", least=0)
    depth, width, batch = whole(depth, "depth", least=1), whole(width, "width", least=1), whole(batch, "batch", least=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Flow(depth, width, true_or_false(shared, "shared")).double()
    rng = np.random.default_rng(seed)
    x, other = rng.uniform(-1.5, 1.5, (batch, 2)), rng.uniform(-1.5, 1.5, (500, 2))
    measures = {"error elsewhere": _error(torch.from_numpy(other), torch.from_numpy(spiral(other)))}
    inputs, targets = torch.from_numpy(x), torch.from_numpy(spiral(x))
    return LearningTask("neural-ode", model, nn.MSELoss(), inputs, targets, measures)


def spiral(x: np.ndarray) -> np.ndarray:
    """Return where the flow of ẋ = A x³ takes points (n, 2), to 1e-10."""
    found = solve_ivp(
        lambda t, y: (y.reshape(-1, 2) ** 3 @ _SPIRAL.T).ravel(), (0.0, _TIME), x.ravel(), rtol=1e-12, atol=1e-12
    )
    return found.y[:, -1].reshape(-1, 2)


def _error(x: Tensor, truth: Tensor) -> Callable[[nn.Module], float]:
    return lambda model: float((model(x) - truth).square().mean().sqrt())
