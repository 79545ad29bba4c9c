"""Hidden controls at one damping: which directions are delayed, and what is left of the others."""

import math

import numpy as np
import pytest
import torch

from linop_hess.lq.pivots.hidden import Hidden, hidden_controls, strongest_coupling
from tests.lq.methods.conformance import MIXED, SIZES, setting
from tests.lq.problems import random_blocks

COUPLED = ("more controls than outputs", "wildly varying", "empty states inside", *MIXED)


def each(shape, largest, damping=1e-3):
    """Every coupled segment: its group, its position there, what is decided, and N = (I − QQᵀ)B by dense blocks, in units kept."""
    truth, blocks = setting(shape), random_blocks(*SIZES[shape], seed=7)
    for group in truth.analysis.groups:
        unit = group.state_unit
        gram = None
        if group.is_coupled:
            gram = group.space.hidden_gram() if unit is None else group.space.hidden_gram() * unit * unit.mT
        for k, found in enumerate(hidden_controls(group, gram, damping, largest)):
            Q = group.space.at(k).Q(torch.eye(group.r).double()[None])[0].numpy()
            B = blocks.B[group.stages[k]][:, : group.n_in]
            kept = 1.0 if unit is None else unit[k].numpy().T
            yield group, k, found, (B - Q @ (Q.T @ B)) * kept, Q


@pytest.mark.parametrize("shape", SIZES)
def test_without_a_bound_all_are_eliminated(shape):
    for group, _, found, N, _ in each(shape, math.inf):
        assert not found.is_split and found.delayed == 0 and found.damping == 1e-3
        if group.is_coupled:
            np.testing.assert_allclose(found.gram, N.T @ N, rtol=0, atol=1e-12 * np.abs(N).max() ** 2 * len(N))
        else:
            assert found.gram is None


@pytest.mark.parametrize("largest", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("shape", COUPLED)
def test_those_above_the_bound_are_delayed(shape, largest):
    """By singular values of N in units of the state; together with the weak ones they are all that the state acts on."""
    delayed = 0
    for group, k, found, N, Q in each(shape, largest):
        if not group.is_coupled:
            assert not found.is_split
            continue
        unit = group.unit_in[k].numpy() / (1.0 if group.state_unit is None else group.state_unit[k].numpy())
        sigma = np.linalg.svd(N * unit.T, compute_uv=False)
        rank = int((sigma > 1e-12 * sigma[0]).sum())
        if not found.is_split:
            assert (np.linalg.norm(N * unit.T, axis=0) <= largest).all()
            continue
        delayed += found.delayed
        assert found.delayed == (sigma > largest).sum() or np.abs(sigma - largest).min() < 1e-9
        U = torch.cat([found.directions, found.weak], 1).numpy()
        assert U.shape[1] == rank or largest > 0
        np.testing.assert_allclose(U.T @ U, np.eye(U.shape[1]), rtol=0, atol=1e-12)
        np.testing.assert_allclose(Q.T @ U, 0, rtol=0, atol=1e-12)
        coupling = torch.cat([found.coupling, found.weak_coupling], 1).numpy()
        np.testing.assert_allclose(coupling, N.T @ U, rtol=0, atol=1e-12 * np.abs(N).max() * len(N))
        np.testing.assert_allclose(U @ (U.T @ N), N, rtol=0, atol=1e-11 * np.abs(N).max() * len(N))
        weak = found.weak_coupling
        torch.testing.assert_close(found.gram, weak @ weak.mT)
    assert delayed >= 1 or largest > 0


@pytest.mark.parametrize("shape", COUPLED)
def test_halves_of_split_segments(shape):
    for group, _, found, N, _ in each(shape, 0.5):
        if not found.is_split:
            continue
        g = torch.randn(group.control.p, 2, generator=torch.Generator().manual_seed(0)).double()
        weak = found.weak.numpy()
        pushed = N.T @ (weak @ (weak.T @ g.numpy())) / 1e-3
        np.testing.assert_allclose(found.push(g), pushed, rtol=0, atol=1e-11 * np.abs(pushed).max(initial=1.0))
        c, d = (
            torch.randn(size, 2, generator=torch.Generator().manual_seed(1)).double()
            for size in (found.delayed, group.n_in)
        )
        answer = found.directions.numpy() @ c.numpy() - weak @ (weak.T @ (N @ d.numpy())) / 1e-3
        np.testing.assert_allclose(found.answer(c, d), answer, rtol=0, atol=1e-11 * np.abs(answer).max(initial=1.0))


@pytest.mark.parametrize("shape", SIZES)
def test_strongest_coupling(shape):
    found, expected = strongest_coupling(setting(shape).analysis), 0.0
    for group, k, hidden, N, _ in each(shape, math.inf):
        unit = group.unit_in[k].numpy() / (1.0 if group.state_unit is None else group.state_unit[k].numpy())
        column = float(np.linalg.norm(N * unit.T, axis=0).max(initial=0.0)) if group.is_coupled else 0.0
        assert hidden.largest_coupling(torch.from_numpy(unit)) == pytest.approx(column, rel=1e-9)
        expected = max(expected, column**2)
    assert found == pytest.approx(expected, rel=1e-9)


def test_nothing_hidden():
    assert Hidden().largest_coupling(torch.ones(2, 1)) == 0.0 and Hidden().delayed == 0 and not Hidden().is_split
