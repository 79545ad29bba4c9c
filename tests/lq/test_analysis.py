"""What the damping does not change."""

import time

import numpy as np
import pytest
import torch

from linop_hess.lq.analysis import Analysis
from linop_hess.lq.methods.plan import METHODS
from tests.autograd.test_threads import at_once
from tests.lq.methods.conformance import DTYPES, SIZES, WIRED, setting


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SIZES, *WIRED])
def test_norms_are_bounds_from_below(shape, dtype):
    truth = setting(shape, dtype)
    rounding = 1 + 10 * torch.finfo(dtype).eps
    assert 0.7 * truth.norm <= truth.analysis.norm <= rounding * truth.norm
    for damping in (0.5, -3.0, 1e3):
        norm = np.abs(truth.eigenvalues + damping).max(initial=0.0)
        assert 0.7 * norm <= truth.analysis.damped_norm(damping) <= rounding * norm


def test_probe():
    truth = setting("equal")
    v, product = truth.analysis.probe
    assert float(v.norm()) == pytest.approx(1.0)
    np.testing.assert_allclose(product.numpy(), truth.H @ v.numpy(), rtol=0, atol=1e-13 * truth.norm)
    assert torch.equal(v, Analysis(truth.problem).probe[0])


def test_norm_of_nothing():
    assert Analysis(setting("equal").problem.gauss_newton()).norm == 0.0


@pytest.mark.parametrize("shape", SIZES)
def test_hidden_controls_by_ranks(shape):
    """p less the rank of G where A = 0 and there are more controls than outputs."""
    truth = setting(shape)
    expected = 0
    for stage in truth.problem.stages:
        if stage.p and not bool(stage.dense_A().any()):
            G = stage.dense_G()[0].numpy()
            rank = np.linalg.matrix_rank(G) if G.size else 0  # NumPy before 2 has no rank of what is empty
            rank = max(1, int(rank)) if stage.n_out else 0
            expected += stage.p - rank if stage.p > stage.n_out else 0
    assert truth.analysis.hidden == expected


def test_once():
    analysis, made = setting("equal").analysis, []

    def make(given):
        made.append(given)
        return object()

    assert analysis.once(make) is analysis.once(make) and made == [analysis]
    assert Analysis(analysis.problem).once(make) is not analysis.once(make)


def test_no_damping_changes_it():
    """Factors at several dampings leave every array of the analysis as it was."""
    analysis = setting("more controls than outputs").analysis
    before = [(blocks.curvature.clone(), blocks.W.clone()) for blocks in analysis.condensed]
    for name in ("banded", "riccati", "dense"):
        for damping in (0.5, 1e-6, -0.3):
            METHODS[name].factor(analysis, damping).solve(torch.ones(29, 1).double())
    for (curvature, W), blocks in zip(before, analysis.condensed, strict=True):
        assert torch.equal(curvature, blocks.curvature) and torch.equal(W, blocks.W)


def test_in_float64():
    double, single = setting("equal").analysis, setting("equal", torch.float32).analysis
    assert double.in_float64 is double
    assert single.in_float64 is single.in_float64 and single.in_float64.problem.dtype == torch.float64
    assert not any(block.nonzero for block in double.gauss_newton().problem.blocks)


@pytest.mark.parametrize("shape", SIZES)
def test_order(shape):
    analysis = setting(shape).analysis
    for position, (g, k) in enumerate(analysis.pairs):
        assert analysis.groups[g].segments[k] == position
    assert analysis.condensed_group(0) is analysis.condensed[0]
    assert [space is None for space in analysis.row_spaces] == [block.p == 0 for block in analysis.problem.blocks]
    assert analysis.samples == 1


def test_moved_blocks_are_those_of_another_problem():
    """Factors of moved blocks differ by about as much; the analysis itself stays as it was."""
    analysis = setting("equal").analysis
    factor = METHODS["riccati"].factor
    before = factor(analysis, 0.3).logabsdet()
    other = analysis.moved(0.3, 1e-7, 0)
    assert 1e-10 < abs(factor(other, 0.3).logabsdet() - before) < 1e-4
    assert factor(analysis, 0.3).logabsdet() == before
    assert factor(analysis.moved(0.3, 1e-7, 0), 0.3).logabsdet() == factor(other, 0.3).logabsdet()
    assert factor(analysis.moved(0.3, 0.0, 1), 0.3).logabsdet() == before


def test_threads_that_ask_at_once_have_the_same():
    """Of two caches one would be lost, with what threads have put in it."""
    analysis, made = setting("equal").analysis, []

    def make(analysis):
        time.sleep(0.05)
        made.append(analysis)
        return object()

    found = at_once([lambda: analysis.once(make)] * 4)
    assert len(made) == 1 and all(one is found[0] for one in found)
