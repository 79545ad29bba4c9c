"""Pointwise functions."""

import functools

import torch

from linop_hess.lq.stages.diagonal import DiagonalStage
from tests.lq.stages.conformance import Case, StageConformance, draw, with_adjoint


def case(K=1, n=4):
    generator = torch.Generator().manual_seed(n)
    z, beta = draw(generator, K, n), draw(generator, K, n)
    y = z.sin()
    stage = DiagonalStage(z.cos(), second=-y).with_adjoint(beta)
    return Case(stage, with_adjoint([lambda x, v: v.sin()] * K, z[:, :0], z, beta))


class TestDiagonal(StageConformance):
    cases = {
        "one": case,
        "single entry": functools.partial(case, n=1),
        "stack": functools.partial(case, K=3, n=5),
    }


def test_curvature_that_is_given_stays():
    stage = DiagonalStage(torch.ones(1, 2), torch.full((1, 2), 3.0))
    assert stage.with_adjoint(torch.ones(1, 2)) is stage and stage.nonzero == {"C"}


def test_an_adjoint_takes_the_place_of_another():
    stage = case().stage
    twice = stage.with_adjoint(torch.ones(1, 4, dtype=torch.float64)).with_adjoint(
        2 * torch.ones(1, 4, dtype=torch.float64)
    )
    assert torch.equal(twice.c, 2 * stage.second)
    assert DiagonalStage(stage.f, second=stage.second).nonzero == frozenset()
