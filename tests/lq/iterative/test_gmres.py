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
    return gmres(lambda X: A @ X, M, g, lambda of_x, of_g: tolerance * (10.0 * of_x + of_g), most)


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
    found = gmres(lambda X: singular @ X, lambda X: X, G, lambda *_: 1e-8 * torch.ones(3).double(), 200)
    assert not found.reached and bool(torch.isfinite(found.x).all())
    assert not solve(lambda X: X, 1e-14, most=5).reached


@pytest.mark.parametrize("good", [0, 1, 7])
def test_a_preconditioner_that_leaves_the_range_of_its_numbers_ends_it(good):
    calls = []

    def M(X):
        calls.append(X.shape)
        return X if len(calls) <= good else X * float("inf")

    found, alone = solve(M, 1e-14), solve(lambda X: X, 1e-14, most=max(good, 1))
    assert not found.reached and found.iterations == good
    assert torch.equal(found.x, alone.x) if good else not found.x.any()  # what was found before is kept


def test_zero():
    found = solve(lambda X: X, 1e-14, g=torch.cat([G[:, :1], torch.zeros(N, 1).double()], 1))
    assert found.reached and not found.x[:, 1].any()


def test_memory_is_bounded():
    problem = analyses()[0].problem
    assert vectors_nbytes(problem, 1) < vectors_nbytes(problem, 8) <= vectors_nbytes(problem, 1 << 40)


def test_a_cycle_reaches_every_column_whatever_its_size():
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
    assert len(calls) == steps <= 4 and max(calls) == 2  # nothing is spent on a column of zeros


def test_a_block_takes_fewer_products_than_its_columns_alone():
    alone = [solve(lambda X: X, 1e-12, g=column[:, None]).iterations for column in G.mT]
    together = solve(lambda X: X, 1e-12)
    assert together.reached and together.iterations * 3 < 0.75 * sum(alone)


@pytest.mark.parametrize("columns", [2, 70, 150])
def test_columns_that_depend_on_each_other(columns):
    generator = torch.Generator().manual_seed(1)
    g = G[:, :2] @ torch.randn(2, columns, generator=generator, dtype=torch.float64)
    g[:, -1] = g[:, 0]
    g *= torch.logspace(0, -100, columns, dtype=torch.float64)
    blocks = []

    def product(X):
        blocks.append(X.shape[1])
        return A @ X

    found = gmres(product, lambda X: X, g, lambda of_x, of_g: 1e-13 * (10.0 * of_x + of_g), 300)
    exact = torch.linalg.solve(A, g)
    error = torch.linalg.vector_norm(found.x - exact, dim=0) / torch.linalg.vector_norm(exact, dim=0)
    assert found.reached and float(error.max()) < 1e-9  # the condition is 1e3
    residuals = len(blocks) // N + -(-columns // 64)
    assert sum(b > 2 for b in blocks) <= 2 * residuals


def test_more_columns_than_rows():
    g = torch.randn(N, 2 * N, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = solve(lambda X: X, 1e-14, g=g)
    assert found.reached and found.iterations <= 8
    r = torch.linalg.vector_norm(g - A @ found.x, dim=0)
    assert bool((r <= 1e-14 * (10.0 * found.x.norm(dim=0) + g.norm(dim=0))).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_block_that_nearly_depends_on_itself(dtype):
    generator = torch.Generator().manual_seed(3)
    g = (G[:, :1] + 1e-9 * torch.randn(N, 8, generator=generator, dtype=torch.float64)).to(dtype)
    own, tolerance = A.to(dtype), 1e-13 if dtype == torch.float64 else 1e-5
    found = gmres(lambda X: own @ X, lambda X: X, g, lambda of_x, of_g: tolerance * (10.0 * of_x + of_g), 1000)
    r = torch.linalg.vector_norm(g.double() - A @ found.x.double(), dim=0)
    sizes = 10.0 * found.x.double().norm(dim=0) + g.double().norm(dim=0)
    assert found.reached and bool((r <= 2 * tolerance * sizes).all())
