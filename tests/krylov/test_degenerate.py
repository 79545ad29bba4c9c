"""Degenerate systems: whatever becomes of a run, its record tells the true residual of the x it returns."""

import json

import numpy as np
import pytest
from scipy.sparse.linalg import LinearOperator

from linop_hess import krylov
from tests.krylov.systems import INDEFINITE, SPD, B, N, symmetric

SIZES = (1, 4)
DTYPES = (np.float64, np.float32)
MATRICES = {
    "zero": lambda n: np.zeros((n, n)),
    "identity": np.eye,
    "definite": lambda n: symmetric(np.linspace(1, 5, n)),
    "indefinite": lambda n: symmetric(np.linspace(-2, 3, n)),
    "singular": lambda n: symmetric(np.linspace(0, 3, n)),
    "rank one": lambda n: np.ones((n, n)),
    "shift": lambda n: np.roll(np.eye(n), 1, axis=0),
    "nilpotent": lambda n: np.eye(n, k=1),
    "skew": lambda n: np.triu(np.ones((n, n)), 1) - np.tril(np.ones((n, n)), -1),
    "ill-conditioned": lambda n: np.diag(np.logspace(0, -18, n)),
    "small": lambda n: 1e-30 * np.eye(n),
    "large": lambda n: 1e30 * symmetric(np.linspace(1, 5, n)),
}
PRECONDITIONERS = {
    "none": lambda n: None,
    "zero": lambda n: np.zeros((n, n)),
    "negative": lambda n: -np.eye(n),
    "singular": lambda n: np.diag(np.r_[0.0, np.ones(n - 1)]),
    "indefinite": lambda n: np.diag((-1.0) ** np.arange(n)),
    "returns its operand": lambda n: LinearOperator((n, n), matvec=lambda v: v, dtype=float),
    "NaN": lambda n: np.full((n, n), np.nan),
}


def sides(A, n, dtype):
    """Right-hand sides: zero, random, consistent, a unit vector, and ones of extreme size."""
    rng = np.random.default_rng(n)
    small, large = (1e-310, 1e300) if dtype == np.float64 else (1e-40, 1e37)
    random = rng.standard_normal(n)
    return [np.zeros(n), random, A @ random, np.eye(n)[0], small * random, large * random, small**0.6 * random]


def exact_residual(A, x, b):
    """Residual and size of what it is summed from, in extended precision, relative to b."""
    A, x, b = (a.astype(np.longdouble) for a in (A, x, b))
    scale = np.sqrt((b**2).sum()) or 1.0
    sums = np.abs(A) @ np.abs(x) + np.abs(b)
    return np.sqrt(((b - A @ x) ** 2).sum()) / scale, np.sqrt((sums**2).sum()) / scale


def check(record, A, b, allowed):
    assert len(record.residuals) == record.iterations + 1
    json.dumps(record.as_dict(), allow_nan=False)
    if not np.isfinite(record.x).all():
        assert np.isnan(record.residual) and not record.converged
        assert "exceeds the range" in record.status
        return
    truth, size = exact_residual(A, record.x, b)
    # A product with denormal numbers is not right to more than the smallest of them.
    rounding = 30 * np.finfo(A.dtype).eps * size + 1e-3 * truth
    if record.residual < np.inf:
        assert abs(record.residual - truth) <= rounding, record
    assert record.converged == (record.residual <= 1.1 * allowed and record.status.startswith("converged"))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("solver", krylov.SOLVERS)
def test_the_residual_is_that_of_x(solver, matrix, dtype):
    turn = list(MATRICES).index(matrix)
    for n in SIZES:
        A = MATRICES[matrix](n).astype(dtype)
        for i, b in enumerate(sides(A.astype(float), n, dtype)):
            b = b.astype(dtype)
            size = float(exact_residual(A, np.zeros(n, dtype), b)[1]) and np.linalg.norm(b.astype(np.longdouble))
            for j, M in enumerate(PRECONDITIONERS.values()):
                if (i + j + turn) % (
                    3 if dtype == DTYPES[0] else 7
                ):  # each with some right-hand sides, all pairs among the matrices
                    continue
                starts = [None, np.zeros(n)]
                if not b.any() or 1e-3 < size < 1e3:
                    starts += [np.ones(n), np.linalg.lstsq(A.astype(float), b.astype(float), rcond=None)[0]]
                for k, x0 in enumerate(starts):
                    # Cut short every second time, from each start with half of the right-hand sides and preconditioners.
                    options = ({"maxiter": 20}, {"maxiter": 1, "atol": 1e-3})[(i + (i + j + turn) // 7 + k + n) % 2]
                    start = None if x0 is None else x0.astype(dtype)
                    record = krylov.run(solver, A, b, M=M(n), x0=start, **options)
                    with np.errstate(over="ignore"):
                        allowed = max(1e-8, float(np.longdouble(options.get("atol", 0.0)) / (size or 1.0)))
                    check(record, A, b, allowed)


@pytest.mark.parametrize("solver", krylov.SOLVERS)
def test_an_exact_start_takes_no_iterations(solver):
    x = np.arange(1.0, N + 1)
    record = krylov.run(solver, np.diag(np.full(N, 2.0)), 2 * x, x0=x)
    assert (record.iterations, record.converged, record.residual) == (0, True, 0.0)
    assert np.array_equal(record.x, x)


@pytest.mark.parametrize("solver", krylov.SOLVERS)
def test_a_zero_right_hand_side_from_elsewhere(solver):
    """SciPy answers zero before it iterates."""
    record = krylov.run(solver, SPD, np.zeros(N), x0=np.ones(N))
    assert not record.x.any()
    assert record.residual == 0.0 and record.converged and len(record.residuals) == record.iterations + 1


@pytest.mark.parametrize("solver", krylov.SOLVERS)
def test_nothing_to_solve(solver):
    record = krylov.run(solver, np.zeros((0, 0)), np.zeros(0))
    assert record.converged and record.x.shape == (0,)


@pytest.mark.parametrize("solver", krylov.SOLVERS)
@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1e170, 1e300])
def test_the_size_of_b_does_not_matter(solver, scale):
    """To the last digit, by a power of two; SciPy's own norms would be 0 or Inf."""
    power = 2.0 ** round(np.log2(scale))
    one, other = (krylov.run(solver, SPD, factor * B) for factor in (1.0, power))
    assert np.array_equal(other.x, power * one.x)
    assert np.array_equal(other.residuals, one.residuals)
    assert (other.converged, other.status, other.iterations) == (one.converged, one.status, one.iterations)


