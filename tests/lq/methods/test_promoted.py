"""Any method in double precision."""

import pytest
import torch

from linop_hess.errors import SingularPivotError
from linop_hess.lq.methods import banded, dense, riccati
from linop_hess.lq.methods.mixed import PromotedFactorization
from tests.lq.methods.conformance import SHAPES, right_hand_side, setting
from tests.lq.problems import backward_error


@pytest.mark.parametrize("module", [banded, riccati, dense], ids=lambda module: module.METHOD.name)
@pytest.mark.parametrize("shape", SHAPES)
def test_solves_in_double_precision(module, shape):
    truth = setting(shape, torch.float32)
    found = PromotedFactorization(module.factor, truth.analysis, 0.3)
    g = right_hand_side(len(truth.H))
    assert found.analysis.problem.dtype == torch.float64 and found.method == module.METHOD.name
    assert backward_error(truth.H, 0.3, found.solve(torch.from_numpy(g)).numpy(), g) <= 1e-12
    single = found.solve(torch.from_numpy(g).float())
    assert single.dtype == torch.float64
    assert found.nbytes == found.inner.nbytes + found.analysis.problem.nbytes
    assert found.answers == {"solve"}


def test_the_problem_is_promoted_once():
    analysis = setting("equal", torch.float32).analysis
    first, second = (PromotedFactorization(riccati.factor, analysis, damping) for damping in (0.3, 0.1))
    assert first.analysis is second.analysis is analysis.in_float64


def test_singular_to_double_precision():
    with pytest.raises(SingularPivotError):
        PromotedFactorization(riccati.factor, setting("more controls than outputs", torch.float32).analysis, 0.0)
