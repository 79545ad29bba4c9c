"""GMRES on dense matrices, against LAPACK."""

import pytest
import torch

from linop_hess.lq.iterative.gmres import cycle, gmres, vectors_nbytes
from tests.lq.sketches import analyses

N = 80
GENERATOR = torch.Generator().manual_seed(0)
Q = torch.linalg.qr(torch.randn(N, N, generator=GENERATOR, dtype=torch.float64)).Q
A = (Q * torch.cat([-torch.logspace(-1, 1, 10), torch.logspace(-2, 1, N - 10)]).double()) @ Q.mT
G = torch.randn(N, 3, generator=GENERATOR, dtype=torch.float64)


def solve(M, tolerance, most=300, g=G):
    sizes = torch.linalg.vector_norm(g, dim=0)
    return gmres(lambda X: A @ X, M, g, lambda x: tolerance * (10.0 * x + sizes), most)


@pytest.mark.parametrize("tolerance", [1e-6, 1e-14])
def test_every_column(tolerance):
    found = solve(lambda X: X, tolerance)
    r = torch.linalg.vector_norm(G - A @ found.x, dim=0)
    assert found.reached and found.iterations <= 2 * N
    assert bool((r <= tolerance * (10.0 * found.x.norm(dim=0) + G.norm(dim=0))).all())


def test_a_preconditioner_in_single_precision_costs_no_digits():
    inverse = torch.linalg.inv(A).float()
    found = solve(lambda X: inverse @ X.float(), 1e-15)
    assert found.reached and found.iterations <= 12
    assert float((A @ found.x - G).norm()) <= 1e-13 * float(found.x.norm())


def test_it_gives_up():
    singular = torch.zeros(N, N, dtype=torch.float64)
    singular[0, 0] = 1.0
    found = gmres(lambda X: singular @ X, lambda X: X, G, lambda x: 1e-8 * torch.ones(3).double(), 200)
    assert not found.reached and bool(torch.isfinite(found.x).all())
    assert not solve(lambda X: X, 1e-14, most=5).reached


def test_zero():
    found = solve(lambda X: X, 1e-14, g=torch.cat([G[:, :1], torch.zeros(N, 1).double()], 1))
    assert found.reached and not found.x[:, 1].any()


def test_memory_is_bounded():
    problem = analyses()[0].problem
    assert vectors_nbytes(problem, 1) < vectors_nbytes(problem, 8) <= vectors_nbytes(problem, 1 << 40)


def test_a_cycle_solves_each_column_by_itself():
    generator = torch.Generator().manual_seed(0)
    K = torch.randn(30, 30, generator=generator, dtype=torch.float64)
    K = K + K.T + 20 * torch.eye(30, dtype=torch.float64)
    g = torch.randn(30, 3, generator=generator, dtype=torch.float64) * torch.tensor(
        [1.0, 1e-100, 0.0], dtype=torch.float64
    )
    calls = []

    def product(x):
        calls.append(x.shape[1])
        return K @ x

    approximate = torch.linalg.inv(K + 1e-4 * torch.diag(torch.arange(30.0)))
    enough = 1e-7 * torch.linalg.vector_norm(g, dim=0)
    x, steps = cycle(product, lambda v: approximate @ v, g, torch.zeros_like(g), lambda sizes: enough, 20)
    gap = torch.linalg.vector_norm(K @ x - g, dim=0)
    assert bool((gap <= 2e-7 * torch.linalg.vector_norm(g, dim=0)).all()) and not bool(x[:, 2].any())
    assert len(calls) == steps <= 4 and set(calls) == {3}
