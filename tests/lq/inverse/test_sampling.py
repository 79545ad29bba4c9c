"""Products with the positive definite operator, and samples."""

import numpy as np
import pytest
import torch

from linop_hess.errors import FactorizationError
from linop_hess.lq import make_plan
from linop_hess.lq.inverse.factors import Factors
from linop_hess.lq.inverse.sampling import positive, sample
from linop_hess.lq.methods.plan import METHODS
from tests.lq.methods.conformance import MIXED, SHAPES, WIRED, eye, setting


def factors_of(truth, damping, name):
    plan = make_plan(truth.analysis, damping)
    return Factors(truth.analysis, damping, plan, METHODS[name].factor(truth.analysis, damping))


@pytest.mark.parametrize("name", ["riccati", "dense"])
@pytest.mark.parametrize("shape", [*SHAPES, *MIXED, *WIRED])
def test_positive_has_the_eigenvectors_signs_undone(shape, name):
    """(P K)² = I, and P is symmetric positive definite; any dtype comes back as it went."""
    truth = setting(shape)
    for damping in (0.5, 1e-2, -0.3):
        K, factors = truth.shifted(damping), factors_of(truth, damping, name).bounded()
        P = positive(factors, eye(len(K), torch.float64)).numpy()
        lost = np.linalg.norm(P, 2) * np.linalg.norm(K, 2) * max(1.0, np.linalg.norm(P @ K, 2))
        np.testing.assert_allclose(P @ K @ P @ K, np.eye(len(K)), rtol=0, atol=1e-12 * len(K) * lost)
        np.testing.assert_allclose(P, P.T, rtol=0, atol=1e-10 * np.abs(P).max())
        assert np.linalg.eigvalsh(P).min() > 0
        single = positive(factors, eye(len(K), torch.float32))
        assert single.dtype == torch.float32
        np.testing.assert_allclose(single.numpy(), P, rtol=1e-5, atol=1e-6 * np.abs(P).max())


def test_covariance_of_samples():
    truth = setting("equal")
    damping = 1.3 * -truth.eigenvalues[0]
    for name in ("riccati", "dense"):
        drawn = sample(factors_of(truth, damping, name).answering("sample"), 40_000, torch.Generator().manual_seed(0))
        white = np.linalg.cholesky(truth.shifted(damping)).T @ drawn.numpy()
        assert np.abs(white @ white.T / 40_000 - np.eye(12)).max() <= 0.05
        assert np.abs(white.mean(1)).max() <= 0.03


def test_a_generator_says_which():
    truth = setting("more controls than outputs")
    factors = factors_of(truth, 2 * truth.norm, "riccati").answering("sample")
    first, again = (sample(factors, 3, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, again) and not torch.equal(first, sample(factors, 3, torch.Generator().manual_seed(8)))
    assert sample(factors, 0, None).shape == (29, 0)


@pytest.mark.parametrize("name", ["riccati", "dense"])
def test_a_negative_pivot_is_never_made_a_nan(name):
    truth = setting("equal")
    assert truth.eigenvalues[0] < -0.1
    with pytest.raises(FactorizationError, match="made a pivot negative"):
        sample(factors_of(truth, 0.1, name).answering("sample"), 2, None)
