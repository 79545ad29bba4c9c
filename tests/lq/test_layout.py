"""Places of controls and states in flat vectors."""

import numpy as np
import pytest
import torch

from linop_hess.lq.layout import Layout, Slots
from tests.lq.methods.conformance import SHAPES, setting

STARTS = {"even": [1, 5, 9], "uneven": [0, 4, 9], "one": [3], "none": [], "touching": [2, 5, 8]}


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("columns", [0, 1, 2])
@pytest.mark.parametrize("size", [0, 3])
@pytest.mark.parametrize("name", STARTS)
def test_slots(name, size, columns, strided):
    starts = STARTS[name]
    slots = Slots(np.array(starts, dtype=np.int64), size)
    flat = (
        torch.arange(12.0 * columns).view(columns, 12).mT if strided else torch.arange(12.0 * columns).view(12, columns)
    )
    expected = torch.stack([flat[s : s + size] for s in starts]) if starts else flat.new_zeros(0, size, columns)
    assert torch.equal(slots.gather(flat), expected) and slots.count == len(starts)
    assert slots.index(flat.device).tolist() == [s + k for s in starts for k in range(size)]
    for write in ("put", "add"):
        target = flat.clone()
        getattr(slots, write)(target, -torch.ones(len(starts), size, columns))
        truth = flat.clone()
        for s in starts:
            truth[s : s + size] = -1.0 if write == "put" else truth[s : s + size] - 1.0
        assert torch.equal(target, truth)
    some = np.arange(len(starts))[1:]
    assert torch.equal(slots.take(some).gather(flat), expected[1:])


def test_gathered_pieces_of_even_slots_are_views():
    flat = torch.zeros(12, 2)
    Slots(np.array([1, 5]), 3).gather(flat).fill_(1.0)
    assert float(flat.sum()) == 12.0


@pytest.mark.parametrize("shape", SHAPES)
def test_layout(shape):
    n, p = SHAPES[shape]
    layout = setting(shape).problem.layout
    assert layout.n_in.tolist() == n[:-1] and layout.n_out.tolist() == n[1:] and layout.p.tolist() == p
    assert (layout.length, layout.size, layout.size_in, layout.size_out) == (len(p), sum(p), sum(n[:-1]), sum(n[1:]))
    assert layout.x_offsets.tolist() == [sum(p[:l]) for l in range(len(p) + 1)]
    assert layout.first == next(l for l, size in enumerate(p) if size)
    y, d = torch.randn(sum(n[1:]), 2), torch.randn(sum(n[:-1]), 2)
    inner = sum(n[1:-1])
    assert torch.equal(layout.shift(y), torch.cat([torch.zeros(n[0], 2), y[:inner]]))
    assert torch.equal(layout.shift_adjoint(d), torch.cat([d[n[0] :], torch.zeros(n[-1], 2)]))
    torch.testing.assert_close((layout.shift(y) * d).sum(), (y * layout.shift_adjoint(d)).sum())


class Sizes:
    def __init__(self, n_in, n_out, p):
        self.n_in, self.n_out, self.p = n_in, n_out, p


def test_stacks():
    """Stages 0, 2 and 3 are alike: their slots are those of one stack."""
    order = [(0, 0), (1, 0), (0, 1), (0, 2)]
    layout = Layout([Sizes(2, 2, 3), Sizes(2, 2, 0)], np.array(order))
    assert layout.x_slots[0].starts.tolist() == [0, 3, 6] and layout.in_slots[0].starts.tolist() == [0, 4, 6]
    assert layout.out_slots[1].starts.tolist() == [2] and layout.x_slots[1].size == 0
    rest = [(stack, inner.tolist()) for stack, inner in layout.after_first()]
    assert rest == [(0, [1, 2]), (1, [0])]


def test_without_controls_nothing_is_first():
    assert Layout([Sizes(1, 1, 0)], np.array([(0, 0)])).first == 1
