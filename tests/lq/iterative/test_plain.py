"""Plain GMRES as a method: certified, chosen where it is the fastest, and an error where it does not converge."""

import numpy as np
import pytest
import torch

from linop_hess import lq
from linop_hess.errors import FactorizationError
from linop_hess.lq.inverse import solver as solve
from linop_hess.lq.iterative.options import Asked
from linop_hess.lq.iterative.plain import METHOD, NoFactors, forecast
from linop_hess.lq.methods.plan import make_plan
from tests.lq.sketches import analyses, backward_error, damped


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("columns", [1, 3])
def test_solves_are_certified(which, columns):
    analysis = analyses("wired")[which]
    A = damped(analysis, 5.0).numpy()
    g = torch.randn(len(A), columns, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inverse = lq.Inverse(analysis, 5.0, "iterative")
    found = inverse.solve(g)
    assert found.method == "iterative" and 0 < found.iterations < len(A) and inverse.solver.nbytes == 0
    assert max(backward_error(A, found.x[:, j], g[:, j]) for j in range(columns)) <= 1e-14
    assert torch.equal(inverse.product(g), found.x)  # certified: there are no factors to apply
    assert inverse.inertia.negative == int((np.linalg.eigvalsh(A) < 0).sum())


def test_no_convergence_is_an_error(monkeypatch):
    monkeypatch.setattr(solve, "MOST_ITERATIONS", 20)  # N of them would do for so small a network
    analysis = analyses()[0]
    with pytest.raises(FactorizationError, match="by method 'iterative': after .* iterations"):
        lq.Inverse(analysis, 1e-4, "iterative").solve(torch.ones(analysis.problem.size, dtype=torch.float64))


def test_a_zero_column_is_solved_too():
    analysis = analyses()[0]
    g = torch.zeros(analysis.problem.size, 2, dtype=torch.float64)
    g[3, 0] = 1.0
    x = lq.Inverse(analysis, 5.0, "iterative").solve(g).x
    assert not x[:, 1].any() and backward_error(damped(analysis, 5.0).numpy(), x[:, 0], g[:, 0]) <= 1e-14


def test_the_plan_chooses_it_where_it_is_the_fastest(monkeypatch):
    """With everything else dear, for one right-hand side and a large damping; for many not, and a small damping takes more."""
    analysis = analyses()[0]
    dear = {name: lq.methods.base.Cost(1.0, 1.0, 0.3) for name in ("banded", "riccati", "dense", "ldu")}
    dear["woodbury"] = lq.methods.base.Cost.impossible("no")
    monkeypatch.setitem(analysis._made, lq.methods.plan.estimates, dear)
    plan = make_plan(analysis, 50.0, 1, 1e-6)
    assert plan.choice == "iterative" and "iterations <- chosen" in str(plan)
    assert make_plan(analysis, 50.0, 1000, 1e-6).choice != "iterative"
    assert make_plan(analysis, 1e-6, 1, 1e-6).costs["iterative"].iterations > 4 * plan.costs["iterative"].iterations


def test_forecast_looks_no_further_than_it_is_worth():
    analysis = analyses()[0]
    cost = forecast(analysis, Asked(1.0), 0.0)
    assert cost.at_least and cost.iterations is None
    assert forecast(analysis, Asked(1.0, tolerance=1e-6), float("inf")).iterations > 0
    assert METHOD.exact is False and NoFactors(analysis, 1.0).solve(torch.ones(3)).sum() == 3
