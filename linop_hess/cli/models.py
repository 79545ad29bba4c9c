"""The classifiers of 8 × 8 images that `linop-hess compare` knows, alive in every layer: derivatives neither vanish nor explode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

PIXELS, SIDE, CLASSES = 64, 8, 10

# With the gain of the orthogonal initialization that keeps derivatives alive through dozens of layers.
ACTIVATIONS: dict[str, tuple[type[nn.Module], float]] = {
    "tanh": (nn.Tanh, 1.2),
    "relu": (nn.ReLU, 2**0.5),
    "gelu": (nn.GELU, 1.6),
    "silu": (nn.SiLU, 1.8),
    "sigmoid": (nn.Sigmoid, 4.0),
    "softplus": (nn.Softplus, 1.6),
}


def mlp(depth: int, width: int, activation: str) -> nn.Module:
    """Return `depth` hidden layers, each a Linear and an activation, and a Linear to the classes."""
    module, gain = ACTIVATIONS[activation]
    # sigmoid(0) and softplus(0) are not 0; the biases take that off again, or every layer would saturate.
    rest = float(module()(torch.zeros(())))
    layers: list[nn.Module] = [_orthogonal(PIXELS, width, gain, 0.0), module()]
    for _ in range(depth - 1):
        layers += [_orthogonal(width, width, gain, rest), module()]
    return nn.Sequential(*layers, _orthogonal(width, CLASSES, 1.0, rest))


def _orthogonal(fan_in: int, fan_out: int, gain: float, rest: float) -> nn.Linear:
    """Return a layer that maps the constant input `rest` to zero."""
    layer = nn.Linear(fan_in, fan_out)
    nn.init.orthogonal_(layer.weight, gain)
    with torch.no_grad():
        layer.bias.copy_(-rest * layer.weight.sum(dim=1))
    return layer


class ResidualBlock(nn.Module):
    """x + W₂ φ(W₁ norm(x)): the norm stands in the branch, before the layers (pre-LN)."""

    def __init__(self, width: int, activation: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, width)
        self.activation = ACTIVATIONS[activation][0]()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.activation(self.inner(self.norm(x))))


class ResidualMLP(nn.Module):
    """A Linear to `width`, `depth` residual blocks, a norm, and a Linear to the classes."""

    def __init__(self, depth: int, width: int, activation: str) -> None:
        super().__init__()
        self.embed = nn.Linear(PIXELS, width)
        self.blocks = nn.ModuleList(ResidualBlock(width, activation) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class ConvBlock(nn.Module):
    """x + conv(φ(group norm(x)))."""

    def __init__(self, width: int, activation: str) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2 if width % 2 == 0 else 1, width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.activation = ACTIVATIONS[activation][0]()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(self.activation(self.norm(x)))


class ConvNet(nn.Module):
    """A convolution of stride 2 to `width` channels of 4 × 4, `depth` residual blocks, the mean over positions, a Linear."""

    def __init__(self, depth: int, width: int, activation: str) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(ConvBlock(width, activation) for _ in range(depth))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images.view(-1, 1, SIDE, SIDE))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class Transformer(nn.Module):
    """The 8 rows of the image as tokens: `depth` pre-LN encoder layers of width `width`, the mean over tokens, a Linear."""

    def __init__(self, depth: int, width: int, activation: str) -> None:
        super().__init__()
        self.embed = nn.Linear(SIDE, width)
        self.position = nn.Parameter(torch.randn(SIDE, width) / 2)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 2 if width % 2 == 0 else 1, 2 * width, dropout=0.0,
                activation=ACTIVATIONS[activation][0](), batch_first=True, norm_first=True,
            )
            for _ in range(depth)
        )  # fmt: skip
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images.view(-1, SIDE, SIDE)) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


class Recurrent(nn.Module):
    """The 8 rows of the image as steps of an `nn.GRU` of `depth` layers; a Linear reads the last state."""

    def __init__(self, depth: int, width: int, activation: str) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(SIDE, width, depth, batch_first=True), nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        states, _ = self.gru(images.view(-1, SIDE, SIDE))
        return self.head(states[:, -1])


@dataclass(frozen=True)
class Family:
    """A kind of classifier and its sizes where none are given.

    Attributes
    ----------
    make : callable
        Called with depth, width and activation.
    depth, width, batch : int
    activation : str
        One of `ACTIVATIONS`; empty where the family has its own.
    layers, units : str
        What depth and width count.
    """

    make: Callable[[int, int, str], nn.Module]
    depth: int
    width: int
    batch: int
    activation: str
    layers: str
    units: str


FAMILIES: dict[str, Family] = {
    "mlp": Family(mlp, 24, 8, 16, "tanh", "hidden layers", "neurons a hidden layer"),
    "resmlp": Family(ResidualMLP, 12, 8, 8, "tanh", "residual blocks", "neurons a layer"),
    "convnet": Family(ConvNet, 3, 4, 4, "silu", "residual blocks", "channels"),
    "transformer": Family(Transformer, 2, 8, 4, "gelu", "encoder layers", "entries a token"),
    "gru": Family(Recurrent, 1, 8, 8, "", "recurrent layers", "entries of the hidden state"),
}
