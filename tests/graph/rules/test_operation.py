"""What rules ask of K nodes that carry out one operation."""

import itertools

import numpy as np
import pytest
import torch

from linop_hess.graph.rules.operation import Operation


def reading(*shapes, ids):
    """K nodes with arguments of these shapes and these elements."""
    flats = [[torch.zeros(shape) for shape in shapes] for _ in ids]
    active = tuple(range(len(shapes)))
    ids = np.array(ids)
    return Operation(torch.ops.aten.mm.default, flats, None, active, (0,), ids, np.ones(ids.shape[1], dtype=int), "")


@pytest.mark.parametrize("shape", [(6,), (2, 3), (3, 1, 2)])
def test_elements_are_distinct_in_whatever_order_they_lie(shape):
    for order in itertools.permutations(range(4, 10)):
        assert reading(shape, ids=[order]).are_distinct(0)
    transposed = np.arange(6).reshape(2, 3).T.flatten()
    assert reading((3, 2), ids=[transposed, transposed + 6]).are_distinct(0)


@pytest.mark.parametrize("shape", [(4,), (2, 2)])
def test_an_element_that_occurs_twice_is_seen_wherever_it_is(shape):
    for ids in itertools.product(range(3), repeat=4):
        assert not reading(shape, ids=[(5, 6, 7, 8), ids]).are_distinct(0)
    op = reading((2,), (2, 2), ids=[(1, 1, 2, 4, 3, 5)])
    assert not op.are_distinct(0) and op.are_distinct(1)
    assert reading((), ids=[(3,), (3,)]).are_distinct(0)
