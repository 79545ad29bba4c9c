"""log|det(H + εI)| by each of its ways."""

import numpy as np
import pytest

from linop_hess.lq import make_plan
from linop_hess.lq.inverse import determinant
from linop_hess.lq.inverse.determinant import logabsdet
from linop_hess.lq.inverse.factors import Factors
from linop_hess.lq.methods.plan import METHODS
from tests.lq.methods.conformance import MIXED, SHAPES, WIRED, setting

DAMPINGS = (0.5, 1e-2, 1e-5, 1e-7, -0.3)


@pytest.mark.parametrize("way", ["as planned", "no dense matrix", "no band", "factors of a dense matrix"])
@pytest.mark.parametrize("shape", [*SHAPES, *MIXED, *WIRED])
def test_against_eigenvalues(shape, way, monkeypatch):
    if way in ("no dense matrix", "no band"):
        monkeypatch.setattr(determinant, "DENSE_UP_TO", -1)
    if way == "no band":
        monkeypatch.setattr(determinant, "_WORTH", 0.0)
    truth = setting(shape)
    for damping in DAMPINGS:
        values = truth.eigenvalues + damping
        if np.abs(values).min(initial=np.inf) <= 1e-11 * truth.norm:
            continue
        plan = make_plan(truth.analysis, damping)
        dense = METHODS["dense"].factor(truth.analysis, damping) if way == "factors of a dense matrix" else None
        factors = Factors(truth.analysis, damping, plan, dense)
        expected = np.log(np.abs(values)).sum()
        tolerance = 1e-11 * (abs(expected) + len(values)) + truth.doubt(damping, 1e-13)
        assert abs(logabsdet(factors, plan) - expected) <= tolerance, damping


def test_the_band_is_made_where_it_is_worth_it(monkeypatch):
    analysis = setting("equal").analysis
    plan = make_plan(analysis, 40.0)
    monkeypatch.setattr(determinant, "DENSE_UP_TO", -1)
    made = []
    for worth in (100.0, 0.0):
        factors = Factors(analysis, 40.0, plan, METHODS["riccati"].factor(analysis, 40.0))
        monkeypatch.setattr(determinant, "_WORTH", worth)
        logabsdet(factors, plan)
        made.append("banded" in factors._made)
    assert made == [True, False]
