"""What the factors know, against dense eigenvalues, determinants and inverses by LAPACK."""

from functools import cache

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import cg, minres
from torch.nn import functional as f

import linop_hess as lh
from linop_hess.errors import NotPositiveDefiniteError
from linop_hess.lq.accuracy import GROWTH_MODERATE, MULTIPLIER
from linop_hess.lq.inverse import selected
from tests.helpers import make_batch, make_mlp, oracle_hessian
from tests.test_inverse import random_network, right_hand_sides


@pytest.fixture
def no_columns(monkeypatch):
    """As if N were too large to solve for all columns of the inverse."""
    from linop_hess.lq.inverse import entries

    monkeypatch.setattr(entries, "SOLVED_UP_TO", 0)


def inertia_of(eigenvalues):
    return int((eigenvalues < 0).sum()), int((eigenvalues > 0).sum())


@pytest.mark.parametrize("batch_of_seeds", range(4))
def test_random_networks(batch_of_seeds):
    indefinite = 0
    for seed in range(400 + 10 * batch_of_seeds, 406 + 10 * batch_of_seeds):
        model, loss_fn, x, y = random_network(seed)
        lin = lh.linearize(model, loss_fn, x, y)
        H = oracle_hessian(model, loss_fn, x, y)
        eigenvalues = np.linalg.eigvalsh(H)
        for damping in (0.5, 1e-3, 1e-6, 1e-9, -1e-3, -0.02, -1e-10):
            shifted = eigenvalues + damping
            if np.abs(shifted).min() <= 1e-12 * np.abs(eigenvalues).max():
                continue
            inverse = lin.inverse(damping)
            found = inverse.inertia()
            assert (found.negative, found.positive) == inertia_of(shifted) and found.zero == 0, (seed, damping)
            indefinite += found.negative > 0 and found.positive > 0
            assert inverse.is_positive_definite == (shifted[0] > 0)
            sign, logdet = inverse.slogdet()
            # What LAPACK's eigenvalues know: each to N roundings of ‖H‖.
            doubt = 2 * len(H) * np.finfo(float).eps * np.abs(eigenvalues).max() * (1 / np.abs(shifted)).sum()
            assert sign == (-1) ** found.negative
            assert abs(logdet - np.log(np.abs(shifted)).sum()) <= 1e-10 * abs(logdet) + doubt
    assert indefinite >= 9


def test_gauss_newton():
    model, loss_fn, x, y = random_network(3)
    lin = lh.linearize(model, loss_fn, x, y)
    inverse = lin.gauss_newton().inverse(1e-3)
    assert inverse.is_positive_definite
    sign, logdet = np.linalg.slogdet(lh.to_dense(lin.gauss_newton()) + 1e-3 * np.eye(lin.problem.size))
    assert inverse.slogdet()[0] == sign == 1
    np.testing.assert_allclose(inverse.slogdet()[1], logdet, rtol=1e-10)


WIDE = (6, 16, 15, 17, 3)  # by 4 samples wider than what is condensed


@cache
def setting(seed=2, widths=(3, 5, 4, 4, 3), samples=3):
    model = make_mlp(list(widths), seed=seed, gain=1.4)
    x, y = make_batch(widths[0], widths[-1], samples)
    return lh.linearize(model, f.cross_entropy, x, y), oracle_hessian(model, f.cross_entropy, x, y)


@pytest.mark.parametrize("widths", [(3, 5, 4, 4, 3), (3, 20, 20, 3)])
@pytest.mark.parametrize("damping", [1e-2, -1e-2, 1e-4])
def test_positive(widths, damping):
    lin, H = setting(widths=widths)
    K = H + damping * np.eye(len(H))
    assert inertia_of(np.linalg.eigvalsh(K))[0] > 0
    positive = lin.inverse(damping).positive()
    dense = lh.to_dense(positive)
    scale = np.abs(dense).max()
    np.testing.assert_allclose(dense, dense.T, rtol=0, atol=1e-9 * scale)
    assert np.linalg.eigvalsh((dense + dense.T) / 2)[0] > 0
    # (dense K)² = I: the preconditioned matrix has eigenvalues ±1.
    product = dense @ K
    eigenvalues = np.linalg.eigvals(product)
    np.testing.assert_allclose(np.abs(eigenvalues), 1, atol=1e-5)
    g = right_hand_sides(len(H), 1)[:, 0]
    iterations = []
    x, info = minres(K, g, M=positive, rtol=1e-10, maxiter=20, callback=lambda x: iterations.append(1))
    assert info == 0 and len(iterations) <= 3
    assert np.linalg.norm(g - K @ x) <= 1e-7 * np.linalg.norm(K, 2) * np.linalg.norm(x)


