"""A solution as a user meets it: unpacked, printed, in a notebook."""

import math

import torch

from linop_hess.lq.solve.solution import Solution


def test_it_unpacks_prints_and_is_frozen():
    solution = Solution(torch.ones(3, 1), 1e-16, 2e-15, 1, "banded")
    x, backward_error, residual_norm, steps, method = solution
    assert x is solution.x and (backward_error, residual_norm, steps, method) == (1e-16, 2e-15, 1, "banded")
    assert math.isnan(solution.structured_error)
    assert (
        "backward error 1.0e-16" in str(solution)
        and "1 refinement step," in str(solution)
        and "banded" in repr(solution)
    )
