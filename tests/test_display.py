"""How results are shown and unpacked: in a terminal, in a notebook, in a tuple."""

from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from torch.nn import functional as f

import linop_hess as lh
from linop_hess import krylov
from linop_hess.operators import Identity
from linop_hess.operators.operator import Sum
from tests.helpers import make_batch, make_mlp


@pytest.fixture(scope="module")
def lin():
    model = make_mlp([3, 5, 4, 2], seed=1, gain=1.3)
    return lh.linearize(model, f.cross_entropy, *make_batch(3, 2, 4))


class Cells(HTMLParser):
    """The cells of a table, checked to be closed in order."""

    def __init__(self, html):
        super().__init__()
        self.open, self.rows = [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def test_inertias_and_solutions_are_unpacked_in_the_documented_order(lin):
    inverse = lin.inverse(0.1)
    inertia = inverse.inertia()
    negative, zero, positive = inertia
    assert (negative, zero, positive) == (inertia.negative, inertia.zero, inertia.positive)
    assert negative > 0 and negative + zero + positive == inverse.shape[0]
    solution = inverse.solve(lin.gradient)
    x, backward_error, residual_norm, refinement_steps, method = solution
    assert x is solution.x and backward_error == solution.backward_error and residual_norm == solution.residual_norm
    assert refinement_steps == solution.refinement_steps and method == solution.method == inverse.method
    sign, logabsdet = inverse.slogdet()
    assert sign == (-1) ** negative and np.isfinite(logabsdet)


def test_solutions_and_inertias_are_shown_without_their_arrays(lin):
    solution = lin.inverse(0.1).solve(np.stack([lin.gradient] * 2, 1))
    assert repr(solution) == str(solution)
    assert repr(solution).startswith(f"Solution(x of shape ({len(lin.gradient)}, 2), backward error ")
    assert repr(lh.Inertia(2, 0, 5)) == "Inertia(negative=2, zero=0, positive=5)"
    assert solution._repr_html_() == f"<pre>{solution}</pre>"


def test_methods_that_cannot_be_used_have_a_line_and_no_numbers(lin):
    plan = lin.plan(0.1)
    table, _, _ = str(plan).partition("\n\n")
    reasons = [line for line in table.splitlines() if "cannot be used" in line]
    assert reasons == [f"woodbury cannot be used: {plan.costs['woodbury'].why_not}"] and plan.costs["woodbury"].why_not
    assert "inf" not in table.split() and not [line for line in table.splitlines() if line.startswith("woodbury  ")]
    assert [line.split()[0] for line in table.splitlines()[1:-1]] == [m for m in plan.costs if m != "woodbury"]
    assert repr(plan) == str(plan) and "<- chosen" in table
    rows = Cells(plan._repr_html_()).rows
    assert rows[0][:4] == ["method", "flops", "memory", "seconds"] and len(rows) == len(plan.costs)
    assert "<p>woodbury cannot be used:" in plan._repr_html_() and "<pre>" in plan._repr_html_()


def test_records_and_comparisons(lin):
    A = lin.damped(10.0)
    record = krylov.run("minres", A, lin.gradient, name="a < b")
    table = krylov.compare({"a < b": record, "direct": krylov.direct(lin.inverse(10.0).matvec, A, lin.gradient)})
    assert repr(record) == str(record) and "array" not in repr(record)
    assert record._repr_html_().startswith("<pre>a &lt; b: ")
    assert repr(table) == str(table)
    rows = Cells(table._repr_html_()).rows
    assert rows[0][0] == "method" and [row[0] for row in rows[1:]] == ["a < b", "direct"]
    assert len({len(row) for row in rows}) == 1


def test_spectra(lin):
    density = lh.spectrum.density(lin, 12)
    assert "\n" not in repr(density) and f"{density.size:,} eigenvalues" in repr(density)
    rows = Cells(density._repr_html_()).rows
    assert sum(int(row[2]) for row in rows[1:]) == density.counts.sum() + density.nullity
    assert len(str(density).splitlines()) == len(rows)
    pairs = lh.spectrum.eigsh(lin, 3, which="SA")
    assert repr(pairs) == str(pairs) and len(Cells(pairs._repr_html_()).rows) == 4
    assert "none missing" in pairs._repr_html_()


@pytest.mark.parametrize(
    ("made", "formula"),
    [
        (lambda lin: lin.H, "ChainCurvature"),
        (lambda lin: lin.damped(0.5), "ChainCurvature + 0.5·I"),
        (lambda lin: lin.damped(-1.0), "ChainCurvature - I"),
        (lambda lin: lin.damped(-0.25), "ChainCurvature - 0.25·I"),
        (lambda lin: 2 * lin.damped(0.5), "2·(ChainCurvature + 0.5·I)"),
        (lambda lin: -lin.damped(0.5) @ lin.H, "(-(ChainCurvature + 0.5·I)) @ ChainCurvature"),
        (lambda lin: lin.D_x.T @ lin.M_inv.T, "ParameterJacobian.T @ InverseTransition.T"),
        (lambda lin: lin.damped(2.0) ** 3, "(ChainCurvature + 2·I)**3"),
        (lambda lin: lin.H - lin.gauss_newton() @ lin.H, "ChainCurvature - ChainCurvature @ ChainCurvature"),
        (lambda lin: lin.inverse(0.1, "riccati"), "inverse of H + 0.1·I by riccati"),
        (lambda lin: lin.inverse(0.1, "riccati") @ lin.H, "(inverse of H + 0.1·I by riccati) @ ChainCurvature"),
        (lambda lin: lin.inverse(0.1, "dense").positive(), "positive part of the inverse of H + 0.1·I by dense"),
        (lambda lin: lin.H.block("0.*").damped(0.5), "(block of ChainCurvature) + 0.5·I"),
        (lambda lin: Identity(3) + Identity(3), "I + I"),
    ],
)
def test_operators_are_shown_as_formulas(lin, made, formula):
    operator = made(lin)
    rows, columns = operator.shape
    assert repr(operator) == f"<{rows}x{columns} {formula} with dtype=float64>"


def test_long_formulas_are_cut():
    assert len(repr(Sum(*[Identity(3)] * 500))) < 300


def test_hessians_by_autograd_say_that_they_are_damped():
    model = make_mlp([3, 4, 2], dtype=torch.float32)
    hessian = lh.Hessian(model, f.cross_entropy, make_batch(3, 2, 4, dtype=torch.float32))
    assert repr(hessian.damped(1e-3)) == "<26x26 Hessian + 0.001·I with dtype=float32>"