def test_positive_is_the_inverse_of_a_definite_matrix():
    lin, H = setting()
    damping = 1.1 * -np.linalg.eigvalsh(H)[0]
    K = H + damping * np.eye(len(H))
    inverse = lin.inverse(damping)
    assert inverse.is_positive_definite
    expected = np.linalg.inv(K)
    np.testing.assert_allclose(lh.to_dense(inverse.positive()), expected, rtol=0, atol=1e-11 * np.abs(expected).max())
    g = right_hand_sides(len(H), 1)[:, 0]
    iterations = []
    _, info = cg(K, g, M=inverse.positive(), rtol=1e-8, callback=lambda x: iterations.append(1))
    assert info == 0 and len(iterations) <= 2


def test_samples():
    """Colored unit vectors give L⁻ᵀD^(−½) itself, whose square is the inverse."""
    lin, H = setting()
    damping = 1.2 * -np.linalg.eigvalsh(H)[0]
    inverse = lin.inverse(damping)
    N = len(H)
    K = np.linalg.inv(H + damping * np.eye(N))
    samples = inverse.sample(40_000, torch.Generator().manual_seed(0))
    assert samples.shape == (N, 40_000) and samples.dtype == np.float64
    empirical = samples @ samples.T / 40_000
    assert np.linalg.norm(empirical - K, 2) <= 0.1 * np.linalg.norm(K, 2)
    again = inverse.sample(40_000, torch.Generator().manual_seed(0))
    np.testing.assert_array_equal(samples, again)
    L = np.linalg.cholesky(H + damping * np.eye(N))
    white = L.T @ samples  # its covariance is the identity
    assert abs(white @ white.T / 40_000 - np.eye(N)).max() <= 0.05


def test_samples_of_an_indefinite_matrix():
    lin, H = setting()
    with pytest.raises(NotPositiveDefiniteError, match="negative .*damping=.* works") as caught:
        lin.inverse(1e-3).sample(1)
    damping = float(str(caught.value).split("damping=")[-1].split()[0])
    assert np.linalg.eigvalsh(H)[0] + damping > 0
    lin.inverse(damping).sample(1)
    with pytest.raises(ValueError, match="number of samples"):
        lin.inverse(damping).sample(-1)
    with pytest.raises(TypeError, match="torch.Generator"):
        lin.inverse(damping).sample(1, np.random.default_rng(0))


def test_samples_are_never_nan():
    """Inertia may be known otherwise than from the factors, one of whose pivots rounding may have made negative."""
    lin, H = setting()
    inverse = lin.inverse(1e-2)
    assert np.linalg.eigvalsh(H)[0] < -1e-2
    inverse._inverse.inertia = lh.Inertia(0, 0, len(H))
    with pytest.raises(lh.errors.FactorizationError, match="made a pivot negative"):
        inverse.sample(2)


def test_quadratic_form():
    lin, H = setting()
    V = right_hand_sides(len(H), 3)
    expected = np.diag(V.T @ np.linalg.solve(H + 0.1 * np.eye(len(H)), V))
    inverse = lin.inverse(0.1)
    np.testing.assert_allclose(inverse.quadratic_form(V), expected, rtol=1e-10)
    assert isinstance(inverse.quadratic_form(V[:, 0]), float)


def test_factor_report():
    lin, H = setting()
    report = lin.inverse(1e-2).factor_report()
    assert [row.stage for row in report] == [0, 2, 4, 6]
    assert sum(row.pivots + row.hidden for row in report) == len(H)
    assert all(0 < row.smallest <= row.largest for row in report)


