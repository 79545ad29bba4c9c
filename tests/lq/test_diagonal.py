"""A diagonal apart from the stages, H = H_c + diag(D): every method and question against LAPACK on the dense matrix."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from linop_hess import lq
from linop_hess.errors import FactorizationError, NotPositiveDefiniteError
from linop_hess.lq.inverse import entries
from linop_hess.lq.inverse.counting import count_up_to, smallest_convex_damping
from linop_hess.lq.inverse.inertia import inertia
from tests.lq.graphs import GRAPHS
from tests.lq.problems import backward_error, gauss_newton_blocks, random_blocks

SHAPES = {
    "more controls than outputs": ([2, 2, 3, 2, 1], [8, 9, 7, 5]),
    "fewer controls than outputs": ([4, 5, 6, 5, 4], [1, 2, 1, 3]),
    "stages without controls": ([2, 4, 3, 5, 2, 1], [0, 6, 0, 0, 5]),
    "wide": ([3, 5, 60, 62, 4, 3], [4, 6, 70, 9, 7]),
}
METHODS = ("auto", "riccati", "banded", "dense", "ldu")
DAMPINGS = (0.3, 1e-3, 1e-6, -0.07, 0.0)


def uniform(N):
    return np.full(N, 0.02)


def negative(N):
    return np.full(N, -0.4)


def some_not(N):
    """A third of the controls without: of one sign for positive dampings."""
    return np.where(np.arange(N) % 3 == 0, 0.0, 0.05)


def each(N):
    return 0.01 + np.random.default_rng(1).random(N)


def decades(N):
    return 10.0 ** np.linspace(-6, 1, N)


def mixed(N):
    return 0.2 * np.random.default_rng(2).standard_normal(N)


def name_of(value: object) -> str:
    return getattr(value, "__name__", str(value))


DIAGONALS = (uniform, negative, some_not, each, decades, mixed)
# Every pair of two of them, in a third of all triples.
THIRD = [
    (shape, damping, diagonal)
    for i, shape in enumerate([*SHAPES, *GRAPHS])
    for j, damping in enumerate(DAMPINGS)
    for k, diagonal in enumerate(DIAGONALS)
    if (i + j + k) % 3 == 0
]


@cache
def made(shape: str, dtype: torch.dtype = torch.float64) -> tuple[lq.Problem, np.ndarray]:
    """A chain without a diagonal, and its Hessian."""
    blocks = GRAPHS[shape]() if shape in GRAPHS else random_blocks(*SHAPES[shape], seed=7, with_A="some")
    blocks = blocks.rounded(dtype)
    return blocks.problem(dtype), blocks.hessian()


def with_diagonal(shape: str, diagonal, dtype: torch.dtype = torch.float64) -> tuple[lq.Problem, np.ndarray]:
    problem, H = made(shape, dtype)
    D = torch.from_numpy(diagonal(len(H))).to(dtype)
    return problem.with_curvature(problem.blocks, D), H + np.diag(D.double().numpy())


def spectrum(H: np.ndarray, damping: float) -> tuple[np.ndarray, np.ndarray, float]:
    """K = H + εI, its eigenvalues and condition number."""
    K = H + damping * np.eye(len(H))
    values = np.linalg.eigvalsh(K)
    smallest = np.abs(values).min()
    return K, values, float(np.abs(values).max() / smallest) if smallest else np.inf


@pytest.mark.parametrize("diagonal", DIAGONALS, ids=lambda d: d.__name__)
@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("shape", [*SHAPES, *GRAPHS])
def test_change_of_variables(shape, damping, diagonal):
    """T⁻¹(H̃ + ηI)T⁻¹ = H + εI, det T = 1, and H̃ is the Hessian of a chain without a diagonal."""
    problem, H = with_diagonal(shape, diagonal)
    change = lq.Analysis(problem).at(damping)
    N = len(H)
    assert change.analysis.problem.diagonal is None and change.asked == damping
    inner = change.analysis.problem.hessian_product(torch.eye(N).double(), change.damping).numpy()
    T = np.ones(N) if change.units is None else change.units[:, 0].numpy()
    K = H + damping * np.eye(N)
    gap = np.abs(inner / T[:, None] / T - K)
    assert gap.max() <= 1e-14 * N * np.abs(K).max()
    assert abs(np.log(T).sum()) <= 1e-13 * N
    if diagonal in (uniform, negative):
        assert change.units is None and change.damping == damping + diagonal(1)[0]


def test_without_a_diagonal_nothing_changes():
    analysis = lq.Analysis(made("wide")[0])
    change = analysis.at(0.1)
    assert change.analysis is analysis and change.damping == change.asked == 0.1 and change.units is None


def test_the_last_change_is_kept():
    analysis = lq.Analysis(with_diagonal("wide", each)[0])
    assert analysis.at(0.1) is analysis.at(0.1) is not analysis.at(0.2)
    same = lq.Analysis(with_diagonal("wide", uniform)[0])
    assert same.at(0.1).analysis is same.at(0.2).analysis


@pytest.mark.parametrize("shape, damping, diagonal", THIRD, ids=name_of)
def test_every_question(shape, damping, diagonal):
    problem, H = with_diagonal(shape, diagonal)
    K, values, condition = spectrum(H, damping)
    if condition > 1e12:
        return  # singular to rounding
    g = np.random.default_rng(0).standard_normal((len(H), 2))
    inverse = np.linalg.inv(K)
    size, analysis = np.abs(inverse).max(), lq.Analysis(problem)
    for method in METHODS:
        if method == "ldu" and shape != "fewer controls than outputs":
            continue
        found = lq.Inverse(analysis, damping, method)
        solution = found.solve(torch.from_numpy(g))
        assert solution.backward_error <= 1e-14 and backward_error(H, damping, solution.x.numpy(), g) <= 1e-14, method
        signs = found.inertia
        assert (signs.negative, signs.zero, signs.positive) == ((values < 0).sum(), 0, (values > 0).sum()), method
        sign, logabsdet = found.slogdet()
        doubt = 1e-13 * len(H) * np.abs(values).max() * (1 / np.abs(values)).sum()
        assert sign == np.sign(values).prod() and abs(logabsdet - np.log(np.abs(values)).sum()) <= doubt, method
        assert np.abs(found.entries.diagonal.numpy() - inverse.diagonal()).max() <= 1e-14 * condition * size, method
        layout = problem.layout
        for l, block in zip(np.flatnonzero(layout.p), found.blocks(), strict=True):
            own = layout.controls(l)
            assert np.abs(block.numpy() - inverse[np.ix_(own, own)]).max() <= 1e-14 * condition * size, method
        positive = found.positive()(torch.eye(len(H)).double()).numpy()
        gap = positive @ K @ positive @ K - np.eye(len(H))
        assert np.abs(gap).max() <= 1e-12 * condition * len(H), method
        assert np.linalg.eigvalsh((positive + positive.T) / 2).min() > 0, method
        if (values > 0).all():
            factors = found.factors.answering("sample")
            root = found.factors.change.vectors(factors.color(torch.eye(factors.noise).double())).numpy()
            assert np.abs(root @ root.T - inverse).max() <= 1e-13 * condition * size, method
            assert found.sample(2, torch.Generator().manual_seed(0)).shape == (len(H), 2)
        else:
            with pytest.raises(NotPositiveDefiniteError):
                found.sample(2, None)


@pytest.mark.parametrize("diagonal", DIAGONALS, ids=lambda d: d.__name__)
@pytest.mark.parametrize("method", ["auto", "riccati", "banded", "dense"])
def test_float32(method, diagonal):
    problem, H = with_diagonal("more controls than outputs", diagonal, torch.float32)
    g = np.random.default_rng(0).standard_normal((len(H), 2)).astype(np.float32)
    for damping in (0.3, 1e-3, -0.07):
        K, values, condition = spectrum(H, damping)
        if condition > 1e6:
            continue
        found = lq.Inverse(problem, damping, method)
        x = found.solve(torch.from_numpy(g)).x
        assert x.dtype == torch.float32 and backward_error(H, damping, x.numpy(), g) <= 1e-6
        signs = found.inertia
        assert (signs.negative, signs.positive) == ((values < 0).sum(), (values > 0).sum())
        gap = np.abs(found.entries.diagonal.numpy() - np.linalg.inv(K).diagonal()).max()
        assert gap <= 1e-13 * condition * np.abs(np.linalg.inv(K)).max()
        assert found.positive()(torch.from_numpy(g)).dtype == torch.float32


@pytest.mark.parametrize("diagonal", [uniform, some_not, each, decades], ids=lambda d: d.__name__)
def test_gauss_newton_in_function_space(diagonal):
    """A ridge keeps the method whose cost does not grow with the number of parameters."""
    blocks = gauss_newton_blocks([3, 4, 6], [30, 40], 5, samples=2)
    chain, H = blocks.problem(), blocks.hessian()
    D = diagonal(len(H))
    problem = chain.with_curvature(chain.blocks, torch.from_numpy(D))
    K, values, condition = spectrum(H + np.diag(D), 1e-2)
    found = lq.Inverse(problem, 1e-2, "woodbury")
    g = np.random.default_rng(0).standard_normal((len(H), 1))
    assert backward_error(H + np.diag(D), 1e-2, found.solve(torch.from_numpy(g)).x.numpy(), g) <= 1e-14
    assert found.is_positive_definite
    assert abs(found.slogdet()[1] - np.log(values).sum()) <= 1e-12 * condition
    inverse = np.linalg.inv(K)
    assert np.abs(found.entries.diagonal.numpy() - inverse.diagonal()).max() <= 1e-14 * condition * inverse.max()
    factors = found.factors.answering("sample")
    root = found.factors.change.vectors(factors.color(torch.eye(factors.noise).double()))
    assert np.abs((root @ root.T).numpy() - inverse).max() <= 1e-13 * condition * inverse.max()


@pytest.mark.parametrize("diagonal", DIAGONALS, ids=lambda d: d.__name__)
def test_counting(diagonal):
    """Shifts through the whole spectrum, so that ε + D has every sign."""
    problem, H = with_diagonal("more controls than outputs", diagonal)
    analysis, values = lq.Analysis(problem), np.linalg.eigvalsh(H)
    for b in np.concatenate([(values[:-1] + values[1:]) / 2, [values[0] - 1, values[-1] + 1]]):
        if np.abs(values - b).min() > 1e-6:
            assert count_up_to(analysis, float(b)) == (values <= b).sum()
    least = smallest_convex_damping(analysis, 1e-6)
    if values[0] < 0:
        assert -values[0] <= least <= -values[0] * (1 + 1e-5)


def test_errors_speak_of_the_damping_that_was_asked_for():
    problem, H = with_diagonal("more controls than outputs", negative)
    with pytest.raises(
        FactorizationError, match=r"damping=0\.4 "
    ) as caught:  # with D = −0.4 no pivot of hidden controls
        lq.Inverse(problem, 0.4)
    assert caught.value.damping == 0.4 and caught.value.suggested_damping != 0.4
    with pytest.raises(FactorizationError, match=r"damping=0\.4"):
        inertia(lq.Analysis(problem), 0.4 + 1e-15)


def test_factors_never_meet_a_diagonal():
    problem, _ = with_diagonal("wide", each)
    with pytest.raises(ValueError, match="expected a problem without a diagonal"):
        lq.METHODS["riccati"].factor(lq.Analysis(problem), 0.1)


def test_problem():
    chain, H = made("wide")
    D = torch.from_numpy(each(len(H)))
    problem = chain.with_curvature(chain.blocks, D)
    assert problem.transition is chain.transition and problem.nbytes == chain.nbytes + D.nbytes
    x = torch.randn(len(H), 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    truth = chain.hessian_product(x, 0.1) + D[:, None] * x
    torch.testing.assert_close(problem.hessian_product(x, 0.1), truth, rtol=1e-14, atol=1e-13)
    torch.testing.assert_close(problem.apply_A(x) - chain.apply_A(x), D[:, None] * x, rtol=1e-13, atol=1e-13)
    assert torch.equal(problem.gauss_newton().diagonal, D)
    assert problem.to(torch.float32).diagonal.dtype == torch.float32
    for wrong in (D[:-1], torch.full_like(D, np.nan)):
        with pytest.raises(ValueError, match="expected a diagonal of"):
            chain.with_curvature(chain.blocks, wrong)


@pytest.mark.parametrize("shape, diagonal", [(s, d) for s, e, d in THIRD if e == 0.3], ids=name_of)
def test_entries_from_the_factors(shape, diagonal, monkeypatch):
    """As of many parameters: by selected inversion and by the dense factors, in the units that are factored in."""
    monkeypatch.setattr(entries, "SOLVED_UP_TO", -1)
    problem, H = with_diagonal(shape, diagonal)
    for damping, method in ((0.3, "riccati"), (1e-2, "riccati"), (0.3, "dense"), (-0.07, "dense")):
        K, _, condition = spectrum(H, damping)
        if condition > 1e8:
            continue
        found, inverse = lq.Inverse(problem, damping, method), np.linalg.inv(K)
        atol = 1e-13 * (10 + condition) * np.abs(inverse).max()
        np.testing.assert_allclose(found.entries.diagonal.numpy(), inverse.diagonal(), rtol=0, atol=atol)
        own = [problem.layout.controls(int(l)) for l in np.flatnonzero(problem.layout.p)]
        for places, block in zip(own, found.blocks(), strict=True):
            np.testing.assert_allclose(block.numpy(), inverse[np.ix_(places, places)], rtol=0, atol=atol)
