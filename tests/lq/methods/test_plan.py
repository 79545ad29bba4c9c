"""Choices and ladders."""

from dataclasses import replace

import pytest
import torch

from linop_hess.lq.iterative.convergence import spectrum_of
from linop_hess.lq.methods import plan as plan_module
from linop_hess.lq.methods.base import Cost
from linop_hess.lq.methods.mixed import PromotedFactorization
from linop_hess.lq.methods.plan import METHODS, Plan, estimates, ladder, make_plan, promoted, with_first
from tests.lq.methods.conformance import SIZES, WIRED, setting


def made_up(choice="riccati", available=1000, **nbytes):
    costs = {name: Cost(1.0, 10.0, 1.0) for name in METHODS}
    costs.update({name: Cost(1.0, size, 1.0) for name, size in nbytes.items()})
    return Plan(1e-3, costs, choice, available, costs)


@pytest.mark.parametrize("shape", [*SIZES, *WIRED])
def test_every_method_is_in_the_plan(shape):
    plan = make_plan(setting(shape).analysis, 1e-3)
    text = str(plan)
    assert plan.choice in ("banded", "riccati", "dense") and set(plan.costs) == set(METHODS)
    assert text.count("<- chosen") == 1 and len(text.splitlines()) == 1 + len(plan.costs)
    for name, cost in plan.costs.items():
        assert name in text and cost.flops >= 0 and cost.nbytes >= 0 and cost.seconds > 0


def test_the_fastest_that_fits_is_chosen(monkeypatch):
    analysis = setting("wildly varying").new_analysis()
    costs = {"banded": Cost(1, 500, 1.0), "riccati": Cost(1, 50, 2.0), "dense": Cost(1, 5, 3.0)}
    costs |= {"woodbury": Cost.impossible("no"), "ldu": Cost(1, 1, 0.1)}
    for name, cost in costs.items():
        fixed = replace(METHODS[name], estimate=lambda analysis, cost=cost: cost)
        monkeypatch.setitem(plan_module.METHODS, name, fixed)
    for available, choice in ((1000, "banded"), (499, "riccati"), (49, "dense"), (1, "dense")):
        monkeypatch.setattr(plan_module, "available_bytes", lambda available=available: available)
        plan = make_plan(analysis, 0.1)
        assert plan.choice == choice and plan.available == available
    assert plan.by_time() == ["ldu"] and "does not fit" in str(plan) and "woodbury cannot be used" in str(plan)


def test_estimates_are_made_once():
    analysis = setting("equal").new_analysis()
    known, first, second = analysis.once(estimates), make_plan(analysis, 0.1), make_plan(analysis, 1e-3)
    assert all(first.costs[name] is second.costs[name] is cost for name, cost in known.items()) and "dense" in known


def test_what_fits():
    plan = made_up(dense=600.0, woodbury=float("nan"))
    assert plan.fits("dense") and not plan.fits("dense", 2) and not plan.fits("woodbury")


def test_ladder_in_double_precision():
    rungs = ladder(made_up(), "riccati", torch.float64)
    assert [name for name, _ in rungs] == ["riccati", "banded", "riccati", "dense"]
    assert rungs[0][1] is not rungs[2][1]  # eigenvectors at every stage
    assert [name for name, _ in ladder(made_up(), "banded", torch.float64)] == ["banded", "riccati", "dense"]
    assert [name for name, _ in ladder(made_up(dense=1e9), "banded", torch.float64)] == ["banded", "riccati"]
    assert [name for name, _ in ladder(made_up(), "woodbury", torch.float64)][0] == "woodbury"


def test_ladder_in_single_precision_goes_on_in_double():
    rungs = ladder(made_up(), "banded", torch.float32)
    assert [name for name, _ in rungs] == ["banded", "banded", "riccati", "dense"]
    analysis = setting("equal", torch.float32).analysis
    kinds = [isinstance(factor(analysis, 0.1), PromotedFactorization) for _, factor in rungs]
    assert kinds == [False, True, True, True]


def test_ldu_is_looked_at_by_itself():
    assert [name for name, _ in ladder(made_up(), "ldu", torch.float32)] == ["ldu"]


def test_promoted():
    analysis = setting("equal", torch.float32).analysis
    found = promoted(METHODS["dense"].factor)(analysis, 0.1)
    assert found.method == "dense" and found.analysis is analysis.in_float64


def test_no_look_at_the_spectrum_where_an_exact_method_is_asked_for(monkeypatch):
    """What iterating would take matters to a choice alone: here every other method takes forever."""
    monkeypatch.setattr(plan_module, "_fitting", lambda costs, available: [])
    for method, looked in (("riccati", False), ("dense", False), ("iterative", True), ("auto", True), ("", True)):
        analysis = setting("equal").new_analysis()
        cost = make_plan(analysis, 0.3, method=method).costs["iterative"]
        assert analysis.has(spectrum_of) == looked == (not cost.at_least) == (cost.iterations is not None)


def test_what_a_method_tries_first_comes_before_its_own_factors_alone():
    first, own = METHODS["banded"].first, METHODS["banded"].factor
    assert with_first([("banded", own), ("dense", METHODS["dense"].factor)])[:2] == [("banded", first), ("banded", own)]
    for rungs in ([("banded", promoted(own))], [("dense", METHODS["dense"].factor), ("banded", own)]):
        assert with_first(rungs) == rungs


def test_iterations_that_nothing_makes_fewer_count_twice(monkeypatch):
    """A sketch that is too slow is made larger meanwhile; GMRES alone goes on as it is."""
    analysis = setting("equal").new_analysis()
    for name, method in METHODS.items():
        slow = Cost(1.0, 1.0, 100.0)
        monkeypatch.setitem(
            plan_module.METHODS, name, replace(method, estimate=lambda _, cost=slow: cost) if method.exact else method
        )
    for sketched, choice in ((3.0, "sketched"), (5.0, "iterative")):
        for name, cost in (("sketched", Cost(1.0, 1.0, sketched, certain=1.0)), ("iterative", Cost(1.0, 1.0, 2.0))):
            made = replace(METHODS[name], forecast=lambda *_, cost=cost: cost)
            monkeypatch.setitem(plan_module.METHODS, name, made)
        assert make_plan(analysis, 0.1).choice == choice
