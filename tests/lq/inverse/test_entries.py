"""Entries of the inverse are certified, or compared with certified solves."""

import warnings

import numpy as np
import pytest
import torch

from linop_hess.lq import Solver
from linop_hess.lq.inverse import entries, selected
from linop_hess.lq.inverse.entries import DiagonalEntries
from linop_hess.lq.inverse.factors import Factors
from tests.lq.methods.conformance import DTYPES, MIXED, SHAPES, WIRED, setting


def entries_of(truth, damping, method="riccati"):
    solver = Solver(truth.analysis, damping, method)
    return DiagonalEntries(Factors(solver.analysis, damping, solver.plan, solver.factorization), solver)


@pytest.fixture
def no_columns(monkeypatch):
    """As if N were too large to solve for all columns of the inverse."""
    monkeypatch.setattr(entries, "SOLVED_UP_TO", -1)


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, *MIXED, *WIRED])
def test_against_the_dense_inverse(shape, dtype, few, monkeypatch):
    if not few:
        monkeypatch.setattr(entries, "SOLVED_UP_TO", 0)
    truth = setting(shape, dtype)
    for damping in (0.5, -0.3, 1e-3):
        expected, condition = np.linalg.inv(truth.shifted(damping)), np.linalg.cond(truth.shifted(damping))
        found = entries_of(truth, damping)
        atol = 2e-13 * (10 + condition) * np.abs(expected).max(initial=0.0)
        np.testing.assert_allclose(found.diagonal.numpy(), np.diag(expected), rtol=0, atol=atol)
        assert found.diagonal.dtype == torch.float64 and (found.gap == 0.0) == few or found.gap <= atol
        assert sum(len(block) for block in found.blocks()) == len(truth.H)


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("method", ["riccati", "dense"])
@pytest.mark.parametrize("shape", [*SHAPES, *MIXED, *WIRED])
def test_blocks_at_any_places(shape, method, few, monkeypatch):
    """Of a whole stage, inside one, across stages and empty; columns of those across stages a few at a time."""
    truth = setting(shape)
    N, layout = len(truth.H), truth.analysis.problem.layout
    monkeypatch.setattr(entries, "SOLVED_UP_TO", N if few else -1)
    monkeypatch.setattr(entries, "_COLUMNS_BYTES", 8 * 3 * N)
    stages = [np.sort(layout.controls(l)) for l in np.flatnonzero(layout.p).tolist()]
    sets = [*stages, *(one[1::2] for one in stages), np.arange(0, N, 3), np.arange(N), np.arange(0)]
    # Every pair of shape, method, way and damping.
    damping = (0.5, -0.3)[([*SHAPES, *MIXED, *WIRED].index(shape) + (method == "dense") + few) % 2]
    expected, condition = np.linalg.inv(truth.shifted(damping)), np.linalg.cond(truth.shifted(damping))
    atol = 2e-13 * (10 + condition) * np.abs(expected).max(initial=0.0)
    for one, block in zip(sets, entries_of(truth, damping, method).blocks_at(sets), strict=True):
        np.testing.assert_allclose(block.numpy(), expected[np.ix_(one, one)], rtol=0, atol=atol)


def test_a_wrong_way_is_found_out_and_the_careful_one_taken(no_columns, monkeypatch):
    truth = setting("wildly varying")
    expected = np.diag(np.linalg.inv(truth.shifted(0.5)))
    genuine, tried = selected.diagonal, []

    def first_wrong(factors):
        tried.append(factors)
        return genuine(factors) * (1.0 + 1e-7 * (len(tried) == 1))

    monkeypatch.setattr(selected, "diagonal", first_wrong)
    found = entries_of(truth, 0.5)
    np.testing.assert_allclose(found.diagonal.numpy(), expected, rtol=0, atol=1e-11 * np.abs(expected).max())
    assert len(tried) == 2 and tried[0] is not tried[1]


def test_what_no_way_gets_right_is_told(no_columns, monkeypatch):
    truth = setting("wildly varying")
    genuine = selected.diagonal
    monkeypatch.setattr(selected, "diagonal", lambda factors: 1.001 * genuine(factors))
    with pytest.raises(ArithmeticError, match="differs by .* from certified solves"):
        entries_of(truth, 0.5)
    monkeypatch.setattr(selected, "diagonal", lambda factors: genuine(factors) * np.nan)
    with pytest.raises(ArithmeticError):
        entries_of(truth, 0.5)
    monkeypatch.setattr(selected, "diagonal", lambda factors: (1.0 + 1e-6) * genuine(factors))
    with pytest.warns(RuntimeWarning, match="more than rounding explains"):
        assert entries_of(truth, 0.5).gap > 0
    monkeypatch.setattr(selected, "diagonal", genuine)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        entries_of(truth, 0.5)


@pytest.mark.parametrize("method", ["riccati", "dense"])
@pytest.mark.parametrize("shape", WIRED)
def test_blocks_of_controls_that_lie_anywhere(shape, method, no_columns):
    """A set of places is ascending, whatever the order of the stage that they belong to."""
    truth = setting(shape)
    found = entries_of(truth, 0.5, method)
    inverse = np.linalg.inv(truth.shifted(0.5))
    sets = [np.sort(own) for own in truth.controls()]
    sets += [own[:-1] for own in sets] + [np.arange(len(inverse))]
    for places, block in zip(sets, found.blocks_at(sets), strict=True):
        np.testing.assert_allclose(
            block.numpy(), inverse[np.ix_(places, places)], rtol=0, atol=1e-11 * np.abs(inverse).max()
        )
