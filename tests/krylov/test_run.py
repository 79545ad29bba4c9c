"""Krylov runs against LAPACK and SciPy called bare, and what they say of how they ended."""

import json

import numpy as np
import pytest
from scipy.sparse.linalg import LinearOperator

from linop_hess import krylov
from tests.krylov.systems import INDEFINITE, SPD, B, N, true_residual


def nan_in(v):
    v = v.copy()
    v[3] = np.nan
    return v


@pytest.mark.parametrize("solver", krylov.SOLVERS)
@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("start", [False, True])
def test_every_solver_reaches_lapacks_solution(solver, preconditioned, start):
    M = np.diag(1 / np.diag(SPD)) if preconditioned else None
    x0 = np.random.default_rng(2).standard_normal(N) if start else None
    record = krylov.run(solver, SPD, B, M=M, x0=x0, rtol=1e-10)
    assert np.allclose(record.x, np.linalg.solve(SPD, B), rtol=0, atol=1e-7)
    assert len(record.residuals) == record.iterations + 1
    assert record.residuals[0] == pytest.approx(1.0 if x0 is None else true_residual(SPD, x0))
    assert record.residual == pytest.approx(true_residual(SPD, record.x), rel=1e-3, abs=1e-15)
    assert record.converged == (true_residual(SPD, record.x) <= 1.1e-10)
    assert (record.products_M > 0) == preconditioned


def test_scipys_success_is_not_believed():
    # An eigenvalue of 1e-9 whose eigenvector carries most of b: minres's test on ||A|| ||x|| passes early.
    A = np.diag(np.r_[1e-9, np.linspace(1, 2, N - 1)])
    b = np.r_[1.0, np.full(N - 1, 0.1)]
    record = krylov.run("minres", A, b, rtol=1e-4)
    assert record.info == 0
    assert true_residual(A, record.x, b) > 0.5
    assert not record.converged
    assert record.status.startswith("SciPy reports success but the true residual is 8")


def test_minres_refuses_an_indefinite_preconditioner_in_words():
    b = np.ones(N)
    M = np.diag(np.r_[-np.ones(N - 5), np.ones(5)])
    record = krylov.run("minres", SPD, b, M=M)
    assert record.status.startswith("indefinite preconditioner")
    assert (record.info, record.iterations, record.converged) == (None, 0, False)
    # Caught only later, when the first quadratic form happens to be positive.
    record = krylov.run("minres", SPD, np.r_[np.full(N - 5, 0.01), np.ones(5)], M=M)
    assert record.status.startswith("indefinite preconditioner")
    assert record.residual == pytest.approx(true_residual(SPD, record.x, np.r_[np.full(N - 5, 0.01), np.ones(5)]))


def test_cg_with_an_indefinite_preconditioner_is_reported():
    M = np.diag(np.r_[-np.ones(N - 5), np.ones(5)])
    record = krylov.run("cg", SPD, B, M=M, maxiter=15)
    assert record.negative_curvature_M > 0
    assert "indefinite" in record.status
    # The exact inverse of an indefinite matrix: cg arrives in one step, and is told on all the same.
    w, V = np.linalg.eigh(INDEFINITE)
    record = krylov.run("cg", INDEFINITE, V[:, 0] + 0.1 * V[:, -1], M=np.linalg.inv(INDEFINITE))
    assert record.converged
    assert record.status == "converged, although M is indefinite"


def test_cg_on_an_indefinite_matrix_says_so():
    record = krylov.run("cg", INDEFINITE, B, maxiter=10)
    assert not record.converged
    assert record.negative_curvature > 0
    assert "A is indefinite" in record.status


def test_stall_and_limit_are_told_apart():
    # A cyclic shift: gmres makes no progress at all before iteration N.
    shift = np.roll(np.eye(N), 1, axis=0)
    record = krylov.run("gmres", shift, np.eye(N)[0], maxiter=N - 1, restart=N - 1)
    assert record.residuals == pytest.approx(np.ones(N))
    assert record.status == "stalled at 1.0e+00"
    record = krylov.run("cg", SPD, B, rtol=1e-12, maxiter=10)
    assert record.status.startswith("iteration limit reached")
    assert krylov.run("gmres", shift, np.eye(N)[0], restart=N).residual < 1e-14


