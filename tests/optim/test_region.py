"""Trust-region steps: those of a dense eigendecomposition, from a saddle point without gradient too, and what is refused."""

import numpy as np
import pytest
import torch
from torch import nn

import linop_hess as lh
from linop_hess.optim import TrustRegion
from tests.optim.problems import chain, dense_hessian

CE = nn.CrossEntropyLoss()


def test_the_first_step_is_the_global_minimizer_in_the_ball():
    model, x, y = chain(depth=2, width=3)
    H = dense_hessian(model, CE, x, y)
    g = lh.linearize(model, CE, x, y).gradient
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    opt = TrustRegion(model, CE, radius=0.05)
    opt.step(x, y)
    step = (nn.utils.parameters_to_vector(model.parameters()).detach() - before).numpy()
    values, vectors = np.linalg.eigh(np.asarray(H))
    low, high = max(0.0, -values[0]), max(0.0, -values[0]) + np.linalg.norm(g) / 0.05
    for _ in range(200):
        lam = (low + high) / 2
        longer = np.linalg.norm((vectors.T @ g) / (values + lam)) > 0.05
        low, high = (lam, high) if longer else (low, lam)
    expected = -vectors @ ((vectors.T @ g) / (values + lam))
    assert opt.last.accepted and values[0] < 0.0
    assert np.linalg.norm(step - expected) <= 1e-9 * np.linalg.norm(expected)


def test_a_saddle_point_without_gradient_is_left():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    x = torch.randn(6, 3).double()
    y = torch.tensor([0, 1, 0, 1, 0, 1])
    opt = TrustRegion(model, CE, radius=0.5)
    losses = [opt.step(x, y) for _ in range(4)]
    assert losses[-1] < losses[0] - 1e-3 and opt.records[0].method == "hard"


@pytest.mark.parametrize("radius", [0.0, -1.0, float("nan"), "1"])
def test_a_radius_is_positive(radius):
    with pytest.raises((ValueError, TypeError)):
        TrustRegion(nn.Linear(2, 1), CE, radius=radius)


def test_a_loss_alone_is_not_enough():
    model, x, y = chain(depth=2, width=3)
    with pytest.raises(TypeError, match="SaddleFree"):
        TrustRegion(model, CE).step(lambda: CE(model(x), y))
