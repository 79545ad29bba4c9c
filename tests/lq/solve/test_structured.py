"""Solutions that the blocks determine and the matrix does not, against recursions in NumPy and exact arithmetic."""

from fractions import Fraction
from functools import cache

import numpy as np
import pytest
import torch

from linop_hess import lq
from linop_hess.errors import FactorizationError
from linop_hess.lq.accuracy import DETERMINED
from linop_hess.lq.solve.structured import StructuredSolver
from tests.lq.methods.conformance import SHAPES, right_hand_side, setting
from tests.lq.problems import of_blocks, pendulum, random_blocks

METHODS = ["auto", "banded", "riccati", "dense"]


def relative(x, truth):
    return np.abs(np.asarray(x) - truth).max() / np.abs(truth).max()


@pytest.mark.parametrize(
    ("method", "seconds"), [(method, seconds) for method in METHODS for seconds in (4, 6, 12)] + [("auto", 20)]
)
def test_an_unstable_system_held_for_long(method, seconds):
    blocks, g, u, _ = pendulum(seconds)
    solver = lq.Solver(blocks.problem(), 0.0, method)
    G = np.stack([g, 1e-12 * g, np.zeros_like(g)], 1)
    found = solver.solve(G)
    # At 4 s the condition number is 1e11, at which factors of the matrix are still believed, and lose so many digits.
    allowed = 1e-15 * np.linalg.cond(blocks.hessian()) if found.method == "dense" else 1e-11
    assert relative(found.x[:, 0], u) <= allowed
    assert relative(found.x[:, 1], 1e-12 * u) <= allowed
    assert not found.x[:, 2].any()
    if seconds >= 6:
        assert found.structured_error <= 1e-13
    assert found.backward_error <= 1e-14


@pytest.mark.parametrize("method", METHODS)
def test_the_same_in_single_precision(method):
    blocks, g, _, _ = pendulum(6)
    blocks = blocks.rounded(torch.float32)
    g = g.astype(np.float32)
    truth = lq.Solver(blocks.problem(), 0.0, "riccati").solve(g.astype(float)).x.numpy()
    found = lq.Solver(blocks.problem(torch.float32), 0.0, method).solve(g)
    assert relative(found.x, truth) <= 1e-5


def test_the_papers_method_has_no_stand_in():
    blocks, g, u, _ = pendulum(8)
    try:
        found = lq.Solver(blocks.problem(), 0.0, "ldu").solve(g)
    except FactorizationError:
        return
    assert found.method == "ldu" and relative(found.x, u) <= 1e-11


@pytest.mark.parametrize("shape", SHAPES)
def test_its_solutions_are_lapacks(shape):
    truth = setting(shape)
    g = right_hand_side(len(truth.H), 2)
    for damping in (0.3, 1e-4, -0.21):
        x, error = StructuredSolver(truth.analysis, damping).solve(torch.from_numpy(g))
        K = truth.shifted(damping)
        expected = np.linalg.solve(K, g)
        gap = np.linalg.norm(x.numpy() - expected, axis=0) / np.linalg.norm(expected, axis=0)
        assert np.all(gap <= 1e-14 * np.linalg.cond(K)), damping
        assert float(error.max()) <= 1e-12 * np.linalg.cond(K)


SINGULAR = {
    # H = 0 where A is what curvature of the state after it takes away: 3 · 0.1² is 0.03 but for rounding.
    "cancelled by what comes after": (of_blocks((-3 * 0.1**2, 0, 0, 0, 0.1), (1.0, 0, 3.0, 0, 0)), 0.0),
    # The same through a stage of large gain.
    "cancelled after a large gain": (of_blocks((-3 * 0.1**2 * 1e12, 0, 0, 0, 0.1), (1.0, 0, 3.0 * 1e12, 0, 0)), 0.0),
    # A shift that is an eigenvalue of a stage that nothing touches.
    "shifted onto an eigenvalue of one control": (of_blocks((0.1, 0, 0, 0, 0), (1.0, 0, 0, 0, 0)), -0.1 * (1 + 2.0**-51)),
    # One eigenvalue of rounding below a chain of huge gain.
    "beside a large one": (of_blocks((1e18, 0, 0, 0, 1.0), (0.3, 0, 0, 0, 0)), -0.3 * (1 + 2.0**-51)),
}  # fmt: skip


