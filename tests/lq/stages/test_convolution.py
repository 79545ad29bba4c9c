"""Convolutions with padding and stride, against torch's."""

import functools

import torch
from torch.nn import functional as f

from linop_hess.lq.stages.convolution import Arrangement, ConvolutionStage
from tests.lq.stages.conformance import Case, StageConformance, draw, with_adjoint


def case(K=1, samples=2, channels=2, size=(3, 4), out=3, kernel=(2, 2), padding=0, stride=1, weight=True, bias=True):
    generator = torch.Generator().manual_seed(samples + 7 * out)
    W, w0 = draw(generator, K, out, channels, *kernel), draw(generator, K, out)
    Z = draw(generator, K, samples, channels, *size)

    def map_of(k):
        def map_(x, z):
            own = x[: W[k].numel()].view(W[k].shape) if weight else W[k]
            shift = x[x.numel() - out :] if bias else w0[k]
            return f.conv2d(z.view(Z[k].shape), own, shift, stride, padding).reshape(-1)

        return map_

    x = torch.cat([W.flatten(1)] * weight + [w0] * bias, 1)
    # Which entry each patch entry reads, from an image of the entries' numbers; padding reads none.
    source = Z[0, 0].numel()
    numbers = torch.arange(1.0, source + 1).view(1, channels, *size)
    patches = f.unfold(numbers, kernel, padding=padding, stride=stride)[0].T.long()
    gather = torch.where(patches == 0, source, patches - 1)
    arrangement = Arrangement(samples, source, gather.reshape(-1), gather.shape[0], out)
    rows = arrangement.unfold(Z.reshape(K, -1, 1)).reshape(K, samples * gather.shape[0], -1)
    beta = draw(generator, K, samples * gather.shape[0] * out)
    stage = ConvolutionStage(W.flatten(2), rows, None, weight, bias, arrangement).with_adjoint(beta)
    return Case(stage, with_adjoint([map_of(k) for k in range(K)], x, Z.flatten(1), beta))


class TestConvolution(StageConformance):
    cases = {
        name: functools.partial(case, **settings)
        for name, settings in {
            "plain": {},
            "padding": {"padding": 1},
            "stride": {"size": (5, 4), "stride": 2},
            "stride and padding": {"size": (4, 4), "stride": 2, "padding": 1},
            "weight": {"bias": False},
            "bias": {"weight": False},
            "fewer rows than patch entries": {"samples": 1, "size": (2, 3), "kernel": (2, 2), "channels": 3},
            "fewer rows, more channels": {"samples": 1, "size": (2, 3), "channels": 3, "out": 4, "bias": False},
            "one position": {"samples": 3, "size": (2, 2)},
            "one dimension": {"size": (1, 6), "kernel": (1, 3), "padding": (0, 1)},
            "as large after as before": {"channels": 2, "out": 2, "kernel": (3, 3), "padding": 1},
            "a pixel each": {"channels": 3, "out": 3, "kernel": (1, 1)},
            "stack": {"K": 2, "samples": 1, "size": (2, 3), "channels": 3},
        }.items()
    }


def test_samples_are_those_of_the_batch():
    assert case(samples=3).stage.samples == 3
