"""Modules of the zoo (`tests/graph/zoo.py`) that share parameters, mix samples, have several inputs, or compute their weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as f

# Recurrences: the same parameters again and again.


class Recurrent(nn.Module):
    """nn.RNN, nn.GRU or nn.LSTM as it is, and its last output."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(layer.hidden_size * (2 if layer.bidirectional else 1), 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


class CellLoop(nn.Module):
    """A cell called in a Python loop."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.cell, self.head = cell, nn.Linear(cell.hidden_size, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class HandGRU(nn.Module):
    """A GRU of one's own, its gates slices of one product."""

    def __init__(self, hidden: int = 3) -> None:
        super().__init__()
        self.hidden = hidden
        self.w, self.u, self.head = nn.Linear(2, 3 * hidden), nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        n, z = self.hidden, x.new_zeros(x.shape[0], self.hidden)
        for t in range(x.shape[1]):
            a, b = self.w(x[:, t]), self.u(z)
            reset, update = torch.sigmoid(a[:, : 2 * n] + b[:, : 2 * n]).chunk(2, 1)
            z = (1 - update) * torch.tanh(a[:, 2 * n :] + reset * b[:, 2 * n :]) + update * z
        return self.head(z)


class RungeKutta(nn.Module):
    """A neural ODE unrolled: RK4 steps of one vector field."""

    def __init__(self, steps: int = 2, h: float = 0.4) -> None:
        super().__init__()
        self.field = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
        self.head, self.steps, self.h = nn.Linear(3, 2), steps, h

    def forward(self, z: Tensor) -> Tensor:
        for _ in range(self.steps):
            k1 = self.field(z)
            k2 = self.field(z + self.h / 2 * k1)
            k3 = self.field(z + self.h / 2 * k2)
            k4 = self.field(z + self.h * k3)
            z = z + self.h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return self.head(z)


class Equilibrium(nn.Module):
    """A deep equilibrium model unrolled: z ← tanh(Wz + Ux)."""

    def __init__(self, width: int = 4, steps: int = 6) -> None:
        super().__init__()
        self.w, self.u, self.head = nn.Linear(width, width, bias=False), nn.Linear(3, width), nn.Linear(width, 3)
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        z = injected = self.u(x)
        for _ in range(self.steps):
            z = torch.tanh(self.w(z) + injected)
        return self.head(z)


class TiedAutoencoder(nn.Module):
    """One weight, used once as it is and once transposed."""

    def __init__(self, visible: int = 5, hidden: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden, visible))
        self.up, self.down = nn.Parameter(torch.zeros(hidden)), nn.Parameter(torch.zeros(visible))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight.T + self.up) @ self.weight + self.down


# Sets, graphs, pairs; several inputs and outputs.


class DeepSet(nn.Module):
    """A sum over the members of a set."""

    def __init__(self) -> None:
        super().__init__()
        self.phi = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3))
        self.rho = nn.Sequential(nn.Tanh(), nn.Linear(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.rho(self.phi(x).sum(1))


class GraphNetwork(nn.Module):
    """Messages along edges, summed where they arrive: the nodes of the batch interact."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.embed, self.message = nn.Linear(3, width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, 2)

    def forward(self, graph: dict[str, Tensor]) -> Tensor:
        source, target = graph["edges"]
        z = torch.tanh(self.embed(graph["nodes"]))
        messages = f.silu(self.message(torch.cat([z[source], z[target]], 1)))
        return self.head(z.index_add(0, target, messages))


class TwoTowers(nn.Module):
    """Two encoders and a learned temperature; the loss compares every pair of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
        self.right = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3))
        self.temperature = nn.Parameter(torch.tensor(0.5))

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        return f.normalize(self.left(left), dim=1) * self.temperature.exp(), f.normalize(self.right(right), dim=1)


class Gaussian(nn.Module):
    """Mean, log-variance and latent state, in a dict with a tuple inside."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.mean, self.spread = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> dict[str, object]:
        z = torch.tanh(self.trunk(x))
        return {"mean": self.mean(z), "log_variance": self.spread(z), "latent": (z, [z.square()])}


# Computed weights, modules in modules, in-place writing, branches.


class LoRA(nn.Module):
    """A frozen layer and a learned update of low rank, added to its output or merged into its weight."""

    def __init__(self, merged: bool, width: int = 4, rank: int = 2) -> None:
        super().__init__()
        self.frozen = nn.Linear(width, width + 1).requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.zeros(rank, width)), nn.Parameter(torch.zeros(width + 1, rank))
        self.head, self.merged = nn.Linear(width + 1, 3), merged

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return self.head(torch.tanh(f.linear(x, self.frozen.weight + self.b @ self.a, self.frozen.bias)))
        return self.head(torch.tanh(self.frozen(x) + x @ self.a.T @ self.b.T))


class Stack(nn.Module):
    """A stem and blocks by name."""

    def __init__(self, stem: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.stem, self.blocks = stem, nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x


class Direction(nn.Module):
    """Weight norm of one's own: rows g v / ‖v‖, for `torch.nn.utils.parametrize`."""

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        return g * v / torch.linalg.vector_norm(v, dim=1, keepdim=True)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return torch.linalg.vector_norm(weight, dim=1, keepdim=True), weight


class WritesInPlace(nn.Module):
    """Slices written in place, also from each other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = torch.zeros_like(y)
        z[:, 0] = y[:, 1]
        z[:, 1:] += torch.tanh(y[:, :-1])
        z[:, 2] = z[:, 0].clone() * z[:, 3].clone()
        return self.last(z.mul_(2.0))


class Branches(nn.Module):
    """Python control flow that looks at the values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(torch.tanh(y) if y.sum() > 0 else torch.sin(y))


class PINN(nn.Module):
    """u(x) and its first and second derivative by x, by autograd or by torch.func, or left to the loss."""

    def __init__(self, route: str, widths: Sequence[int] = (1, 5, 4, 1)) -> None:
        super().__init__()
        layers = [nn.Linear(m, n) for m, n in zip(widths[:-1], widths[1:], strict=True)]
        self.net = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])
        self.route = route

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.route == "func":
            slope = torch.func.grad(lambda point: self.net(point.view(1, 1)).squeeze())
            points = x[:, 0]
            return self.net(x)[:, 0], torch.vmap(slope)(points), torch.vmap(torch.func.grad(slope))(points)
        x = x.detach().clone().requires_grad_()
        u = self.net(x)
        if self.route == "loss":
            return x, u
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
        return u[:, 0], slope[:, 0], curvature[:, 0]
