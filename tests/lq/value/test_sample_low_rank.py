"""One block a sample and a part of low rank, against the dense Schur complement."""

import pytest
import torch

from linop_hess.lq.iterative.options import SketchOptions
from linop_hess.lq.iterative.sketch import Sketches
from linop_hess.lq.matrix.hessian import assembled
from linop_hess.lq.methods.sketched import SketchedFactorization
from linop_hess.lq.value.sample_low_rank import SampleLowRankValue
from tests.lq.sketches import DAMPING, analyses


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_products_and_pulling_back():
    stage = analyses()[0].problem.stages[3]
    n = stage.n_out // 30
    half = draw(0, 30, n, n)
    value = SampleLowRankValue(
        half + half.mT, draw(1, stage.n_out, 4), torch.tensor([1.0, -1.0, 1.0, -1.0]).double(), draw(2, 4, 6)
    )
    dense = torch.block_diag(*value.V) + (value.U * value.T) @ value.U.mT
    d = draw(3, stage.n_out, 2)
    torch.testing.assert_close(value @ d, dense @ d)
    back = value.pull_back(stage)
    e = draw(4, stage.n_in, 2)
    torch.testing.assert_close(back @ e, stage.pull_back(dense) @ e)
    assert value.compress() is value and value.rank == 4


@pytest.mark.parametrize("kind", ["tanh", "wired"])
@pytest.mark.parametrize("which", [0, 1])
def test_couplings_and_pivots(kind, which):
    """S of the last two spans and E of the last, against blocks of H + εI in the order of the chain."""
    analysis = analyses(kind)[which]
    rank = analysis.problem.size
    sketch = Sketches(analysis).of(SketchOptions(rank, None, 30, torch.float64))
    layout = analysis.problem.layout
    order = torch.arange(rank) if layout.places is None else torch.from_numpy(layout.places)
    A = (assembled(analysis) + DAMPING * torch.eye(rank, dtype=torch.float64))[order][:, order]
    last = sketch.span(len(sketch.sweeps) - 1, DAMPING)
    S, E, _ = SampleLowRankValue.zero(sketch.basis.directions, rank).pivot(last)
    edge = rank - last.r
    assert float((S - A[edge:, edge:]).norm() / A.norm()) < 1e-14
    x, d = draw(0, last.r, 4), draw(1, last.n_in, 4)
    forth, back = E @ d, E.transposed(x)
    torch.testing.assert_close((x * forth).sum(0), (back * d).sum(0))
    factors = SketchedFactorization(analysis, DAMPING, sketch.options)
    before = factors.factors[-2].elimination
    middle = edge - before.theta.numel()
    schur = A[middle:edge, middle:edge] - A[middle:edge, edge:] @ torch.linalg.solve(
        A[edge:, edge:], A[edge:, middle:edge]
    )
    X = before.solve(schur)
    assert float((X - torch.eye(len(X))).norm()) < 1e-8