@pytest.mark.parametrize("method", [*METHODS, "ldu"])
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, torch.float64) for case in SINGULAR]
    # Data rounded to float32 cancel no more.
    + [(case, torch.float32) for case, (_, damping) in SINGULAR.items() if damping],
)
def test_singular_to_rounding_is_refused(case, method, dtype):
    blocks, damping = SINGULAR[case]
    g = right_hand_side(2, 3)
    if dtype == torch.float32 and damping:
        damping = -float(np.float32(-damping)) * (1 + 2.0**-51)
    # Where H is rounding of its summands altogether, its assembly is refused.
    with pytest.raises((FactorizationError, ArithmeticError)):
        lq.Solver(blocks.problem(dtype), damping, method).solve(g)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("gain", [1.0, 30.0, 1e3, 1e5])
def test_shifts_onto_eigenvalues_of_growing_chains(method, gain):
    """What is accepted by its blocks is right in exact arithmetic; one eigenvalue after the other."""
    accepted = 0
    for seed in range(6):
        blocks = growing(seed, gain)
        values = np.linalg.eigvalsh(blocks.hessian())
        for damping in (0.0, *(-values[[0, 2, -1]])):
            g = right_hand_side(6, 2, seed)
            try:
                found = lq.Solver(blocks.problem(), float(damping), method).solve(g)
            except FactorizationError:
                continue
            if np.isnan(found.structured_error):
                continue
            accepted += 1
            assert found.structured_error <= DETERMINED
            truth = exact_truth(seed, gain, float(damping))
            gap = np.linalg.norm(found.x.numpy() - truth, axis=0) / np.linalg.norm(truth, axis=0)
            assert gap.max() <= 1e-5, (seed, damping)
    assert accepted or gain < 1e5


def growing(seed, gain):
    blocks = random_blocks([2, 2, 1, 2, 1], [2, 1, 2, 1], seed, with_A="all")
    for F in blocks.F:
        F *= gain
    return blocks


@cache
def exact_truth(seed, gain, damping):
    return exact_solution(exact_hessian(growing(seed, gain)), damping, right_hand_side(6, 2, seed))


def exact_hessian(blocks):
    """The Hessian in rational numbers."""
    p = [len(A) for A in blocks.A]
    N, start, H = sum(p), 0, fractions(np.zeros((sum(p), sum(p))))
    D = fractions(np.zeros((blocks.F[0].shape[1], N)))
    for l in range(len(p)):
        A, B, C, F, G = (fractions(group[l]) for group in (blocks.A, blocks.B, blocks.C, blocks.F, blocks.G))
        mine = slice(start, start + p[l])
        H[mine, mine] += A
        BD = B @ D
        H[mine] += BD
        H[:, mine] += BD.T
        H += D.T @ C @ D
        D = F @ D
        D[:, mine] += G
        start += p[l]
    return H


def exact_solution(H, damping, g):
    """Gauss-Jordan in rational numbers."""
    K, x = H.copy(), fractions(g)
    for i in range(len(K)):
        K[i, i] += Fraction(damping)
    for i in range(len(K)):
        pivot = next(k for k in range(i, len(K)) if K[k, i] != 0)
        K[[i, pivot]], x[[i, pivot]] = K[[pivot, i]], x[[pivot, i]]
        x[i], K[i] = x[i] / K[i, i], K[i] / K[i, i]
        for k in range(len(K)):
            if k != i and K[k, i] != 0:
                x[k], K[k] = x[k] - K[k, i] * x[i], K[k] - K[k, i] * K[i]
    return x.astype(float)


def fractions(array):
    out = np.empty(array.shape, dtype=object)
    for index, value in np.ndenumerate(array):
        out[index] = Fraction(float(value))
    return out
