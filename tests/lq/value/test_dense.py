"""A dense cost-to-go."""

import pytest
import torch

from linop_hess.lq.pivots.delayed import PackedElimination, eliminate
from linop_hess.lq.pivots.hidden import Hidden
from linop_hess.lq.pivots.rules import BoundedGrowth
from linop_hess.lq.stages.dense import DenseStage
from linop_hess.lq.stages.diagonal import DiagonalStage
from linop_hess.lq.value.controls import CondensedControl
from linop_hess.lq.value.dense import DenseValue


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def symmetric(seed, n):
    half = draw(seed, n, n)
    return half + half.mT


def control(n_out, r, n_in, seed=0, free=False):
    T, W = symmetric(seed, r + n_in), draw(seed + 1, n_out, r + n_in)
    return CondensedControl(W, T, r), T, W


def quadratic(M, *parts):
    u = torch.cat(parts)
    return (u.mT @ M @ u).diagonal() / 2


@pytest.mark.parametrize("late", [0, 2])
def test_pull_back(late):
    stage = DenseStage.plain(draw(0, 1, 4, 3), None, None, None, symmetric(1, 3)[None])
    Y, Lambda = (draw(2, 4, late), symmetric(3, late)) if late else (None, None)
    value = DenseValue(symmetric(4, 4), Y, Lambda)
    found = value.pull_back(stage)
    F, C = stage.f[0, 0], stage.c[0, 0]
    torch.testing.assert_close(found.V, F.mT @ value.V @ F + C)
    if late:
        torch.testing.assert_close(found.Y, F.mT @ Y)
        assert found.Lambda is Lambda


@pytest.mark.parametrize("late", [0, 2])
def test_a_step_is_the_minimum_over_the_controls(late):
    """Pivot and downdate, against the stationary value of the quadratic form in (s, c, δ) by a dense Schur complement."""
    here, T, W = control(4, 3, 5)
    Y, Lambda = (draw(2, 4, late), symmetric(3, late)) if late else (None, None)
    V = symmetric(4, 4)
    S, E, before = DenseValue(V, Y, Lambda).pivot(here)
    r = 3 + late
    assert S.shape == (r, r) and E.shape == (r, 5)
    # The whole form in (s, c, δ): ½ uᵀTu + ½ δ⁺ᵀVδ⁺ + δ⁺ᵀYc + ½ cᵀΛc.
    s, c, d = draw(5, 3, 2), draw(6, late, 2), draw(7, 5, 2)
    after = W @ torch.cat([s, d])
    expected = quadratic(T, s, d) + quadratic(V, after)
    if late:
        expected = expected + (after.mT @ Y @ c).diagonal() + quadratic(Lambda, c)
    u = torch.cat([s, c])
    found = quadratic(S, u) + (u.mT @ E @ d).diagonal() + quadratic(before.V, d)
    torch.testing.assert_close(found, expected)
    dense = before.V - E.mT @ torch.linalg.solve(S, E)
    left = before.downdate(PackedElimination.of(S, E), Hidden())
    torch.testing.assert_close(left.V, dense, rtol=1e-9, atol=1e-9)
    assert left.Y is None and left.compress() is left


def test_delayed_directions_are_carried_along():
    here, _, _ = control(4, 3, 5)
    S, E, before = DenseValue(symmetric(4, 4)).pivot(here)
    elimination = eliminate(S, E, BoundedGrowth(0.0), torch.ones(5, 1).double(), last=False)
    U = torch.linalg.qr(draw(8, 5, 2)).Q
    hidden = Hidden(directions=draw(9, 6, 2), coupling=U, damping=0.25)
    left = before.downdate(elimination, hidden)
    assert elimination.delayed == 3 and left.Y.shape == (5, 5)
    torch.testing.assert_close(left.Y, torch.cat([E.mT @ elimination.W, U], 1))
    torch.testing.assert_close(left.Lambda, torch.diag(torch.cat([elimination.mu, torch.full((2,), 0.25).double()])))
    assert left.pull_back_state(control(5, 2, 3)[0]).Y is None


@pytest.mark.parametrize("batch", [False, True])
def test_entries_that_pass_by(batch):
    """States longer than the control's: the rest is unchanged."""
    here, T, W = control(4, 3, 5)
    V = symmetric(4, 6)
    if batch:
        here, V = CondensedControl(W.expand(2, -1, -1), T.expand(2, -1, -1), 3), V.expand(2, -1, -1)
    S, E, before = DenseValue(V).pivot(here)
    s, d, by = draw(5, 3, 2), draw(7, 5, 2), draw(6, 2, 2)
    expected = quadratic(T, s, d) + quadratic(V[0] if batch else V, W @ torch.cat([s, d]), by)
    state = torch.cat([d, by])
    for part in range(2 if batch else 1):
        S_, E_, V_ = (X[part] if batch else X for X in (S, E, before.V))
        found = quadratic(S_, s) + (s.mT @ E_ @ state).diagonal() + quadratic(V_, state)
        torch.testing.assert_close(found, expected)


def test_products_and_sizes():
    value = DenseValue(symmetric(0, 3))
    d = draw(1, 3, 2)
    torch.testing.assert_close(value @ d, value.V @ d)
    units = torch.tensor([[1.0], [10.0], [100.0]]).double()
    assert value.largest(units) == pytest.approx(float((value.V * units * units.mT).abs().max()))
    assert DenseValue(torch.zeros(0, 0)).largest(torch.ones(0, 1)) == 0.0


@pytest.mark.parametrize("is_own", [False, True])
def test_what_is_its_own_is_written_over_and_nothing_else(is_own):
    stage = DiagonalStage(draw(0, 1, 4), draw(1, 1, 4))
    V = symmetric(2, 4)
    before, expected = V.clone(), stage.pull_back(V)
    found = DenseValue(V, is_own=is_own).pull_back(stage)
    assert torch.equal(found.V, expected) and found.is_own == is_own
    assert torch.equal(V, expected if is_own else before)
