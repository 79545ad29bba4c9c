"""Stages with controls in other units, and with curvature of their controls added."""

import functools
from dataclasses import replace

import pytest
import torch

from linop_hess.lq.stages.affine import AffineStage
from linop_hess.lq.stages.convolution import ConvolutionStage
from linop_hess.lq.stages.injection import InitialStage
from linop_hess.lq.stages.penalized import CurvedStage, EntrywiseRowSpace, ScaledStage, scaled
from linop_hess.lq.stages.wired import WiredStage
from tests.lq.stages import test_affine, test_convolution, test_dense, test_embedding, test_scale_shift, test_wired
from tests.lq.stages.conformance import Case, StageConformance, draw


def one_unit(K, p, o):
    return torch.full((K, p), 0.375).double() + torch.arange(K)[:, None]


def unit_a_tensor(K, p, o):
    """One unit for a weight of p − o entries, another for a bias of o."""
    return torch.cat([torch.full((K, p - o), 0.25), torch.full((K, o), 3.0)], 1).double()


def unit_an_entry(K, p, o):
    return draw(torch.Generator().manual_seed(11), K, p).abs() + 0.5


def in_units(make, units, o=0):
    inner = make()
    blocks, K, p = inner.blocks, inner.stage.count, inner.stage.p
    t = units(K, p, o)
    A = blocks.A * t[:, :, None] * t[:, None, :]
    return Case(scaled(inner.stage, t), replace(blocks, G=blocks.G * t[:, None], A=A, B=blocks.B * t[:, :, None]))


WIDE = functools.partial(test_affine.case, rows=2, inputs=5)
O = WIDE().stage.W.shape[1]


class TestScaled(StageConformance):
    cases = {
        f"{kind}, {units.__name__.replace('_', ' ')}": functools.partial(in_units, make, units, o)
        for kind, make, o in (
            ("affine", WIDE, O),
            ("affine, stack", functools.partial(test_affine.case, K=2), O),
            ("affine, wide stack", functools.partial(test_affine.case, K=2, rows=2, inputs=6, outputs=3), 3),
            ("affine, many outputs", functools.partial(test_affine.case, rows=2, inputs=4, outputs=9), 9),
            ("affine, no bias", functools.partial(test_affine.case, rows=2, inputs=4, bias=False), 2),
            ("convolution", test_convolution.case, test_convolution.case().stage.W.shape[1]),
            ("dense", functools.partial(test_dense.case, m=2), 2),
            ("embedding", test_embedding.case, 2),
            ("scale and shift", next(iter(test_scale_shift.TestScaleShift.cases.values())), 1),
            ("wired", next(iter(test_wired.TestWired.cases.values())), 1),
        )
        for units in (one_unit, unit_a_tensor, unit_an_entry)
        # Kinds that keep their structure in units of their own in all, what they share with others in one.
        if kind in ("affine", "convolution", "dense", "wired") or units is unit_a_tensor
    }


@pytest.mark.parametrize("units", [one_unit, unit_a_tensor])
def test_an_affine_stage_keeps_its_structure(units):
    """One unit a tensor: a Kronecker product as before, so that nothing of n_out × p is formed."""
    for make, kind in ((WIDE, AffineStage), (test_convolution.case, ConvolutionStage)):
        stage = make().stage
        t = units(stage.count, stage.p, stage.W.shape[1])
        assert type(scaled(stage, t)) is kind
        assert type(scaled(stage, t).row_space()) is type(stage.row_space())
        assert type(scaled(InitialStage(stage), t).inner) is kind
        assert torch.equal(scaled(scaled(stage, t), t).dense_G(), stage.dense_G() * t[:, None].square())
    assert isinstance(scaled(stage, unit_an_entry(stage.count, stage.p, 0)), ScaledStage)
    assert isinstance(scaled(WIDE().stage, unit_an_entry(1, WIDE().stage.p, 0)).row_space(), EntrywiseRowSpace)
    wired = next(iter(test_wired.TestWired.cases.values()))().stage
    assert isinstance(scaled(wired, one_unit(wired.count, wired.p, 0)), WiredStage)


def test_the_adjoint_may_come_after_the_units():
    case = WIDE()
    t = unit_a_tensor(1, case.stage.p, O)
    again = scaled(case.stage.gauss_newton(), t).with_adjoint(case.stage.beta.reshape(1, -1))
    torch.testing.assert_close(again.dense_B(), case.blocks.B * t[:, :, None], rtol=1e-14, atol=1e-14)


def every_control(K, p, o):
    return -unit_an_entry(K, p, o)


def the_last(K, p, o):
    """The bias, where o is its size."""
    return torch.where(torch.arange(p) >= p - o, every_control(K, p, o), 0.0)


def the_first(K, p, o):
    return torch.where(torch.arange(p) < max(1, p // 3), every_control(K, p, o), 0.0)


def curved(make, curvature, o):
    inner = make()
    diagonal = curvature(inner.stage.count, inner.stage.p, o)
    return Case(
        CurvedStage(inner.stage, diagonal), replace(inner.blocks, A=inner.blocks.A + torch.diag_embed(diagonal))
    )


class TestCurved(StageConformance):
    cases = {
        f"{kind}, {curvature.__name__.replace('_', ' ')}": functools.partial(curved, make, curvature, o)
        for kind, make, o in (
            ("affine", WIDE, O),
            ("affine, many rows", functools.partial(test_affine.case, rows=7), O),
            ("convolution", test_convolution.case, test_convolution.case().stage.W.shape[1]),
            ("dense", functools.partial(test_dense.case, m=2), 2),
            ("embedding", test_embedding.case, 2),
            ("wired", next(iter(test_wired.TestWired.cases.values())), 2),
            ("affine in units", functools.partial(in_units, WIDE, unit_a_tensor, O), O),
            ("affine in units of entries", functools.partial(in_units, WIDE, unit_an_entry), O),
        )
        for curvature in (every_control, the_last, the_first)
        if kind in ("affine", "dense", "wired") or curvature is the_last
    }


def test_only_curved_controls_join_the_visible_ones():
    case = curved(WIDE, the_last, O)
    space, before = case.stage.row_space(), case.stage.inner.row_space()
    assert before.r < space.r <= before.r + O and space.hidden > 0 and type(space) is type(before)
