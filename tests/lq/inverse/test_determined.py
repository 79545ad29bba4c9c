"""Inertia, determinants, samples, entries and positive products where ‖H‖ exceeds all pivots by more than 1/eps."""

import numpy as np
import pytest
import torch

from linop_hess import HessianInverse, lq
from linop_hess.errors import FactorizationError
from linop_hess.lq.inverse.determined import determined, looks_singular
from linop_hess.lq.pivots.inertia import Inertia
from tests.lq.methods.conformance import setting
from tests.lq.problems import of_blocks, pendulum, random_blocks
from tests.lq.solve.test_structured import SINGULAR


@pytest.mark.parametrize(
    ("method", "seconds"), [("riccati", 6), ("dense", 6), ("riccati", 12), ("dense", 12), ("auto", 20)]
)
def test_an_unstable_system_answers_everything(method, seconds):
    blocks, g, u, log = pendulum(seconds)
    inverse = HessianInverse(blocks.problem(), 0.0, method)
    N = len(g)
    assert inverse.inertia() == Inertia(0, 0, N) and inverse.is_positive_definite
    sign, found = inverse.slogdet()
    assert sign == 1.0 and found == pytest.approx(log, rel=1e-13)
    assert np.abs(inverse.positive() @ g - u).max() <= 1e-11 * np.abs(u).max()
    diagonal = inverse.diagonal()
    places = [0, N // 2, N - 1]
    columns = inverse.solve(np.eye(N)[:, places]).x
    np.testing.assert_allclose(diagonal[places], columns[places, range(3)], rtol=1e-12)
    samples = inverse.sample(4000, torch.Generator().manual_seed(0))
    assert np.abs(np.square(samples).mean(1) / diagonal - 1).max() <= 0.15


def test_an_indefinite_one():
    """The last pushes of the pendulum get negative curvature: as many negative pivots."""
    blocks, g, _, _ = pendulum(8)
    blocks.A[-4:-1] = [-A for A in blocks.A[-4:-1]]
    blocks.C[-1] = np.zeros((2, 2))
    pivots = textbook_pivots(blocks)
    inverse = HessianInverse(blocks.problem(), 0.0)
    assert inverse.inertia() == Inertia(int((pivots < 0).sum()), 0, int((pivots > 0).sum())) == Inertia(3, 0, 197)
    assert inverse.slogdet() == (-1.0, pytest.approx(np.log(np.abs(pivots)).sum(), rel=1e-13))
    # L⁻ᵀ|D|⁻¹L⁻¹ − L⁻ᵀD⁻¹L⁻¹ is positive semidefinite, of the rank of the negative part of D.
    G = np.random.default_rng(1).standard_normal((200, 6))
    gap = G.T @ (inverse.positive() @ G - inverse.solve(G).x)
    values = np.linalg.eigvalsh((gap + gap.T) / 2)
    assert np.all(values[3:] > 1e-3 * values[-1]) and np.abs(values[:3]).max() <= 1e-9 * values[-1]


def textbook_pivots(blocks):
    """Pivots of the recursion with one control a stage, without any delay."""
    P, pivots = np.zeros((0, 0)), []
    for A, B, C, F, G in zip(
        *(group[::-1] for group in (blocks.A, blocks.B, blocks.C, blocks.F, blocks.G)), strict=True
    ):
        E, V = B + G.T @ P @ F, F.T @ P @ F + C
        if len(A):
            S = A + G.T @ P @ G
            pivots.append(S[0, 0])
            V = V - E.T @ E / S
        P = V
    return np.array(pivots)


@pytest.mark.parametrize("case", SINGULAR)
def test_what_is_singular_is_not_determined(case):
    blocks, damping = SINGULAR[case]
    analysis = lq.Analysis(blocks.problem())
    assert determined(analysis, damping, lq.make_plan(analysis, damping)) is None
    try:
        found = lq.Inverse(analysis, damping).inertia
    except (FactorizationError, ArithmeticError):
        return
    assert found.zero == 1


def test_well_conditioned_ones_are_left_alone():
    truth = setting("equal")
    inverse = lq.Inverse(truth.analysis, 0.3)
    assert not looks_singular(inverse.solver.factorization)
    assert determined(truth.analysis, 0.3, inverse.solver.plan).inertia(0.0) == inverse.inertia


@pytest.mark.parametrize("method", ["auto", "riccati", "dense"])
def test_the_sign_of_an_eigenvalue_of_rounding_is_not_told(method):
    """Shifts onto eigenvalues: those found negative and positive are; what is not certain is counted as zero, or refused."""
    for seed in range(25):
        blocks = random_blocks([2, 2, 1, 2], [2, 1, 2], seed, with_A="some")
        values = np.linalg.eigvalsh(blocks.hessian())
        for value in values[::2]:
            try:
                inverse = lq.Inverse(blocks.problem(), float(-value), method)
                found = inverse.inertia
            except FactorizationError:
                continue
            gaps = values - value
            near = np.abs(gaps) <= 1e-12 * np.abs(values).max()
            assert found.zero == near.sum(), (seed, value)
            assert found.negative == (gaps[~near] < 0).sum()
            with pytest.raises(FactorizationError, match="determinant is zero"):
                inverse.slogdet()


def test_one_control():
    for damping, inertia in ((-0.1, Inertia(1, 0, 1)), (0.5, Inertia(0, 0, 2))):
        assert lq.Inverse(of_blocks((1e20, 0, 0, 0, 1.0), (0.05, 0, 0, 0, 0)).problem(), damping).inertia == inertia
