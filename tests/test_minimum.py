"""`certify_minimum` against dense eigenvalues, at minima, saddle points, flat valleys and on the way."""

import numpy as np
import pytest
import torch
from torch import nn

import linop_hess as lh


def linear(x: torch.Tensor, y: torch.Tensor) -> nn.Sequential:
    """Least squares, solved by LAPACK."""
    model = nn.Sequential(nn.Linear(x.shape[1], y.shape[1], bias=False)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.linalg.lstsq(x, y, driver="gelsd").solution.T)
    return model


def test_a_strict_minimum_and_a_flat_one():
    torch.manual_seed(0)
    x, y = torch.randn(9, 3).double(), torch.randn(9, 2).double()
    report = lh.certify_minimum(lh.linearize(linear(x, y), nn.functional.mse_loss, x, y))
    values = np.linalg.eigvalsh((x.T @ x).numpy()) / 9  # each twice
    assert report.verdict == "strict minimum"
    assert report.is_minimum
    assert tuple(report.around) == (0, 0, 6) == tuple(report.at_zero)
    np.testing.assert_allclose([report.lowest, report.highest], [values[0], values[-1]], rtol=0, atol=1e-8 * values[-1])
    assert report.backward_error <= 1e-14
    x[:, 2] = x[:, 1]  # one direction of three is not seen, for each of two outputs
    report = lh.certify_minimum(lh.linearize(linear(x, y), nn.functional.mse_loss, x, y))
    assert report.verdict == "no descent, flat directions undecided"
    assert (report.flat, report.is_minimum) == (2, False)
    assert "flat" in str(report)
    assert "<table>" in report._repr_html_()


def test_a_saddle_point_a_maximum_and_a_point_on_the_way():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False)).double()
    x, y = torch.randn(6, 2).double(), torch.randn(6, 2).double()
    on_the_way = lh.linearize(model, nn.functional.mse_loss, x, y)
    H = lh.to_dense(on_the_way.H)
    values = np.linalg.eigvalsh((H + H.T) / 2)
    report = lh.certify_minimum(on_the_way)
    edge = report.edge
    expected = ((values < -edge).sum(), (abs(values) <= edge).sum(), (values > edge).sum())
    assert report.verdict == "not stationary"
    assert tuple(report.around) == expected
    assert report.gradient_norm == pytest.approx(np.linalg.norm(on_the_way.gradient), rel=1e-15)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # a product of zeros: the classic saddle point
    report = lh.certify_minimum(lh.linearize(model, nn.functional.mse_loss, x, y))
    assert report.verdict == "saddle point"
    assert report.around.negative == report.around.positive == 6
    assert np.isnan(report.backward_error)
    hill = nn.Sequential(nn.Linear(1, 1, bias=False)).double()
    with torch.no_grad():
        hill[0].weight.zero_()
    lin = lh.linearize(hill, lambda y, _: -y.square().sum(), torch.ones(2, 1).double(), None)
    assert lh.certify_minimum(lin).verdict == "maximum"


def test_the_predicted_decrease_is_that_of_the_least_squares_problem():
    torch.manual_seed(1)
    x, y = torch.randn(9, 3).double(), torch.randn(9, 2).double()
    model = linear(x, y)
    best = float(nn.functional.mse_loss(model(x), y).detach())
    with torch.no_grad():
        model[0].weight += 1e-3
    report = lh.certify_minimum(lh.linearize(model, nn.functional.mse_loss, x, y), flat=1e-12)
    assert report.verdict == "not stationary"
    assert report.predicted_decrease == pytest.approx(
        float(nn.functional.mse_loss(model(x), y).detach()) - best, rel=1e-6
    )
    assert report.step_length == pytest.approx(1e-3 * 6**0.5, rel=1e-6)


def test_bad_input():
    torch.manual_seed(0)
    x, y = torch.randn(9, 3).double(), torch.randn(9, 2).double()
    lin = lh.linearize(linear(x, y), nn.functional.mse_loss, x, y)
    for wrong in ({"gtol": -1.0}, {"flat": 0.0}, {"flat": 1.0}):
        with pytest.raises(ValueError, match="gtol must be at least 0 and flat between 0 and 1"):
            lh.certify_minimum(lin, **wrong)
    with pytest.raises(TypeError, match="pass gradient="):
        lh.certify_minimum(lin.H)
    assert lh.certify_minimum(lin.H, gradient=lin.gradient).is_minimum
