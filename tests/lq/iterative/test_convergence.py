"""Iterations that are expected: no fewer than are made where eigenvalues are spread, and few where they are not."""

import math

import pytest
import torch

import linop_hess as lh
from linop_hess import lq
from linop_hess.lq.analysis import Analysis
from linop_hess.lq.iterative.convergence import (
    LEAST,
    by_count,
    expected_iterations,
    least_iterations,
    looks_definite,
    product_of,
    product_seconds,
    spectrum_of,
)
from linop_hess.lq.iterative.gmres import gmres
from tests.lq.sketches import analyses, damped


@pytest.mark.parametrize("damping", [0.3, 3.0, 100.0])
@pytest.mark.parametrize("which", [0, 1])
def test_a_bound_for_random_right_hand_sides(damping, which):
    analysis = analyses()[which]
    g = torch.randn(analysis.problem.size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    made = lq.Inverse(analysis, damping, "iterative", tolerance=1e-6).solve(g).iterations
    assert made <= 1.3 * expected_iterations(analysis, damping, 1e-6) + 5  # looked at every five iterations


def test_directions_are_taken_off():
    analysis = analyses()[0]
    found = analysis.once(spectrum_of)
    plain, sketched = (by_count(found.count_beyond, 0.01, 1e-6, s) for s in (0, 100))
    assert 0.0 < sketched < plain and LEAST <= expected_iterations(analysis, 0.01, 1e-6) <= analysis.problem.size
    assert expected_iterations(analysis, 0.0, 1e-6) == analysis.problem.size
    assert analysis.once(spectrum_of) is analysis.once(spectrum_of)


def test_too_many_are_told_by_few_products(monkeypatch):
    """As many as are expected of all products, or fewer; none more is made once that is too many, and all where it is not."""
    product, made = lq.Problem.hessian_product, []
    monkeypatch.setattr(lq.Problem, "hessian_product", lambda self, *args: (made.append(0), product(self, *args))[1])
    first = analyses()[0]
    analysis = lq.Analysis(first.problem)
    assert analysis.probe[0].shape[1] == len(made) == 1
    few = least_iterations(analysis, 1e-3, 1e-14, 10.0)
    assert 10.0 < few <= expected_iterations(first, 1e-3, 1e-14) and len(made) - 21 < 8
    many = len(made)
    assert least_iterations(analysis, 1e3, 1e-14, 1e9) == LEAST and many < len(made)
    assert least_iterations(analysis, 1e-3, 1e-14, math.inf) == LEAST == least_iterations(analysis, 0.0, 1e-14, 1.0)
    analysis.once(spectrum_of)
    assert least_iterations(analysis, 1e-3, 1e-14, 10.0) == LEAST  # all is known: ask what is expected


@pytest.mark.parametrize("which", [0, 1])
def test_definite_is_told_by_the_spectrum_alone(which):
    analysis = analyses()[which]
    assert not looks_definite(analysis, 1e3)  # nothing was looked at yet
    analysis.once(spectrum_of)
    least = float(torch.linalg.eigvalsh(damped(analysis, 0.0))[0])
    assert looks_definite(analysis, -least + 1e-6) and (which == 1 or not looks_definite(analysis, -0.9 * least))


def test_seconds_of_a_product():
    analysis = analyses()[0]
    assert 0.0 < product_seconds(analysis) < product_seconds(analysis, 1.0, 1000)


def test_a_product_in_single_precision_takes_less():
    analysis = analyses()[0]
    single = product_seconds(Analysis(analysis.problem.to(torch.float32)))
    assert product_seconds(analysis, dtype=torch.float32) == pytest.approx(single, rel=1e-2)


@pytest.mark.parametrize("samples", [30, 1000])
def test_matrices_are_as_wide_as_the_state_of_a_sample(samples):
    """However many samples there are: more of them are more rows."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8)).double()
    x, y = torch.randn(samples, 8).double(), torch.randint(8, (samples,))
    one = product_of(lh.linearize(model, torch.nn.CrossEntropyLoss(), x, y).analysis)
    assert one.width == pytest.approx(8.0, rel=0.1) and one.rows == pytest.approx(samples, rel=0.1)


@pytest.mark.parametrize("damping", [0.3, 1.0, 3.0, 100.0])
def test_expected_is_not_far_from_what_is_made(damping):
    """Of right-hand sides of all eigenvectors, within a factor, where some products show how residuals fall."""
    analysis = analyses()[0]
    A = damped(analysis, damping)
    g = torch.randn(len(A), 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    made = gmres(lambda X: A @ X, lambda v: v, g, lambda _, of_g: 1e-8 * of_g, 300).iterations
    assert made / 1.6 - 2 <= expected_iterations(analysis, damping, 1e-8) <= 1.6 * made + 2