@pytest.mark.parametrize("seed", [2, 3])
def test_count_eigenvalues(seed):
    lin, H = setting(seed)
    eigenvalues = np.linalg.eigvalsh(H)
    ends = np.array([eigenvalues[0] - 1, -0.05, -1e-3, 1e-3, 0.03, 0.2, eigenvalues[-1] + 1])
    for a, b in zip(ends[:-1], ends[1:], strict=True):
        assert lin.count_eigenvalues(a, b) == ((eigenvalues > a) & (eigenvalues <= b)).sum()
    assert lin.count_eigenvalues(ends[0], ends[-1]) == len(H)
    assert lin.count_eigenvalues(0.1, 0.1) == 0
    near = np.abs(eigenvalues) <= 1e-10
    assert lin.count_eigenvalues(-1e-6, 0.0) == (near | ((eigenvalues > -1e-6) & (eigenvalues <= 0))).sum()
    with pytest.raises(ValueError, match="needs a <= b"):
        lin.count_eigenvalues(1.0, 0.0)
    for a, b in ((np.nan, 1.0), (0.0, np.inf)):
        with pytest.raises(ValueError, match="expected [ab] to be finite"):
            lin.count_eigenvalues(a, b)
    with pytest.raises(TypeError, match="expected a to be a real number"):
        lin.count_eigenvalues("0", 1.0)


def test_smallest_convex_damping():
    lin, H = setting()
    least = -np.linalg.eigvalsh(H)[0]
    found = lin.smallest_convex_damping()
    assert least < found <= 1.0011 * least
    assert lin.inverse(found).is_positive_definite
    np.testing.assert_allclose(lin.smallest_convex_damping(margin=0.5), 1.5 * found)
    with pytest.raises(ValueError, match="margin"):
        lin.smallest_convex_damping(margin=-1)
    linear = lh.linearize(make_mlp([3, 2]), f.cross_entropy, *make_batch(3, 2, 9))
    assert 0 < linear.smallest_convex_damping() <= 1e-6 * np.linalg.norm(lh.to_dense(linear.H), 2)


@pytest.mark.parametrize("route", ["by columns", "from both ends"])
@pytest.mark.parametrize("batch_of_seeds", range(2))
def test_diagonal_and_blocks(batch_of_seeds, route, request):
    if route == "from both ends":
        request.getfixturevalue("no_columns")
    for seed in range(500 + 10 * batch_of_seeds, 507 + 10 * batch_of_seeds):
        model, loss_fn, x, y = random_network(seed)
        lin = lh.linearize(model, loss_fn, x, y)
        H = lh.to_dense(lin.H)
        H = (H + H.T) / 2
        for damping in (0.5, 1e-2, 1e-4, 1e-6, -0.02):
            K = H + damping * np.eye(len(H))
            expected = np.linalg.inv(K)
            atol = (1e-13 + 1e-14 * np.linalg.cond(K)) * np.abs(expected).max()
            inverse = lin.inverse(damping)
            np.testing.assert_allclose(inverse.diagonal(), np.diag(expected), rtol=0, atol=atol)
            np.testing.assert_allclose(inverse.trace(), np.trace(expected), rtol=0, atol=len(H) * atol)
            start = 0
            for block in inverse.block_diagonal().values():
                stop = start + len(block)
                np.testing.assert_allclose(block, expected[start:stop, start:stop], rtol=0, atol=3 * atol)
                start = stop
            assert start == len(H)


def test_diagonal_of_other_layers_and_wide_ones(no_columns):
    from tests.test_linearization import network

    for name in ("curved in its parameters", "normalized", "convolution", "activation first"):
        lin = lh.linearize(*network(name))
        K = lh.to_dense(lin.damped(0.3))
        expected = np.linalg.inv(K)
        atol = 1e-14 * np.linalg.cond(K) * np.abs(expected).max()
        np.testing.assert_allclose(lin.inverse(0.3).diagonal(), np.diag(expected), rtol=0, atol=atol)
    lin, H = setting(widths=(3, 24, 24, 3), samples=4)
    expected = np.linalg.inv(H + 1e-2 * np.eye(len(H)))
    scale = np.linalg.cond(H + 1e-2 * np.eye(len(H))) * np.abs(expected).max()
    np.testing.assert_allclose(lin.inverse(1e-2).diagonal(), np.diag(expected), rtol=0, atol=1e-14 * scale)


def test_diagonal_with_delayed_directions(monkeypatch, no_columns):
    from linop_hess.lq.inverse import factors

    lin, H = setting()
    monkeypatch.setattr(factors, "GROWTH", 0.1)
    inverse = lin.inverse(1e-2)
    assert sum(row.delayed for row in inverse.factor_report()) > 3
    expected = np.diag(np.linalg.inv(H + 1e-2 * np.eye(len(H))))
    np.testing.assert_allclose(inverse.diagonal(), expected, rtol=0, atol=1e-10 * np.abs(expected).max())
    eigenvalues = np.linalg.eigvalsh(H) + 1e-2
    assert (inverse.inertia().negative, inverse.inertia().positive) == inertia_of(eigenvalues)


