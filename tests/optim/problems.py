"""Small networks to train, and their dense Hessians by double backward."""

import torch
from torch import nn

from tests.lq.test_complex_damping import dense_hessian

__all__ = ["chain", "dense_hessian", "digits_like"]


def chain(depth=4, width=4, batch=6, act=nn.Tanh, seed=0, outputs=3, dtype=torch.float64):
    """A deep narrow network with an indefinite Hessian, cross entropy, and a batch with a sample twice."""
    torch.manual_seed(seed)
    layers, size = [], 5
    for _ in range(depth):
        layers += [nn.Linear(size, width), act()]
        size = width
    model = nn.Sequential(*layers, nn.Linear(size, outputs)).to(dtype)
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight, 1.4)
            nn.init.zeros_(layer.bias)
    x, y = torch.randn(batch, 5, dtype=dtype), torch.randint(outputs, (batch,))
    x[-1], y[-1] = x[0], y[0]
    return model, x, y


def digits_like(batch=16, seed=0):
    """Inputs in eight classes, random."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 5, generator=generator, dtype=torch.float64), torch.randint(
        3, (batch,), generator=generator
    )
