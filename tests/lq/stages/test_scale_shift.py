"""Scale and shift per feature, of entries as they are or standardized."""

import functools

import torch

from linop_hess.lq.stages.scale_shift import Features, ScaleShiftStage
from tests.lq.stages.conformance import Case, StageConformance, draw, with_adjoint


def case(K=1, features=3, each=2, weight=True, bias=True, standardize=True):
    generator = torch.Generator().manual_seed(features)
    index = torch.arange(features).repeat(each)
    n = index.numel()
    w, w0, beta, z = (draw(generator, K, size) for size in (features, features, n, n))
    slope = draw(generator, K, n) if standardize else torch.ones(K, n, dtype=torch.float64)
    mean = draw(generator, K, n) * standardize

    def map_of(k):
        def map_(x, v):
            own = x[:features] if weight else w[k]
            shift = x[x.numel() - features :] if bias else w0[k]
            return own[index] * ((v - mean[k]) * slope[k]) + shift[index]

        return map_

    x = torch.cat([w] * weight + [w0] * bias + [w.new_zeros(K, 0)], 1)
    normalized = (z - mean) * slope
    stage = ScaleShiftStage(normalized, slope, w[:, index], None, Features(index, features), weight, bias)
    return Case(stage.with_adjoint(beta), with_adjoint([map_of(k) for k in range(K)], x, z, beta))


class TestScaleShift(StageConformance):
    cases = {
        name: functools.partial(case, **settings)
        for name, settings in {
            "both": {},
            "weight": {"bias": False},
            "bias": {"weight": False},
            "neither": {"weight": False, "bias": False},
            "as they are": {"standardize": False},
            "more controls than entries": {"each": 1},
            "stack": {"K": 3},
        }.items()
    }


def test_every_entry_is_by_itself():
    assert case(features=3, each=4).stage.samples == 12
