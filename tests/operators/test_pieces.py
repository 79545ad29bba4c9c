"""The lifted system of a problem whose controls lie anywhere in flat vectors."""

import numpy as np
import pytest

from linop_hess.operators.pieces import Augmented, ChainHessian, layerwise_permutation
from tests.lq.methods.conformance import setting


@pytest.mark.parametrize("shape", ["shared, places", "idle everywhere, places", "residual, places", "equal"])
def test_lifted_system(shape):
    """Eliminating (y, z) leaves H in flat order; layer by layer it is block tridiagonal."""
    truth, damping = setting(shape), 0.3
    problem, N = truth.problem, len(truth.H)
    K = Augmented(problem, damping) @ np.eye(N + 2 * problem.layout.size_out)
    schur = K[:N, :N] - K[:N, N:] @ np.linalg.solve(K[N:, N:], K[N:, :N])
    np.testing.assert_allclose(schur, truth.shifted(damping), rtol=0, atol=1e-12 * truth.norm)
    np.testing.assert_allclose(ChainHessian(problem) @ np.eye(N), truth.H, rtol=0, atol=1e-12 * truth.norm)

    turn = layerwise_permutation(problem) @ np.eye(len(K))
    assert np.array_equal(turn @ turn.T, np.eye(len(K)))
    by_layer = turn @ K @ turn.T
    layer = np.repeat(np.arange(problem.length), problem.layout.p + 2 * problem.layout.n_out)
    assert not by_layer[abs(layer[:, None] - layer) > 1].any()
    for l in range(problem.length):
        first = int(np.searchsorted(layer, l))
        own = problem.layout.controls(l)
        assert np.array_equal(turn[first : first + own.size].argmax(1), own)
