"""Trust-region and cubic steps against a dense eigendecomposition."""

from functools import cache

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import nn

import linop_hess as lh
from linop_hess.curvature import ChainCurvature
from linop_hess.lq.analysis import Analysis
from linop_hess.trust_region.certificate import gap_in_region, gap_of_cubic
from tests.lq.problems import random_blocks

EASY, HARD = 125, 25


def dual(H: np.ndarray, g: np.ndarray, length) -> tuple[float, float]:
    """λ of the global minimizer, where ‖s(λ)‖ = length(λ), and −½ gᵀ(H + λI)⁻¹g; in the hard case without the lowest eigenspace.

    Eigenvalues are measured from the edge max(0, −λ_min), so that nothing cancels close to it.
    """
    values, vectors = np.linalg.eigh(H)
    edge = max(0.0, -values[0])
    gamma, above = vectors.T @ g, values + edge
    above[0] = max(0.0, values[0])
    gamma[np.abs(gamma) < 1e-15 * np.linalg.norm(g)] = 0.0

    def excess(move: float) -> float:
        parts = np.divide(gamma, above + move, out=np.zeros_like(gamma), where=gamma != 0)
        return float(np.linalg.norm(parts)) - length(edge + move)

    scale = np.abs(values).max()
    if (edge == 0.0 and excess(0.0) <= 0) or excess(1e-15 * scale) <= 0:
        move = 0.0
    else:
        most = np.linalg.norm(gamma) + 10 * scale
        while excess(most) > 0:
            most *= 4
        move = scipy.optimize.brentq(excess, 1e-15 * scale, most, xtol=1e-300, rtol=1e-14)
    parts = np.divide(gamma**2, above + move, out=np.zeros_like(gamma), where=above + move > 0)
    return edge + move, float(-0.5 * parts.sum())


def optimum_in_region(H: np.ndarray, g: np.ndarray, radius: float) -> float:
    """Least value of the model, by strong duality."""
    lam, value = dual(H, g, lambda _: radius)
    return value - 0.5 * lam * radius**2


def optimum_of_cubic(H: np.ndarray, g: np.ndarray, sigma: float) -> float:
    lam, value = dual(H, g, lambda lam: lam / sigma)
    return value - lam**3 / (6 * sigma**2)


@cache
def chain(seed: int) -> tuple[ChainCurvature, np.ndarray]:
    blocks = random_blocks([3, 2, 3], [4, 2 + seed % 3], seed, with_A="all")
    return ChainCurvature(Analysis(blocks.problem())), blocks.hessian()


