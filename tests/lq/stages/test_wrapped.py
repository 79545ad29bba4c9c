"""The controls of a stage that has no state before it."""

import functools
from dataclasses import replace

import torch

from linop_hess.lq.stages.wrapped import InitialStage
from tests.lq.stages import test_affine, test_convolution, test_dense, test_embedding
from tests.lq.stages.conformance import Case, StageConformance


def case(make):
    inner = make()
    blocks = inner.blocks
    gone = {"F": blocks.F[:, :, :0], "B": blocks.B[:, :, :0], "C": blocks.C[:, :0, :0]}
    return Case(InitialStage(inner.stage), replace(blocks, **gone))


class TestInitial(StageConformance):
    # The row space is that of the inner stage, with a state before it that nobody asks for.
    test_row_space = test_hidden_coupling = test_hidden_directions = None

    cases = {
        "affine": functools.partial(case, functools.partial(test_affine.case, rows=2, inputs=5)),
        "affine, stack": functools.partial(case, functools.partial(test_affine.case, K=2)),
        "convolution": functools.partial(case, test_convolution.case),
        "dense": functools.partial(case, functools.partial(test_dense.case, m=2)),
        "embedding": functools.partial(case, test_embedding.case),
    }


def test_only_the_controls_of_the_inner_stage_are_there():
    inner = test_affine.case().stage
    stage = InitialStage(inner)
    assert (stage.n_in, stage.p, stage.samples, stage.nonzero) == (0, inner.p, inner.samples, frozenset())
    assert stage.gauss_newton().inner.beta is None
    assert torch.equal(stage.dense_G(), inner.dense_G())
