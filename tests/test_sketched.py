"""Sketched and iterative inverses as users have them."""

import pickle

import numpy as np
import pytest
import scipy.sparse.linalg as spla
import torch

import linop_hess as lh
from linop_hess.errors import FactorizationError
from linop_hess.lq.inverse import solver
from linop_hess.lq.iterative.sizing import Enough, Patience
from tests.lq.sketches import DAMPING, backward_error, damped, network


@pytest.fixture(scope="module")
def lin():
    return network()


@pytest.fixture(scope="module")
def A(lin):
    return damped(lin.analysis).numpy()


def test_as_a_preconditioner_of_scipy(lin, A):
    inv = lin.inverse(DAMPING, "sketched", rank=50)
    b = lin.gradient
    plain = lh.krylov.run("gmres", A, b, rtol=1e-8, restart=300, maxiter=300)
    record = lh.krylov.run("gmres", A, b, M=inv, rtol=1e-8, restart=300, maxiter=300)
    assert record.converged and record.iterations < plain.iterations
    positive = lh.to_dense(inv.positive())
    assert np.linalg.eigvalsh((positive + positive.T) / 2)[0] > 0.0
    assert lh.krylov.run("minres", A, b, M=inv.positive(), rtol=1e-10, maxiter=400).residual < 1e-4
    assert spla.gmres(lin.damped(DAMPING), b, M=inv, rtol=1e-6, restart=100)[1] == 0


def test_the_product_is_symmetric_and_fixed(lin):
    M = lh.to_dense(lin.inverse(DAMPING, "sketched", rank=30))
    assert np.linalg.norm(M - M.T) < 1e-4 * np.linalg.norm(M)  # in single precision
    inv = lin.inverse(DAMPING, "sketched", rank=lin.problem.size)
    M = lh.to_dense(inv)
    assert np.linalg.norm(M - M.T) < 1e-12 * np.linalg.norm(M)


def test_all_directions_are_the_inverse(lin, A):
    x = lin.inverse(DAMPING, "sketched", rank=lin.problem.size) @ lin.gradient
    expected = np.linalg.solve(A, lin.gradient)
    assert np.linalg.norm(x - expected) < 1e-10 * np.linalg.norm(expected)


@pytest.mark.parametrize("options", [{"rank": 30}, {"tol": 0.1}, {"rank": 30, "core": 20}])
def test_other_dampings_and_pickles_keep_what_was_asked(lin, options):
    inv = lin.inverse(DAMPING, "sketched", right_hand_sides=3, **options)
    other = inv.with_damping(1.0)
    again = pickle.loads(pickle.dumps(inv))
    for changed, damping in ((other, 1.0), (again, DAMPING)):
        assert changed.method == "sketched" and changed.report().samples == options.get("core", 30)
        assert changed.report().directions == inv.report().directions
        solution = changed.solve(lin.gradient)
        assert backward_error(damped(lin.analysis, damping).numpy(), solution.x, lin.gradient) <= 1e-14
        assert f"{solution.iterations} iteration" in str(solution)


def test_gauss_newton(lin):
    G = lin.gauss_newton()
    solution = G.inverse(DAMPING, "sketched", rank=40).solve(lin.gradient)
    assert backward_error(damped(G.analysis).numpy(), solution.x, lin.gradient) <= 1e-14


def test_other_questions_go_to_exact_factors(lin, A):
    inv = lin.inverse(DAMPING, "sketched", rank=20)
    values = np.linalg.eigvalsh(A)
    assert inv.inertia().negative == int((values < 0).sum())
    assert inv.slogdet()[1] == pytest.approx(np.log(np.abs(values)).sum(), rel=1e-10)
    np.testing.assert_allclose(inv.diagonal(), np.linalg.inv(A).diagonal(), rtol=1e-8)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank to be at least 1"),
        ({"rank": 10**5}, ValueError, "expected rank of 1 to"),
        ({"rank": 2.5}, TypeError, "rank to be an integer"),
        ({"tol": 1.0}, ValueError, "tol between 0 and 1"),
        ({"tol": -0.1}, ValueError, "tol between 0 and 1"),
        ({"tol": float("nan")}, ValueError, "tol"),
        ({"tol": 0.1, "rank": 5}, ValueError, "leave one of them out"),
        ({"core": 31}, ValueError, "expected core of 1 to 30"),
        ({"right_hand_sides": 0}, ValueError, "right_hand_sides"),
    ],
)
def test_bad_input(lin, given, error, message):
    with pytest.raises(error, match=message):
        lin.inverse(DAMPING, "sketched", **given)
    if "right_hand_sides" not in given:
        with pytest.raises((ValueError, TypeError)):
            lin.inverse(DAMPING, "dense", **given)