@pytest.mark.parametrize("solver", krylov.SOLVERS)
def test_a_solution_beyond_the_range(solver):
    record = krylov.run(solver, 1e-5 * np.eye(N), np.full(N, 1e306))
    assert not record.converged and record.status == "the solution exceeds the range of float64: scale b down"
    assert np.isnan(record.residual)
    json.dumps(record.as_dict(), allow_nan=False)


@pytest.mark.parametrize("solver", krylov.SOLVERS)
def test_atol_is_scipys(solver):
    size = float(np.linalg.norm(B))
    strict = krylov.run(solver, SPD, B, rtol=1e-10)
    loose = krylov.run(solver, SPD, B, rtol=1e-10, atol=1e-2 * size)
    # What these two call iterations are cycles of several products.
    assert loose.converged and (loose.iterations < strict.iterations or solver in ("lgmres", "gcrotmk"))
    assert 1e-9 < loose.residual <= 1.1e-2 or solver == "lgmres"
    assert np.array_equal(krylov.run(solver, SPD, B, rtol=1e-10, atol=1e-13).x, strict.x)
    start = krylov.run(solver, SPD, B, atol=2 * size)
    assert (start.iterations, start.converged) == (0, True) and not start.x.any()
    with pytest.raises(ValueError, match="atol of at least zero"):
        krylov.run(solver, SPD, B, atol=-1.0)
    with pytest.raises(TypeError, match="atol"):
        krylov.run(solver, SPD, B, atol=None)


def test_atol_of_a_direct_solve():
    wrong = np.linalg.solve(SPD, B) * (1 + 1e-4)
    assert krylov.direct(lambda _: wrong, SPD, B, atol=1.0).converged
    assert not krylov.direct(lambda _: wrong, SPD, B, atol=1e-6).converged
    huge = krylov.direct(lambda b: np.linalg.solve(SPD, b), SPD, 1e300 * B)
    assert huge.converged and huge.residual < 1e-14


@pytest.mark.parametrize("solver", krylov.SOLVERS)
def test_a_callback_that_raises_ends_the_run(solver):
    def progress(done):
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        krylov.run(solver, SPD, B, progress=progress)


@pytest.mark.parametrize("solver", krylov.SOLVERS)
@pytest.mark.parametrize("where", ["A", "M"])
@pytest.mark.parametrize(
    "error", [ValueError("non-symmetric matrix"), RuntimeError("zero vector"), ZeroDivisionError()]
)
def test_an_operators_own_error_is_never_taken_for_scipys(solver, where, error):
    def broken(v):
        raise error

    bad = LinearOperator((N, N), matvec=broken, dtype=float)
    with pytest.raises(type(error)) as caught:
        krylov.run(solver, bad if where == "A" else SPD, B, M=bad if where == "M" else SPD)
    assert caught.value is error


@pytest.mark.parametrize("solver", krylov.SOLVERS)
def test_operators_that_return_their_operand_or_one_buffer(solver):
    buffer = np.empty(N)

    def product(v):
        buffer[:] = INDEFINITE @ v
        return buffer

    A = LinearOperator((N, N), matvec=product, dtype=float)
    assert np.array_equal(krylov.run(solver, A, B, maxiter=20).x, krylov.run(solver, INDEFINITE, B, maxiter=20).x)
    same = LinearOperator((N, N), matvec=lambda v: v, dtype=float)
    assert np.array_equal(krylov.run(solver, SPD, B, M=same).x, krylov.run(solver, SPD, B, M=np.eye(N)).x)
    assert np.allclose(krylov.run(solver, same, B).x, B)


def test_progress_is_a_switch_or_a_callable(capsys):
    seen = []
    record = krylov.run("cg", SPD, B, progress=seen.append)
    assert seen == list(range(1, record.iterations + 1))
    for progress in (None, False, True):
        assert np.array_equal(krylov.run("cg", SPD, B, progress=progress).x, record.x)
    assert not capsys.readouterr().err  # no bars in what is no terminal
    with pytest.raises(TypeError, match="bool or callable"):
        krylov.run("cg", SPD, B, progress="yes")
