"""The networks of `linop-hess compare`, on real data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from linop_hess.cli.models import FAMILIES

DIGITS = 1797
"""Images in scikit-learn's digits."""


@dataclass(frozen=True)
class Problem:
    """A classifier, its loss, and the batch at which its Hessian is taken."""

    model: nn.Module
    loss_fn: nn.Module
    inputs: Tensor
    targets: Tensor


def digits_problem(
    depth: int | None = None,
    width: int | None = None,
    batch: int | None = None,
    activation: str | None = None,
    train_steps: int = 0,
    seed: int = 0,
    model: str = "mlp",
) -> Problem:
    """Build a small float64 classifier of scikit-learn's digits.

    Parameters
    ----------
    depth : int, optional
        Hidden layers, residual blocks, encoder layers or recurrent layers. This and the next three are by default those
        of the family, in `FAMILIES`.
    width : int, optional
        Neurons a layer, channels, entries of a token, or of the hidden state.
    batch : int, optional
        Images in the batch that defines the Hessian, 1 to `DIGITS`.
    activation : str, optional
        One of `ACTIVATIONS`. A gated recurrence has its own.
    train_steps : int
        Adam steps at rate 1e-3 on random batches of 64 images first.
    seed : int
        Seeds the weights, the choice of images and the training; torch's global generator is left alone.
    model : str
        One of `FAMILIES`.

    Returns
    -------
    Problem
        Cross-entropy; pixels scaled to [-1, 1].

    Raises
    ------
    ImportError
        Without scikit-learn, of the extra ``demo``.
    ValueError
        If `activation` is given for a model that has its own.
    """
    from sklearn.datasets import load_digits

    family = FAMILIES[model]
    if activation and not family.activation:
        raise ValueError(
            f"expected no activation with the model {model!r}, which has its own, got {activation!r}: leave it out"
        )
    pixels, classes = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels / 8 - 1), torch.tensor(classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = family.make(depth or family.depth, width or family.width, activation or family.activation).double()
        chosen = torch.randperm(len(images))[: batch or family.batch]
        loss_fn = nn.CrossEntropyLoss()
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
        for _ in range(train_steps):
            some = torch.randint(len(images), (64,))
            optimizer.zero_grad()
            loss_fn(network(images[some]), labels[some]).backward()
            optimizer.step()
    return Problem(network, loss_fn, images[chosen], labels[chosen])
