"""The elimination of one pivot block."""

import math

import numpy as np
import pytest
import torch

from linop_hess.lq.pivots.delayed import (
    PackedElimination,
    eliminate,
    obey,
    packed_among,
    pivots_of,
    stacked_by_size,
    subtract_gram,
)
from linop_hess.lq.pivots.rules import BoundedGrowth, SmallPivots


def block(r, n, seed=0, small=0):
    """S with `small` eigenvalues of 1e-9, a coupling E, and a value V."""
    generator = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn(r, r, generator=generator).double()).Q
    values = torch.linspace(-2.0, 3.0, r).double() if r > 1 else torch.ones(r).double()
    values[values.abs() < 0.05] = 0.7
    values[:small] = 1e-9
    S = U * values @ U.mT
    V = torch.randn(n, n, generator=generator).double()
    return (S + S.mT) / 2, torch.randn(r, n, generator=generator).double(), V + V.mT


SIZES = [(0, 3), (1, 1), (4, 3), (5, 0), (20, 7), (80, 30)]


@pytest.mark.parametrize("careful", [False, True])
@pytest.mark.parametrize("small", [0, 2])
@pytest.mark.parametrize(("r", "n"), [size for size in SIZES if size[0] > 3])
def test_delayed_or_not_it_is_the_same_system(r, n, small, careful):
    """With the delayed directions c as unknowns of what remains, (S, E; Eᵀ, V) is solved."""
    S, E, V = block(r, n, small=small)
    found = eliminate(S, E, SmallPivots(1e-3), torch.ones(n, 1).double(), last=False, careful=careful)
    assert found.delayed == small and found.theta.numel() == r - small
    left = V.clone()
    found.take_off(left)
    # What remains: [V', Y; Yᵀ, μ] in (δ, c), c an unknown too.
    remaining = torch.cat(
        [torch.cat([left, found.coupling], 1), torch.cat([found.coupling.mT, torch.diag(found.mu)], 1)]
    )
    whole = torch.cat([torch.cat([S, E], 1), torch.cat([E.mT, V], 1)])
    signs = lambda M: (int((torch.linalg.eigvalsh(M) < 0).sum()), int((torch.linalg.eigvalsh(M) > 0).sum()))  # noqa: E731
    of_pivots = int((found.theta < 0).sum()), int((found.theta > 0).sum())
    assert tuple(np.add(of_pivots, signs(remaining))) == signs(whole)
    torch.testing.assert_close(
        torch.linalg.slogdet(whole)[1],
        found.theta.abs().log().sum() + torch.linalg.slogdet(remaining)[1],
        rtol=1e-7,
        atol=0,
    )
    # u = XᵀY load + K (δ, c) minimizes, whatever (δ, c).
    load, d, c = (torch.randn(k, 2, generator=torch.Generator().manual_seed(3)).double() for k in (r, n, small))
    X, Y, K = found.response()
    u = X.mT @ (Y @ load) + K @ torch.cat([d, c])
    residual = S @ u + E @ d - load
    torch.testing.assert_close(
        found.pivots.whiten(residual),
        torch.zeros(r - small, 2).double(),
        rtol=0,
        atol=1e-11 * (1 + float(u.abs().max())),
    )
    torch.testing.assert_close(found.W.mT @ u, c, rtol=0, atol=1e-9 * (1 + float(u.abs().max())))
    assert found.whitened() is found and found.nbytes > 0


@pytest.mark.parametrize(("r", "n"), SIZES)
def test_the_last_block_is_eliminated_whole(r, n):
    S, E, V = block(r, n, small=min(r, 1))
    found = eliminate(S, E, SmallPivots(1.0), torch.ones(n, 1).double(), last=True)
    assert found.delayed == 0
    left = V.clone()
    found.take_off(left)
    expected = V - E.mT @ torch.linalg.solve(S, E) if r else V
    torch.testing.assert_close(left, expected, rtol=1e-5, atol=1e-9 * (1 + float(expected.abs().max() if n else 0)))


@pytest.mark.parametrize("r", [3, 80])
def test_what_may_not_be_divided_by(r):
    S, E, _ = block(r, 2)
    unit = torch.ones(2, 1).double()
    with pytest.raises(ZeroDivisionError, match="zero"):
        eliminate(torch.zeros_like(S), E, SmallPivots(1e-3), unit, last=True)
    for bad in (math.nan, math.inf):
        wrong = S.clone()
        wrong[-1, 0] = bad
        with pytest.raises(ArithmeticError, match="NaN or Inf"):
            eliminate(wrong, E, SmallPivots(1e-3), unit, last=False)


