"""The objective of a chain."""

import functools

import torch

from linop_hess.lq.stages.objective import ObjectiveStage
from tests.lq.stages.conformance import Case, StageConformance, differentiated, draw, symmetric


def case(m=1, i=3):
    generator = torch.Generator().manual_seed(m)
    row, c = draw(generator, 1, m * i), symmetric(generator, 1, m, i, i)

    def value(x, z):
        parts = zip(c[0], z.view(m, i), strict=True)
        return row @ z + 0.5 * sum(part @ block @ part for block, part in parts)

    at = row.new_zeros(1, 0), row.new_zeros(1, m * i)
    blocks = differentiated([value], [lambda x, z: value(x, z)[0]], *at)
    return Case(ObjectiveStage(row, c), blocks)


class TestObjective(StageConformance):
    cases = {"one": case, "samples": functools.partial(case, m=4, i=2)}


def test_rounding_of_a_semidefinite_hessian_is_taken_off():
    half = torch.randn(1, 1, 2, 5, generator=torch.Generator().manual_seed(0))
    stage = ObjectiveStage(torch.ones(1, 5), half.mT @ half)
    values = torch.linalg.eigvalsh(stage.to(torch.float64).c[0, 0])
    assert float(values[:3].abs().max()) <= 1e-14 * float(values[-1])
    assert float(torch.linalg.eigvalsh(stage.c[0, 0].double())[:3].abs().max()) >= 1e-9 * float(values[-1])
    assert stage.gauss_newton() is stage and stage.with_adjoint(torch.ones(1, 1)) is stage
