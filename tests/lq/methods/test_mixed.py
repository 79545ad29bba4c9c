"""Factors in single precision of problems in double: certified solves, rejection, and nothing factored twice."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import linop_hess as lh
from linop_hess import lq
from linop_hess.errors import FactorizationError
from linop_hess.lq.matrix import hessian
from linop_hess.lq.methods import dense, mixed, plan
from tests.helpers import make_batch, make_mlp, oracle_hessian
from tests.lq.methods.conformance import setting

CE = nn.CrossEntropyLoss()


@pytest.fixture(scope="module")
def network():
    """A network of 228 parameters, an indefinite Hessian of rank less than that, repeated samples; and its dense truths."""
    model, (x, y) = make_mlp([8, 9, 7, 6, 3]), make_batch(8, 3, 60)
    x, y = torch.cat([x, x[:20]]), torch.cat([y, y[:20]])
    H, G = oracle_hessian(model, CE, x, y), lh.to_dense(lh.GaussNewton(model, CE, (x, y)))
    return lh.linearize(model, CE, x, y), H, G


@pytest.fixture
def counted(monkeypatch):
    """How often H was assembled and factored, by precision."""
    made: list[str] = []
    of, assemble, cholesky = dense.SymmetricFactor.of.__func__, hessian.assemble, mixed.CholeskyFactor.of.__func__

    def factored(cls, S, is_own=False):
        made.append(f"factored {str(S.dtype)[-7:]}")
        return of(cls, S, is_own)

    def tried(cls, S):
        found = cholesky(cls, S)
        made.extend(["factored float32"] if found else [])
        return found

    def assembled(problem, dtype=None):
        made.append(f"assembled {str(dtype or problem.dtype)[-7:]}")
        return assemble(problem, dtype)

    monkeypatch.setattr(dense.SymmetricFactor, "of", classmethod(factored))
    monkeypatch.setattr(mixed.CholeskyFactor, "of", classmethod(tried))
    monkeypatch.setattr(hessian, "assemble", assembled)
    return made


def backward_error(H, damping, x, g):
    K = H + damping * np.eye(len(H))
    return np.linalg.norm(g - K @ x) / (np.linalg.norm(K, 2) * np.linalg.norm(x) + np.linalg.norm(g))


@pytest.mark.parametrize("which", ["H", "Gauss-Newton"])
@pytest.mark.parametrize("damping", [0.3, 1e-2, 1e-4])
def test_solves_are_as_good_as_in_double(network, which, damping, counted):
    lin, *truths = network
    H, matrix = (truths[0], lin.H) if which == "H" else (truths[1], lin.gauss_newton())
    inverse = lh.HessianInverse(lq.Analysis(matrix.problem), damping, "dense", precision="single")
    for g in (lin.gradient, np.ones((len(H), 3)), np.zeros(len(H))):
        solution = inverse.solve(g)
        assert solution.backward_error <= 1e-14
        assert backward_error(H, damping, solution.x, g) <= 2e-14 if g.any() else not solution.x.any()
    assert (inverse.precision, inverse.method) == ("single", "dense")
    assert counted == ["assembled float32", "factored float32"]


@pytest.mark.parametrize("shift", [-1.5, -0.5, 0.0, 0.5, 1.5])
def test_cholesky_is_of_definite_matrices_alone(network, shift):
    """Around the damping that makes H + εI definite: what Cholesky takes is definite, and either way a solve is certified."""
    lin, H, _ = network
    lowest = np.linalg.eigvalsh(H)[0]
    damping = float(-lowest * (1 + shift))
    factors = mixed.factor(lq.Analysis(lin.problem), damping)
    assert lowest < -1e-4
    if shift:
        assert isinstance(factors._factor, mixed.CholeskyFactor) == (shift > 0)
    assert factors.nbytes >= 4 * len(H) ** 2
    if abs(damping) > 1e-6:
        inverse = lin.inverse(damping, "dense", precision="single" if shift else "auto")
        x = inverse.solve(lin.gradient)
        assert x.backward_error <= 1e-14 and backward_error(H, damping, x.x, lin.gradient) <= 2e-14
        assert inverse.is_positive_definite == (shift > 0) or not shift


def test_cholesky_of_what_has_no_factor():
    assert mixed.CholeskyFactor.of(torch.tensor([[1.0, 2.0], [2.0, 1.0]])) is None
    assert mixed.CholeskyFactor.of(torch.full((2, 2), torch.nan)) is None
    assert mixed.CholeskyFactor.of(torch.diag(torch.tensor([1.0, torch.inf]))) is None
    assert mixed.CholeskyFactor.of(torch.zeros(2, 2)) is None
    empty = mixed.CholeskyFactor.of(torch.zeros(0, 0))
    assert empty is not None and empty.solve(torch.zeros(0, 3)).shape == (0, 3)
    S, X = torch.tensor([[2.0, 1.0], [1.0, 3.0]]), torch.tensor([[1.0], [2.0]])
    assert torch.allclose(S @ mixed.CholeskyFactor.of(S.clone()).solve(X), X, rtol=0, atol=1e-6)


@pytest.mark.parametrize("first", [0, 1, 250, 599])
def test_a_matrix_that_has_no_cholesky_factor_is_as_it_was(first):
    """It is tried in the memory of the matrix, so that there is one copy of H."""
    A = torch.randn(600, 600, generator=torch.Generator().manual_seed(2))
    S = A @ A.mT / 600 + torch.eye(600)
    S = (S + S.mT) / 2
    definite = S.clone()
    S[first, first] = 1e-3 - 0.5 * (first == 0)
    kept = S.clone()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert mixed.CholeskyFactor.of(S) is None
        factor = mixed.CholeskyFactor.of(definite)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(S, kept)
    assert factor is not None and factor.L.data_ptr() == definite.data_ptr()


def test_all_but_solves_is_answered_in_double(network, counted):
    lin, H, _ = network
    inverse = lh.HessianInverse(lq.Analysis(lin.problem), 0.02, "dense", precision="single")
    values = np.linalg.eigvalsh(H + 0.02 * np.eye(len(H)))
    assert values[0] < 0
    inertia = inverse.inertia()
    assert (inertia.negative, inertia.positive) == (int((values < 0).sum()), int((values > 0).sum()))
    assert inverse.slogdet()[1] == pytest.approx(np.log(abs(values)).sum(), abs=1e-10)
    exact = np.diag(np.linalg.inv(H + 0.02 * np.eye(len(H))))
    assert abs(inverse.diagonal() - exact).max() <= 1e-11 * abs(exact).max()
    assert counted == ["assembled float32", "factored float32", "assembled float64", "factored float64"]


def test_a_damping_too_small_for_single_is_taken_in_double_at_once(network, monkeypatch, counted):
    lin, H, _ = network
    monkeypatch.setattr(plan, "SINGLE_FROM", 1)
    analysis = lq.Analysis(lin.problem)
    found = lq.Solver(analysis, 1e-9, "dense")
    assert found.precision == "double" and found.solve(lin.gradient_tensor).backward_error <= 1e-14
    assert counted == ["assembled float64", "factored float64"]


def test_single_that_fails_is_followed_by_double_once(network, monkeypatch, counted):
    """Between zero eigenvalues of H and ε there is nothing for float32: refinement stalls, and double comes next."""
    lin, H, _ = network
    monkeypatch.setattr(plan, "SINGLE_FROM", 1)
    monkeypatch.setattr(plan, "SINGLE_DAMPING", 0.0)
    monkeypatch.setattr(plan, "_in_single", lambda a, *_: a.once(plan.single_estimates))
    monkeypatch.setattr(mixed, "_STEPS", 2)
    found = lq.Solver(lq.Analysis(lin.problem), 1e-10, "dense")
    assert found.precision == "single"
    g = lin.gradient_tensor
    solution = found.solve(g)
    assert found.precision == "double" and solution.backward_error <= 1e-14
    assert backward_error(H, 1e-10, solution.x.numpy(), g.numpy()) <= 2e-14
    found.solve(g)
    assert counted == ["assembled float32", "factored float32", "assembled float64", "factored float64"]
    with pytest.raises(FactorizationError, match="could not be solved to a backward error"):
        lq.Solver(lq.Analysis(lin.problem), 1e-10, "dense", precision="single").solve(g)


def test_precision_overrides_the_plan(network, monkeypatch):
    lin, _, _ = network
    monkeypatch.setattr(plan, "SINGLE_FROM", 1)
    assert lin.inverse(0.1, "dense", precision="double").precision == "double"
    single = lin.inverse(0.1, precision="single")
    assert (single.method, single.precision) == ("dense", "single")
    assert single.with_damping(0.2).precision == "single"
    assert single.nbytes < 0.6 * lin.inverse(0.1, "dense", precision="double").nbytes
    with pytest.raises(ValueError, match="precision must be one of"):
        lin.inverse(0.1, precision="half")
    with pytest.raises(
        ValueError, match='method "riccati" cannot be used here: it factors a float64 problem in float64'
    ):
        lin.inverse(0.1, "riccati", precision="single")


def test_a_float32_problem_keeps_its_precision_or_is_promoted():
    truth = setting("equal", torch.float32)
    g = torch.ones(len(truth.H), 1)
    for precision, told in (("auto", "single"), ("single", "single"), ("double", "double")):
        found = lq.Solver(truth.new_analysis(), 0.3, "dense", precision=precision)
        assert found.precision == told and found.solve(g).backward_error <= 1e-6


def test_the_plan_knows_time_and_memory(network):
    analysis = lq.Analysis(network[0].problem)
    own, single = plan.estimates(analysis)["dense"], plan.single_estimates(analysis)["dense"]
    assert single.precision == "single" and not own.precision
    assert own.flops < single.flops < 3 * own.flops
    told = lq.make_plan(analysis, 0.1, precision="single")
    assert told.costs["dense"] == single and told.in_own_precision.costs["dense"] == own
    assert "in single precision <- chosen" in str(told)
    assert lq.make_plan(analysis, 0.1).costs["dense"] == own  # too small to be worth it


def test_the_plan_charges_what_is_factored(network, monkeypatch):
    """Of a matrix that seems definite Cholesky's factors, of others Bunch-Kaufman's."""
    analysis, told = network[0].analysis, {}
    for definite in (False, True):
        monkeypatch.setattr(plan, "looks_definite", lambda analysis, damping, told=definite: told)
        told[definite] = plan.make_plan(analysis, 1e-2, precision="single").costs
    assert told[True]["dense"].seconds < told[False]["dense"].seconds
    assert {**told[True], "dense": None} == {**told[False], "dense": None}
    assert mixed.definite(analysis, told[False]["dense"]) == told[True]["dense"]


def test_entries_beyond_the_range_of_float32_are_left_to_double(monkeypatch):
    monkeypatch.setattr(plan, "SINGLE_FROM", 1)
    rng = np.random.default_rng(0)
    C = 1e30 * rng.standard_normal((2, 2))
    stages = [np.zeros((2, 2))], [np.zeros((2, 2))], [C + C.T], [np.eye(2)], [1e8 * np.eye(2)]
    problem = lq.Problem.from_blocks(*(2 * one for one in stages))
    found = lq.Solver(problem, 1e44, "dense", precision="auto")
    assert found.precision == "double" and found.solve(torch.ones(4, 1).double()).backward_error <= 1e-14
