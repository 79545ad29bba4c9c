"""Eliminations that meet: covariances of states from both ends, against the inverse of the dense KKT matrix."""

import numpy as np
import pytest
import torch

from linop_hess.lq.methods.riccati import RiccatiFactorization
from linop_hess.lq.pivots.rules import BoundedGrowth
from linop_hess.lq.value import cost_to_come
from linop_hess.lq.value.cost_to_come import CostToCome, symmetrized
from tests.lq.methods.conformance import MIXED, SHAPES, setting


def state_covariances(truth, damping):
    """Blocks P M⁻¹ G K⁻¹ Gᵀ M⁻ᵀ Pᵀ of the states before each stage: the covariance of δ = P M⁻¹ G x for x of covariance K⁻¹."""
    N = len(truth.H)
    p, layout = truth.problem, truth.problem.layout
    D = layout.shift(p.transition.substitute(p.apply_G(torch.eye(N).double()))).numpy()
    return D @ np.linalg.inv(truth.shifted(damping)) @ D.T


@pytest.mark.parametrize("growth", [1e12, 1.0])
@pytest.mark.parametrize("shape", [*SHAPES, *MIXED])
@pytest.mark.parametrize("damping", [0.5, -0.3, 1e-2])
def test_joined_is_the_covariance_of_the_state(shape, damping, growth):
    truth = setting(shape)
    found = RiccatiFactorization(truth.analysis, damping, BoundedGrowth(growth * max(truth.norm, 1e-3)))
    expected = state_covariances(truth, damping)
    condition = np.linalg.cond(truth.shifted(damping)) if len(truth.H) else 1.0
    costs, offsets = found.costs_to_go(), truth.problem.layout.in_offsets
    if not costs:
        return
    before = CostToCome.of_nothing(costs[0].value.V)
    for position, (factor, cost) in enumerate(zip(found.factors, costs, strict=True)):
        if position:
            l, n = factor.segment.stage, factor.segment.n_in
            g, k = found.analysis.pairs[position]
            unit = found.analysis.groups[g].state_unit
            unit = np.ones((n, 1)) if unit is None else unit[k].numpy()
            ours = before.joined(cost.value).numpy()[:n, :n] * unit * unit.T
            mine = expected[offsets[l] : offsets[l + 1], offsets[l] : offsets[l + 1]]
            atol = 1e-11 * condition * np.abs(mine).max(initial=1e-12)
            np.testing.assert_allclose(ours, mine, rtol=0, atol=atol)
        if position + 1 < len(costs):
            before = before.through(factor.segment, costs[position + 1].value, costs[position + 1].units)
            assert torch.equal(before.matrix, before.matrix.mT)


def test_added_curvature_bounds_what_comes_and_is_taken_off_again(monkeypatch):
    """Whatever is added, the covariance is the same; the first curvature that keeps the matrix small is taken."""
    truth = setting("equal")
    found = RiccatiFactorization(truth.analysis, 0.5, BoundedGrowth(1e12))
    costs = found.costs_to_go()
    covariances = []
    for tried in ((1e-2,), (0.3,), (-0.2,)):
        monkeypatch.setattr(cost_to_come, "ADDED_CURVATURE", tried)
        before = CostToCome.of_nothing(costs[0].value.V)
        before = before.through(found.factors[0].segment, costs[1].value, costs[1].units)
        scale = costs[1].value.largest(costs[1].units)
        torch.testing.assert_close(before.added, tried[0] * scale / costs[1].units[:, 0].square())
        covariances.append(before.joined(costs[1].value))
    for other in covariances[1:]:
        torch.testing.assert_close(other, covariances[0], rtol=0, atol=1e-11 * float(covariances[0].abs().max()))
    monkeypatch.setattr(cost_to_come, "ADDED_CURVATURE", (1e-2, 3e-2))
    monkeypatch.setattr(cost_to_come, "ADDED_LIMIT", 0.0)  # none is good enough, so the best of them
    assert CostToCome.of_nothing(costs[0].value.V).through(found.factors[0].segment, costs[1].value, costs[1].units)


def test_symmetrized():
    assert torch.equal(symmetrized(torch.tensor([[1.0, 2.0], [4.0, 3.0]])), torch.tensor([[1.0, 3.0], [3.0, 3.0]]))
