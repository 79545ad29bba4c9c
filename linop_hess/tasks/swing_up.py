"""Swing-up of a pendulum and of a pole on a cart, by a torque and by a force."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from linop_hess.tasks.control import ControlTask


class Pendulum(ControlTask):
    """θ̈ = k sin θ − b θ̇ + u with θ = 0 upright, from hanging at rest, by semi-implicit Euler; the state is (θ, ω).

    Cost ∫ ½ r u² + q (1 − cos θ) + ½ w ω² dt + Q (1 − cos θ) + ½ W ω² at the end. Zero controls are a stationary point that is no
    minimum.

    Parameters
    ----------
    length : int
    horizon : float
        Seconds.
    start : sequence of float
        (θ, ω), in rad and rad/s.
    """

    k, b, r, q, w, Q, W = 9.81, 0.1, 0.05, 1.0, 0.05, 100.0, 20.0
    weight = (10.0, 30.0)

    def __init__(self, length: int = 1000, horizon: float = 4.0, start: Sequence[float] = (math.pi, 0.0)) -> None:
        super().__init__(length, start, horizon)

    def step(self, x: Sequence[Any], u: Any, m: Any) -> tuple[Any, ...]:
        """One step of semi-implicit Euler."""
        rate = x[1] + self.h * (self.k * m.sin(x[0]) - self.b * x[1] + u)
        return x[0] + self.h * rate, rate

    def running(self, x: Sequence[Any], u: Any, m: Any) -> Any:
        """Cost of a stage."""
        return self.h * (0.5 * self.r * u * u + self.q * (1.0 - m.cos(x[0])) + 0.5 * self.w * x[1] * x[1])

    def terminal(self, x: Sequence[Any], m: Any) -> Any:
        """Cost of the last state."""
        return self.Q * (1.0 - m.cos(x[0])) + 0.5 * self.W * x[1] * x[1]


class CartPole(ControlTask):
    """A pole of length 0.5 m and mass 0.2 kg on a cart of 1 kg that a force moves; the state is (position, θ, velocity, ω), θ = 0 upright.

    Cost ∫ ½ r u² + q (1 − cos θ) + ½ s x² dt + Q (1 − cos θ) + ½ S x² + ½ W (v² + ω²) at the end.

    Parameters
    ----------
    length : int
    horizon : float
        Seconds.
    start : sequence of float
    """

    cart, pole, arm, k = 1.0, 0.2, 0.5, 9.81
    r, q, s, Q, S, W = 0.02, 1.0, 0.1, 200.0, 100.0, 20.0
    weight = (1.0, 10.0, 1.0, 1.0)

    def __init__(
        self, length: int = 500, horizon: float = 3.0, start: Sequence[float] = (0.0, math.pi, 0.0, 0.0)
    ) -> None:
        super().__init__(length, start, horizon)

    def step(self, x: Sequence[Any], u: Any, m: Any) -> tuple[Any, ...]:
        """One step of semi-implicit Euler."""
        sin, cos = m.sin(x[1]), m.cos(x[1])
        mass = self.cart + self.pole * sin * sin
        push = u + self.pole * sin * (self.arm * x[3] * x[3] - self.k * cos)
        turn = (self.cart + self.pole) * self.k * sin - cos * (u + self.pole * self.arm * x[3] * x[3] * sin)
        v, rate = x[2] + self.h * push / mass, x[3] + self.h * turn / (self.arm * mass)
        return x[0] + self.h * v, x[1] + self.h * rate, v, rate

    def running(self, x: Sequence[Any], u: Any, m: Any) -> Any:
        """Cost of a stage."""
        return self.h * (0.5 * self.r * u * u + self.q * (1.0 - m.cos(x[1])) + 0.5 * self.s * x[0] * x[0])

    def terminal(self, x: Sequence[Any], m: Any) -> Any:
        """Cost of the last state."""
        speed = x[2] * x[2] + x[3] * x[3]
        return self.Q * (1.0 - m.cos(x[1])) + 0.5 * self.S * x[0] * x[0] + 0.5 * self.W * speed


class ControlStage(nn.Module):
    """One stage as a layer: its control is its parameter; it takes and gives (state, cost so far), shape (batch, n + 1).

    Parameters
    ----------
    task : ControlTask
    u : float
    """

    def __init__(self, task: ControlTask, u: float = 0.0) -> None:
        super().__init__()
        self.task = task
        self.u = nn.Parameter(torch.tensor([float(u)], dtype=torch.float64, device="cpu"))

    def forward(self, z: Tensor) -> Tensor:
        """Return the state and the cost after the stage."""
        x = z.unbind(1)
        after = self.task.step(x[:-1], self.u, torch)
        return torch.stack([*after, x[-1] + self.task.running(x[:-1], self.u, torch)], 1)


def as_network(task: ControlTask, u: Sequence[float]) -> tuple[nn.Sequential, Any, Tensor, Tensor]:
    """Return (model, loss_fn, inputs, targets) for `lh.linearize`: a layer a stage, and a loss that does not read its targets."""
    model = nn.Sequential(*(ControlStage(task, float(value)) for value in u))

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        z = output.unbind(1)
        return (z[-1] + task.terminal(z[:-1], torch)).sum()

    inputs = torch.tensor([[*task.start, 0.0]], dtype=torch.float64, device="cpu")
    return model, loss_fn, inputs, torch.zeros(1, dtype=torch.float64, device="cpu")
