"""Networks with many samples and a Hessian that is not negligible, for sketches; dense truths by LAPACK."""

from functools import cache

import numpy as np
import torch

import linop_hess as lh
from linop_hess.lq.analysis import Analysis
from linop_hess.lq.matrix.hessian import assembled

DAMPING = 3e-2


@cache
def network(kind="tanh"):
    """A linearization of unequal widths with repeated samples; "wired" has skips, a norm and a layer without bias."""
    torch.manual_seed(0)
    layers = []
    for a, b in [(5, 7), (7, 4), (4, 6), (6, 7), (7, 3)]:
        layer = torch.nn.Linear(a, b, bias=b != 6).double()
        torch.nn.init.orthogonal_(layer.weight, 1.5)
        layers += [layer, torch.nn.Tanh()]
    if kind == "wired":
        layers.insert(6, torch.nn.LayerNorm(6).double())
    model = torch.nn.Sequential(*layers[:-1])
    if kind == "wired":
        model = Skip(model)
    x, y = torch.randn(30, 5).double(), torch.randint(3, (30,))
    x[7] = x[6]
    return lh.linearize(model, torch.nn.CrossEntropyLoss(), x, y)


class Skip(torch.nn.Module):
    """A network whose input is used again at its end."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.out = inner, torch.nn.Linear(8, 3).double()

    def forward(self, x):
        h = self.inner(x)
        return h + self.out(torch.cat([x, h], 1).tanh())


def analyses(kind="tanh"):
    """Of H and of Gauss-Newton, anew: nothing of other tests is kept in them."""
    problem = network(kind).problem
    return Analysis(problem), Analysis(problem.gauss_newton())


def damped(analysis, damping=DAMPING):
    H = assembled(analysis)
    return H + damping * torch.eye(len(H), dtype=H.dtype)


def backward_error(A, x, g):
    x, g = (np.asarray(v, dtype=float) for v in (x, g))
    return np.linalg.norm(g - A @ x) / (np.linalg.norm(A, 2) * np.linalg.norm(x) + np.linalg.norm(g))
