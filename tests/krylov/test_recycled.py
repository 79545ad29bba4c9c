"""Flexible GMRES with a recycled space, and blocks of right-hand sides."""

import numpy as np
import pytest
import scipy.sparse.linalg as spla

from linop_hess import krylov

N = 120
RNG = np.random.default_rng(0)
VALUES = np.r_[-np.geomspace(1e-2, 3.0, 20), np.geomspace(1e-2, 1.0, N - 20)]
Q = np.linalg.qr(RNG.standard_normal((N, N)))[0]
A = (Q * VALUES) @ Q.T
B = RNG.standard_normal((N, 4))


def true_residual(A, x, b):
    return np.linalg.norm(b - A @ x) / np.linalg.norm(b)


@pytest.mark.parametrize("restart", [30, 60])
def test_gcrotmk_is_judged_by_the_true_residual(restart):
    record = krylov.run("gcrotmk", A, B[:, 0], rtol=1e-10, restart=restart, maxiter=300)
    assert record.converged and record.residual == pytest.approx(true_residual(A, record.x, B[:, 0]), rel=1e-6)
    assert record.residuals[0] == 1.0 and len(record.residuals) == record.iterations + 1
    np.testing.assert_allclose(record.x, np.linalg.solve(A, B[:, 0]), rtol=0, atol=1e-7 * np.abs(record.x).max())


def test_the_preconditioner_may_change():
    """An inner solve of a loose tolerance is no fixed M: gcrotmk converges, and says so by b − Ax."""
    inner = spla.LinearOperator(A.shape, matvec=lambda v: spla.gmres(A, v, rtol=0.3, restart=N)[0], dtype=float)
    record = krylov.run("gcrotmk", A, B[:, 0], M=inner, rtol=1e-10, maxiter=100)
    assert record.converged and true_residual(A, record.x, B[:, 0]) <= 1.1e-10


def test_a_block_shares_its_space():
    """Where few eigenvalues keep a solve from ending, later ones need not find them again."""
    few = (Q * np.r_[-np.geomspace(1e-3, 1e-1, 8), np.linspace(1.0, 2.0, N - 8)]) @ Q.T
    options = {"rtol": 1e-8, "restart": 6, "maxiter": 300}  # a direction a cycle is kept
    alone = sum(krylov.run("gcrotmk", few, b, **options).products_A for b in B.T)
    space = krylov.RecycledSpace(40)
    records = krylov.run_block("gcrotmk", few, B, recycled=space, **options)
    assert all(record.converged for record in records) and records[2].name == "gcrotmk, column 2"
    assert sum(record.products_A for record in records) < 0.8 * alone
    assert 0 < len(space) <= 41 and space.nbytes > 0 and str(len(space)) in repr(space)
    X = np.column_stack([record.x for record in records])
    assert np.linalg.norm(few @ X - B) <= 1.1e-8 * np.linalg.norm(B)


def test_a_space_for_another_damping():
    space = krylov.RecycledSpace(60)
    krylov.run("gcrotmk", A, B[:, 0], recycled=space, rtol=1e-10, restart=60, maxiter=300)
    other = A + 1e-3 * np.eye(N)
    fresh = krylov.run("gcrotmk", other, B[:, 0], rtol=1e-10, restart=20, maxiter=400)
    moved = space.for_other(other)
    again = krylov.run("gcrotmk", other, B[:, 0], recycled=moved, rtol=1e-10, restart=20, maxiter=400)
    assert again.converged and true_residual(other, again.x, B[:, 0]) <= 1.1e-10
    assert again.products_A < fresh.products_A


def test_bad_input():
    space = krylov.RecycledSpace(3)
    with pytest.raises(ValueError, match="expected no recycled space for gmres"):
        krylov.run("gmres", A, B[:, 0], recycled=space)
    krylov.run("gcrotmk", A, B[:, 0], recycled=space, maxiter=2)
    with pytest.raises(ValueError, match="vectors of length 5"):
        krylov.run("gcrotmk", np.eye(5), np.ones(5), recycled=space)
    with pytest.raises(ValueError, match="expected A of shape"):
        space.for_other(np.eye(5))
    for size in (0, 1.5):
        with pytest.raises((ValueError, TypeError), match="size"):
            krylov.RecycledSpace(size)
    with pytest.raises(ValueError, match=r"expected a block of right-hand sides of shape \(120, k\)"):
        krylov.run_block("gmres", A, B[:, 0])
    with pytest.raises(ValueError, match="expected no inner_m for gcrotmk"):
        krylov.run("gcrotmk", A, B[:, 0], inner_m=3)


def test_a_block_by_any_solver():
    records = krylov.run_block("gmres", A, B, rtol=1e-8, restart=N, maxiter=N, name="plain")
    assert [record.name for record in records] == [f"plain, column {j}" for j in range(4)]
    assert all(record.converged for record in records)