def test_diagonal_is_not_trusted(monkeypatch, no_columns):
    """A wrong entry is found by a certified solve: a warning, or if it is more than a little wrong an error."""
    from linop_hess.lq.inverse import selected

    lin, H = setting()
    expected = np.diag(np.linalg.inv(H + 1e-2 * np.eye(len(H))))
    genuine = selected.diagonal
    monkeypatch.setattr(selected, "diagonal", lambda factors: 1.001 * genuine(factors))
    with pytest.raises(ArithmeticError, match="certified solves"):
        lin.inverse(1e-2).trace()
    monkeypatch.setattr(selected, "diagonal", lambda factors: (1 + 1e-6) * genuine(factors))
    with pytest.warns(RuntimeWarning, match="more than rounding explains"):
        found = lin.inverse(1e-2).diagonal()
    np.testing.assert_allclose(found, expected, rtol=2e-6)


def test_a_more_careful_diagonal(monkeypatch, no_columns):
    """What the first way gets wrong, the second one gets right."""
    from linop_hess.lq.inverse import selected

    lin, H = setting()
    expected = np.diag(np.linalg.inv(H + 1e-2 * np.eye(len(H))))
    genuine = selected.diagonal
    tried = []

    def first_wrong(factors):
        tried.append(factors)
        return genuine(factors) * (1.0 + 1e-7 * (len(tried) == 1))

    monkeypatch.setattr(selected, "diagonal", first_wrong)
    np.testing.assert_allclose(lin.inverse(1e-2).diagonal(), expected, rtol=0, atol=1e-11 * np.abs(expected).max())
    assert len(tried) == 2 and tried[0] is not tried[1]


def test_single_precision():
    """Everything is computed in float64 inside."""
    model, loss_fn, x, y = random_network(102, torch.float32)
    lin = lh.linearize(model, loss_fn, x, y)
    inverse = lin.inverse(1e-2)
    K = lh.to_dense(lin.H).astype(np.float64)
    K = (K + K.T) / 2 + 1e-2 * np.eye(len(K))
    assert (inverse.inertia().negative, inverse.inertia().positive) == inertia_of(np.linalg.eigvalsh(K))
    expected = np.diag(np.linalg.inv(K))
    assert inverse.diagonal().dtype == np.float32
    atol = 1e-6 * np.linalg.cond(K) * np.abs(expected).max()
    np.testing.assert_allclose(inverse.diagonal(), expected, rtol=0, atol=atol)
    assert inverse.positive().dtype == np.float32


def test_inertia_refuses_a_damping_lost_in_rounding():
    lin, H = setting()
    found = lin.inverse(1e-11).inertia()
    assert (found.negative, found.positive) == inertia_of(np.linalg.eigvalsh(H) + 1e-11)
    with pytest.raises(lh.errors.FactorizationError, match="lost in rounding"):
        lin.inverse(1e-14).inertia()


