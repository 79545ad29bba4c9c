"""Eigenvalues near a shift, histograms, ends and condition numbers, against LAPACK's."""

import io
import itertools
from functools import cache

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import aslinearoperator
from torch.nn import functional as f

import linop_hess as lh
from linop_hess.spectrum import eigenpairs
from tests.helpers import make_batch, make_mlp, oracle_hessian


@cache
def setting(widths=(5, 9, 9, 8, 3), samples=3, seed=2, gain=1.4):
    model = make_mlp(list(widths), seed=seed, gain=gain)
    x, y = make_batch(widths[0], widths[-1], samples)
    return lh.linearize(model, f.cross_entropy, x, y), oracle_hessian(model, f.cross_entropy, x, y)


def check(pairs, H, sigma, k, tolerance=1e-8):
    """The values are the k nearest to sigma, the vectors theirs."""
    eigenvalues = np.linalg.eigvalsh(H)
    norm = np.abs(eigenvalues).max()
    assert pairs.values.shape == (k,) and pairs.vectors.shape == (len(H), k)
    distances = np.sort(np.abs(eigenvalues - sigma))[:k]
    np.testing.assert_allclose(np.sort(np.abs(pairs.values - sigma)), distances, rtol=0, atol=2e-7 * norm)
    true = np.linalg.norm(H @ pairs.vectors - pairs.vectors * pairs.values, axis=0)
    assert true.max() <= tolerance * norm
    np.testing.assert_allclose(pairs.residuals, true, rtol=0, atol=1e-13 * norm)
    assert np.abs(pairs.vectors.T @ pairs.vectors - np.eye(k)).max() <= 1e-10
    assert pairs.missing == ()
    assert pairs.nullity == (np.abs(eigenvalues) <= 1e-7 * pairs.norm).sum()


@pytest.fixture
def always_lanczos(monkeypatch):
    monkeypatch.setattr(eigenpairs, "_SMALL", 0)


@pytest.mark.parametrize(("sigma", "k"), [(0.1, 6), (-0.1, 6), (0.5, 3), (-2.0, 12), (1e-3, 10), (20.0, 4)])
def test_near_a_shift(always_lanczos, sigma, k):
    lin, H = setting()
    assert np.linalg.eigvalsh(H)[0] < -0.1
    check(lh.spectrum.eigsh(lin, k, sigma), H, sigma, k)


def test_small_matrices_are_dense():
    lin, H = setting((2, 3, 2))
    check(lh.spectrum.eigsh(lin, 5, -0.05), H, -0.05, 5)


def test_null_space_among_the_nearest(always_lanczos):
    """Lanczos alone sees one vector of each eigenspace."""
    lin, H = setting((6, 6, 6, 3), samples=1)
    eigenvalues = np.linalg.eigvalsh(H)
    zeros = (np.abs(eigenvalues) <= 1e-12).sum()
    nearer = (np.abs(eigenvalues - 0.01) < 0.01 - 1e-9).sum()
    assert zeros > 30 and nearer < 10
    pairs = lh.spectrum.eigsh(lin, nearer + 12, 0.01)
    check(pairs, H, 0.01, nearer + 12)
    assert (np.abs(pairs.values) <= 1e-7 * pairs.norm).sum() == 12
    assert f"of the null space: 12 of {pairs.nullity}" in str(pairs) and "none missing" in str(pairs)


def test_repeated_eigenvalues(always_lanczos):
    """One linear layer and a squared error: every eigenvalue as often as there are outputs."""
    model = make_mlp([5, 7], bias=False)
    x, _ = make_batch(5, 7, 12)
    lin = lh.linearize(model, f.mse_loss, x, torch.zeros(12, 7, dtype=torch.float64))
    H = lh.to_dense(lin.H)
    eigenvalues = np.linalg.eigvalsh(H)
    assert np.ptp(eigenvalues[-7:]) < 1e-12
    pairs = lh.spectrum.eigsh(lin, 7, eigenvalues[-1] + 0.1)
    check(pairs, H, eigenvalues[-1] + 0.1, 7)
    assert np.ptp(pairs.values) < 1e-12