def case(index: int) -> tuple[ChainCurvature, np.ndarray, np.ndarray, float]:
    """A curvature, its dense matrix, a gradient and a radius; the last fifth hard, in turn wholly and nearly."""
    rng = np.random.default_rng(index)
    curvature, H = chain(index // 5)
    values, vectors = np.linalg.eigh(H)
    assert values[0] < -1e-3 * values[-1]  # indefinite
    g = rng.standard_normal(len(H))
    radius = 10.0 ** rng.uniform(-3, 3)
    if index >= EASY:
        along = (0.0, 1e-14, 1e-9, 1e-5, 0.0)[index % 5]
        g += (along - vectors[:, 0] @ g) * vectors[:, 0]
        if index % 5 == 4:
            g[:] = 0.0
        rest = np.linalg.norm((vectors[:, 1:].T @ g) / (values[1:] - values[0]))
        radius = (1.0 + rng.uniform(0.01, 3.0)) * (rest or 1.0)  # longer than what g alone gives
    return curvature, H, g, radius


def test_random_problems():
    kinds = []
    for index in range(EASY + HARD):
        curvature, H, g, radius = case(index)
        step = lh.trust_region.solve(curvature, radius, gradient=g)
        s, norm = step.s, np.linalg.norm(H, 2)
        value, best = g @ s + 0.5 * s @ H @ s, optimum_in_region(H, g, radius)
        size = np.linalg.norm(g) * radius + norm * radius**2
        assert step.certificate.holds, (index, str(step))
        assert np.linalg.eigvalsh(H)[0] + step.multiplier >= -1e-12 * norm
        assert np.linalg.norm(s) <= radius * (1 + 1e-10)
        assert abs(value - best) <= 1e-12 * size, (index, value, best)
        assert value - best <= step.certificate.gap + 1e-14 * size
        assert abs(step.decrease + value) <= 1e-13 * size
        kinds.append(step.kind)
    assert kinds[:EASY].count("boundary") > EASY // 2
    exact = [
        index for index in range(EASY, EASY + HARD) if index % 5 in (0, 1, 4)
    ]  # g has no part in the lowest eigenvector
    assert all(kinds[index] == "hard" for index in exact)


@pytest.mark.parametrize("index", [*range(0, EASY, 20), *range(EASY, EASY + HARD, 6)])
def test_cubic(index):
    curvature, H, g, _ = case(index)
    values = np.linalg.eigvalsh(H)
    sigma = 10.0 ** np.random.default_rng(index).uniform(-2, 2)
    if index >= EASY and g.any():  # ‖s‖ = λ/σ at the edge is longer than what g alone gives
        vectors = np.linalg.eigh(H)[1]
        rest = np.linalg.norm((vectors[:, 1:].T @ g) / (values[1:] - values[0]))
        sigma = -values[0] / rest / 1.5
    step = lh.trust_region.cubic(curvature, sigma, gradient=g)
    s = step.s
    value = g @ s + 0.5 * s @ H @ s + sigma / 3 * np.linalg.norm(s) ** 3
    size = np.linalg.norm(g) * step.length + values[-1] * step.length**2
    best = optimum_of_cubic(H, g, sigma)
    assert step.certificate.holds, str(step)
    assert abs(value - best) <= 1e-12 * size
    assert value - best <= step.certificate.gap + 1e-14 * size
    assert values[0] + step.multiplier >= -1e-12 * np.abs(values).max()


def test_bounds_of_the_gap_hold_for_wrong_steps():
    rng = np.random.default_rng(0)
    for index in range(60):
        _, H, g, radius = case(index)
        edge = max(0.0, -np.linalg.eigvalsh(H)[0])
        lam = edge + rng.uniform(0, 1) * edge
        s = -np.linalg.solve(H + lam * np.eye(len(H)) * (1 + 1e-9), g) + 0.1 * rng.standard_normal(len(H))
        s *= min(1.0, radius / np.linalg.norm(s))
        residual = float(np.linalg.norm(g + H @ s + lam * s))
        value = g @ s + 0.5 * s @ H @ s
        assert value - optimum_in_region(H, g, radius) <= gap_in_region(residual, s, lam, radius) * (1 + 1e-12)
        sigma, size = 10.0 ** rng.uniform(-1, 1), np.linalg.norm(s)
        residual = float(np.linalg.norm(g + H @ s + sigma * size * s))
        value += sigma / 3 * size**3
        assert value - optimum_of_cubic(H, g, sigma) <= gap_of_cubic(residual, s, lam, sigma) * (1 + 1e-12)


def network() -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    for layer in model[::2]:
        nn.init.orthogonal_(layer.weight, gain=1.5)
    x = torch.randn(6, 3, dtype=torch.float64)
    return model, torch.cat([x, x[:2]]), torch.randn(8, 2, dtype=torch.float64)


@pytest.mark.parametrize("radius", [1e-4, 0.3, 20.0])
def test_networks_and_their_gauss_newton_matrices(radius):
    lin = lh.linearize(network()[0], nn.functional.mse_loss, *network()[1:])
    for curvature in (lin, lin.H, lin.gauss_newton()):  # the last is singular: fewer outputs than parameters
        H = lh.to_dense(lin.H if curvature is lin else curvature)
        step = lh.trust_region.solve(curvature, radius, gradient=None if curvature is lin else lin.gradient)
        g, s = lin.gradient, step.s
        best = optimum_in_region((H + H.T) / 2, g, radius) if curvature is not lin.gauss_newton() else None
        assert step.certificate.convex, str(step)
        assert step.certificate.stationarity <= 1e-10
        size = np.linalg.norm(g) * radius + np.linalg.norm(H, 2) * radius**2
        if best is not None:
            assert abs(g @ s + 0.5 * s @ H @ s - best) <= 1e-12 * size
        assert step.certificate.gap <= 1e-9 * size


def test_float32_and_what_a_step_shows():
    model, x, y = network()
    lin = lh.linearize(model.float(), nn.functional.mse_loss, x.float(), y.float())
    step = lh.trust_region.solve(lin, 0.5)
    assert step.certificate.holds
    assert "holds" in str(step)
    assert "<table>" in step._repr_html_()
    assert step.factorizations >= 1


def test_bad_input():
    lin = lh.linearize(network()[0], nn.functional.mse_loss, *network()[1:])
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="radius"):
            lh.trust_region.solve(lin, wrong)
    with pytest.raises(ValueError, match="sigma must be positive"):
        lh.trust_region.cubic(lin, 0.0)
    with pytest.raises(TypeError, match="pass gradient="):
        lh.trust_region.solve(lin.H, 1.0)
    with pytest.raises(TypeError, match="linearization"):
        lh.trust_region.solve(np.eye(3), 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gradient"):
        lh.trust_region.solve(lin.H, 1.0, gradient=np.ones(3))