def test_options_of_another_method(lin):
    with pytest.raises(ValueError, match="expected no rank, tol or core for method 'dense'"):
        lin.inverse(DAMPING, "dense", rank=5)
    with pytest.raises(ValueError, match="right_hand_sides"):
        lin.plan(DAMPING, right_hand_sides=0)
    with pytest.raises(ValueError, match='expected factors of method "sketched"'):
        lin.inverse(DAMPING, "dense").report()


def test_samples_that_see_each_other_are_said_in_the_plan():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 4).double()

        def forward(self, x):
            return self.layer(self.layer(x).tanh())

    torch.manual_seed(0)
    lin = lh.linearize(Tied(), torch.nn.functional.mse_loss, torch.randn(6, 4).double(), torch.randn(6, 4).double())
    assert "sketched cannot be used: the states of all samples interact" in str(lin.plan(0.1))
    with pytest.raises(ValueError, match='method "sketched" cannot be used here'):
        lin.inverse(0.1, "sketched")
    solution = lin.inverse(30.0, "iterative").solve(lin.gradient)
    assert solution.backward_error <= 1e-14


@pytest.mark.parametrize(
    "precision, rank, expected",
    [
        ("auto", 30, "single"),
        ("single", 30, "single"),
        ("double", 30, "double"),
        ("auto", None, "double"),
        ("single", None, "single"),
    ],
)
def test_precision_is_what_was_asked_for_and_what_the_factors_have(lin, precision, rank, expected):
    rank = lin.problem.size if rank is None else rank
    inv = lin.inverse(DAMPING, "sketched", rank=rank, precision=precision)
    assert inv.precision == expected and inv.report().dtype == {"single": "float32", "double": "float64"}[expected]
    solution = inv.solve(lin.gradient)
    assert backward_error(damped(lin.analysis, DAMPING).numpy(), solution.x, lin.gradient) <= 1e-14
    assert pickle.loads(pickle.dumps(inv)).precision == expected
    assert lin.inverse(DAMPING, "iterative", precision=precision).solve(lin.gradient).backward_error <= 1e-14


def test_pickles_keep_how_many_directions_were_found_worth_it(lin, monkeypatch):
    """A sketch that grew would grow again, at the cost of a solve that is too slow."""
    monkeypatch.setattr(Enough, "__call__", lambda self, seen: seen.have >= self._least)
    inv = lin.inverse(DAMPING, "sketched")
    begun = inv.report().directions
    with monkeypatch.context() as impatient:
        impatient.setattr(Patience, "is_over", lambda self, left: True)
        inv.solve(lin.gradient)
    grown = inv.report().directions
    assert grown >= 2 * begun
    for again in (pickle.loads(pickle.dumps(inv)), pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(inv))))):
        assert again.report().directions == grown
        np.testing.assert_array_equal(again @ lin.gradient, inv @ lin.gradient)
    assert (
        inv.with_damping(DAMPING).report().directions == begun
    )  # of the same samples, and found anew at another damping


def test_advice_is_of_what_can_be_changed(lin, monkeypatch):
    monkeypatch.setattr(solver, "MOST_ITERATIONS", 3)
    for options, told in (({}, "try a larger damping, or"), ({"core": 20}, "try a larger core, a larger damping, or")):
        with pytest.raises(FactorizationError, match=told):
            lin.inverse(1e-5, "sketched", **options).solve(lin.gradient)
