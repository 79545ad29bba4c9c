"""|H| by quadrature and by subspaces, against dense eigendecompositions."""

import numpy as np
import pytest
import torch
from torch import nn

import linop_hess as lh
from linop_hess.optim.absolute import inverse_absolute, krylov_subspace, quadrature, rational_subspace
from tests.optim.problems import chain, dense_hessian


@pytest.fixture(scope="module")
def indefinite():
    model, x, y = chain()
    loss_fn = nn.CrossEntropyLoss()
    H = torch.from_numpy(dense_hessian(model, loss_fn, x, y))
    values, vectors = torch.linalg.eigh(H)
    assert float(values[0]) < -1e-2 * float(values[-1])
    return lh.linearize(model, loss_fn, x, y), H, values, vectors


# Poles that reach 1e-8 of (λ² + 1)^(−½), relatively, over [0, ratio].
@pytest.mark.parametrize(("ratio", "poles"), [(1e1, 8), (1e2, 13), (1e3, 17), (1e4, 22), (1e6, 32)])
def test_poles_for_eight_digits(ratio, poles):
    sigma, weights = quadrature(ratio, poles)
    values = np.concatenate([[0.0], np.geomspace(1e-3, ratio, 5000)])
    found = (weights / (values[:, None] ** 2 + sigma**2)).sum(1)
    assert abs(found * np.sqrt(values**2 + 1) - 1).max() <= 1e-8 and (sigma >= 1).all() and (weights > 0).all()


def test_quadrature_against_the_dense_matrix(indefinite):
    """‖H‖/δ = 1e4 with 24 poles: 1e-8."""
    lin, H, values, vectors = indefinite
    delta = float(values.abs().max()) / 1e4
    g = torch.stack([lin.gradient_tensor, torch.randn(len(H), dtype=torch.float64)], 1)
    found = inverse_absolute(lin, delta, g, tolerance=1e-12)
    expected = vectors @ ((vectors.T @ g) / (values**2 + delta**2).sqrt()[:, None])
    assert float((found - expected).norm()) <= 1e-8 * float(expected.norm())


def test_steps_of_subspaces_that_are_the_whole_space(indefinite):
    lin, H, values, vectors = indefinite
    g = lin.gradient_tensor
    for damping in (1e-2, 1.0):
        K = torch.linalg.inv(H + 1j * damping * torch.eye(len(H)))
        product, solve = (lambda V: H @ V), (lambda z, K=K: K @ z)
        expected = -vectors @ ((vectors.T @ g) / (values.abs() + damping))
        spaces = [(krylov_subspace(product, g, len(g)), 1e-6)]
        if (
            damping == 1.0
        ):  # solves from solves come to lie along one direction, so that one pole does not span everything
            spaces.append((rational_subspace([solve], product, g, 20), 1e-3))
        for space, bound in spaces:
            step, promised = space.step(damping)
            assert float((step - expected).norm()) <= bound * float(expected.norm())
            assert promised < 0 and abs(promised - float(g @ step + 0.5 * step @ H @ step)) <= 1e-10 * abs(promised)
            identity = space.basis.T @ space.basis
            assert torch.allclose(identity, torch.eye(len(identity), dtype=torch.float64), rtol=0, atol=1e-12)


def test_few_solves_say_more_than_many_products(indefinite):
    lin, H, values, vectors = indefinite
    g, damping = lin.gradient_tensor, 1e-3 * float(values.abs().max())
    solver = lh.lq.Solver(lin.analysis, 1j * damping)
    expected = -vectors @ ((vectors.T @ g) / (values.abs() + damping))
    product = lin.problem.hessian_product
    rational = rational_subspace([lambda z: solver.solve(z).x], product, g, 5).step(damping)[0]
    lanczos = krylov_subspace(product, g, 11).step(damping)[0]
    assert float((rational - expected).norm()) < 0.5 * float((lanczos - expected).norm())


def test_bad_input(indefinite):
    lin = indefinite[0]
    for delta in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError):
            inverse_absolute(lin, delta, lin.gradient_tensor)
    with pytest.raises(ValueError, match="at least 1"):
        quadrature(10.0, 0)
    with pytest.raises(ValueError, match="positive"):
        quadrature(0.0, 4)
    with pytest.raises(ValueError, match="shape"):
        inverse_absolute(lin, 1.0, lin.gradient_tensor[1:], poles=2)
