"""HessianFree: its products and steps against dense Gauss-Newton matrices by autograd."""

import pytest
import torch
from torch import nn

from linop_hess.optim import GaussNewton, HessianFree, JustConvex
from linop_hess.optim.quadratic.products import ProductModel
from linop_hess.optim.record import Tally
from tests.optim.problems import chain

CE = nn.CrossEntropyLoss()


def dense_gauss_newton(model, x, y):
    """JᵀMJ with J and M by single and double backward, entry by entry."""
    parameters, output = list(model.parameters()), model(x)
    rows = [torch.autograd.grad(z, parameters, retain_graph=True) for z in output.reshape(-1)]
    J = torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])
    M = torch.autograd.functional.hessian(lambda z: CE(z, y), output.detach())
    return J.T @ M.reshape(output.numel(), output.numel()) @ J


def model_of(opt, x, y, tally=None):
    return ProductModel(*opt._objective(x, y).gauss_newton(), tally or Tally())


def test_products_are_those_of_the_dense_matrix_and_stay_those_of_the_point():
    model, x, y = chain()
    G = dense_gauss_newton(model, x, y)
    g = torch.cat([p.reshape(-1) for p in torch.autograd.grad(CE(model(x), y), list(model.parameters()))])
    products = model_of(HessianFree(model, CE), x, y)
    v = torch.randn(len(g), dtype=torch.float64)
    norm = float(torch.linalg.matrix_norm(G, 2))
    assert float((products.gradient - g).norm()) <= 1e-14 * float(g.norm())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)  # as trial points do
    assert float((products.product(v[:, None])[:, 0] - G @ v).norm()) <= 1e-13 * norm * float(v.norm())
    assert products.change(v) == pytest.approx(float(g @ v + v @ G @ v / 2), rel=1e-12)
    assert 0.5 * norm <= products.norm() <= norm * (1 + 1e-12)


def test_a_step_solves_the_damped_system_where_cg_runs_on():
    model, x, y = chain()
    G = dense_gauss_newton(model, x, y)
    opt = HessianFree(model, CE, damping=0.5, iterations=400, tolerance=1e-15)
    tally = Tally()
    local = opt._local_model(opt._objective(x, y), tally)
    step, promised = local.propose(0.5)
    g = local.curvature.gradient
    exact = -torch.linalg.solve(G + 0.5 * torch.eye(len(g), dtype=torch.float64), g)
    assert float((step - exact).norm()) <= 1e-7 * float(exact.norm())
    assert promised == pytest.approx(float(g @ step + step @ G @ step / 2), rel=1e-9)
    again, _ = local.propose(0.5)  # from the last step, which is not forgotten
    assert float((again - exact).norm()) <= 1e-7 * float(exact.norm()) and tally.products > 10


def test_what_products_do_not_tell_is_refused():
    model, x, y = chain()
    with pytest.raises(TypeError, match="inertia"):
        HessianFree(model, CE, damping=JustConvex()).step(x, y)
    with pytest.raises(TypeError, match="Gauss-Newton"):
        HessianFree(model, CE).step(lambda: CE(model(x), y))
    with pytest.raises(TypeError, match="takes the parameters too"):
        HessianFree(model, lambda z, t, params: CE(z, t)).step(x, y)
    with pytest.raises(ValueError, match="tolerance"):
        HessianFree(model, CE, tolerance=0.0)

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner(x), x

    pair = Pair()
    with pytest.raises(TypeError, match="one tensor"):
        HessianFree(pair, lambda z, t: CE(z[0], t)).step(x, y)


def test_a_closure_of_two_is_as_good_as_a_batch():
    model, x, y = chain()
    twin = chain()[0]
    one, other = HessianFree(model, CE), HessianFree(twin, CE)
    for _ in range(3):
        one.step(x, y)
        other.step(lambda: (twin(x), y))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert one.last.method == "cg" and GaussNewton(model, CE).step(x, y) == pytest.approx(one.last.new_loss, rel=1e-14)
