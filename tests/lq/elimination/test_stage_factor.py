"""The sweeps of the halves, segment by segment."""

import pytest
import torch

from linop_hess.lq.elimination.stage_factor import SegmentLoad, unwhiten, whiten
from linop_hess.lq.methods.riccati import RiccatiFactorization
from linop_hess.lq.pivots.rules import BoundedGrowth
from tests.lq.methods.conformance import setting


def factored(growth, damping=1e-2):
    """A chain all of whose controls are visible, with few or many directions delayed."""
    truth = setting("fewer controls than outputs", with_A="all")
    analysis = truth.analysis
    assert analysis.hidden == 0
    found = RiccatiFactorization(analysis, damping, BoundedGrowth(growth * analysis.norm))
    return truth, found, [factor.elimination.whitened() for factor in found.factors]


@pytest.mark.parametrize(("growth", "delays"), [(1e6, False), (1e-2, True)])
def test_sweeps_are_transposes_and_a_congruence(growth, delays):
    truth, found, eliminations = factored(growth)
    assert (sum(factor.delayed for factor in found.factors) > 0) == delays
    N = len(truth.H)
    parts = torch.eye(N).double().split([factor.segment.r for factor in found.factors])
    load = [SegmentLoad(part, None, part[:0]) for part in parts]
    half = torch.cat(whiten(found.factors, eliminations, load))
    pivots = [e.theta.numel() for e in eliminations]
    s, d, c = unwhiten(found.factors, eliminations, torch.eye(N).double().split(pivots))
    assert all(directions.shape[0] == 0 for directions in c)
    back = torch.cat(s)
    size = float(half.abs().max()) ** 2
    torch.testing.assert_close(back, half.mT, rtol=0, atol=1e-12 * size)
    D = torch.diag(torch.cat([e.theta for e in eliminations]))
    K = torch.from_numpy(truth.shifted(1e-2))
    torch.testing.assert_close(half @ K @ half.mT, D, rtol=0, atol=1e-12 * size * truth.norm)


def test_states_follow_the_controls():
    """δ before each segment is what the dynamics make of the controls that `unwhiten` gives."""
    truth, found, eliminations = factored(1e-2)
    w = torch.randn(len(truth.H), 2, generator=torch.Generator().manual_seed(0)).double()
    s, d, _ = unwhiten(found.factors, eliminations, w.split([e.theta.numel() for e in eliminations]))
    moved = truth.problem.layout.shift(truth.problem.transition.substitute(truth.problem.apply_G(torch.cat(s))))
    offsets = truth.problem.layout.in_offsets
    for l, state in enumerate(d[1:], 1):
        kept = found.analysis.groups[found.analysis.pairs[l][0]].state_unit
        unit = 1.0 if kept is None else kept[found.analysis.pairs[l][1]]
        torch.testing.assert_close(state * unit, moved[offsets[l] : offsets[l + 1]], rtol=1e-9, atol=1e-9)


def test_what_arrives_is_what_was_delayed():
    _, found, _ = factored(1e-2)
    for factor, after in zip(found.factors[:-1], found.factors[1:], strict=True):
        assert factor.arrived == after.delayed
        assert factor.elimination.theta.numel() + factor.elimination.delayed == factor.segment.r + factor.arrived
    assert found.factors[-1].arrived == found.factors[0].delayed == 0
    assert all(factor.nbytes > 0 for factor in found.factors)
