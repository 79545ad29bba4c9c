"""True residuals of every iteration against dense truths: hand-made Krylov spaces, SciPy cut short."""

import time

import numpy as np
import pytest
import scipy.sparse.linalg as spla
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator

from linop_hess import krylov
from tests.krylov.systems import INDEFINITE, SPD, B, N, symmetric, true_residual


@pytest.mark.parametrize("solver", ["cg", "minres", "bicgstab"])
def test_each_residual_is_the_residual_of_that_iterate(solver):
    record = krylov.run(solver, SPD, B, rtol=1e-12, maxiter=12)
    for k in range(1, 12):
        x, _ = getattr(spla, solver)(SPD, B, rtol=1e-12, maxiter=k)
        assert record.residuals[k] == pytest.approx(true_residual(SPD, x), rel=1e-6)


def test_lgmres_iterations_are_its_outer_cycles():
    record = krylov.run("lgmres", INDEFINITE, B, rtol=1e-12, maxiter=6, inner_m=5)
    for k in range(1, record.iterations):
        x, _ = spla.lgmres(INDEFINITE, B, rtol=1e-12, atol=0.0, maxiter=k, inner_m=5)
        assert record.residuals[k] == pytest.approx(true_residual(INDEFINITE, x), rel=1e-6)
    assert record.iterations == 6


@pytest.mark.parametrize("restart", [4, 7, N])
@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("start", [False, True])
def test_gmres_inner_residuals_are_those_of_scipys_iterates_cut_short(restart, preconditioned, start):
    rng = np.random.default_rng(3)
    A = INDEFINITE + 0.3 * rng.standard_normal((N, N))
    M = symmetric(np.linspace(-2, 1, N) + 0.01, seed=4) if preconditioned else None
    x0 = rng.standard_normal(N) if start else None
    record = krylov.run("gmres", A, B, M=M, x0=x0, rtol=1e-12, maxiter=18, restart=restart)
    assert record.iterations == 18
    for k in range(1, 19):
        # SciPy's own iterate after k inner iterations: a run that is not allowed more.
        x, _ = spla.gmres(
            A, B, x0=None if x0 is None else x0.copy(), M=M, rtol=1e-12, restart=restart,
            maxiter=k, callback=lambda _: None, callback_type="legacy",
        )  # fmt: skip
        assert record.residuals[k] == pytest.approx(true_residual(A, x), rel=1e-6)


def test_gmres_without_preconditioner_minimizes_over_the_krylov_space():
    record = krylov.run("gmres", INDEFINITE, B, maxiter=8, restart=8)
    K = np.stack([np.linalg.matrix_power(INDEFINITE, j) @ B for j in range(9)], axis=1)
    for k in range(1, 9):
        y = np.linalg.lstsq(K[:, 1 : k + 1], B, rcond=None)[0]
        assert record.residuals[k] == pytest.approx(
            np.linalg.norm(B - K[:, 1 : k + 1] @ y) / np.linalg.norm(B), rel=1e-6
        )


def test_products_are_counted_and_measuring_is_not():
    total = 0

    def matvec(v):
        nonlocal total
        total += 1
        return SPD @ v

    A = LinearOperator((N, N), matvec=matvec, dtype=float)
    M = np.diag(1 / np.diag(SPD))
    record = krylov.run("cg", A, B, M=M, rtol=1e-10)
    assert record.products_A == record.products_M == record.iterations
    assert total == 2 * record.iterations
    total = 0
    bare = 0

    def count(_):
        nonlocal bare
        bare += 1

    record = krylov.run("minres", A, B, rtol=1e-10)
    spla.minres(SPD, B, rtol=1e-10, callback=count)
    assert record.iterations == bare == record.products_A
    # gmres: one product an inner iteration and one a cycle, none more for the record.
    total = 0
    record = krylov.run("gmres", A, B, rtol=1e-12, maxiter=12, restart=4)
    assert (record.iterations, record.products_A, total) == (12, 15, 15)


def test_the_clock_stands_while_residuals_are_measured():
    calls = 0

    def slow_every_second(v):
        nonlocal calls
        calls += 1
        if calls % 2 == 0:  # cg: the solver's product, then the one of the callback
            time.sleep(0.02)
        return SPD @ v

    A = LinearOperator((N, N), matvec=slow_every_second, dtype=float)
    begin = time.perf_counter()
    record = krylov.run("cg", A, B, rtol=1e-14, maxiter=10)
    wall = time.perf_counter() - begin
    assert wall > 0.2
    assert record.seconds < 0.1


def test_progress_is_told_each_iteration():
    seen = []
    record = krylov.run("minres", SPD, B, progress=seen.append)
    assert seen == list(range(1, record.iterations + 1))


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 8),
    seed=st.integers(0, 10**6),
    solver=st.sampled_from(list(krylov.SOLVERS)),
    preconditioned=st.booleans(),
)
def test_the_last_residual_is_always_that_of_x(n, seed, solver, preconditioned):
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((n, n))
    A = A + A.T
    b = rng.standard_normal(n)
    M = np.diag(rng.uniform(0.1, 1, n)) if preconditioned else None
    record = krylov.run(solver, A, b, M=M, maxiter=20)
    if record.status.startswith("breakdown"):
        return
    x = record.x
    bound = 1e-13 * (1 + np.linalg.norm(A) * np.linalg.norm(x) / np.linalg.norm(b))
    assert abs(record.residual - true_residual(A, x, b)) <= bound
    assert record.converged == (record.residual <= 1.1e-8)
    assert len(record.residuals) == record.iterations + 1
