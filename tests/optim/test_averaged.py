"""The mean of curvatures and its inverse, against dense matrices by double backward."""

import numpy as np
import pytest
import torch
from torch import nn

import linop_hess as lh
from linop_hess.errors import FactorizationError
from linop_hess.optim.quadratic.averaged import AveragedCurvature
from tests.helpers import oracle_hessian
from tests.optim.problems import chain, digits_like

CE = nn.CrossEntropyLoss()


def batches(model):
    x, y = digits_like(24)
    return [lh.linearize(model, CE, x[k::3], y[k::3]) for k in range(3)]


@pytest.mark.parametrize("absolute", [False, True])
def test_the_inverse_of_a_mean(absolute):
    model, _, _ = chain()
    x, y = digits_like(24)
    decay, damping, mean = 0.7, 0.2, None
    averaged = AveragedCurvature(decay, absolute)
    for k, lin in enumerate(batches(model)):
        averaged.add(lin, damping)
        if absolute:
            H = oracle_hessian(model, CE, x[k::3], y[k::3])
        else:
            H = lh.to_dense(lin.gauss_newton())
        mean = H if mean is None else decay * mean + (1 - decay) * H
    g = np.random.default_rng(0).standard_normal(len(mean))
    if absolute:
        values, vectors = np.linalg.eigh(mean)
        assert values[0] < -1e-3 * values[-1]
        truth = vectors @ ((vectors.T @ g) / np.hypot(values, damping))
    else:
        truth = np.linalg.solve(mean + damping * np.eye(len(mean)), g)
    found = averaged(torch.from_numpy(g))
    assert found.dtype == torch.float64
    assert np.linalg.norm(found.numpy() - truth) <= 1e-4 * np.linalg.norm(truth)  # factors are in float32


def test_little_damping_takes_double_precision():
    """Where float32 cannot factor M + λI, float64 does."""
    model, _, _ = chain()
    lin = batches(model)[0]
    G = lh.to_dense(lin.gauss_newton())
    damping = 1e-9 * np.linalg.norm(G, 2)
    averaged = AveragedCurvature(0.5, False)
    averaged.add(lin, damping)
    g = torch.from_numpy(np.random.default_rng(0).standard_normal(len(G)))
    found = averaged(g)
    M = torch.from_numpy(G)
    M.diagonal().add_(damping)
    assert averaged._factors[0].dtype == torch.float64
    assert (M @ found - g).norm() <= 1e-13 * M.norm() * found.norm()


def test_what_cannot_be(monkeypatch):
    model, _, _ = chain()
    averaged = AveragedCurvature(0.5, False)
    with pytest.raises(RuntimeError, match="add one"):
        averaged(torch.zeros(3))
    lin = batches(model)[0]
    with pytest.raises(FactorizationError, match="positive definite"):
        averaged.add(lin, -1e3)
    assert averaged._mean is None  # nothing changed
    monkeypatch.setattr("linop_hess.optim.quadratic.averaged.available_on", lambda device: 1000.0)
    with pytest.raises(MemoryError, match="decay=0.0"):
        averaged.add(lin, 1.0)
