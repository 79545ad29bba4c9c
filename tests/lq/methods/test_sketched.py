"""The sketched factorization: symmetric, right on its directions, the inverse where it has all of them; and solves by it."""

import numpy as np
import pytest
import torch

from linop_hess import lq
from linop_hess.errors import FactorizationError
from linop_hess.lq.inverse import solver as solve
from linop_hess.lq.iterative.options import Asked, SketchOptions
from linop_hess.lq.methods.sketched import METHOD, SketchedFactorization, forecast, sketch_report
from tests.lq.methods.conformance import setting
from tests.lq.sketches import DAMPING, analyses, backward_error, damped

F64 = torch.float64


@pytest.mark.parametrize("kind", ["tanh", "wired"])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("rank", [12, 60])
def test_symmetric_and_right_on_its_directions(kind, which, rank):
    analysis = analyses(kind)[which]
    A = damped(analysis)
    factors = SketchedFactorization(analysis, DAMPING, SketchOptions(rank=rank, dtype=F64))
    X = factors.solve(torch.eye(len(A), dtype=F64))
    assert float((X - X.mT).norm() / X.norm()) < 1e-12
    omega = analysis.problem.layout.in_flat_order(factors.sketch.basis.directions)
    assert omega.shape[1] == rank
    assert float((X @ (A @ omega) - omega).norm() / (X.norm() * A.norm())) < 1e-12
    if rank == 12:
        assert float((X @ A - torch.eye(len(A))).norm()) > 1e-6  # and an approximation elsewhere
    positive = factors.positive(torch.eye(len(A), dtype=F64))
    assert float((positive - positive.mT).norm() / positive.norm()) < 1e-12
    assert float(torch.linalg.eigvalsh(positive)[0]) > 0.0


@pytest.mark.parametrize("kind", ["tanh", "wired"])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("damping", [DAMPING, 1.0])
def test_all_directions_give_the_inverse(kind, which, damping):
    analysis = analyses(kind)[which]
    A = damped(analysis, damping)
    factors = SketchedFactorization(analysis, damping, SketchOptions(rank=len(A)))
    assert factors.theta.dtype == F64
    g = torch.randn(len(A), 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    x, expected = factors.solve(g), torch.linalg.solve(A, g)
    assert float((x - expected).norm() / expected.norm()) < 1e-10
    assert int((factors.theta < 0).sum()) == int((torch.linalg.eigvalsh(A) < 0).sum())


@pytest.mark.parametrize("options", [{"rank": 40}, {"tol": 0.05}, {"rank": 40, "core": 25}, {}])
def test_solves_are_certified(options):
    analysis = analyses()[0]
    A = damped(analysis).numpy()
    inverse = lq.Inverse(analysis, DAMPING, "sketched", sketch=SketchOptions(**options))
    g = torch.randn(len(A), 2, generator=torch.Generator().manual_seed(1), dtype=F64)
    found = inverse.solve(g)
    assert found.method == "sketched" and 0 < found.iterations < len(A)
    for j in range(2):
        assert backward_error(A, found.x[:, j], g[:, j]) <= 1e-14
    # The product is that of the sketch: linear, and the same whatever it is scaled by.
    v = inverse.product(g)
    assert torch.equal(v, inverse.product(g)) and float((inverse.product(4.0 * g) - 4.0 * v).abs().max()) == 0.0
    report = sketch_report(inverse.solver.factorization)
    assert report.samples == options.get("core", 30) and max(report.ranks) <= report.directions <= len(A)
    assert sum(report.pivots) == len(A) and report.nbytes == inverse.solver.nbytes and "directions" in str(report)


def test_too_few_directions_are_an_error_that_tells_the_residual(monkeypatch):
    monkeypatch.setattr(solve, "MOST_ITERATIONS", 20)  # N of them would do for so small a network
    analysis = analyses()[0]
    inverse = lq.Inverse(analysis, 1e-4, "sketched", sketch=SketchOptions(rank=1))
    with pytest.raises(FactorizationError, match=r"relative residual is .*a larger rank"):
        inverse.solve(torch.ones(analysis.problem.size, dtype=F64))


def test_products_that_leave_the_range_are_an_error_that_tells_the_residual(monkeypatch):
    analysis = analyses()[0]
    inverse = lq.Inverse(analysis, 1e-4, "sketched", sketch=SketchOptions(rank=1))
    monkeypatch.setattr(SketchedFactorization, "solve", lambda self, g: g * float("nan"))
    g = torch.ones(analysis.problem.size, 1, dtype=F64)
    with pytest.raises(FactorizationError, match=r"after 0 iterations .*relative residual is 1.0e\+00.*a larger rank"):
        inverse.solve(g)
    with pytest.raises(FactorizationError, match="a larger rank"):
        inverse.product(g)


def test_in_single_precision():
    problem = analyses()[0].problem.to(torch.float32)
    inverse = lq.Inverse(problem, DAMPING, "sketched", sketch=SketchOptions(rank=40))
    g = torch.randn(problem.size, generator=torch.Generator().manual_seed(1), dtype=F64)
    x = inverse.solve(g.float()).x
    assert x.dtype == torch.float32 and backward_error(damped(analyses()[0]).numpy(), x, g) <= 2e-6


def test_with_a_penalty():
    problem = analyses()[0].problem
    diagonal = torch.linspace(0.0, 0.1, problem.size, dtype=F64)
    problem = problem.with_curvature(problem.blocks, diagonal)
    A = damped(analyses()[0]) + torch.diag(diagonal)
    g = torch.ones(problem.size, dtype=F64)
    found = lq.Inverse(problem, DAMPING, "sketched", sketch=SketchOptions(rank=30)).solve(g)
    assert backward_error(A.numpy(), found.x, g) <= 1e-14


def test_what_no_damping_changes_is_made_once(monkeypatch):
    analysis = analyses()[0]
    options = SketchOptions(rank=20)
    first = SketchedFactorization(analysis, DAMPING, options)
    assert SketchedFactorization(analysis, 1.0, options).sketch is first.sketch


@pytest.mark.parametrize("name", ["one stage"])
def test_where_it_cannot_be_used(name):
    analysis = setting(name).analysis
    cost = forecast(analysis, Asked(0.1), float("inf"))
    assert cost.why_not
    with pytest.raises(ValueError, match="cannot be used here"):
        lq.Inverse(analysis, 0.1, METHOD.name)


def test_report_of_another_method():
    with pytest.raises(ValueError, match='expected factors of method "sketched"'):
        sketch_report(lq.METHODS["dense"].factor(analyses()[0], DAMPING))


def test_forecast():
    analysis = analyses()[0]
    asked = Asked(DAMPING, tolerance=1e-6, sketch=SketchOptions(rank=20))
    cost = forecast(analysis, asked, float("inf"))
    assert (
        cost.iterations is not None and not cost.at_least and np.isfinite([cost.flops, cost.nbytes, cost.seconds]).all()
    )
    assert forecast(analysis, asked, 0.0).at_least
    many = forecast(analysis, Asked(DAMPING, 50, 1e-6, asked.sketch), float("inf"))
    assert many.seconds > cost.seconds and many.iterations == cost.iterations
