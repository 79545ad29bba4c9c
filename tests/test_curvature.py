"""H and Gauss-Newton matrices are one class of operator, and agree with `Linearization`."""

import numpy as np
import pytest
from torch.nn import functional as f

import linop_hess as lh
from linop_hess.curvature import ChainCurvature
from tests.helpers import make_batch, make_mlp, oracle_hessian
from tests.lq.methods.test_woodbury import gauss_newton_matrix
from tests.lq.problems import backward_error


@pytest.fixture(scope="module")
def network():
    model, (x, y) = make_mlp([3, 5, 4, 3], seed=2, gain=1.4), make_batch(3, 3, 4)
    lin = lh.linearize(model, f.cross_entropy, x, y)
    return lin, oracle_hessian(model, f.cross_entropy, x, y), gauss_newton_matrix(model, f.cross_entropy, x, y)


def both(network):
    lin, H, G = network
    return [(lin.H, H), (lin.gauss_newton(), G)]


def test_one_class(network):
    lin, H, G = network
    assert type(lin.H) is type(lin.gauss_newton()) is ChainCurvature
    assert lin.H is lin.H and lin.gauss_newton() is lin.gauss_newton() and lin.H.analysis is lin.analysis
    for operator, dense in both(network):
        np.testing.assert_allclose(lh.to_dense(operator), dense, rtol=0, atol=1e-13 * np.abs(dense).max())
        damped = lh.to_dense(operator.damped(0.3))
        np.testing.assert_allclose(damped, dense + 0.3 * np.eye(len(dense)), rtol=0, atol=1e-13 * np.abs(dense).max())


@pytest.mark.parametrize("method", ["auto", "banded", "riccati", "dense"])
@pytest.mark.parametrize("damping", [0.5, 1e-3, -0.02])
def test_inverses(network, method, damping):
    lin = network[0]
    g = np.random.default_rng(0).standard_normal((lin.problem.size, 2))
    kinds = set()
    for operator, dense in both(network):
        inverse = operator.inverse(damping, method)
        kinds.add(type(inverse))
        assert backward_error(dense, damping, inverse @ g, g) <= 1e-14
        values = np.linalg.eigvalsh(dense) + damping
        found = inverse.inertia()
        assert (found.negative, found.zero, found.positive) == ((values < 0).sum(), 0, (values > 0).sum())
        assert inverse.slogdet()[1] == pytest.approx(np.log(np.abs(values)).sum(), rel=1e-10)
    np.testing.assert_array_equal(lin.inverse(damping, method) @ g, lin.H.inverse(damping, method) @ g)
    assert kinds == {type(lin.inverse(damping))} == {lh.HessianInverse}
    assert lin.inverse(damping, tolerance=1e-3).tolerance == lin.H.inverse(damping, tolerance=1e-3).tolerance == 1e-3


def test_questions_to_the_spectrum(network):
    for operator, dense in both(network):
        values = np.linalg.eigvalsh(dense)
        found = operator.inertia(0.05)
        assert (found.negative, found.positive) == ((values < -0.05).sum(), (values > -0.05).sum())
        assert operator.count_eigenvalues(-0.03, 0.1) == ((values > -0.03) & (values <= 0.1)).sum()
        assert operator.count_eigenvalues(0.1, 0.1) == 0
        assert operator.extreme_eigenvalues() == pytest.approx((values[0], values[-1]), abs=1e-7 * values[-1])
        shifted = np.abs(values + 0.3)
        assert operator.condition_number(0.3) == pytest.approx(shifted.max() / shifted.min(), rel=1e-5)
        least = max(-values[0], 1e-7 * np.abs(values).max())
        assert least * (1 - 0.3) <= operator.smallest_convex_damping() <= 1.002 * least
        assert operator.smallest_convex_damping(0.5) == pytest.approx(1.5 * operator.smallest_convex_damping())


def test_linearization_passes_on(network):
    lin, H = network[0], network[0].H
    assert lin.inertia(0.1) == H.inertia(0.1) and lin.count_eigenvalues(0, 1) == H.count_eigenvalues(0, 1)
    assert lin.smallest_convex_damping() == H.smallest_convex_damping()
    assert lin.extreme_eigenvalues() == H.extreme_eigenvalues() and lin.condition_number(1.0) == H.condition_number(1.0)
    assert lin.plan(0.1).costs == H.plan(0.1).costs and "woodbury" in lin.gauss_newton().plan(0.1).by_time()


@pytest.mark.parametrize("bad", [np.nan, "1", None, 1j])
def test_bad_dampings(network, bad):
    for operator, _ in both(network):
        for question in (operator.damped, operator.plan, operator.inverse, operator.inertia, operator.condition_number):
            with pytest.raises((ValueError, TypeError), match="damping"):
                question(bad)


def test_other_bad_arguments(network):
    for operator, _ in both(network):
        with pytest.raises(ValueError, match="a <= b"):
            operator.count_eigenvalues(1.0, 0.0)
        for arguments in ((-1.0,), (0.0, 0.0), (0.0, 1.0)):
            with pytest.raises(ValueError, match="margin"):
                operator.smallest_convex_damping(*arguments)
        with pytest.raises(ValueError, match="rtol"):
            operator.extreme_eigenvalues(0.0)
