"""Stages without a state before them: controls that become state, controls that nothing sees, and the first of a chain."""

import functools
from dataclasses import replace

import torch

from linop_hess.lq.stages.base import common_samples
from linop_hess.lq.stages.diagonal import DiagonalStage
from linop_hess.lq.stages.injection import IdleStage, InitialStage, InjectionStage
from tests.lq.stages import test_affine, test_convolution, test_dense, test_embedding
from tests.lq.stages.conformance import Blocks, Case, StageConformance, with_adjoint


def injected(K=1, size=4):
    x = torch.ones(K, size, dtype=torch.float64)
    return Case(InjectionStage.of(size, K), with_adjoint([lambda x, z: x] * K, x, x[:, :0], torch.ones_like(x)))


def idle(K=1, size=4):
    G = torch.zeros(K, 0, size, dtype=torch.float64)
    A, C = G.new_zeros(K, size, size), G.new_zeros(K, 0, 0)
    return Case(IdleStage.of(size, K), Blocks(C, G, A, G.mT, C))


class TestInjection(StageConformance):
    cases = {"one": injected, "stack": functools.partial(injected, K=3, size=6)}


class TestIdle(StageConformance):
    cases = {"one": idle, "stack": functools.partial(idle, K=3, size=2)}


def test_all_controls_are_visible_or_none():
    for stage, r in ((InjectionStage.of(5, 2), 5), (IdleStage.of(5, 2), 0)):
        space = stage.row_space()
        assert (space.r, space.hidden, space.coupled) == (r, 5 - r, False)
        assert stage.nonzero == frozenset() and stage.gauss_newton() is stage


def test_products_of_an_injection_are_copies():
    stage = InjectionStage.of(3)
    for product in (stage.G, stage.Gt):
        given = torch.ones(1, 3, 2, dtype=torch.float64)
        product(given).zero_()
        assert bool((given == 1.0).all())


def test_without_a_state_any_number_of_samples_is_right():
    assert IdleStage.of(3).samples == 0
    assert common_samples([IdleStage.of(3), DiagonalStage(torch.ones(1, 6))]) == 6
    assert common_samples([IdleStage.of(3)]) == 1


def test_dtype_and_count():
    stage = InjectionStage.of(3, 4, dtype=torch.float32)
    assert stage.dtype == torch.float32 and stage.count == 4 and stage.at(2).count == 1
    assert stage.to(torch.float64).G(torch.ones(4, 3, 1, dtype=torch.float64)).dtype == torch.float64


def first(make):
    inner = make()
    blocks = inner.blocks
    gone = {"F": blocks.F[:, :, :0], "B": blocks.B[:, :, :0], "C": blocks.C[:, :0, :0]}
    return Case(InitialStage(inner.stage), replace(blocks, **gone))


class TestInitial(StageConformance):
    # The row space is that of the inner stage, with a state before it that nobody asks for.
    test_row_space = test_hidden_coupling = test_hidden_directions = None

    cases = {
        "affine": functools.partial(first, functools.partial(test_affine.case, rows=2, inputs=5)),
        "affine, stack": functools.partial(first, functools.partial(test_affine.case, K=2)),
        "convolution": functools.partial(first, test_convolution.case),
        "dense": functools.partial(first, functools.partial(test_dense.case, m=2)),
        "embedding": functools.partial(first, test_embedding.case),
    }


def test_only_the_controls_of_the_inner_stage_are_there():
    inner = test_affine.case().stage
    stage = InitialStage(inner)
    assert (stage.n_in, stage.p, stage.samples, stage.nonzero) == (0, inner.p, inner.samples, frozenset())
    assert stage.gauss_newton().inner.beta is None
    assert torch.equal(stage.dense_G(), inner.dense_G())
