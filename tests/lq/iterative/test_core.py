"""A weighted core of samples."""

import pytest
import torch

from linop_hess.lq.analysis import Analysis
from linop_hess.lq.iterative.core import contributions, draw, weighted_core
from linop_hess.lq.matrix.hessian import assembled
from tests.lq.sketches import analyses


@pytest.mark.parametrize("kind", ["tanh", "wired"])
def test_the_sum_over_chosen_samples_with_weights(kind):
    """Against the Hessians of one sample each."""
    problem, samples = analyses(kind)[0].problem, 30
    chosen, weights = draw(contributions(problem, samples), 12)
    assert len(chosen) == 12 and float(weights.min()) >= 1.0
    expected = sum(
        float(w) * assembled(Analysis(weighted(problem, int(b), samples))) for b, w in zip(chosen, weights, strict=True)
    )
    found = assembled(Analysis(weighted_core(problem, samples, 12)))
    assert float((found - expected).norm() / expected.norm()) < 1e-13


def weighted(problem, b, samples):
    one = torch.ones(1, dtype=torch.float64)
    blocks = [block.of_chosen(torch.tensor([b]), one, samples) for block in problem.blocks]
    return type(problem)(blocks, problem.order, problem.names, problem.places, problem.of_loss)


def test_all_samples_are_the_problem_itself():
    analysis = analyses()[0]
    found = assembled(Analysis(weighted_core(analysis.problem, 30, 30)))
    assert float((found - assembled(analysis)).norm() / found.norm()) < 1e-13


@pytest.mark.parametrize("count", [1, 5, 20])
def test_draws_are_unbiased(count):
    score = torch.logspace(-2, 2, 20).double()
    which, weights = draw(score, count)
    assert len(which) == count == len(set(which.tolist()))
    big = score > 0.5 * score.sum() * 2 / max(count, 1)
    assert bool((weights[torch.isin(which, big.nonzero()[:, 0])] < 2.0).all())
    assert len(draw(torch.zeros(6), 3)[0]) == 3
