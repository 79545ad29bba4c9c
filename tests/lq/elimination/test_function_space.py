"""J, Jᵀ and Γ = JJᵀ of problems whose only curvature is that of their last stage."""

import numpy as np
import pytest
import torch

import linop_hess as lh
from linop_hess import lq
from linop_hess.lq.elimination.function_space import FunctionSpace, curved_stage, samples_apart
from tests.helpers import make_batch, make_mlp, oracle_jacobian
from tests.lq.methods.test_woodbury import (
    GAUSS_NEWTON,
    LOSSES,
    coupled,
    cross_entropy,
    gauss_newton_matrix,
    nonconvex,
    squared,
)
from tests.lq.problems import gauss_newton_blocks


def test_the_losses_are_what_they_say():
    """Each of them reaches the part of the code that it is there for."""
    model, (x, y) = make_mlp([3, 5, 4, 3], gain=1.3), make_batch(3, 3, 6)
    spaces = {loss_fn: FunctionSpace(lh.linearize(model, loss_fn, x, y).analysis) for loss_fn in LOSSES}
    assert [spaces[loss_fn].samples for loss_fn in LOSSES] == [6, 6, 6, 1, 1]
    assert [spaces[loss_fn].is_convex for loss_fn in LOSSES] == [True, True, False, True, False]
    assert spaces[cross_entropy].rows == 6 * 2  # softmax has one flat direction


@pytest.mark.parametrize("convex", [True, False])
@pytest.mark.parametrize("shape", GAUSS_NEWTON)
def test_hessian_is_its_square(shape, convex):
    blocks = gauss_newton_blocks(*GAUSS_NEWTON[shape], seed=3, convex=convex)
    H, analysis = blocks.hessian(), lq.Analysis(blocks.problem())
    space = FunctionSpace(analysis)
    J = space.J(torch.eye(len(H)).double())
    assert J.shape == (space.rows, len(H))
    scale = max(np.abs(H).max(initial=0.0), 1e-300)
    np.testing.assert_allclose(J.mT * space.signs @ J, H, rtol=0, atol=1e-12 * scale)
    torch.testing.assert_close(space.Jt(torch.eye(space.rows).double()), J.mT, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(space.gram, J @ J.mT, rtol=1e-11, atol=1e-12 * float((J @ J.mT).abs().max()))
    assert space.gram is space.gram
    assert space.is_convex == bool((space.signs > 0).all())
    if convex:
        assert space.is_convex and space.rows == max(1, GAUSS_NEWTON[shape][0][-1] // 2)


@pytest.mark.parametrize("loss_fn", [cross_entropy, squared, nonconvex, coupled])
@pytest.mark.parametrize("samples", [1, 5])
def test_of_a_network(loss_fn, samples):
    model, (x, y) = make_mlp([3, 5, 4, 3], gain=1.3), make_batch(3, 3, samples)
    space = FunctionSpace(lh.linearize(model, loss_fn, x, y).gauss_newton().analysis)
    H = gauss_newton_matrix(model, loss_fn, x, y)
    J = space.J(torch.eye(len(H)).double()).numpy()
    np.testing.assert_allclose((J.T * space.signs.numpy()) @ J, H, rtol=0, atol=1e-13 * np.abs(H).max())
    np.testing.assert_allclose(space.gram.numpy(), J @ J.T, rtol=0, atol=1e-13 * np.abs(J @ J.T).max())
    assert np.linalg.matrix_rank(np.vstack([J, oracle_jacobian(model, x)])) == np.linalg.matrix_rank(
        oracle_jacobian(model, x)
    )


def test_walk_goes_from_last_to_first():
    model, (x, y) = make_mlp([3, 5, 4, 3]), make_batch(3, 3, 4)
    analysis = lh.linearize(model, cross_entropy, x, y).gauss_newton().analysis
    stages = [int(group.stages[k]) for group, k, _ in FunctionSpace(analysis).walk()]
    assert stages == [4, 2, 0]


@pytest.mark.parametrize(
    ("name", "stage", "found"), [("A", 0, 0), ("B", 1, 1), ("C", 1, 1), ("C", 2, None), ("C", 0, None)]
)
def test_curved_stage(name, stage, found):
    """C of the last stage is what the function space is made of; before the first controls nothing moves."""
    blocks = gauss_newton_blocks([2, 3, 4], [4, 0 if name == "C" else 5], seed=3)
    if (name, stage) == ("C", 0):
        blocks = gauss_newton_blocks([2, 3, 4], [0, 5], seed=3)
    getattr(blocks, name)[stage][:] = 1
    assert curved_stage(blocks.problem()) == found


def test_gauss_newton_matrices_are_flat():
    lin = lh.linearize(make_mlp([3, 4, 3]), cross_entropy, *make_batch(3, 3, 4))
    assert curved_stage(lin.problem) is not None and curved_stage(lin.problem.gauss_newton()) is None


@pytest.mark.parametrize(("loss_fn", "samples"), [(cross_entropy, 6), (coupled, 1)])
def test_samples_apart(loss_fn, samples):
    lin = lh.linearize(make_mlp([3, 4, 3]), loss_fn, *make_batch(3, 3, 6))
    assert samples_apart(lin.problem) == samples
