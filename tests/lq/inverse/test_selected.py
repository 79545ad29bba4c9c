"""Diagonal and blocks of the inverse by eliminations that meet, for factors of every kind."""

import numpy as np
import pytest
import torch

from linop_hess.lq.accuracy import GROWTH, GROWTH_LITTLE, GROWTH_MODERATE, MULTIPLIER
from linop_hess.lq.inverse import selected
from linop_hess.lq.methods import riccati
from linop_hess.lq.methods.riccati import RiccatiFactorization
from linop_hess.lq.pivots.rules import BoundedGrowth
from tests.lq.methods.conformance import MIXED, SHAPES, WIRED, setting

RULES = {
    "for solves": lambda scale: None,
    "bounded growth": lambda scale: BoundedGrowth(GROWTH * scale),
    "bounded multipliers": lambda scale: BoundedGrowth(GROWTH_MODERATE * scale, MULTIPLIER),
    "little growth": lambda scale: BoundedGrowth(GROWTH_LITTLE * scale),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [*SHAPES, *MIXED, *WIRED])
def test_against_the_dense_inverse(shape, rule):
    truth = setting(shape)
    for damping in (0.5, 1e-2, -0.3, 1e-4):
        K = truth.shifted(damping)
        expected, condition = np.linalg.inv(K), np.linalg.cond(K)
        factors = RiccatiFactorization(truth.analysis, damping, RULES[rule](max(truth.norm, abs(damping))))
        atol = 1e-12 * (10 + condition / min(1.0, abs(damping))) * np.abs(expected).max(initial=0.0)
        np.testing.assert_allclose(selected.diagonal(factors).numpy(), np.diag(expected), rtol=0, atol=atol)
        blocks = iter(selected.blocks(factors))
        for own in truth.controls():
            np.testing.assert_allclose(next(blocks).numpy(), expected[np.ix_(own, own)], rtol=0, atol=2 * atol)
        assert next(blocks, None) is None


@pytest.mark.parametrize("shape", ["more controls than outputs", "narrow, wide, narrow", "wide and narrow in turn"])
def test_joint_covariances(shape):
    """Of the visible controls, the state before and the delayed hidden directions of each segment."""
    truth = setting(shape)
    damping, K = 1e-3, truth.shifted(1e-3)
    inverse, condition = np.linalg.inv(K), np.linalg.cond(K)
    factors = RiccatiFactorization(truth.analysis, damping, BoundedGrowth(GROWTH_MODERATE * truth.norm, MULTIPLIER))
    assert sum(factor.segment.hidden.delayed for factor in factors.factors) >= 2
    p, layout = truth.problem, truth.problem.layout
    D = layout.shift(p.transition.substitute(p.apply_G(torch.eye(p.size).double()))).numpy()
    for position, joint in enumerate(selected.joint_covariances(factors)):
        g, k = factors.analysis.pairs[position]
        group, l = factors.analysis.groups[g], factors.factors[position].segment.stage
        x = slice(layout.x_offsets[l], layout.x_offsets[l + 1])
        rows = [group.space.at(k).Q(torch.eye(group.r).double()[None])[0].numpy().T]
        if group.n_in:
            unit = 1.0 if group.state_unit is None else group.state_unit[k].numpy()
            rows.append(D[layout.in_offsets[l] : layout.in_offsets[l + 1]] / unit)
        selector = np.zeros((group.r, p.size))
        selector[:, x] = rows[0]
        rows[0] = selector
        if joint.directions is not None:
            directions = np.zeros((joint.directions.shape[1], p.size))
            directions[:, x] = joint.directions.numpy().T
            rows.append(directions)
        map_ = np.vstack(rows)
        expected = map_ @ inverse @ map_.T
        r = group.r
        atol = 1e-12 * condition * np.abs(expected).max()
        np.testing.assert_allclose(joint.ss.numpy(), expected[:r, :r], rtol=0, atol=atol)
        np.testing.assert_allclose(joint.sd.numpy(), expected[:r, r:], rtol=0, atol=atol)
        np.testing.assert_allclose(joint.dd.numpy(), expected[r:, r:], rtol=0, atol=atol)


def test_no_controls():
    from tests.lq.problems import random_blocks

    factors = riccati.factor(
        setting("equal").analysis.__class__(random_blocks([2, 3, 2], [0, 0], seed=1).problem()), 0.5
    )
    assert selected.diagonal(factors).shape == (0,) and selected.blocks(factors) == []