def test_bicgstab_breakdown():
    rotation = np.array([[0.0, 1.0], [-1.0, 0.0]])
    record = krylov.run("bicgstab", rotation, np.array([1.0, 0.0]))
    assert record.info < 0
    assert record.status.startswith("breakdown")


@pytest.mark.parametrize("solver", krylov.SOLVERS)
@pytest.mark.parametrize("where", ["A", "M"])
def test_nan_from_an_operator_is_a_breakdown(solver, where):
    calls = 0

    def fails_later(v):
        nonlocal calls
        calls += 1
        return SPD @ v if calls < 4 else np.full(N, np.nan)

    bad = LinearOperator((N, N), matvec=fails_later, dtype=float)
    record = krylov.run(solver, bad if where == "A" else SPD, B, M=bad if where == "M" else None, rtol=1e-14)
    assert record.status.startswith("breakdown")
    assert not record.converged
    json.dumps(record.as_dict(), allow_nan=False)


def test_an_operators_own_error_is_passed_on():
    def broken(v):
        raise ValueError("indefinite preconditioner")

    with pytest.raises(ValueError, match="indefinite preconditioner"):
        krylov.run("gmres", LinearOperator((N, N), matvec=broken, dtype=float), B)


def test_zero_right_hand_side():
    for solver in krylov.SOLVERS:
        record = krylov.run(solver, SPD, np.zeros(N))
        assert record.converged
        assert not record.x.any()


def test_inputs_are_left_alone():
    b, x0 = B.copy(), np.ones(N)
    for solver in krylov.SOLVERS:
        krylov.run(solver, SPD, b, x0=x0)
    assert np.array_equal(b, B)
    assert np.array_equal(x0, np.ones(N))


def test_float32_and_integer_right_hand_sides():
    record = krylov.run("cg", SPD.astype(np.float32), B.astype(np.float32), rtol=1e-5)
    assert record.x.dtype == np.float32
    assert record.converged
    record = krylov.run("cg", np.diag([1, 2, 4]), np.array([1, 2, 4]))
    assert record.x == pytest.approx(np.ones(3))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"solver": "sor"}, ValueError, "cg, minres, gmres, lgmres, bicgstab"),
        ({"b": np.ones(N + 1)}, ValueError, r"\(40,\)"),
        ({"b": np.ones((N, 2))}, ValueError, r"\(40, 2\)"),
        ({"b": nan_in(B)}, ValueError, "1 NaN or Inf"),
        ({"b": B + 1j}, TypeError, "complex"),
        ({"A": SPD[:, :-1]}, ValueError, "square A"),
        ({"A": SPD + 1j}, TypeError, "complex"),
        ({"M": np.eye(N - 1)}, ValueError, r"\(39, 39\)"),
        ({"M": 1j * np.eye(N)}, TypeError, "real M"),
        ({"x0": np.ones(3)}, ValueError, "x0"),
        ({"x0": nan_in(B)}, ValueError, "finite x0"),
        ({"rtol": 0.0}, ValueError, "rtol"),
        ({"rtol": -1.0}, ValueError, "rtol"),
        ({"rtol": np.nan}, ValueError, "rtol"),
        ({"maxiter": 0}, ValueError, "maxiter"),
        ({"maxiter": 2.5}, TypeError, "integer"),
        ({"restart": 5}, ValueError, "gmres"),
        ({"inner_m": 5}, ValueError, "lgmres"),
        ({"solver": "gmres", "restart": 0}, ValueError, "restart"),
    ],
)
def test_bad_input(change, error, words):
    arguments = {"solver": "cg", "A": SPD, "b": B} | change
    with pytest.raises(error, match=words):
        krylov.run(**arguments)


def test_direct_is_judged_by_the_given_matrix():
    record = krylov.direct(lambda b: np.linalg.solve(SPD, b), SPD, B, name="LU", setup_seconds=1.5, memory=7)
    assert record.converged
    assert (record.solver, record.iterations, record.products_A) == ("direct", 0, 0)
    assert (record.setup_seconds, record.memory) == (1.5, 7)
    wrong = krylov.direct(lambda b: 1.5 * np.linalg.solve(SPD, b), SPD, B)
    assert wrong.residual == pytest.approx(0.5)
    assert not wrong.converged
    assert "5.0e-01" in wrong.status
    with pytest.raises(ValueError, match="shape"):
        krylov.direct(lambda b: b[:-1], SPD, B)
