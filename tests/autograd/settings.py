"""Models, losses and truths that the tests of autograd share."""

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from linop_hess.autograd import GaussNewton, Hessian
from linop_hess.operators import to_dense
from tests.helpers import (
    make_batch,
    make_mlp,
    oracle_jacobian,
)

DTYPES = [torch.float32, torch.float64]
CURVATURES = [Hessian, GaussNewton]
CE_MEAN, CE_SUM = nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")


class Attention(nn.Module):
    """A transformer layer and a head over the mean of three tokens made of each input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        tokens = x.unsqueeze(1) * torch.linspace(1, 2, 3, dtype=x.dtype)[None, :, None]
        return self.head(self.layer(tokens).mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(2, 3, batch_first=True)
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.cell(x.reshape(len(x), 2, 2))[0][:, -1])


class Tied(nn.Module):
    """One weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, inputs):
        return self.layer(inputs["a"]) * self.layer(inputs["b"])


def mlp_and_batch(dtype=torch.float64, samples=7):
    return make_mlp([4, 5, 5, 3], dtype=dtype), make_batch(4, 3, samples, dtype=dtype)


def gauss_newton_truth(model, loss_fn, x, y):
    """Jᵀ (∇²_z ℓ) J from dense factors, in float64."""
    J = oracle_jacobian(model, x)
    with torch.no_grad():
        z = model.double()(x.double())
    curvature = torch.autograd.functional.hessian(lambda u: loss_fn(u.reshape(z.shape), y), z.reshape(-1))
    return J.T @ curvature.numpy() @ J


def worst(op, truth):
    return np.abs(to_dense(op) - truth).max() / np.abs(truth).max()


class HalfIdle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Linear(2, 2)
        self.used = nn.Linear(4, 3)

    def forward(self, x):
        return self.used(x)


class Checkpointed(nn.Module):
    """An attention layer computed again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Attention().eval()

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)
