"""Backward errors: by stages, by a dense matrix that may be another one, in all precisions, against the dense Hessian."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import linop_hess as lh
from linop_hess import lq
from linop_hess.lq.matrix import hessian, many_columns
from linop_hess.lq.matrix.many_columns import ManyColumns
from linop_hess.lq.methods import dense, riccati
from linop_hess.lq.solve.certificate import Certificate
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


@pytest.mark.parametrize("damping", [0.3, -0.2, 0.1 + 0.05j])
@pytest.mark.parametrize("method", [dense, riccati])
def test_an_error_is_at_least_the_true_one_and_little_more_once_the_norm_is_settled(network, method, damping):
    analysis, g, H = analysis_of(network), columns(network, 3, sizes=2.0), network[2]
    g = g.to(torch.complex128) if isinstance(damping, complex) else g
    factors = method.factor(analysis, damping)
    x = factors.solve(g)
    x[5, 1] *= 1.0 + 1e-7
    true = errors(H, damping, x.numpy(), g.numpy()).max()
    certificate = Certificate(analysis, damping)
    loose, _, _ = certificate.measured(g, x, factors, tolerance=1.0)
    assert not certificate.is_settled and loose >= (1.0 - 1e-6) * true
    tight, residuals, r = certificate.measured(g, x, factors, tolerance=1e-14)
    assert certificate.is_settled and (1.0 - 1e-6) * true <= tight <= 1.2 * true and tight <= loose
    residual = g.numpy() - (H + damping * np.eye(len(H))) @ x.numpy()
    assert np.abs(r.numpy() - residual).max() <= 1e-12 * np.abs(residual).max() + 1e-13 * float(g.abs().max())
    assert np.allclose(residuals, np.linalg.norm(r.numpy(), axis=0), rtol=1e-12)


def test_what_is_not_finite_is_no_solution(network):
    analysis, g = analysis_of(network), columns(network, 2)
    factors = dense.factor(analysis, DAMPING)
    x = factors.solve(g)
    x[0, 0] = float("nan")
    assert Certificate(analysis, DAMPING).measured(g, x, factors, tolerance=1e-14)[0] == float("inf")


@pytest.mark.parametrize("precision", ["single", "double"])
def test_blocks_are_certified_whatever_multiplies_them(network, precision, monkeypatch, calls):
    monkeypatch.setattr(many_columns, "_forming_seconds", lambda analysis: 0.0)
    analysis, g, H = analysis_of(network), columns(network, 70, sizes=2.0), network[2]
    solver = lq.Solver(analysis, DAMPING, "dense", precision=precision)
    solver.solve(g)
    calls.clear()
    solution = solver.solve(g)
    found = errors(H, DAMPING, solution.x.numpy(), g.numpy())
    assert found.max() <= 1e-14
    assert found.max() <= solution.backward_error + 1e-15 and solution.backward_error <= 1e-14
    assert calls and max(calls) <= 2 * 3  # two sums of each 32 columns, which tell how far the matrix is off


def with_a_defect(network, size: float) -> lq.Analysis:
    """An analysis whose dense matrix is off by so much in one direction, which its comparison with a product does not see."""
    analysis = analysis_of(network)
    probe, u = analysis.probe[0], columns(network, 1)
    u -= probe * (probe.mT @ u)
    u /= u.norm()
    analysis.once(hessian.kept).addmm_(u, u.mT, alpha=size)
    return analysis


ALIKE = {
    "equal": lambda g: g.repeat(1, 4),
    "opposite": lambda g: torch.cat([g, -g], 1).repeat(1, 8),
    "opposite halves": lambda g: torch.cat([g.repeat(1, 16), -g.repeat(1, 16)], 1),
    "of other sizes": lambda g: torch.cat([1e-180 * g, -1e180 * g], 1).repeat(1, 3),
}


@pytest.mark.parametrize("size", [1e-12, 1e-6, 1e-2])
@pytest.mark.parametrize("precision", ["single", "double"])
@pytest.mark.parametrize("alike", list(ALIKE))
def test_columns_that_are_alike_do_not_hide_what_the_matrix_is_off(network, precision, size, alike, monkeypatch):
    monkeypatch.setattr(many_columns, "_forming_seconds", lambda analysis: 0.0)
    analysis, g, H = with_a_defect(network, size), ALIKE[alike](columns(network, 1)), network[2]
    solution = lq.Solver(analysis, DAMPING, "dense", precision=precision).solve(g)
    scale = g.abs().amax(0)
    found = errors(H, DAMPING, (solution.x / scale).numpy(), (g / scale).numpy()).max()
    assert found <= 1e-14 and found <= solution.backward_error + 1e-15


def test_a_matrix_that_is_not_trusted_leaves_no_norm(network, monkeypatch):
    monkeypatch.setattr(many_columns, "_forming_seconds", lambda analysis: 0.0)
    analysis, g, H = with_a_defect(network, 1e6), columns(network, 8), network[2]
    factors = dense.factor(analysis_of(network), DAMPING)
    factors.analysis = analysis
    x = factors.solve(g) * (1.0 + 1e-9)
    certificate = Certificate(analysis, DAMPING)
    error, _, _ = certificate.measured(g, x, factors, tolerance=1e-14)
    assert not analysis.once(ManyColumns).is_trusted
    true = errors(H, DAMPING, x.numpy(), g.numpy()).max()
    assert (1.0 - 1e-6) * true <= error <= 1.2 * true


def test_stages_go_on_multiplying_where_no_matrix_can_be_formed(network, monkeypatch):
    def defective(analysis):
        raise ArithmeticError("the dense Hessian differs from a product")

    monkeypatch.setattr(many_columns, "_forming_seconds", lambda analysis: 0.0)
    monkeypatch.setattr(many_columns, "kept", defective)
    analysis, g, H = analysis_of(network), columns(network, 9), network[2]
    solver = lq.Solver(analysis, DAMPING, "dense", precision="single")
    for _ in range(3):
        assert errors(H, DAMPING, solver.solve(g).x.numpy(), g.numpy()).max() <= 1e-14


@pytest.mark.parametrize("precision", ["single", "double"])
def test_a_matrix_that_is_another_one_is_noticed(network, precision, monkeypatch):
    monkeypatch.setattr(many_columns, "_forming_seconds", lambda analysis: 0.0)
    analysis, g, H = analysis_of(network), columns(network, 70), network[2]
    other = analysis.once(hessian.kept)
    other[3, 5] += 1e-11
    other[5, 3] += 1e-11
    solver = lq.Solver(analysis, DAMPING, "dense", precision=precision)
    solution = solver.solve(g)
    assert errors(H, DAMPING, solution.x.numpy(), g.numpy()).max() <= 1e-14
    assert not analysis.once(ManyColumns).is_trusted
