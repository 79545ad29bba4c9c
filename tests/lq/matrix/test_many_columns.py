"""Products of many columns by the dense matrix: when it is formed, what certificates say of it, and factors that follow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import linop_hess as lh
from linop_hess import lq
from linop_hess.lq.matrix import hessian, many_columns
from linop_hess.lq.matrix.many_columns import ManyColumns
from linop_hess.lq.methods import plan
from linop_hess.lq.methods.base import Cost
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
        assert not products.takes_matrix(9) and not analysis.has(hessian.kept)


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
