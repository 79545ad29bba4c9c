"""Spans of a chain."""

import numpy as np
import pytest

from linop_hess.lq.iterative.spans import cut, product_flops
from tests.lq.sketches import analyses


@pytest.mark.parametrize("kind", ["tanh", "wired"])
@pytest.mark.parametrize("rank", [1, 50, 10**6])
def test_spans_cover_the_chain(kind, rank):
    problem = analyses(kind)[0].problem
    found = cut(problem, 30, 1.0, rank)
    assert found.bounds[0][0] == problem.layout.first and found.bounds[-1][1] == problem.length
    assert all(stop == start for (_, stop), (start, _) in zip(found.bounds[:-1], found.bounds[1:], strict=True))
    assert found.controls.sum() == problem.size and found.controls.min() > 0
    sizes = [int(problem.layout.p[a:b].sum()) for a, b in found.bounds]
    np.testing.assert_array_equal(found.controls, sizes)
    assert all(problem.layout.p[start] for start, _ in found.bounds) and len(found.bounds) >= 2


def test_fewer_spans_where_directions_take_longer_than_pivots():
    problem = analyses()[0].problem
    counts = [len(cut(problem, 30, 1.0, rank).bounds) for rank in (1, 10, 1000)]
    assert counts[0] >= counts[1] >= counts[2] == 2


def test_flops_of_a_product():
    problem = analyses()[0].problem
    assert product_flops(problem) > 4 * 30 * problem.size
