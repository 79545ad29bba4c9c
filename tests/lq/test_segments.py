"""Chains cut into segments."""

import numpy as np
import pytest
import torch

from linop_hess.lq import Analysis
from linop_hess.lq import segments as segments_module
from linop_hess.lq.problem import Problem
from linop_hess.lq.segments import identity, loads, order_of, put_controls, split_load, state_load
from linop_hess.lq.stages.dense import DenseStage
from tests.lq.methods.conformance import MIXED, SIZES, WIRED, right_hand_side, setting
from tests.lq.problems import random_blocks


@pytest.mark.parametrize("shape", [*SIZES, *WIRED])
def test_every_control_is_in_one_segment(shape):
    truth = setting(shape)
    analysis, layout = truth.analysis, truth.problem.layout
    starts = np.flatnonzero(layout.p)
    covered = []
    assert sum(group.count for group in analysis.groups) == len(starts) == len(analysis.order)
    for group in analysis.groups:
        assert starts[group.segments].tolist() == group.stages.tolist()
        assert group.is_first == (0 in group.segments) and (group.count == 1 or not group.is_first)
        assert group.r + group.hidden == group.control.p and group.x_slots.count == group.count
        assert group.n_in == (0 if group.is_first else layout.n_in[group.stages[0]])
        last = np.append(starts, truth.problem.length)[group.segments + 1] - 1
        assert set(layout.n_out[last]) == {group.n_out}
        assert group.unit_in.shape == (group.count, group.n_in, 1) and group.unit_out.shape == (
            group.count,
            group.n_out,
            1,
        )
        covered += group.x_slots.index(torch.device("cpu")).tolist()
    assert sorted(covered) == list(range(len(truth.H)))
    assert np.array_equal(order_of(analysis.groups), analysis.order)


@pytest.mark.parametrize("shape", SIZES)
def test_units_are_kept_where_all_is_narrow(shape):
    analysis = setting(shape).analysis
    narrow = [group.is_narrow for group in analysis.groups]
    assert all(narrow) == (shape not in MIXED) == analysis.is_narrow
    for group in analysis.groups:
        assert group.in_units == all(narrow)
        assert group.state_unit is (group.unit_in if group.in_units else None)


def test_alike_segments_are_worked_on_together():
    stage = random_blocks([3, 3], [2], seed=1)
    one = DenseStage.plain(*(torch.from_numpy(getattr(stage, name)[0])[None].repeat(5, 1, 1) for name in "FGABC"))
    analysis = Analysis(Problem([one], np.array([(0, k) for k in range(5)])))
    assert sorted(group.count for group in analysis.groups) == [1, 4]


def test_narrow_is_a_matter_of_size(monkeypatch):
    monkeypatch.setattr(segments_module, "CONDENSED_UP_TO", 8)
    widest = [group.is_narrow for group in setting("equal").new_analysis().groups]
    assert not all(widest)  # 3 + 3 + 3 beyond the first, which has no state before it
    assert [group.is_narrow for group in setting("equal").new_analysis().groups if group.is_first] == [True]


@pytest.mark.parametrize("damping", [0.4, -0.1])
@pytest.mark.parametrize("shape", SIZES)
def test_loads_and_controls(shape, damping):
    """Split g; and x = Q s + g⊥/ε − (I − QQᵀ)Bδ/ε put together again, by dense blocks."""
    truth = setting(shape)
    blocks, layout = random_blocks(*SIZES[shape], seed=7), truth.problem.layout
    g = torch.from_numpy(right_hand_side(len(truth.H)))
    x = torch.full_like(g, torch.nan)
    expected = np.full_like(g.numpy(), np.nan)
    for group in truth.analysis.groups:
        visible, hidden = split_load(group, g)
        load = loads(group, g, damping)
        assert torch.equal(load.visible, visible) and (hidden is None) == (group.hidden == 0) == (load.hidden is None)
        pushed = state_load(group, hidden, damping)
        assert (pushed is None) == (load.state is None) == (not group.is_coupled)
        s, d = (torch.randn(group.count, size, 3).double() for size in (group.r, group.n_in))
        put_controls(x, group, None if hidden is None else hidden / damping, s, d, damping)
        Q = group.space.Q(identity(group)).numpy()
        for k, l in enumerate(group.stages):
            at = slice(layout.x_offsets[l], layout.x_offsets[l + 1])
            B = blocks.B[l][:, : group.n_in]
            unit = 1.0 if group.state_unit is None else group.state_unit[k].numpy()
            rest = np.eye(len(B)) - Q[k] @ Q[k].T
            np.testing.assert_allclose(visible[k], Q[k].T @ g[at].numpy(), rtol=0, atol=1e-13)
            if load.state is not None:
                state = unit * (B.T @ (rest @ g[at].numpy())) / damping
                np.testing.assert_allclose(load.state[k], state, rtol=0, atol=1e-12 * np.abs(state).max(initial=1.0))
            away = rest @ g[at].numpy() - rest @ B @ (unit * d[k].numpy())
            expected[at] = Q[k] @ s[k].numpy() + (away / damping if group.hidden else 0.0)
    np.testing.assert_allclose(x.numpy(), expected, rtol=0, atol=1e-11 * np.abs(expected).max(initial=1.0))
