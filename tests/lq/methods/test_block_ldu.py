"""Method "ldu": the paper's algorithm pivots within blocks only, so it may lose digits, but never silently."""

import pytest
import torch

from linop_hess.errors import FactorizationError, SingularPivotError
from linop_hess.lq import Analysis, Solver
from linop_hess.lq.methods import block_ldu
from tests.lq.methods.conformance import SHAPES, WIRED, SolveConformance, right_hand_side, setting
from tests.lq.problems import backward_error, random_blocks

DAMPINGS = [1.0, 1e-2, 1e-5, 1e-8, -0.37, -1e-4]


class TestLdu(SolveConformance):
    shapes = (*SHAPES, *WIRED)
    roundings = 1e6

    def factor(self, analysis, damping):
        return block_ldu.factor(analysis, damping)


@pytest.mark.parametrize("shape", SHAPES)
def test_right_or_an_error(shape):
    truth = setting(shape, seed=17)
    g = right_hand_side(len(truth.H))
    right = 0
    for damping in DAMPINGS:
        try:
            solution = Solver(truth.analysis, damping, "ldu", tolerance=1e-12).solve(torch.from_numpy(g))
        except FactorizationError:
            continue
        assert solution.method == "ldu"
        assert backward_error(truth.H, damping, solution.x.numpy(), g) <= 1e-12
        right += 1
    assert right >= len(DAMPINGS) - 2


def test_singular_block():
    blocks = random_blocks([2, 3, 2], [3, 4], seed=43, with_A="none")
    blocks.B[1][:] = 0
    with pytest.raises(SingularPivotError) as caught:
        block_ldu.factor(Analysis(blocks.problem()), 0.0)
    assert caught.value.stage in (0, 1)


def test_never_chosen():
    assert not block_ldu.METHOD.is_automatic and block_ldu.METHOD.answers == {"solve"}
    assert block_ldu.estimate(setting("equal").analysis).flops > 0
