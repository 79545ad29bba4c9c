"""Products of many columns by the dense matrix: when it is formed, what certificates say of it, and factors that follow."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import linop_hess as lh
from linop_hess import lq
from linop_hess.errors import SingularPivotError
from linop_hess.lq.matrix import hessian, many_columns
from linop_hess.lq.matrix.many_columns import ManyColumns
from linop_hess.lq.methods import plan
from linop_hess.lq.methods.base import Cost
from tests.autograd.test_threads import at_once
from tests.helpers import make_batch, make_mlp, oracle_hessian

CE = nn.CrossEntropyLoss()
DAMPING = 1e-2


@pytest.fixture(scope="module")
def network():
    """A network of 228 parameters with an indefinite Hessian, and its dense truth."""
    model, (x, y) = make_mlp([8, 9, 7, 6, 3]), make_batch(8, 3, 60)
    x, y = torch.cat([x, x[:20]]), torch.cat([y, y[:20]])
    return model, (x, y), oracle_hessian(model, CE, x, y)


@pytest.fixture
def calls(monkeypatch):
    """The numbers of columns multiplied by stages."""
    made: list[int] = []
    product = lq.Problem.hessian_product

    def counted(self, x, damping=0.0):
        made.append(x.shape[1])
        return product(self, x, damping)

    monkeypatch.setattr(lq.Problem, "hessian_product", counted)
    return made


def analysis_of(network) -> lq.Analysis:
    model, batch, _ = network
    return lh.linearize(model, CE, *batch).analysis


def columns(network, k, sizes=0.0):
    rng = np.random.default_rng(1)
    g = rng.standard_normal((len(network[2]), k)) * 10.0 ** (sizes * rng.standard_normal(k))
    return torch.from_numpy(g)


def errors(H, damping, x, g):
    """The backward error of each column."""
    K = H + damping * np.eye(len(H))
    bounds = np.linalg.norm(K, 2) * np.linalg.norm(x, axis=0) + np.linalg.norm(g, axis=0)
    return np.linalg.norm(g - K @ x, axis=0) / bounds


def half_the_time_in_single(analysis, monkeypatch):
    """Have the plan believe that of dense factors in single precision; the cost of those in double."""
    own = analysis.once(plan.estimates)["dense"]
    monkeypatch.setattr(plan, "SINGLE_FROM", 100)
    monkeypatch.setattr(
        plan,
        "single_estimates",
        lambda analysis: {"dense": Cost(own.flops, own.nbytes, 0.5 * own.seconds, precision="single")},
    )
    return own


def test_the_matrix_is_formed_once_products_by_stages_have_taken_as_long(network, monkeypatch, calls):
    analysis, X, H = analysis_of(network), columns(network, 50), network[2]
    monkeypatch.setattr(many_columns, "_forming_seconds", lambda analysis: 2.5)
    monkeypatch.setattr(many_columns, "product_seconds", lambda analysis, columns: columns / 50)
    products, formed = analysis.once(ManyColumns), []
    for _ in range(4):
        product = products.product(X, DAMPING)
        formed.append(analysis.has(hessian.kept))
        bound = np.linalg.norm(H, 2) * np.linalg.norm(X, axis=0)
        assert (np.linalg.norm(product.numpy() - (H @ X.numpy() + DAMPING * X.numpy()), axis=0) <= 1e-14 * bound).all()
    assert formed == [False, False, False, True]
    calls.clear()
    products.product(X[:, :3], DAMPING)
    assert calls == [3]  # few columns go by stages all the same


def test_no_matrix_is_formed_where_memory_is_short_or_numbers_are_float32(network, monkeypatch):
    monkeypatch.setattr(many_columns, "_forming_seconds", lambda analysis: 0.0)
    model, (x, y), H = network
    single = lh.linearize(make_mlp([8, 9, 7, 6, 3], dtype=torch.float32), CE, x.float(), y).analysis
    for analysis in (single, analysis_of(network)):
        if analysis.problem.dtype == torch.float64:
            monkeypatch.setattr(many_columns, "available_on", lambda device: 31 * 8 * len(H) ** 2 // 8)
        products = analysis.once(ManyColumns)
        X = columns(network, 9).to(analysis.problem.dtype)
        for _ in range(2):
            products.product(X, DAMPING)
        assert not products.product_and_way(X, DAMPING)[1] and not analysis.has(hessian.kept)


def test_factors_follow_in_double_once_single_has_cost_as_much(network, monkeypatch):
    analysis, H = analysis_of(network), network[2]
    half_the_time_in_single(analysis, monkeypatch)
    monkeypatch.setattr(plan, "further_columns", lambda analysis, columns: 0.0)
    solver = lq.Solver(analysis, DAMPING, "dense", precision="auto")
    seconds = solver.plan.own_costs["dense"].seconds
    monkeypatch.setattr(lq.inverse.solver, "further_columns", lambda analysis, columns: seconds * columns / 20.5)
    for k, precision in ((10, "single"), (10, "single"), (1, "double")):
        g = columns(network, k)
        solution = solver.solve(g)
        assert solver.precision == precision
        assert errors(H, DAMPING, solution.x.numpy(), g.numpy()).max() <= 1e-14


def test_the_plan_takes_double_for_many_right_hand_sides(network, monkeypatch):
    analysis = analysis_of(network)
    own = half_the_time_in_single(analysis, monkeypatch)
    monkeypatch.setattr(plan, "further_columns", lambda analysis, columns: 0.1 * own.seconds * (columns - 1))
    assert plan.make_plan(analysis, DAMPING, right_hand_sides=4).costs["dense"].precision == "single"
    assert plan.make_plan(analysis, DAMPING, right_hand_sides=8).costs["dense"].precision == ""


def single_until(columns, analysis, monkeypatch):
    """A solver with factors in single precision, which those in double follow after so many columns."""
    half_the_time_in_single(analysis, monkeypatch)
    monkeypatch.setattr(plan, "further_columns", lambda analysis, columns: 0.0)
    solver = lq.Solver(analysis, DAMPING, "dense", precision="auto")
    monkeypatch.setattr(lq.inverse.solver, "further_columns", lambda analysis, k: 1e9 if k > columns else 0.0)
    assert solver.precision == "single"
    return solver


def test_threads_that_solve_at_once_take_the_same_factors(network, monkeypatch):
    H, g = network[2], columns(network, 10)
    solver = single_until(5, analysis_of(network), monkeypatch)
    for solution in at_once([lambda: solver.solve(g)] * 4):
        assert solution.method == "dense"
        assert errors(H, DAMPING, solution.x.numpy(), g.numpy()).max() <= 1e-14
    assert solver.method == "dense" and solver.precision == "double"


@pytest.mark.parametrize("error", [SingularPivotError(), MemoryError()])
def test_factors_in_single_stay_where_none_in_double_can_follow(network, monkeypatch, error):
    def fails(analysis, damping):
        raise error

    H, g = network[2], columns(network, 10)
    monkeypatch.setitem(plan.METHODS, "dense", replace(plan.METHODS["dense"], factor=fails))
    solver = single_until(5, analysis_of(network), monkeypatch)
    for _ in range(2):
        assert errors(H, DAMPING, solver.solve(g).x.numpy(), g.numpy()).max() <= 1e-14
        assert solver.method == "dense" and solver.precision == "single"


def test_more_columns_than_parameters(network):
    analysis, H = analysis_of(network), network[2]
    solver = lq.Solver(analysis, DAMPING, "dense", precision="single")
    for k in (len(H), len(H) + 1, 2 * len(H) + 3):
        g = columns(network, k)
        assert errors(H, DAMPING, solver.solve(g).x.numpy(), g.numpy()).max() <= 1e-14


def test_memory_is_asked_for_when_it_is_needed(network, monkeypatch):
    analysis, X = analysis_of(network), columns(network, 50)
    monkeypatch.setattr(many_columns, "_forming_seconds", lambda analysis: 2.5)
    monkeypatch.setattr(many_columns, "product_seconds", lambda analysis, columns: columns / 50)
    products = analysis.once(ManyColumns)
    monkeypatch.setattr(many_columns, "available_on", lambda device: 31 * X.shape[0] ** 2)
    for _ in range(5):
        products.product(X, DAMPING)
    assert not analysis.has(hessian.kept)


def test_threads_that_multiply_at_once_share_one_matrix(network, monkeypatch):
    """And what each has spent counts, once."""
    analysis, X = analysis_of(network), columns(network, 8)
    monkeypatch.setattr(many_columns, "_forming_seconds", lambda analysis: 1e9)
    monkeypatch.setattr(many_columns, "product_seconds", lambda analysis, columns: 1.0)
    products = analysis.once(ManyColumns)
    of_stages = at_once([lambda: [products.product_and_way(X, DAMPING)[1] for _ in range(300)]] * 4)
    assert not any(map(any, of_stages)) and products.spent == 1200.0
