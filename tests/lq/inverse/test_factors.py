"""Which factors a question is put to."""

import math

import numpy as np
import pytest
import torch

from linop_hess.errors import FactorizationError
from linop_hess.lq import Analysis, Solver, make_plan
from linop_hess.lq.accuracy import GROWTH, GROWTH_LITTLE, GROWTH_MODERATE, MULTIPLIER, SMALLEST_DAMPING
from linop_hess.lq.inverse.factors import Factors
from linop_hess.lq.methods import plan as plan_module
from linop_hess.lq.methods import riccati
from linop_hess.lq.methods.plan import METHODS
from tests.lq.methods.conformance import MIXED, SHAPES, WIRED, setting
from tests.lq.problems import gauss_newton_blocks

QUESTIONS = ("inertia", "determinant", "positive", "sample")


def factors_of(shape, damping=0.3, method=None, dtype=torch.float64):
    analysis = setting(shape, dtype).analysis
    if method is None:
        return Factors(analysis, damping, make_plan(analysis, damping))
    solver = Solver(analysis, damping, method)
    return Factors(analysis, damping, solver.plan, solver.factorization)


@pytest.mark.parametrize("question", QUESTIONS)
def test_those_of_the_solves_where_they_answer(question):
    analysis = setting("equal").analysis
    dense = METHODS["dense"].factor(analysis, 0.3)
    factors = Factors(analysis, 0.3, make_plan(analysis, 0.3), dense)
    assert factors.answering(question) is dense is factors.made("dense") is factors.bounded()


@pytest.mark.parametrize("question", ("inertia", "positive", "sample"))
def test_else_the_fastest_that_answers(question):
    factors = factors_of("equal", method="banded")
    by_time = [name for name in make_plan(factors.analysis, 0.3).by_time() if question in METHODS[name].answers]
    assert factors.answering(question).method == by_time[0] != "banded"


@pytest.mark.parametrize("method", ["riccati", "dense"])
@pytest.mark.parametrize("question", QUESTIONS)
def test_in_another_precision_the_method_of_the_solves_comes_first(question, method):
    factors = factors_of("equal", method=method, dtype=torch.float32)
    found = factors.answering(question)
    assert found.method == method and found.analysis is factors.analysis and found.theta.dtype == torch.float64


def test_a_cost_that_is_not_convex_is_asked_of_others():
    problem = gauss_newton_blocks([3, 3, 3, 4], [3, 3, 3], seed=3, convex=False).problem()
    analysis = Analysis(problem)
    woodbury = METHODS["woodbury"].factor(analysis, 0.3)
    factors = Factors(analysis, 0.3, make_plan(analysis, 0.3), woodbury)
    assert factors.answering("inertia") is woodbury
    assert {factors.answering(question).method for question in ("positive", "sample")} <= {"riccati", "dense"}


def test_promoted_factors_are_made_anew():
    """Factors that a float32 solve escalated to answer nothing but solves."""
    analysis = setting("equal", torch.float32).analysis
    promoted = plan_module.promoted(riccati.factor_careful)(analysis, 0.3)
    factors = Factors(analysis, 0.3, make_plan(analysis, 0.3), promoted)
    for question in QUESTIONS:
        assert factors.answering(question).method == "riccati"
    factors.bounded()
    assert factors.for_entries(0).analysis is analysis.in_float64


@pytest.mark.parametrize("shape", [*SHAPES, *MIXED, *WIRED])
def test_growth_is_bounded_as_asked_and_factors_are_made_once(shape):
    factors = factors_of(shape, 1e-5, "riccati")
    found = {growth: factors.riccati(growth) for growth in (GROWTH, GROWTH_MODERATE, GROWTH_LITTLE)}
    for growth, made in found.items():
        assert factors.riccati(growth) is made
    assert factors.riccati(GROWTH_MODERATE, MULTIPLIER) is factors.riccati(GROWTH_MODERATE, MULTIPLIER)
    delayed = [sum(made.delayed.values()) for made in found.values()]
    assert delayed == sorted(delayed)


def test_factors_of_solves_serve_where_they_grow_little():
    factors = factors_of("equal", 40.0, "riccati")
    solving = factors.made("riccati")
    assert factors.bounded() is solving is factors.for_entries(0)


@pytest.mark.parametrize("shape", [*SHAPES, *MIXED, *WIRED])
def test_hidden_growth(shape):
    """What Bᵀ(I − QQᵀ)B/ε adds at most, in units of the states."""
    factors = factors_of(shape, 1e-5)
    assert (factors.hidden_growth > 0) <= (factors.analysis.hidden > 0)
    again = factors_of(shape, 1e-6)
    assert again.hidden_growth == pytest.approx(10 * factors.hidden_growth, rel=1e-9)
    assert factors_of(shape, 0.0).hidden_growth == (math.inf if factors.hidden_growth else 0.0)


@pytest.mark.parametrize("sign", [1, -1])
def test_tiny_dampings_are_refused_where_controls_are_hidden(sign):
    factors = factors_of("more controls than outputs")
    damping = sign * 0.5 * SMALLEST_DAMPING * factors.analysis.norm
    tiny = Factors(factors.analysis, damping, make_plan(factors.analysis, damping))
    with pytest.raises(FactorizationError, match="lost in rounding") as caught:
        tiny.refuse_tiny_damping()
    works = caught.value.suggested_damping
    Factors(factors.analysis, works, make_plan(factors.analysis, works)).refuse_tiny_damping()
    visible = setting("equal", with_A="all").analysis
    Factors(visible, damping, make_plan(visible, damping)).refuse_tiny_damping()


@pytest.mark.parametrize("shape", [*SHAPES, *MIXED, *WIRED])
def test_report(shape):
    truth, factors = setting(shape), factors_of(shape, 1e-5)
    rows = factors.report()
    assert [row.stage for row in rows] == np.flatnonzero(truth.problem.layout.p).tolist()
    assert sum(row.pivots + row.hidden for row in rows) == len(truth.H)
    assert all(0 <= row.smallest <= row.largest for row in rows)
    carried = 0
    for row in reversed(rows):  # what arrives and what is its own is eliminated or goes on
        own = int(truth.problem.layout.p[row.stage])
        assert row.pivots + row.hidden + row.delayed == own + carried
        carried = row.delayed
    assert carried == 0


def test_memory_is_asked_for(monkeypatch):
    analysis = setting("equal").new_analysis()
    monkeypatch.setattr(plan_module, "available_bytes", lambda: 100)
    factors = Factors(analysis, 0.3, make_plan(analysis, 0.3))
    for question in (lambda: factors.made("dense"), lambda: factors.riccati(GROWTH)):
        with pytest.raises(MemoryError, match="needs about .* but only"):
            question()
