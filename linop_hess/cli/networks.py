"""The networks of `linop-hess compare`: deep, narrow classifiers of real data, alive in every layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

DIGITS = 1797
"""Images in scikit-learn's digits."""

# With the gain of the orthogonal initialization that keeps derivatives alive through dozens of layers.
ACTIVATIONS: dict[str, tuple[type[nn.Module], float]] = {
    "tanh": (nn.Tanh, 1.2),
    "relu": (nn.ReLU, 2**0.5),
    "gelu": (nn.GELU, 1.6),
    "silu": (nn.SiLU, 1.8),
    "sigmoid": (nn.Sigmoid, 4.0),
    "softplus": (nn.Softplus, 1.6),
}


@dataclass(frozen=True)
class Problem:
    """A classifier, its loss, and the batch at which its Hessian is taken."""

    model: nn.Sequential
    loss_fn: nn.Module
    inputs: Tensor
    targets: Tensor


def digits_problem(
    depth: int = 24,
    width: int = 8,
    batch: int = 16,
    activation: str = "tanh",
    train_steps: int = 0,
    seed: int = 0,
) -> Problem:
    """Build a deep, narrow float64 classifier of scikit-learn's digits.

    Parameters
    ----------
    depth : int
        Hidden layers, each a Linear and an activation; a Linear to the 10 classes follows.
    width : int
        Neurons a hidden layer.
    batch : int
        Images in the batch that defines the Hessian, 1 to `DIGITS`.
    activation : str
        One of `ACTIVATIONS`.
    train_steps : int
        Adam steps at rate 1e-3 on random batches of 64 images first.
    seed : int
        Seeds the weights, the choice of images and the training; torch's global generator is left alone.

    Returns
    -------
    Problem
        Cross-entropy; pixels scaled to [-1, 1].

    Raises
    ------
    ImportError
        Without scikit-learn, of the extra ``demo``.
    """
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels / 8 - 1), torch.tensor(classes)
    module, gain = ACTIVATIONS[activation]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # sigmoid(0) and softplus(0) are not 0; the biases take that off again, or every layer would saturate.
        rest = float(module()(torch.zeros(())))
        layers: list[nn.Module] = [_orthogonal(images.shape[1], width, gain, 0.0), module()]
        for _ in range(depth - 1):
            layers += [_orthogonal(width, width, gain, rest), module()]
        model = nn.Sequential(*layers, _orthogonal(width, 10, 1.0, rest))
        chosen = torch.randperm(len(images))[:batch]
        loss_fn = nn.CrossEntropyLoss()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(train_steps):
            some = torch.randint(len(images), (64,))
            optimizer.zero_grad()
            loss_fn(model(images[some]), labels[some]).backward()
            optimizer.step()
    return Problem(model, loss_fn, images[chosen], labels[chosen])


def _orthogonal(fan_in: int, fan_out: int, gain: float, rest: float) -> nn.Linear:
    """Return a layer that maps the constant input `rest` to zero."""
    layer = nn.Linear(fan_in, fan_out, dtype=torch.float64)
    nn.init.orthogonal_(layer.weight, gain)
    with torch.no_grad():
        layer.bias.copy_(-rest * layer.weight.sum(dim=1))
    return layer
