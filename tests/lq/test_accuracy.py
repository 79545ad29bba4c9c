"""The tolerances, where they decide."""

import numpy as np
import pytest

from linop_hess.lq import accuracy
from linop_hess.lq.stages.dense import DenseStage


@pytest.mark.parametrize(("gap", "accepted"), [(0.5, True), (2.0, False)])
def test_blocks_given_as_symmetric(gap, accepted):
    A = np.array([[2.0, 1.0], [1.0 + 2.0 * gap * accuracy.SYMMETRIC, 2.0]])
    blocks = A, np.zeros((2, 1)), np.zeros((1, 1)), np.ones((1, 1)), np.ones((1, 2))
    if accepted:
        a = DenseStage.from_arrays(0, *blocks).dense_A()[0].numpy()
        assert np.array_equal(a, a.T)
    else:
        with pytest.raises(ValueError, match="A is not symmetric"):
            DenseStage.from_arrays(0, *blocks)