@pytest.mark.parametrize(
    ("widths", "samples"), [([64] * 12 + [3], 4), ([4] + [20] * 59 + [3], 3), ([4] * 300 + [3], 1)]
)
def test_diagonal_of_deep_chains(widths, samples):
    """One sweep over the factors was measured to be wrong by 1e20 roundings on the second of them."""
    model = make_mlp(widths, gain=1.2)
    lin = lh.linearize(model, f.cross_entropy, *make_batch(widths[0], 3, samples))
    for damping in (0.1, -1e-2, 1e-6):
        inverse = lin.inverse(damping)
        diagonal = inverse.diagonal()
        entries = np.r_[np.argsort(np.abs(diagonal))[-3:], np.arange(0, len(diagonal), len(diagonal) // 10)]
        unit = np.zeros((len(diagonal), entries.size))
        unit[entries, np.arange(entries.size)] = 1.0
        solved = (inverse @ unit)[entries, np.arange(entries.size)]
        scale = np.abs(solved).max()
        atol = 1e-14 * (1 + lin.analysis.norm * scale) * scale
        np.testing.assert_allclose(diagonal[entries], solved, rtol=0, atol=atol)


@pytest.mark.parametrize("widths", [(4, 5, 6, 4, 3), WIDE])
@pytest.mark.parametrize("side", ["leading", "trailing"])
def test_where_a_block_of_the_chain_is_singular(widths, side, no_columns):
    """Diagonal, inertia and determinant at dampings for which the leading or trailing Hessian has an eigenvalue δ.

    Nothing is small in H + εI itself.
    """
    lin, H = setting(widths=widths, samples=4)
    eigenvalues, offsets = np.linalg.eigvalsh(H), lin.problem.layout.x_offsets
    norm = np.abs(eigenvalues).max()
    for stage in (2, 4, 6) if len(H) < 200 else (4,):
        cut = offsets[stage]
        values = np.linalg.eigvalsh(H[:cut, :cut] if side == "leading" else H[cut:, cut:])
        values = values[np.abs(values) > 1e-2 * norm]
        conditions = [norm / np.abs(eigenvalues - value).min() for value in values]
        value, condition = values[np.argmin(conditions)], min(conditions)
        assert condition < 1e4
        for delta in (1e-6, 1e-10, 1e-13, 0.0):
            inverse = lin.inverse(float(delta * norm - value), "riccati")
            shifted = eigenvalues + inverse.damping
            found = inverse.inertia()
            assert (found.negative, found.positive) == inertia_of(shifted)
            assert abs(inverse.slogdet()[1] - np.log(np.abs(shifted)).sum()) <= 1e-10 * len(H)
            expected = np.diag(np.linalg.inv(H + inverse.damping * np.eye(len(H))))
            atol = 3e-14 * condition * np.abs(expected).max()
            np.testing.assert_allclose(inverse.diagonal(), expected, rtol=0, atol=atol)
            assert sum(row.delayed for row in inverse.factor_report()) <= 4
            g = right_hand_sides(len(H), 1)
            solution = inverse.solve(g)
            assert solution.method == "riccati" and solution.backward_error <= 1e-14


def test_a_singular_matrix():
    """(H + εI) x = 0 for every x: no factor, determinant or sample, and counts step over it."""
    model = torch.nn.Linear(3, 2, bias=False).double()
    x, y = torch.eye(3, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64)
    lin = lh.linearize(model, lambda o, t: (o - t).square().sum(), x, y)
    np.testing.assert_array_equal(lh.to_dense(lin.H), 2 * np.eye(6))
    for question in (lambda: lin.inverse(-2.0), lambda: lin.inertia(-2.0), lambda: lin.condition_number(-2.0)):
        with pytest.raises(lh.errors.FactorizationError, match="singular to working precision"):
            question()
    assert lin.count_eigenvalues(1.0, 2.0) == 6 and lin.count_eigenvalues(2.0, 3.0) == 0
    assert lin.extreme_eigenvalues() == pytest.approx((2.0, 2.0)) and lin.condition_number(1.0) == pytest.approx(1.0)
    assert lh.spectrum.eigsh(lin, 2, 2.0).values == pytest.approx([2.0, 2.0])
    one_zero = lin.inverse(1.0)
    one_zero._inverse.inertia = lh.Inertia(0, 1, 5)
    with pytest.raises(lh.errors.FactorizationError, match="determinant is zero to rounding"):
        one_zero.slogdet()


@pytest.mark.parametrize("damping", [1e-4, -1e-5, 1e-7])
def test_wide_segments_at_small_dampings(damping):
    """Hidden directions that are coupled too strongly for their elimination are delayed."""
    lin, H = setting(widths=WIDE, samples=4)
    shifted = np.linalg.eigvalsh(H) + damping
    inverse = lin.inverse(damping, "riccati")
    found = inverse.inertia()
    assert (found.negative, found.zero, found.positive) == (inertia_of(shifted)[0], 0, inertia_of(shifted)[1])
    factors = inverse._inverse.factors
    bounded = factors.riccati(GROWTH_MODERATE, MULTIPLIER)
    assert sum(factor.segment.hidden.delayed > 0 for factor in bounded.factors) >= 2
    K = H + damping * np.eye(len(H))
    expected, largest = np.diag(np.linalg.inv(K)), 1 / np.abs(shifted).min()
    atol = 1e-14 * np.abs(shifted).max() * largest * np.abs(expected).max()
    with torch.no_grad():
        for attempt in range(2):
            found = selected.diagonal(factors.for_entries(attempt)).numpy()
            np.testing.assert_allclose(found, expected, rtol=0, atol=atol)
    g = right_hand_sides(len(H), 1)[:, 0]
    positive = inverse.positive()
    back = positive @ (K @ (positive @ g))  # (P K)² = I
    assert np.linalg.norm(K @ back - g) <= 1e-13 * largest * np.abs(shifted).max() * np.linalg.norm(g)
