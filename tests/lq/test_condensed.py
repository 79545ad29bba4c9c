"""Segments as dense blocks: ½ uᵀTu and δ⁺ = W u are what the stages make of u."""

import numpy as np
import pytest
import torch

from linop_hess.lq import stacked as stacked_module
from linop_hess.lq.analysis import Analysis
from linop_hess.lq.condensed import Damped, block_sizes, condense, moved
from tests.lq.methods.conformance import DTYPES, SIZES, setting
from tests.lq.problems import Blocks, random_blocks


def rollout(blocks, first, last, x, d):
    """Cost and last state of stages first..last−1 with controls x in the first of them, from state d."""
    cost = x @ blocks.A[first] @ x / 2 + x @ blocks.B[first] @ d + d @ blocks.C[first] @ d / 2
    d = blocks.F[first] @ d + blocks.G[first] @ x
    for l in range(first + 1, last):
        cost += d @ blocks.C[l] @ d / 2
        d = blocks.F[l] @ d
    return cost, d


@pytest.mark.parametrize("units", ["in units", "out of units"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SIZES)
def test_against_a_rollout(shape, dtype, units):
    truth, blocks = setting(shape, dtype), random_blocks(*SIZES[shape], seed=7).rounded(dtype)
    edges = np.append(np.flatnonzero(truth.problem.layout.p), truth.problem.length)
    rng = np.random.default_rng(0)
    for group in truth.analysis.groups:
        found = condense(group)
        unit_in, unit_out = group.unit_in, group.unit_out
        if units == "out of units":
            found = found.out_of_units(unit_in, unit_out)
            unit_in, unit_out = torch.ones_like(unit_in), torch.ones_like(unit_out)
        for k, segment in enumerate(group.segments):
            s, d = rng.standard_normal(group.r), rng.standard_normal(group.n_in)
            x = group.space.at(k).Q(torch.from_numpy(s).to(dtype)[None, :, None])[0, :, 0].double().numpy()
            state = np.zeros(blocks.F[edges[segment]].shape[1])
            state[: group.n_in] = unit_in[k, :, 0].double().numpy() * d
            cost, after = rollout(blocks, edges[segment], edges[segment + 1], x, state)
            u = torch.from_numpy(np.concatenate([s, d])).to(dtype)
            ours, moved = float(u @ found.curvature[k] @ u) / 2, found.W[k] @ u * unit_out[k, :, 0]
            size = float(u.abs() @ found.curvature[k].abs() @ u.abs()) + 1.0
            assert abs(ours - cost) <= 100 * torch.finfo(dtype).eps * size
            reach = float((found.W[k].abs() @ u.abs() * unit_out[k, :, 0]).max()) if len(after) else 1.0
            np.testing.assert_allclose(
                moved.double(), after, rtol=0, atol=100 * torch.finfo(dtype).eps * max(reach, 1.0)
            )


@pytest.mark.parametrize("shape", ["more controls than outputs", "narrow, wide, narrow"])
def test_damping_and_hidden_controls(shape):
    for group in setting(shape).analysis.groups:
        found = condense(group)
        T, r = found.T(0.25), group.r
        expected = found.curvature.clone()
        expected[:, :r, :r] += 0.25 * torch.eye(r).double()
        if found.gram is not None:
            expected[:, r:, r:] -= 4.0 * found.gram
            other = found.T(0.25, torch.zeros_like(found.gram))
            torch.testing.assert_close(other[:, r:, r:], found.curvature[:, r:, r:])
        torch.testing.assert_close(T, expected)
        assert (found.gram is not None) == group.is_coupled and T is not found.curvature


@pytest.mark.parametrize("shape", SIZES)
def test_a_few_segments_at_a_time(shape, monkeypatch):
    """Blocks do not depend on how many segments are worked on at a time, nor T on the order in which it is asked for."""
    analysis = setting(shape).analysis
    whole = [condense(group) for group in analysis.groups]
    for at_a_time in (1, 2 * whole[-1].curvature[:1].nbytes):
        monkeypatch.setattr(stacked_module, "_AT_A_TIME", at_a_time)
        for group, expected in zip(analysis.groups, whole, strict=True):
            found = condense(group)
            torch.testing.assert_close(found.curvature, expected.curvature)
            torch.testing.assert_close(found.W, expected.W)
            torch.testing.assert_close(found.gram, expected.gram)
            other = None if expected.gram is None else 0.5 * expected.gram
            for gram in (None, other):
                damped, T = Damped(found, 0.25, gram), expected.T(0.25, gram)
                for k in (*range(group.count), 0, group.count - 1, group.count // 2):
                    torch.testing.assert_close(damped.T(k), T[k])


def test_sizes_see_what_cancels():
    """A chain of a control and two stages, its curvature and its row cancelling: sizes are those of the summands."""
    one, minus = np.array([[1.0]]), np.array([[-1.0]])
    two = np.array([[1.0], [1.0]])
    blocks = Blocks(
        A=[minus * 1e6, np.zeros((0, 0)), np.zeros((0, 0))],
        B=[one * 0, np.zeros((0, 2)), np.zeros((0, 1))],
        C=[one * 0, np.diag([1e6, 0.0]), one],
        F=[two * 0, np.array([[1e3, -1e3]]), one],
        G=[two, np.zeros((1, 0)), np.zeros((1, 0))],
    )
    group = Analysis(blocks.problem()).groups[0]
    condensed, sizes = condense(group), block_sizes(group)
    assert not condensed.curvature.any() and not condensed.W.any()
    assert 1e6 <= float(sizes.ss) <= 4e6 and 300 <= float(sizes.s) <= 4e3


def test_moved_by_a_share_of_the_sizes():
    truth = setting("equal")
    for group in truth.analysis.groups:
        blocks, sizes = condense(group), block_sizes(group)
        other = moved(blocks, sizes, 0.3, 1e-3, torch.Generator().manual_seed(0))
        E = other.curvature - blocks.curvature
        assert torch.allclose(E, E.mT)
        of_controls = E[:, : blocks.r, : blocks.r].abs().amax((1, 2))
        assert bool((of_controls <= 5e-3 * (sizes.ss[:, 0, 0] + 0.3)).all()) and bool((of_controls > 0).all())
        of_rows = (other.W - blocks.W).abs().amax(2, keepdim=True)
        assert bool((of_rows <= 5e-3 * torch.maximum(sizes.s, sizes.d)).all())
