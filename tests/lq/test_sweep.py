"""Products stage by stage, against dense blocks of the whole."""

import pytest
import torch

from linop_hess.lq import transition
from linop_hess.lq.matrix.hessian import assembled
from linop_hess.lq.transition import Sweep, SweptProduct, pulled_back, times_blocks
from tests.lq.sketches import analyses


@pytest.mark.parametrize("kind", ["tanh", "wired"])
@pytest.mark.parametrize("which", [0, 1])
def test_products_with_the_hessian(kind, which):
    analysis = analyses(kind)[which]
    problem = analysis.problem
    x = torch.randn(problem.size, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = assembled(analysis) @ x
    found = problem._swept_product(x)
    assert float((found - expected).norm() / expected.norm()) < 1e-13
    assert float((problem.hessian_product(x, 0.5) - expected - 0.5 * x).norm() / expected.norm()) < 1e-13


@pytest.mark.parametrize("kind", ["tanh", "wired"])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("numbers", [1, 300])
def test_products_in_chunks_of_samples(kind, which, numbers, monkeypatch):
    monkeypatch.setattr(transition, "_NUMBERS_IN_CACHE", numbers)
    analysis = analyses(kind)[which]
    swept = SweptProduct(Sweep(analysis.problem.stages[analysis.problem.layout.first :]))
    x = torch.randn(analysis.problem.size, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    layout, expected = analysis.problem.layout, assembled(analysis) @ x
    found = layout.in_flat_order(swept.times(layout.in_chain_order(x)))
    assert float((found - expected).norm() / expected.norm()) < 1e-13
    assert max(swept._parts) > 1 and bool((swept.times(x[:, :1]) == SweptProduct(swept.sweep).times(x[:, :1])).all())


def test_parts_add_up():
    problem = analyses()[0].problem
    sweep = Sweep(problem.stages[problem.layout.first :])
    x = torch.randn(problem.size, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = torch.zeros_like(x)
    for start, stop in ((0, 11), (11, 30)):
        part = sweep.of_samples(start, stop, 30)
        part.back(None, states=part.forward(x, None), x=x, rows=rows, down=False)
    expected = problem.hessian_product(x)
    assert float((rows - expected).norm() / expected.norm()) < 1e-13


def test_blocks_of_samples():
    problem = analyses()[0].problem
    stage = problem.stages[3]
    V = torch.randn(30, stage.n_out // 30, stage.n_out // 30, dtype=torch.float64)
    V = V + V.mT
    found = pulled_back(stage, V, 30)
    dense = stage.pull_back(torch.block_diag(*V))
    torch.testing.assert_close(torch.block_diag(*found), dense)
    d = torch.randn(stage.n_out, 2, dtype=torch.float64)
    torch.testing.assert_close(times_blocks(V, d), torch.block_diag(*V) @ d)
