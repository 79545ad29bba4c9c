"""Segments at one damping, against dense blocks: condensed or stage by stage they are the same."""

import numpy as np
import pytest
import torch

from linop_hess.errors import SingularPivotError
from linop_hess.lq import segments as segments_module
from linop_hess.lq.value.controls import CondensedControl, StageControl, add_product, segments_at
from tests.lq.methods.conformance import MIXED, SHAPES, setting
from tests.lq.problems import random_blocks


def dense_segment(blocks, first, last, damping, Q, space_first):
    """S, E, Z of ½ uᵀTu for V = 0 and W = [R, F] of stages first..last−1, hidden controls eliminated, by dense algebra."""
    A, B, C, F, G = (getattr(blocks, name)[first] for name in "ABCFG")
    if space_first:
        B, C, F = B[:, :0], C[:0, :0], F[:, :0]
    hidden = np.eye(len(A)) - Q @ Q.T
    S, E = Q.T @ A @ Q + damping * np.eye(Q.shape[1]), Q.T @ B
    Z = C - B.T @ hidden @ B / damping
    R, through = G @ Q, F
    for l in range(first + 1, last):
        S, E, Z = S + R.T @ blocks.C[l] @ R, E + R.T @ blocks.C[l] @ through, Z + through.T @ blocks.C[l] @ through
        R, through = blocks.F[l] @ R, blocks.F[l] @ through
    return S, E, Z, R, through


@pytest.mark.parametrize("how", ["as planned", "stage by stage"])
@pytest.mark.parametrize("shape", [*SHAPES, *MIXED])
@pytest.mark.parametrize("damping", [0.4, -0.2])
def test_against_dense_blocks(shape, how, damping, monkeypatch):
    if how == "stage by stage":
        monkeypatch.setattr(segments_module, "CONDENSED_UP_TO", -1)
    truth = setting(shape)
    analysis, blocks = truth.new_analysis(), random_blocks(*{**SHAPES, **MIXED}[shape], seed=7)
    found = segments_at(analysis, damping, np.inf)
    starts = [*np.flatnonzero(truth.problem.layout.p), truth.problem.length]
    assert [segment.stage for segment in found] == starts[:-1]
    for position, segment in enumerate(found):
        g, k = analysis.pairs[position]
        group = analysis.groups[g]
        assert isinstance(segment.control, CondensedControl if group.is_narrow else StageControl)
        Q = group.space.at(k).Q(torch.eye(group.r).double()[None])[0].numpy()
        S, E, Z, R, F = dense_segment(blocks, starts[position], starts[position + 1], damping, Q, position == 0)
        unit = np.ones((segment.n_in, 1))
        after = np.ones((segment.n_out, 1))
        if group.in_units:
            unit, after = group.unit_in[k].numpy(), group.unit_out[k].numpy()
        V = np.random.default_rng(0).standard_normal((segment.n_out,) * 2)
        V = V + V.T
        back = V / after / after.T  # in terms of the states themselves
        ours = [part.numpy() for part in segment.congruence(torch.from_numpy(V))]
        expected = S + R.T @ back @ R, (E + R.T @ back @ F) * unit.T, (Z + F.T @ back @ F) * unit * unit.T
        for mine, theirs in zip(ours, expected, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-11 * np.abs(theirs).max(initial=1.0))
        y = np.random.default_rng(1).standard_normal((segment.n_out, 2))
        for mine, theirs in zip(segment.adjoint(torch.from_numpy(y)), (R, F * unit.T), strict=True):
            np.testing.assert_allclose(
                mine.numpy(), theirs.T @ (y / after), rtol=0, atol=1e-11 * np.abs(y / after).max(initial=1.0)
            )
        s, d = (np.random.default_rng(2).standard_normal((size, 2)) for size in (segment.r, segment.n_in))
        moved = segment.forward(torch.from_numpy(s), torch.from_numpy(d)).numpy()
        theirs = (R @ s + F @ (unit * d)) / after
        np.testing.assert_allclose(moved, theirs, rtol=0, atol=1e-11 * np.abs(theirs).max(initial=1.0))


@pytest.mark.parametrize("shape", ["more controls than outputs", "narrow, wide, narrow"])
def test_strongly_coupled_directions_are_left_out(shape):
    """What is delayed is never taken off the state; with nothing eliminated C alone remains."""
    truth = setting(shape)
    damping = 1e-6
    all_, none = segments_at(truth.analysis, damping, np.inf), segments_at(truth.analysis, damping, 0.0)
    delayed = [segment.hidden.delayed for segment in none]
    assert sum(delayed) >= 2 and not any(segment.hidden.delayed for segment in all_)
    for segment, other in zip(all_, none, strict=True):
        V = torch.zeros(segment.n_out, segment.n_out).double()
        difference = other.congruence(V)[2] - segment.congruence(V)[2]
        if other.hidden.delayed:
            coupling = other.hidden.coupling
            torch.testing.assert_close(difference, coupling @ coupling.mT / damping, rtol=1e-6, atol=1e-8 / damping)
        else:
            assert not bool(difference.any())


def test_no_damping():
    with pytest.raises(SingularPivotError):
        segments_at(setting("more controls than outputs").analysis, 0.0, np.inf)
    assert segments_at(setting("equal", with_A="all").analysis, 0.0, np.inf)


def test_add_product():
    C, A, B = torch.randn(2, 3, 4), torch.randn(2, 3, 5), torch.randn(2, 5, 4)
    torch.testing.assert_close(add_product(C, A, B), C + A @ B)
    torch.testing.assert_close(add_product(C[0], A[0], B[0]), C[0] + A[0] @ B[0])
