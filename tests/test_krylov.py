"""Krylov runs against dense truths: LAPACK, hand-made Krylov spaces, SciPy called bare."""

import json
import time

import numpy as np
import pytest
import scipy.sparse.linalg as spla
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator, aslinearoperator

from linop_hess import krylov

N = 40


def symmetric(eigenvalues, seed=0):
    """Return a symmetric matrix with these eigenvalues and random eigenvectors."""
    rng = np.random.default_rng(seed)
    Q, _ = np.linalg.qr(rng.standard_normal((len(eigenvalues),) * 2))
    A = (Q * eigenvalues) @ Q.T
    return (A + A.T) / 2


SPD = symmetric(np.linspace(1, 10, N))
INDEFINITE = symmetric(np.linspace(-3, 4, N))
B = np.random.default_rng(1).standard_normal(N)


def true_residual(A, x, b=B):
    return np.linalg.norm(b - A @ x) / np.linalg.norm(b)


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


def nan_in(v):
    v = v.copy()
    v[3] = np.nan
    return v


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


def test_compare_tabulates_records_and_callables():
    done = krylov.run("cg", SPD, B)
    table = krylov.compare(
        {
            "CG": done,
            "MINRES | M": lambda: krylov.run("minres", SPD, B, M=np.linalg.inv(SPD), setup_seconds=0.25),
            "LU": lambda: krylov.direct(lambda b: np.linalg.solve(SPD, b), SPD, B, memory=12800),
        }
    )
    assert [r.name for r in table.records] == ["CG", "MINRES | M", "LU"]
    assert done.name == "cg"
    rows = table.rows()
    assert rows[0]["iterations"] == done.iterations
    assert rows[1]["setup_seconds"] == 0.25
    json.dumps(rows, allow_nan=False)
    lines = str(table).splitlines()
    assert len(lines) == 5
    where = lines[0].index("true residual") + len("true residual")
    assert all(line[where - 1] != " " and line[where] == " " for line in lines[2:])
    assert "12.5 KiB" in lines[4]
    markdown = table.to_markdown().splitlines()
    assert markdown[0].startswith("| method |")
    assert r"MINRES \| M" in markdown[3]
    assert table["LU"].memory == 12800
    with pytest.raises(KeyError, match="'CG'"):
        table["nothing"]


def test_compare_rejects_what_is_no_run():
    with pytest.raises(ValueError, match="at least one"):
        krylov.compare({})
    with pytest.raises(TypeError, match="'x'.*float"):
        krylov.compare({"x": 1.0})
    with pytest.raises(TypeError, match="'x'.*NoneType"):
        krylov.compare({"x": lambda: None})


def test_as_dict_is_json_and_complete():
    record = krylov.run("gmres", aslinearoperator(SPD), B, maxiter=3)
    plain = json.loads(json.dumps(record.as_dict(solution=True), allow_nan=False))
    assert plain["x"] == pytest.approx(record.x)
    assert plain["residuals"] == pytest.approx(record.residuals)
    assert plain["backward_error"] is None
    assert "x" not in record.as_dict()
    assert "true residual" in str(record)
