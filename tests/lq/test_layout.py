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


INDICES = {
    "neighbours": ([[1, 2, 3], [5, 6, 7]], True),
    "every second": ([[0, 2, 4], [1, 3, 5]], True),
    "interleaved": ([[0, 3, 6], [1, 4, 7], [2, 5, 8]], True),
    "unevenly placed": ([[0, 1], [3, 4], [9, 10]], False),
    "descending pieces": ([[6, 7], [3, 4]], False),
    "backwards": ([[4, 3, 2]], False),
    "anywhere": ([[7, 0, 3], [2, 9, 1]], False),
    "one entry each": ([[8], [5]], False),
    "nothing": ([[], []], True),
}


@pytest.mark.parametrize("name", INDICES)
def test_slots_anywhere(name):
    index, is_view = np.array(INDICES[name][0], dtype=np.int64), INDICES[name][1]
    slots = Slots.at(index)
    flat = torch.arange(24.0).view(12, 2)
    assert (slots.count, slots.size) == index.shape
    assert torch.equal(slots.gather(flat), flat[torch.from_numpy(index)])
    assert slots.index(flat.device).tolist() == index.ravel().tolist()
    one = slots.take(np.array([1 % len(index)]))
    assert torch.equal(one.gather(flat), flat[torch.from_numpy(index[[1 % len(index)]])])
    values = -torch.rand(*index.shape, 2)
    for write in ("put", "add"):
        target, truth = flat.clone(), flat.clone()
        getattr(slots, write)(target, values)
        rows = torch.from_numpy(index).reshape(-1)
        truth[rows] = values.reshape(-1, 2) + (truth[rows] if write == "add" else 0.0)
        assert torch.equal(target, truth)
    gathered = slots.gather(flat)
    assert (
        not gathered.numel() or (gathered.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()) == is_view
    )


def test_places():
    """Stage 0 has controls 4, 1, stage 1 has 0, 3, 2."""
    sizes = [Sizes(2, 2, 2), Sizes(2, 2, 3)]
    layout = Layout(sizes, np.array([(0, 0), (1, 0)]), [4, 1, 0, 3, 2])
    assert layout.controls(0).tolist() == [4, 1] and layout.controls(1).tolist() == [0, 3, 2]
    flat = torch.arange(5.0)[:, None]
    assert layout.x_slots[1].gather(flat).flatten().tolist() == [0, 3, 2]
    chain = layout.in_chain_order(flat)
    assert chain.flatten().tolist() == [4, 1, 0, 3, 2] and torch.equal(layout.in_flat_order(chain), flat)
    plain = Layout(sizes, np.array([(0, 0), (1, 0)]), range(5))
    assert plain.places is None and plain.in_chain_order(flat) is flat and plain.controls(1).tolist() == [2, 3, 4]
    with pytest.raises(ValueError, match="permutation"):
        Layout(sizes, np.array([(0, 0), (1, 0)]), [4, 1, 0, 3, 3])
