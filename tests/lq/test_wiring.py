"""Which entries are read, kept and put."""

import numpy as np
import pytest
import torch

from linop_hess.lq.wiring import Selection, Wiring, add_at

INDICES = {
    "whole": (range(6), 6),
    "run": ([2, 3, 4], 6),
    "two runs": ([4, 5, 0, 1], 6),
    "constants": ([-1, 2, 3, -1], 6),
    "first entry after a constant": ([-1, 0, 1], 6),
    "one entry often": ([3] * 9, 6),
    "backwards": (range(12)[::-1], 12),
    "scattered, constants": ([7, -1, 3, 3, 9, -1, 0, 5, 2], 12),
    "of every sample one": ([0, 3, 6, 9], 12),
    "of every sample two, constants": ([1, 2, -1, 4, 5, -1, 7, 8, -1, 10, 11, -1], 12),
    "only constants": ([-1, -1], 3),
    "nothing": ([], 4),
    "nothing of nothing": ([], 0),
    "constants of nothing": ([-1, -1, -1], 0),
}


@pytest.mark.parametrize("name", INDICES)
def test_selection(name):
    index, size = np.array(INDICES[name][0], dtype=np.int64), INDICES[name][1]
    S = torch.zeros(index.size, size)
    for row, entry in enumerate(index.tolist()):
        if entry >= 0:
            S[row, entry] = 1.0
    found = Selection(index, size, torch.device("cpu"))
    v, w = torch.randn(2, size, 3), torch.randn(2, index.size, 3)
    for strided in (False, True):
        if strided:
            v, w = v.mT.contiguous().mT, w.mT.contiguous().mT
        assert torch.equal(found.pick(v), S @ v)
        torch.testing.assert_close(found.spread(w), S.T @ w)
        out = torch.ones(2, size, 3)
        found.add_to(out, w)
        torch.testing.assert_close(out, 1.0 + S.T @ w)
    M = torch.randn(2, size, size)
    M = M + M.mT
    torch.testing.assert_close(found.pick_both(M), S @ M @ S.T)
    m = torch.randn(2, index.size, index.size)
    m = m + m.mT
    torch.testing.assert_close(found.spread_both(m), S.T @ m @ S)
    torch.testing.assert_close(found.spread_columns(m), m @ S)
    before = v.clone()
    found.copy(v).fill_(7.0)
    assert torch.equal(v, before)
    assert found.is_whole == (
        size == index.size and bool((S == torch.eye(size)).all()) if size == index.size else False
    )


def test_runs_are_views():
    v = torch.zeros(1, 6, 1)
    Selection(np.arange(2, 5), 6, v.device).pick(v).fill_(1.0)
    assert v.flatten().tolist() == [0, 0, 1, 1, 1, 0]


def test_parts_are_alike():
    """Three samples of (a, b) and an output each, that stands between them."""
    wiring = Wiring.of(6, 9, 3, read=[0, 2, 4], keep=(range(6), [0, 2, 3, 5, 6, 8]), put=(range(3), [1, 4, 7]))
    assert [wiring.samples(m) for m in (0, 1, 2, 3, 6)] == [3, 1, 1, 3, 3]
    part = wiring.part(2, 3)
    assert (part.n_in, part.n_out, part.outputs) == (4, 6, 2) and part is wiring.part(2, 3)
    assert part.read.tolist() == [0, 2] and part.keep_to.tolist() == [0, 2, 3, 5] and part.put_to.tolist() == [1, 4]
    assert wiring.part(3, 3) is wiring
    d, y = torch.arange(6.0).view(1, 6, 1), 10.0 + torch.arange(3.0).view(1, 3, 1)
    assert wiring.join(d, y).flatten().tolist() == [0, 10, 1, 2, 11, 3, 4, 12, 5]


def test_a_sum_over_samples_has_parts_too():
    wiring = Wiring.of(6, 1, 1, read=[0, 2, 4], keep=([], []), put=([0], [0]))
    assert wiring.samples(3) == 3 and wiring.samples(1) == 1
    part = wiring.part(1, 3)
    assert (part.n_in, part.n_out, part.outputs, part.read.tolist()) == (2, 1, 1, [0])


GOOD = {"n_in": 3, "n_out": 3, "outputs": 2, "read": [0, -1, 2], "keep": ([0, 1], [0, 2]), "put": ([1], [1])}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"read": [3]}, "expected reads of entries 0..2"),
        ({"read": [-2]}, "expected reads"),
        ({"keep": ([0, 3], [0, 2])}, "expected keep_from in 0..2"),
        ({"keep": ([0, 0], [0, 2])}, "each entry of keep_from once"),
        ({"keep": ([0], [0, 2])}, "as many keep_from as keep_to, got 1 and 2"),
        ({"put": ([2], [1])}, "expected put_from in 0..1"),
        ({"put": ([1], [2])}, "name each of the 3 entries"),
        ({"put": ([], [])}, "name each of the 3 entries"),
        ({"put": ([1], [3])}, "name each of the 3 entries"),
    ],
)
def test_what_is_refused(changes, message):
    assert Wiring.of(**GOOD).read.tolist() == [0, -1, 2]
    with pytest.raises(ValueError, match=message):
        Wiring.of(**GOOD | changes)


@pytest.mark.parametrize("K", [1, 3, 50])
def test_entries_are_added_where_they_belong_however_many_matrices(K):
    """By matrices where these are few, and along the second axis where they are many."""
    rng = np.random.default_rng(K)
    out, w = rng.standard_normal((K, 400, 2)), rng.standard_normal((K, 300, 2))
    index = rng.permutation(400)[:300]
    index[:5] = index[5:10]  # some twice
    expected = out.copy()
    for place, entry in zip(index, w.swapaxes(0, 1), strict=True):
        expected[:, place] += entry
    found = torch.from_numpy(out.copy())
    add_at(found, torch.from_numpy(index), torch.from_numpy(w))
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-14)
