"""Affine stages: weight, bias and both; more rows than features and fewer; rows that repeat or vanish."""

import functools

import pytest
import torch

from linop_hess.lq.stages.affine import AffineStage
from tests.lq.stages.conformance import Case, StageConformance, draw, with_adjoint


def case(K=1, rows=4, inputs=3, outputs=2, weight=True, bias=True, spoil=None):
    generator = torch.Generator().manual_seed(rows + 10 * inputs)
    W, w0 = draw(generator, K, outputs, inputs), draw(generator, K, outputs)
    Z, beta = draw(generator, K, rows, inputs), draw(generator, K, rows * outputs)
    if spoil is not None:
        spoil(Z)

    def map_of(k):
        def map_(x, z):
            own = x[: outputs * inputs].view(outputs, inputs) if weight else W[k]
            shift = x[x.numel() - outputs :] if bias else w0[k]
            return (z.view(rows, inputs) @ own.T + shift).reshape(-1)

        return map_

    x = torch.cat([W.flatten(1)] * weight + [w0] * bias + [W.new_zeros(K, 0)], 1)
    stage = AffineStage(W, Z, None, weight, bias).with_adjoint(beta)
    return Case(stage, with_adjoint([map_of(k) for k in range(K)], x, Z.flatten(1), beta))


def repeat(Z):
    Z[:, 1] = Z[:, 0]
    Z[:, 2:] = 2 * Z[:, :1]


def vanish(Z):
    Z[:, 1] = 0.0


def one_vanishes(Z):
    Z[0, 0] = 0.0


class TestAffine(StageConformance):
    cases = {
        name: functools.partial(case, **settings)
        for name, settings in {
            "more rows": {"rows": 7},
            "fewer rows": {"rows": 2, "inputs": 5},
            "fewer rows, more outputs": {"rows": 3, "inputs": 5, "outputs": 6},
            "weight": {"rows": 3, "inputs": 5, "bias": False},
            "bias": {"rows": 3, "weight": False},
            "neither": {"rows": 3, "weight": False, "bias": False},
            "one row": {"rows": 1, "inputs": 4, "outputs": 3},
            "one row, weight": {"rows": 1, "inputs": 4, "bias": False},
            "rows as features": {"rows": 3, "inputs": 3, "bias": False},
            "repeated rows": {"rows": 4, "inputs": 6, "spoil": repeat},
            "a zero row": {"rows": 3, "inputs": 5, "bias": False, "spoil": vanish},
            "zero rows, more rows": {"rows": 6, "spoil": vanish},
            "one zero row alone": {"rows": 1, "inputs": 3, "bias": False, "spoil": one_vanishes},
            "stack": {"K": 3, "rows": 2, "inputs": 4},
            "stack, one row": {"K": 3, "rows": 1, "inputs": 4},
            "stack of which one has a zero row": {"K": 2, "rows": 1, "inputs": 3, "bias": False, "spoil": one_vanishes},
            "stack, more rows": {"K": 2, "rows": 5, "inputs": 2},
        }.items()
    }


def test_samples_are_the_rows_and_the_coupling_is_thin():
    stage = case(rows=3, inputs=20, outputs=5).stage
    space = stage.row_space()
    assert stage.samples == 3 and (space.r, space.hidden) == (15, 90)
    assert space.hidden_coupling().shape == (1, 3 * (21 - 3), 60)
    assert not stage.gauss_newton().row_space().coupled


def test_repeated_rows_are_seen_once():
    space = case(rows=4, inputs=6, spoil=repeat, bias=False).stage.row_space()
    assert space.r == 2


@pytest.mark.parametrize("small", [1e-4, 1e-7])
def test_small_couplings_keep_their_digits(small):
    """Adjoints that are nearly parallel: singular values of N far below the largest, to eps of the largest, not to its root."""
    stage = case(rows=2, inputs=5, outputs=3, bias=False).stage
    stage.beta[0, 1] = stage.beta[0, 0] + small * stage.beta[0, 1]
    space = stage.row_space()
    sigma = torch.linalg.svdvals(space.hidden_coupling()[0])
    truth = torch.linalg.svdvals(stage.beta[0]).repeat_interleave(3)
    torch.testing.assert_close(sigma[sigma > 1e-12], truth, rtol=0, atol=1e-14)


def test_hidden_directions_of_small_coupling_are_orthogonal_to_the_row_space():
    """Of a large input next to a bias hardly anything is hidden: what is left of B after one projection has rounding along Q."""
    stage = case(rows=1, inputs=4, outputs=2).stage
    stage.Z.mul_(1e5)
    space = stage.row_space()
    _, sigma, Wt = torch.linalg.svd(space.hidden_coupling()[0], full_matrices=False)
    w, smallest = Wt[-1:].mT, sigma[-1]
    assert 1e-7 < float(smallest / sigma[0]) < 1e-4
    U = space.hidden_directions((w / smallest)[None])
    assert float(space.Qt(U).abs().max()) <= 1e-15
    torch.testing.assert_close(float(U.norm()), 1.0, rtol=0, atol=1e-15 * float(sigma[0] / smallest))