def test_at_an_eigenvalue(always_lanczos):
    lin, H = setting()
    eigenvalues = np.linalg.eigvalsh(H)
    at = float(eigenvalues[-3])
    pairs = lh.spectrum.eigsh(lin, 3, at)
    assert abs(pairs.sigma - at) <= 1e-7 * pairs.norm
    check(pairs, H, at, 3)
    zero = lh.spectrum.eigsh(lin, 4, 0.0)
    assert zero.sigma == 0.0
    check(zero, H, 0.0, 4)


def test_what_lanczos_missed_is_told(always_lanczos, monkeypatch):
    lin, H = setting()
    eigenvalues = np.linalg.eigvalsh(H)
    genuine = eigenpairs.arpack
    monkeypatch.setattr(eigenpairs, "_ROUNDS", 1)

    def forgetful(A, k, **options):
        if k < 6:
            return genuine(A, k=k, **options)
        values, vectors = genuine(A, k=k + 1, **options)
        return np.delete(values, k // 2), np.delete(vectors, k // 2, axis=1)

    monkeypatch.setattr(eigenpairs, "arpack", forgetful)
    pairs = lh.spectrum.eigsh(lin, 6, 0.5)
    ((a, b, count),) = pairs.missing
    inside = ((eigenvalues > a) & (eigenvalues <= b)).sum()
    assert count == 1 and inside - ((pairs.values > a) & (pairs.values <= b)).sum() == 1
    assert "missing: 1 in" in str(pairs)
    monkeypatch.setattr(eigenpairs, "_ROUNDS", 12)
    check(lh.spectrum.eigsh(lin, 6, 0.5), H, 0.5, 6)


def test_gauss_newton_and_single_precision(always_lanczos):
    model = make_mlp([4, 6, 6, 3], seed=1, gain=1.3, dtype=torch.float32)
    lin = lh.linearize(model, f.cross_entropy, *make_batch(4, 3, 4, dtype=torch.float32))
    G = lh.to_dense(lin.gauss_newton()).astype(float)
    pairs = lh.spectrum.eigsh(lin.gauss_newton(), 3, 0.7)
    expected = np.linalg.eigvalsh((G + G.T) / 2)
    expected = np.sort(expected[np.argsort(np.abs(expected - 0.7))[:3]])
    np.testing.assert_allclose(pairs.values, expected, atol=1e-5 * np.abs(G).max())
    low, high = lin.gauss_newton().extreme_eigenvalues()
    assert abs(low) < 1e-6 * high


def check_ends(pairs, H, which, k):
    """The values are LAPACK's k at that end, the vectors theirs, and none is missing."""
    spectrum = np.linalg.eigvalsh(H)
    norm = np.abs(spectrum).max()
    expected = {"SA": spectrum[:k], "LA": spectrum[-k:], "LM": spectrum[np.argsort(-np.abs(spectrum))[:k]]}[which]
    keys = (np.abs(pairs.values), np.abs(expected)) if which == "LM" else (pairs.values, expected)
    np.testing.assert_allclose(np.sort(keys[0]), np.sort(keys[1]), rtol=0, atol=1e-7 * norm)
    assert (np.diff(pairs.values) >= 0).all() and pairs.missing == () and "none missing" in str(pairs)
    true = np.linalg.norm(H @ pairs.vectors - pairs.vectors * pairs.values, axis=0)
    assert true.max() <= 1e-8 * norm
    assert np.abs(pairs.vectors.T @ pairs.vectors - np.eye(k)).max() <= 1e-10


@pytest.mark.parametrize("which", ["SA", "LA", "LM"])
@pytest.mark.parametrize("k", [1, 5, 20])
def test_ends_of_the_spectrum(always_lanczos, which, k):
    lin, H = setting()
    assert (np.linalg.eigvalsh(H) < -1e-3).sum() > 5
    check_ends(lh.spectrum.eigsh(lin, k, which=which), H, which, k)


@pytest.mark.parametrize("which", ["SA", "LA", "LM"])
def test_ends_far_into_a_null_space(always_lanczos, which):
    lin, H = setting((6, 6, 6, 3), samples=1)
    nonzero = int((np.abs(np.linalg.eigvalsh(H)) > 1e-9).sum())
    assert len(H) - nonzero > 30
    check_ends(lh.spectrum.eigsh(lin, nonzero + 9, which=which), H, which, nonzero + 9)
    G = lh.to_dense(lin.gauss_newton())  # semidefinite: its smallest are the null space
    check_ends(lh.spectrum.eigsh(lin.gauss_newton(), 5, which=which), G, which, 5)


@pytest.mark.parametrize("which", ["SA", "LA", "LM"])
@pytest.mark.parametrize("spread", [0.0, 1e-12, 1e-6])
def test_ends_that_are_repeated_or_clustered(always_lanczos, which, spread):
    """A linear layer and a squared error with weights: seven eigenvalues from each of the inputs, some negative."""
    model = make_mlp([5, 7], bias=False)
    x, _ = make_batch(5, 7, 12)
    weights = (1 + spread * torch.arange(7.0).double()) * torch.tensor([1.0, -1, 1, -1, 1, -1, 1]).double()
    lin = lh.linearize(model, lambda o, _: (o.square() * weights).sum(), x, None)
    H = lh.to_dense(lin.H)
    for k in (3, 4, 9):
        check_ends(lh.spectrum.eigsh(lin, k, which=which), H, which, k)


def test_ends_by_lapack_and_unpacked():
    lin, H = setting((3, 4, 2))
    for which in ("SA", "LA", "LM"):
        check_ends(lh.spectrum.eigsh(lin, 4, which=which), H, which, 4)
    values, vectors = lh.spectrum.eigsh(lin, 4, which="SA")
    np.testing.assert_allclose(H @ vectors, vectors * values, atol=1e-12)
    with pytest.raises(ValueError, match="one of 'nearest', 'SA', 'LA', 'LM', got 'BE'"):
        lh.spectrum.eigsh(lin, 4, which="BE")
    with pytest.raises(ValueError, match="no sigma with which='SA'"):
        lh.spectrum.eigsh(lin, 4, 0.1, which="SA")


def test_ends_that_lanczos_misses_are_told(always_lanczos, monkeypatch):
    lin, H = setting()
    genuine = eigenpairs.arpack
    monkeypatch.setattr(eigenpairs, "_ROUNDS", 1)

    def forgetful(A, k, **options):
        values, vectors = genuine(A, k=k + 1, **options)
        return np.delete(values, k // 2), np.delete(vectors, k // 2, axis=1)

    monkeypatch.setattr(eigenpairs, "arpack", forgetful)
    for which in ("SA", "LA"):
        assert sum(count for _, _, count in lh.spectrum.eigsh(lin, 6, which=which).missing) == 1


def test_any_symmetric_operator():
    model = make_mlp([5, 9, 9, 3], seed=2, gain=1.4)
    x, y = make_batch(5, 3, 3)
    lin, hessian = lh.linearize(model, f.cross_entropy, x, y), lh.Hessian(model, f.cross_entropy, (x, y))
    H = oracle_hessian(model, f.cross_entropy, x, y)
    theirs, ours = lh.spectrum.density(lin, 20), lh.spectrum.density(hessian, 20)
    np.testing.assert_array_equal(theirs.counts, ours.counts)
    assert ours.nullity == theirs.nullity and ours.size == len(H)
    for operator in (hessian, H, aslinearoperator(H)):
        check_ends(lh.spectrum.eigsh(operator, 5, which="SA"), H, "SA", 5)
        check(lh.spectrum.eigsh(operator, 5, 0.1), H, 0.1, 5)
    shifted = lh.spectrum.density(lin.damped(0.5), [-3.0, 0.4, 0.6, 9.0])
    spectrum = np.linalg.eigvalsh(H) + 0.5
    assert shifted.counts.tolist() == [
        ((spectrum > a) & (spectrum <= b)).sum() for a, b in [(-3, 0.4), (0.4, 0.6), (0.6, 9)]
    ]
    with pytest.raises(ValueError, match="expected a symmetric operator"):
        lh.spectrum.density(np.triu(np.ones((4, 4))))
    with pytest.raises(ValueError, match="expected a square operator"):
        lh.spectrum.eigsh(np.ones((4, 5)), 2)
    with pytest.raises(TypeError, match="expected a real operator"):
        lh.spectrum.density(1j * np.eye(3))
    with pytest.raises(ValueError, match="finite entries"):
        lh.spectrum.density(np.full((3, 3), np.nan))


def test_bad_input():
    lin, _ = setting((2, 3, 2))
    for k in (0, -1, lin.problem.size, lin.problem.size + 5):
        with pytest.raises(ValueError, match="k must be from 1"):
            lh.spectrum.eigsh(lin, k)
    for k in (1.5, True, "3"):
        with pytest.raises(TypeError, match="k must be an integer"):
            lh.spectrum.eigsh(lin, k)
    for sigma in (np.nan, np.inf):
        with pytest.raises(ValueError, match="expected sigma to be finite"):
            lh.spectrum.eigsh(lin, 2, sigma)
    with pytest.raises(TypeError, match="expected sigma to be a real number"):
        lh.spectrum.eigsh(lin, 2, 1j)
    with pytest.raises(ArithmeticError, match="residual"):
        lh.spectrum.eigsh(lin, 2, 0.1, tolerance=1e-30)
    with pytest.raises(ValueError, match="tolerance must be positive"):
        lh.spectrum.eigsh(lin, 2, 0.1, tolerance=0)
    for bins in (0, True, [1.0], [0.0, 0.0], [1.0, 0.0], [0.0, np.nan]):
        with pytest.raises(ValueError, match="bins"):
            lh.spectrum.density(lin, bins)
    with pytest.raises(ValueError, match="scale"):
        lh.spectrum.density(lin, scale="log")
    with pytest.raises(ValueError, match="rtol"):
        lin.extreme_eigenvalues(rtol=0)
    with pytest.raises(TypeError, match="edges of bins must be real"):
        lh.spectrum.density(lin, ["a", "b"])
    with pytest.raises(TypeError, match="seed"):
        lh.spectrum.eigsh(lin, 2, seed="a")
    with pytest.raises(ValueError, match="expected sigma to be finite"):
        lh.spectrum.eigsh(lin, 2, 10**400)
    for other in (None, lin.problem):
        with pytest.raises(TypeError, match="linearization"):
            lh.spectrum.eigsh(other, 2)
        with pytest.raises(TypeError, match="linearization"):
            lh.spectrum.density(other)
    assert lin.smallest_convex_damping(rtol=1e-17) > 0


@pytest.mark.parametrize("scale", ["symlog", "linear"])
@pytest.mark.parametrize("bins", [1, 2, 7, 40])
def test_density(scale, bins):
    lin, H = setting()
    eigenvalues = np.linalg.eigvalsh(H)
    found = lh.spectrum.density(lin, bins, scale=scale)
    null = np.abs(eigenvalues) <= found.null
    assert found.null == 1e-7 * lin.analysis.norm and found.nullity == null.sum() > 0
    assert found.counts.sum() + found.nullity == found.size == len(H)
    expected = [((eigenvalues > a) & (eigenvalues <= b) & ~null).sum() for a, b in itertools.pairwise(found.edges)]
    np.testing.assert_array_equal(found.counts, expected)
    assert bins <= found.counts.size <= bins + 2
    assert bins == 1 or str(found).count("null space") == 1


def test_density_of_given_bins_and_of_a_definite_matrix():
    lin, H = setting()
    eigenvalues = np.linalg.eigvalsh(H)
    edges = [-0.3, -0.01, 1e-3, 0.5]
    found = lh.spectrum.density(lin, edges)
    null = np.abs(eigenvalues) <= found.null
    expected = [((eigenvalues > a) & (eigenvalues <= b) & ~null).sum() for a, b in itertools.pairwise(edges)]
    np.testing.assert_array_equal(found.counts, expected)
    model = make_mlp([3, 2], bias=False)
    x, _ = make_batch(3, 2, 9)
    definite = lh.linearize(model, f.mse_loss, x, torch.zeros(9, 2, dtype=torch.float64))
    found = lh.spectrum.density(definite, 5)
    assert found.counts.sum() == found.size == 6 and found.nullity == 0 and found.edges[0] > 0


@pytest.mark.parametrize("widths", [(2, 3, 2), (5, 9, 9, 8, 3)])
def test_extremes_and_condition_number(widths):
    lin, H = setting(widths)
    eigenvalues = np.linalg.eigvalsh(H)
    np.testing.assert_allclose(lin.extreme_eigenvalues(), eigenvalues[[0, -1]], rtol=1e-9)
    for damping in (0.1, 1e-3, -0.03):
        expected = np.linalg.cond(H + damping * np.eye(len(H)), 2)
        np.testing.assert_allclose(lin.condition_number(damping), expected, rtol=1e-5)


def test_extremes_next_to_a_null_space(monkeypatch):
    """Where Lanczos takes long, inertia brackets the end and shift-invert finds it."""
    from scipy.sparse.linalg import ArpackNoConvergence

    from linop_hess.spectrum import extremes

    genuine = extremes.arpack

    def slow(A, which, **options):
        if which != "LM":
            raise ArpackNoConvergence("", np.zeros(0), np.zeros((A.shape[0], 0)))
        return genuine(A, which=which, **options)

    monkeypatch.setattr(extremes, "arpack", slow)
    lin, H = setting()
    eigenvalues = np.linalg.eigvalsh(H)
    np.testing.assert_allclose(lin.extreme_eigenvalues(), eigenvalues[[0, -1]], rtol=1e-7)
    ggn = lin.gauss_newton()
    low, high = ggn.extreme_eigenvalues()
    expected = np.linalg.eigvalsh(lh.to_dense(ggn))
    assert abs(low - expected[0]) <= 1e-7 * expected[-1] and abs(high - expected[-1]) <= 1e-7 * expected[-1]


def test_extremes_are_not_trusted(monkeypatch):
    """Lanczos may end at an inner eigenvalue. Inertia tells, and shift-invert finds the end; if that fails too, bisection does."""
    from linop_hess.spectrum import extremes

    lin, H = setting()
    eigenvalues = np.linalg.eigvalsh(H)
    genuine = extremes._end
    inner = {"SA": eigenvalues[1] / lin.analysis.norm, "LA": eigenvalues[-2] / lin.analysis.norm}
    monkeypatch.setattr(extremes, "_end", lambda A, which, *rest: inner.get(which) or genuine(A, which, *rest))
    np.testing.assert_allclose(lin.extreme_eigenvalues(), eigenvalues[[0, -1]], rtol=1e-7)

    def failing(A, which, *rest):
        if which == "LM":
            raise ArithmeticError("a residual")
        return inner[which]

    monkeypatch.setattr(extremes, "_end", failing)
    np.testing.assert_allclose(lin.extreme_eigenvalues(), eigenvalues[[0, -1]], rtol=1e-7)


def test_where_lanczos_does_not_converge():
    """Eigenvalues over eight decades: the small ones look alike from any shift."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 150, generator=generator, dtype=torch.float64) * torch.logspace(
        0, -4, 150, dtype=torch.float64
    )
    model = torch.nn.Linear(150, 1, dtype=torch.float64)
    lin = lh.linearize(model, f.mse_loss, x, torch.zeros(300, 1, dtype=torch.float64))
    spectrum = np.linalg.eigvalsh(lh.to_dense(lin.H))
    np.testing.assert_allclose(lin.extreme_eigenvalues(), spectrum[[0, -1]], rtol=0, atol=1e-8 * spectrum[-1])
    for damping in (0.1, -0.1):
        shifted = np.abs(spectrum + damping)
        np.testing.assert_allclose(lin.condition_number(damping), shifted.max() / shifted.min(), rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12, 1e25])
def test_any_scale_of_the_loss(scale):
    model = make_mlp([40, 9])
    x, _ = make_batch(40, 9, 100)
    lin = lh.linearize(model, lambda o, t: scale * o.square().mean(), x, None)
    spectrum = np.linalg.eigvalsh(lh.to_dense(lin.H))
    np.testing.assert_allclose(lin.extreme_eigenvalues(), spectrum[[0, -1]], rtol=1e-7)
    damping = 0.1 * spectrum[-1]
    condition = (spectrum[-1] + damping) / (spectrum[0] + damping)
    np.testing.assert_allclose(lin.condition_number(damping), condition, rtol=1e-5)
    assert lh.spectrum.density(lin, 10).counts.sum() == len(spectrum)
    middle = 0.5 * spectrum[-1]
    pairs = lh.spectrum.eigsh(lin, 3, middle)
    distances = np.sort(np.abs(spectrum - middle))[:3]
    np.testing.assert_allclose(np.sort(np.abs(pairs.values - middle)), distances, rtol=1e-6)


def test_ends_that_are_eigenvalues():
    """An end that is an eigenvalue to rounding counts at b and not at a."""
    lin, H = setting()
    eigenvalues = np.linalg.eigvalsh(H)
    norm = np.abs(eigenvalues).max()
    for value in eigenvalues[np.abs(eigenvalues) > 1e-4 * norm]:
        expected = (eigenvalues <= value + 1e-9 * norm).sum()
        assert lin.count_eigenvalues(eigenvalues[0] - 1.0, float(value)) == expected
    edges = eigenvalues[np.abs(eigenvalues) > 1e-4 * norm][::7]
    found = lh.spectrum.density(lin, edges)
    below = (eigenvalues[:, None] <= edges + 1e-9 * norm).sum(0)
    null = np.abs(eigenvalues) <= found.null
    straddles = (edges[:-1] < 0) & (edges[1:] > 0)
    np.testing.assert_array_equal(found.counts, np.diff(below) - null.sum() * straddles)


def test_shifts_at_eigenvalues(always_lanczos):
    lin, H = setting((5, 10, 10, 10, 3))
    eigenvalues = np.linalg.eigvalsh(H)
    for value in eigenvalues[np.abs(eigenvalues) > 1e-3][::12]:
        check(lh.spectrum.eigsh(lin, 4, float(value)), H, float(value), 4)


def test_ties_are_not_missing(always_lanczos):
    """Any of the copies of an eigenvalue will do."""
    model = make_mlp([50, 20])
    x, _ = make_batch(50, 20, 200)
    lin = lh.linearize(model, f.mse_loss, x, torch.zeros(200, 20, dtype=torch.float64))
    for k in (1, 6):
        assert lh.spectrum.eigsh(lin, k, 10.0).missing == ()


def test_small_invariant_subspaces(always_lanczos):
    """Gauss-Newton of few data, from outside its spectrum: ARPACK gives up on most start vectors."""
    model = make_mlp([6, 14, 14, 3], seed=1, gain=1.3)
    ggn = lh.linearize(model, f.cross_entropy, *make_batch(6, 3, 4)).gauss_newton()
    G = lh.to_dense(ggn)
    for share in (-0.2, -0.05, 1.5):
        sigma = share * np.linalg.eigvalsh(G)[-1]
        check(lh.spectrum.eigsh(ggn, 6, sigma), G, sigma, 6)


def test_a_hessian_that_is_zero(always_lanczos):
    lin = lh.linearize(make_mlp([5, 9, 3]), lambda o, t: 0.0 * o.sum(), *make_batch(5, 3, 3))
    N = lin.problem.size
    pairs = lh.spectrum.eigsh(lin, 4, 0.5)
    assert not pairs.values.any() and pairs.nullity == N and np.array_equal(pairs.vectors.T @ pairs.vectors, np.eye(4))
    for bins in (7, [-1.0, 0.5]):
        found = lh.spectrum.density(lin, bins)
        assert found.nullity == N and found.counts.sum() == 0
    assert lin.count_eigenvalues(-1.0, 0.0) == N and lin.count_eigenvalues(0.0, 1.0) == 0
    assert lin.smallest_convex_damping() == 1.0 and lin.condition_number(0.5) == 1.0


def test_the_end_of_a_null_space():
    """Many parameters, few data, all fitted: Lanczos was seen to take the smallest of the nonzero eigenvalues for the smallest."""
    model = make_mlp([64, 12, 10], seed=4, gain=1.2)
    x, _ = make_batch(64, 10, 2)
    lin = lh.linearize(model, lambda o, t: (o - t).square().sum() / 2, x, model(x).detach())
    low, high = lin.extreme_eigenvalues()
    spectrum = np.linalg.eigvalsh(lh.to_dense(lin.H))
    assert abs(low) <= 1e-7 * high and high == pytest.approx(spectrum[-1], rel=1e-8)
    flat = lh.linearize(make_mlp([20, 10, 2], seed=0), lambda o, t: 0.0 * o.sum(), *make_batch(20, 2, 2))
    assert flat.extreme_eigenvalues() == (0.0, 0.0)


def test_plot():
    pytest.importorskip("matplotlib")
    lin, _ = setting()
    for options in ({}, {"scale": "linear"}, {"bins": [-0.1, 0.05, 0.2]}):
        found = lh.spectrum.density(lin, **options)
        figure = lh.plot.spectrum(found, title="a spectrum")
        (ax,) = figure.axes
        assert ax.get_title(loc="left") == "a spectrum"
        null = max(ax.patches, key=lambda bar: (bar.get_x() < 0 < bar.get_x() + bar.get_width(), bar.get_height()))
        if not options.get("bins"):  # with these zero is inside a bin
            assert null.get_height() == found.nullity and not null.get_hatch()
            ends = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in ax.patches if bar is not null]
            left, right = null.get_x(), null.get_x() + null.get_width()
            assert all(high < left or low > right for low, high in ends)
        heights = sum(int(bar.get_height()) for bar in ax.patches)
        assert heights == found.counts.sum() + found.nullity
        assert [text.get_text().split(":")[0] for text in ax.get_legend().get_texts()][-1].startswith("null space")
        assert ax.get_yscale() == "log" and ax.get_xscale() == ("symlog" if not options else "linear")
        figure.savefig(io.BytesIO())


def test_plot_of_other_spectra():
    pytest.importorskip("matplotlib")
    lin, _ = setting()
    outside = lh.spectrum.density(lin, [0.2, 0.6, 1.5])
    (ax,) = lh.plot.spectrum(outside).axes
    assert ax.get_title(loc="left") == f"Spectrum, {lin.problem.size:,} eigenvalues"
    assert "not in range" in ax.get_legend().get_texts()[0].get_text() and ax.get_xlim()[0] > 0.1
    same = lh.linearize(
        torch.nn.Linear(3, 1, bias=False).double(), f.mse_loss, torch.eye(3).double(), torch.zeros(3, 1).double()
    )
    found = lh.spectrum.density(same, 5)
    (ax,) = lh.plot.spectrum(found).axes
    low, high = ax.get_xlim()
    assert found.counts.max() == 3 and max(bar.get_width() for bar in ax.patches) > 0.05 * (high - low)
    (ax,) = lh.plot.spectrum(lh.spectrum.density(lin.gauss_newton())).axes
    assert len([tick for tick in ax.get_xticks() if tick > 0]) >= 3
    with pytest.raises(TypeError, match="density returns"):
        lh.plot.spectrum(np.arange(3))