def test_units_say_what_a_coupling_is_worth():
    """The same block is delayed where the state moves far, and not where it hardly moves."""
    S, E, _ = block(4, 3)
    rule = BoundedGrowth(1.0)
    near, far = (eliminate(S, E, rule, unit * torch.ones(3, 1).double(), last=False) for unit in (1e-3, 1e3))
    assert near.delayed == 0 and far.delayed == 4


@pytest.mark.parametrize("seed", range(5))
def test_packed(seed):
    S, E, V = block(6, 3, seed)
    S.diagonal().mul_(0.05)
    found = PackedElimination.of(S, E)
    assert bool((found.interchanges < 0).any()) or seed
    assert found.delayed == found.W.shape[1] == found.mu.numel() == found.coupling.shape[1] == 0
    kept = [array.clone() for array in (found.packed, found.interchanges, found.E, found.gain)]
    white = found.whitened()
    for mine, before in zip((found.packed, found.interchanges, found.E, found.gain), kept, strict=True):
        assert torch.equal(mine, before)  # whitening once overwrote the factors
    torch.testing.assert_close(white.theta, found.theta, rtol=1e-12, atol=0)
    torch.testing.assert_close(white.white.mT @ (white.white / white.theta[:, None]), E.mT @ torch.linalg.solve(S, E))
    for one in (found, white):
        left = V.clone()
        one.take_off(left)
        torch.testing.assert_close(left, V - E.mT @ torch.linalg.solve(S, E), rtol=1e-10, atol=1e-10)
        X, Y, K = one.response()
        torch.testing.assert_close(X.mT @ Y, torch.linalg.inv(S), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(K, -torch.linalg.solve(S, E), rtol=1e-9, atol=1e-9)
    assert found.nbytes > 0


def test_packed_with_leading_axes():
    blocks = [block(5, 3, seed) for seed in range(4)]
    S, E, V = (torch.stack(part) for part in zip(*blocks, strict=True))
    found = PackedElimination.of(S, E)
    left = V.clone()
    found.take_off(left)
    torch.testing.assert_close(left, V - E.mT @ torch.linalg.solve(S, E), rtol=1e-10, atol=1e-10)
    for k in range(4):
        torch.testing.assert_close(found.theta[k], PackedElimination.of(S[k], E[k]).theta)


def mixed():
    sizes = [(3, 2), (5, 2), (3, 2), (0, 2), (3, 4)]
    return [PackedElimination.of(*block(r, n, seed)[:2]) for seed, (r, n) in enumerate(sizes)]


def test_stacked_by_size_and_pivots_of():
    alike = dict((tuple(positions), e.theta.shape) for positions, e in stacked_by_size(packed_among(mixed())))
    assert alike == {(0, 2): (2, 3), (1,): (1, 5), (3,): (1, 0), (4,): (1, 3)}
    for found, expected in zip(pivots_of(mixed()), mixed(), strict=True):
        torch.testing.assert_close(found, expected.theta)
    other = [*mixed(), mixed()[0].whitened()]
    assert [theta.numel() for theta in pivots_of(other)] == [3, 5, 3, 0, 3, 3]


def test_obey():
    units = [torch.ones(e.E.shape[1], 1).double() for e in mixed()]
    assert list(packed_among([mixed()[0].whitened(), *mixed()])) == [1, 2, 3, 4, 5]
    for eliminations in (mixed(), [e.whitened() for e in mixed()], [mixed()[0].whitened(), *mixed()[1:]]):
        assert obey(BoundedGrowth(1e6), eliminations, units)
        assert not obey(BoundedGrowth(1e-6), eliminations, units)
    assert obey(BoundedGrowth(0.0), [], [])


@pytest.mark.parametrize("n", [0, 5, 255, 256, 301])
def test_subtract_gram(n):
    generator = torch.Generator().manual_seed(n)
    X, theta = torch.randn(7, n, generator=generator).double(), torch.linspace(-3.0, 4.1, 7).double()
    V = torch.randn(n, n, generator=generator).double()
    V = V + V.mT
    expected = V - X.mT @ (X / theta[:, None])
    subtract_gram(V, X, theta)
    torch.testing.assert_close(V, expected, rtol=0, atol=1e-11)
