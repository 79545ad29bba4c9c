"""Method "banded"."""

import numpy as np
import pytest
import torch

from linop_hess import lq
from linop_hess.errors import SingularPivotError
from linop_hess.lq.methods import banded
from linop_hess.lq.methods.banded import BandLayout
from tests.lq.methods.conformance import DAMPINGS, SIZES, SolveConformance, right_hand_side, setting
from tests.lq.problems import backward_error, random_blocks


class TestBanded(SolveConformance):
    def factor(self, analysis, damping):
        return banded.factor(analysis, damping)

    def amplified(self, damping):
        return 1e-2 / abs(damping)


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("damping", DAMPINGS)
def test_determinant(shape, damping):
    truth = setting(shape)
    values = np.abs(truth.eigenvalues + damping)
    found = banded.factor(truth.analysis, damping)
    assert found.answers == {"solve", "determinant"}
    # What 1/ε takes off where controls are hidden is rounded in the matrix that is factored.
    lost = 1e-15 / abs(damping) if truth.analysis.hidden else 0.0
    doubt = truth.doubt(damping, 1e-13 + lost)
    assert doubt < 1e-2
    assert abs(found.logabsdet() - np.log(values).sum()) <= doubt + 1e-13


@pytest.mark.parametrize("shape", SIZES)
def test_layout_has_room_for_every_unknown(shape):
    analysis = setting(shape).analysis
    layout = BandLayout(analysis)
    visible = analysis.problem.size - analysis.hidden
    assert layout.order == layout.start[-1] == visible + 2 * layout.n.sum()
    assert layout.n[-1] == 0 and (np.diff(layout.start) == layout.r + 2 * layout.n).all()
    assert 0 <= layout.bandwidth < max(layout.order, 1)


@pytest.mark.parametrize("scale", [1e-150, 1e150])
def test_constraints_weigh_as_much_as_curvatures(scale):
    """Without it the entries of the matrix are 1e150 apart."""
    blocks = random_blocks([2, 3, 3, 2], [4, 5, 4], seed=3)
    for name in "ABC":
        for block in getattr(blocks, name):
            block *= scale
    H, g = blocks.hessian(), right_hand_side(13)
    damping = 0.3 * scale
    x = banded.factor(lq.Analysis(blocks.problem()), damping).solve(torch.from_numpy(g)).numpy()
    assert backward_error(H / scale, 0.3, x * scale, g) <= 1e-12


def test_hidden_controls_need_a_damping():
    analysis = setting("more controls than outputs").analysis
    with pytest.raises(SingularPivotError) as caught:
        banded.factor(analysis, 0.0)
    assert caught.value.stage in (1, 3)


def test_the_stage_of_an_exactly_singular_pivot():
    zero, one = np.zeros((1, 1)), np.ones((1, 1))
    problem = lq.Problem.from_blocks([one, zero], [zero, zero], [zero, zero], [one, one], [one, one])
    with pytest.raises(SingularPivotError) as caught:
        banded.factor(lq.Analysis(problem), 0.0)
    assert caught.value.stage == 1


def test_estimate_grows_with_the_band():
    costs = [banded.estimate(setting(shape).analysis) for shape in ("equal", "all wide")]
    assert 0 < costs[0].flops < costs[1].flops and costs[0].nbytes < costs[1].nbytes
    assert not costs[0].why_not and costs[0].seconds > 0
