"""Each example runs with small sizes, and what it finds is right."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def restored_generator():
    with torch.random.fork_rng(devices=[]):
        yield


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tested():
    tested = {"first_steps", "preconditioning", "optimal_control"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested


@pytest.mark.parametrize(("depth", "width", "batch"), [(5, 3, 4), (3, 6, 10), (1, 2, 1)])
def test_first_steps(depth, width, batch):
    found = load("first_steps").main(depth=depth, width=width, batch=batch, damping=1e-2)
    assert found["composed"] < 1e-13
    assert found["built in"] < 1e-13
    assert found["backward error"] <= 1e-14
    assert found["other damping"] <= 1e-14
    for residual in ("residual", "block", "augmented", "tridiagonal"):
        assert found[residual] < 1e-10, residual


def test_preconditioning():
    comparison = load("preconditioning").main(depth=6, width=4, batch=4, maxiter=60)
    for record in comparison:
        # A record's residual is recomputed from its x, and never above the tolerance where it says so.
        assert record.converged == (record.residual <= 1.1e-8)
    assert comparison["exact inverse"].converged
    assert comparison["GMRES, M = exact inverse"].iterations <= 2
    assert comparison["GMRES, M = exact inverse"].converged
    stale, plain = comparison["GMRES, M = inverse before the step"], comparison["GMRES"]
    assert stale.converged and 1 < stale.iterations < 30
    assert not plain.converged and plain.iterations == 60
    assert not comparison["CG"].converged and comparison["CG"].negative_curvature > 0
    assert comparison["CG, M = Gauss-Newton inverse"].negative_curvature_M == 0
    assert comparison["MINRES, M = Gauss-Newton inverse"].negative_curvature_M == 0


@pytest.mark.parametrize("steps", [1, 2, 25])
def test_optimal_control(steps):
    found = load("optimal_control").main(steps=steps, horizon=0.04 * steps)
    for method in ("banded", "riccati", "dense"):
        assert found[f"{method} backward error"] <= 1e-14
        assert found[f"{method} against KKT"] < 1e-8
        assert found[f"{method} against regulator"] < 1e-8


def test_optimal_control_holds_the_pendulum_up():
    found = load("optimal_control").main(steps=40, horizon=2.0)
    assert found["largest angle without control"] > 10
    assert found["largest angle with control"] < 1e-3


def test_pendulum_step_is_the_exact_solution():
    # Without a torque θ'' = kθ: cosh and sinh; and a constant torque u shifts the balance point by u/k.
    k, dt = 9.81, 0.1
    _, _, _, F, G = load("optimal_control").pendulum(dt, stiffness=k)
    root = np.sqrt(k)
    c, s = np.cosh(root * dt), np.sinh(root * dt)
    assert np.allclose(F, [[c, s / root], [root * s, c]], rtol=1e-13)
    assert np.allclose(G[:, 0], [(c - 1) / k, s / root], rtol=1e-13)


def test_pendulum_cost_is_the_integral():
    q, r, k, dt = 10.0, 0.1, 9.81, 0.1
    A, B, C, _, _ = load("optimal_control").pendulum(dt, k, q, r)
    rng = np.random.default_rng(0)
    (theta, omega), u = rng.standard_normal(2), rng.standard_normal()
    t, weights = np.polynomial.legendre.leggauss(20)
    t, weights = (t + 1) * dt / 2, weights * dt / 2
    root = np.sqrt(k)
    path = theta * np.cosh(root * t) + omega * np.sinh(root * t) / root + u * (np.cosh(root * t) - 1) / k
    integral = weights @ (q * path**2 + r * u**2)
    state = np.array([theta, omega])
    assert np.isclose(A[0, 0] * u * u + 2 * u * (B @ state)[0] + state @ C @ state, integral, rtol=1e-12)
