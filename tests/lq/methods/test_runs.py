"""Runs of segments, against recursions and eliminations in NumPy."""

import numpy as np
import pytest
import torch

from linop_hess import lq
from linop_hess.lq.methods.runs import Runs, cut, eliminated, state_first
from tests.lq.problems import random_blocks


def kinds(n, p, seed=3):
    """The runs of a random problem, in the order of the chain: how many segments each goes through."""
    runs = cut(lq.Analysis(random_blocks(n, p, seed=seed, with_A="none").problem()))
    lengths = {place: len(some.groups) for some in runs for place in some.places.tolist()}
    assert sorted(lengths) == list(range(len(lengths)))
    return [lengths[place] for place in range(len(lengths))]


@pytest.mark.parametrize(
    ("n", "p", "expected"),
    [
        ([3, 4, 4, 4, 2], [6, 5, 5, 3], [1, 1, 1, 1]),
        ([3, 4, 8, 4, 8, 4, 2], [6, 4, 4, 5, 4, 3], [1, 2, 2, 1]),  # the wide states between are no ends
        ([3, 4, 6, 6, 4, 2], [6, 2, 2, 2, 2], [1, 3, 1]),  # as short as can be
        ([3, 4, 4], [4, 0], [1]),
        ([3, 9, 9, 9, 9, 9, 9, 9, 9, 1], [1] * 9, []),  # too few controls
    ],
)
def test_runs_are_as_short_as_can_be(n, p, expected):
    assert kinds(n, p) == expected


def test_states_that_controls_do_not_reach_end_no_run():
    """As many controls as states, but of one stage two states are seen by none; the stage after it moves them."""
    blocks = random_blocks([3, 4, 4, 5, 5, 2], [6, 4, 6, 6, 3], seed=1, with_A="none")
    blocks.G[1][2:] = 0.0
    blocks.F[1][2:] = 0.0
    runs = cut(lq.Analysis(blocks.problem()))
    assert sorted(len(some.groups) for some in runs for _ in some.places) == [1, 1, 1, 2]


def test_wide_segments_are_left_to_others():
    assert not cut(lq.Analysis(random_blocks([70, 72, 70, 74], [75, 80, 90], seed=3).problem()))


@pytest.mark.parametrize("damping", [0.3, -0.2, 0.1 + 0.2j])
def test_blocks_of_a_run_are_those_of_its_segments_one_after_the_other(damping):
    """½ uᵀTu and Wu for a random u."""
    analysis = lq.Analysis(random_blocks([3, 4, 8, 6, 4, 2], [9, 5, 6, 7, 3], seed=3).problem()).over(damping)
    condensed = analysis.condensed
    middle = [(int(g), int(k)) for g, k in analysis.order[1:4]]
    runs = Runs(np.array([1]), tuple(g for g, _ in middle), tuple(np.array([k]) for _, k in middle))
    T, W = (block[0].numpy() for block in runs.blocks(condensed, damping))
    u = np.random.default_rng(0).standard_normal(T.shape[0])
    value, rest, d = 0.0, u, u[-4:]
    controls = [u[:-4][start:stop] for start, stop in _slices([condensed[g].r for g, _ in reversed(middle)])]
    for (g, k), s in zip(middle, reversed(controls), strict=True):
        own = np.concatenate([s, d])
        value = value + 0.5 * own @ condensed[g].T(damping)[k].numpy() @ own
        d = condensed[g].W[k].numpy() @ own
    assert rest.size == T.shape[0] and abs(0.5 * u @ T @ u - value) <= 1e-13 * abs(value)
    np.testing.assert_allclose(W @ u, d, rtol=1e-12, atol=1e-13)


def _slices(sizes):
    ends = np.cumsum(sizes)
    return list(zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True))


@pytest.mark.parametrize(("r", "n_in", "n"), [(5, 3, 4), (4, 3, 4), (6, 0, 2), (3, 2, 0)])
def test_controls_are_eliminated_by_the_constraint(r, n_in, n):
    rng = np.random.default_rng(1)
    T = rng.standard_normal((2, r + n_in, r + n_in))
    T, W = T + T.transpose(0, 2, 1), rng.standard_normal((2, n, r + n_in))
    small, K = (block.numpy() for block in eliminated(torch.from_numpy(T), torch.from_numpy(W), n_in))
    v = rng.standard_normal((2, n_in + r))
    d, others, after = v[:, :n_in], v[:, n_in : n_in + r - n], v[:, n_in + r - n :]
    u = np.concatenate([np.einsum("kij,kj->ki", K, v), others, d], 1)
    np.testing.assert_allclose(np.einsum("kij,kj->ki", W, u), after, atol=1e-12)
    np.testing.assert_allclose(
        np.einsum("ki,kij,kj->k", v, small, v), np.einsum("ki,kij,kj->k", u, T, u), rtol=1e-11, atol=1e-11
    )
    assert (small == small.transpose(0, 2, 1)).all()


def test_state_first():
    T = torch.arange(9.0).view(1, 3, 3)
    assert torch.equal(state_first(T, 1)[0], T[0][[2, 0, 1]][:, [2, 0, 1]])
