"""Learning tasks on scikit-learn's digits, 8 × 8 pixels: memorize a few, learn to tell them, and compress them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from linop_hess._validate import whole
from linop_hess.tasks.learning import LearningTask

PIXELS, CLASSES, IMAGES, TRAINING = 64, 10, 1797, 1437

# Each with the gain of the initialization that keeps the size of states.
ACTIVATIONS: dict[str, tuple[type[nn.Module], float]] = {
    "tanh": (nn.Tanh, 5 / 3),
    "relu": (nn.ReLU, 2**0.5),
    "gelu": (nn.GELU, 1.6),
    "silu": (nn.SiLU, 1.8),
}
INITS = ("he", "orthogonal", "default")


def digits_memorize(
    seed: int = 0,
    *,
    depth: int = 16,
    width: int = 8,
    batch: int = 32,
    activation: str = "tanh",
    init: str = "he",
) -> LearningTask:
    """A deep narrow classifier and a few images that it is to learn by heart, by cross entropy.

    Parameters
    ----------
    seed : int
        Of the weights and the choice of images; torch's generator is left alone.
    depth, width : int
        Hidden layers, and neurons in each.
    batch : int
        Images, at most 1,797.
    activation : str
        One of `ACTIVATIONS`.
    init : {"he", "orthogonal", "default"}
        "he": normal weights of variance gain² / fan-in, biases 0; "default": torch's.

    Returns
    -------
    LearningTask
        It measures the share of images that are told wrong.

    Raises
    ------
    ImportError
        Without scikit-learn, of the extra ``demo``.
    ValueError, TypeError
        If a size, an activation or an initialization is not usable.
    """
    batch = _at_most(batch, IMAGES)
    model = _network([PIXELS, *_hidden(depth, width), CLASSES], activation, init, seed)
    images, labels = _digits()
    chosen = np.random.default_rng(seed).permutation(IMAGES)[:batch]
    x, y = images[chosen], labels[chosen]
    return LearningTask(
        "digits-memorize", model, nn.CrossEntropyLoss(), x, y, {"error": lambda net: _errors(net, x, y)}
    )


def digits(
    seed: int = 0,
    *,
    depth: int = 4,
    width: int = 16,
    batch: int = TRAINING,
    activation: str = "tanh",
    init: str = "he",
) -> LearningTask:
    """A classifier of digits, trained on 1,437 images or the first of them as one batch, and tested on the other 360.

    Parameters
    ----------
    seed : int
        Of the weights; the images are the same for all.
    depth, width, batch, activation, init
        As of `digits_memorize`; at most 1,437 images.

    Returns
    -------
    LearningTask
        It measures the test error: the share of the other 360 that are told wrong.

    Raises
    ------
    ImportError
        Without scikit-learn, of the extra ``demo``.
    ValueError, TypeError
        If a size, an activation or an initialization is not usable.
    """
    batch = _at_most(batch, TRAINING)
    model = _network([PIXELS, *_hidden(depth, width), CLASSES], activation, init, seed)
    train, test = _split()
    (x, y), (xt, yt) = (tuple(t[part] for t in _digits()) for part in (train[:batch], test))
    return LearningTask("digits", model, nn.CrossEntropyLoss(), x, y, {"test error": lambda net: _errors(net, xt, yt)})


def autoencoder(
    seed: int = 0,
    *,
    depth: int = 7,
    width: int = 16,
    batch: int = 128,
    activation: str = "tanh",
    init: str = "he",
) -> LearningTask:
    """A network that gives images back from a code of a quarter of its width in the middle, by mean squared error.

    Parameters
    ----------
    seed, depth, width, batch, activation, init
        As of `digits`; an odd depth has as many layers before the code as after it.

    Returns
    -------
    LearningTask
        It measures the mean squared error on the 360 other images.

    Raises
    ------
    ImportError
        Without scikit-learn, of the extra ``demo``.
    ValueError, TypeError
        If a size, an activation or an initialization is not usable.
    """
    batch = _at_most(batch, TRAINING)
    sizes = _hidden(depth, width)
    sizes[len(sizes) // 2] = max(1, width // 4)
    model = _network([PIXELS, *sizes, PIXELS], activation, init, seed)
    train, test = _split()
    images, _ = _digits()
    x, xt = images[train[:batch]], images[test]
    return LearningTask(
        "autoencoder", model, nn.MSELoss(), x, x, {"test loss": lambda net: float(nn.functional.mse_loss(net(xt), xt))}
    )


def _digits() -> tuple[Tensor, Tensor]:
    """Images of mean 0 a pixel and variance about 1, and their classes."""
    from sklearn.datasets import load_digits

    pixels, classes = load_digits(return_X_y=True)
    return torch.from_numpy((pixels - pixels.mean(0)) / pixels.std()), torch.from_numpy(classes)


def _split() -> tuple[np.ndarray, np.ndarray]:
    order = np.random.default_rng(0).permutation(IMAGES)
    return order[:TRAINING], order[TRAINING:]


def _errors(net: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((net(x).argmax(1) != y).double().mean())


def _network(sizes: Sequence[int], activation: str, init: str, seed: int) -> nn.Sequential:
    if activation not in ACTIVATIONS:
        raise ValueError(f"expected activation to be one of {list(ACTIVATIONS)}, got {activation!r}: choose one")
    if init not in INITS:
        raise ValueError(f"expected init to be one of {list(INITS)}, got {init!r}: choose one")
    module, gain = ACTIVATIONS[activation]
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(whole(seed, "seed", least=0))
        for before, after in zip(sizes[:-1], sizes[1:], strict=True):
            layers += [nn.Linear(before, after), module()]
        model = nn.Sequential(*layers[:-1]).double()
        for layer in model if init != "default" else ():
            if isinstance(layer, nn.Linear):
                if init == "he":
                    nn.init.normal_(layer.weight, std=gain / layer.in_features**0.5)
                else:
                    nn.init.orthogonal_(layer.weight, gain)
                nn.init.zeros_(layer.bias)
    return model


def _hidden(depth: int, width: int) -> list[int]:
    return [whole(width, "width", least=1)] * whole(depth, "depth", least=1)


def _at_most(batch: int, most: int) -> int:
    if whole(batch, "batch", least=1) > most:
        raise ValueError(f"expected a batch of at most {most:,} images, got {batch:,}: there are no more")
    return batch
