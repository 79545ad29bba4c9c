"""Data in one batch or several: the same matrix, or an error."""

import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from linop_hess.autograd import Hessian
from linop_hess.errors import UnsupportedModelError
from linop_hess.operators import to_dense
from tests.autograd.settings import (
    CE_MEAN,
    CE_SUM,
    CURVATURES,
    DTYPES,
    TwoInputs,
    mlp_and_batch,
    worst,
)
from tests.helpers import (
    make_batch,
    oracle_hessian,
)


@pytest.mark.parametrize("kind", CURVATURES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss_fn", [CE_MEAN, CE_SUM], ids=["mean", "sum"])
def test_unequal_batches_are_one_batch(kind, dtype, loss_fn):
    model, (x, y) = mlp_and_batch(dtype, samples=11)
    whole = kind(model, loss_fn, (x, y))
    batches = list(zip(x.split([1, 3, 7]), y.split([1, 3, 7]), strict=True))
    tolerance = 100 * float(np.finfo(whole.dtype).eps)
    for data in (
        batches,
        [list(batch) for batch in batches],
        tuple(batches),
        DataLoader(TensorDataset(x, y), batch_size=4),
        DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True),
    ):
        parts = kind(model, loss_fn, data)
        assert parts.loss == pytest.approx(whole.loss, rel=tolerance)
        np.testing.assert_allclose(parts.gradient, whole.gradient, atol=tolerance * np.abs(whole.gradient).max())
        assert worst(parts, to_dense(whole)) < tolerance


def test_two_batches_are_not_taken_for_one():
    model, (x, y) = mlp_and_batch()
    halves = [(x[:3], y[:3]), (x[3:], y[3:])]
    truth = oracle_hessian(model, CE_SUM, x, y)
    assert worst(Hessian(model, CE_SUM, halves), truth) < 1e-13
    assert worst(Hessian(model, CE_SUM, [x, y]), truth) < 1e-13
    with pytest.raises(ValueError, match="not clear"):
        Hessian(model, CE_SUM, tuple(halves))


def test_the_reduction_of_a_function_is_asked_for_and_used():
    model, (x, y) = mlp_and_batch()
    batches = [(x[:2], y[:2]), (x[2:], y[2:])]
    with pytest.raises(ValueError, match='reduction="sum" or reduction="mean"'):
        Hessian(model, functional.cross_entropy, batches)
    truth = oracle_hessian(model, functional.cross_entropy, x, y)
    assert worst(Hessian(model, functional.cross_entropy, batches, reduction="mean"), truth) < 1e-13
    assert worst(Hessian(model, functional.cross_entropy, (x, y)), truth) < 1e-13
    with pytest.raises(ValueError, match="contradicts"):
        Hessian(model, CE_MEAN, batches, reduction="sum")
    with pytest.raises(ValueError, match="'none'"):
        Hessian(model, functional.cross_entropy, (x, y), reduction="none")


def test_means_that_weights_cannot_make_exact_are_refused():
    model, (x, y) = mlp_and_batch()
    batches = [(x[:2], y[:2]), (x[2:], y[2:])]
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    with pytest.raises(ValueError, match="class-weighted"):
        Hessian(model, weighted, batches)
    assert worst(Hessian(model, weighted, (x, y)), oracle_hessian(model, weighted, x, y)) < 1e-13
    with pytest.raises(ValueError, match="ignore_index=2"):
        Hessian(model, nn.CrossEntropyLoss(ignore_index=2), [(x, torch.full_like(y, 2)), (x, y)])
    with pytest.raises(ValueError, match="shapes"):
        Hessian(nn.Linear(4, 1).double(), nn.MSELoss(), [(x, torch.ones(7, 1)), (x, torch.ones(7, 2))])
    with pytest.raises(ValueError, match="number of samples"):
        Hessian(model, CE_MEAN, [(x[0], y[0]), (x[1], y[1])])


def test_inputs_may_be_a_dict():
    x, y = make_batch(4, 3, 5)
    model = TwoInputs().double()
    H = Hessian(model, CE_MEAN, ({"a": x, "b": x.flip(0)}, y))
    ps = list(model.parameters())
    v = torch.linspace(-1, 1, 15, dtype=torch.float64)
    step, theta = 1e-5, nn.utils.parameters_to_vector(ps).detach()
    sides = []
    for sign in (1, -1):
        nn.utils.vector_to_parameters(theta + sign * step * v, ps)
        sides.append(Hessian(model, CE_MEAN, ({"a": x, "b": x.flip(0)}, y)).gradient)
    np.testing.assert_allclose(H @ v.numpy(), (sides[0] - sides[1]) / (2 * step), atol=1e-8)


def test_progress_counts_batches(capsys, monkeypatch):
    model, (x, y) = mlp_and_batch()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    H = Hessian(model, CE_SUM, [(x[:3], y[:3]), (x[3:], y[3:])], progress=True)
    capsys.readouterr()
    H @ np.ones(H.shape[0])
    shown = capsys.readouterr().err
    assert "Hessian" in shown and "2/2" in shown


def test_no_progress_bar_where_there_is_no_terminal(capsys):
    model, (x, y) = mlp_and_batch()
    H = Hessian(model, CE_SUM, [(x[:3], y[:3]), (x[3:], y[3:])], progress=True)
    H @ np.ones(H.shape[0])
    assert capsys.readouterr().err == ""


def test_progress_may_be_a_callable():
    model, (x, y) = mlp_and_batch()
    seen = []
    told = Hessian(model, CE_SUM, [(x[:2], y[:2]), (x[2:3], y[2:3]), (x[3:], y[3:])], progress=seen.append)
    assert seen[:3] == [1, 2, 3]
    seen.clear()
    quiet = Hessian(model, CE_SUM, [(x[:2], y[:2]), (x[2:3], y[2:3]), (x[3:], y[3:])], progress=None)
    v = np.ones(told.shape[0])
    np.testing.assert_array_equal(told @ v, quiet @ v)
    assert seen == [1, 2, 3]
    with pytest.raises(TypeError, match="expected progress to be a bool or callable, got int"):
        Hessian(model, CE_SUM, (x, y), progress=1)


def test_progress_without_tqdm_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tqdm", None)
    with pytest.raises(ImportError, match="pip install tqdm"):
        Hessian(*mlp_and_batch()[:1], CE_MEAN, mlp_and_batch()[1], progress=True)


def test_a_loader_that_drops_samples_at_random_is_refused():
    model, (x, y) = mlp_and_batch()
    loader = DataLoader(TensorDataset(x, y), batch_size=3, shuffle=True, drop_last=True)
    torch.manual_seed(0)
    with pytest.raises(UnsupportedModelError, match="shuffles"):
        Hessian(model, CE_SUM, loader)


@pytest.mark.parametrize("kind", CURVATURES)
def test_bad_data(kind):
    model, (x, y) = mlp_and_batch()
    with pytest.raises(TypeError, match="only once"):
        kind(model, CE_SUM, ((x, y) for _ in range(2)))
    with pytest.raises(TypeError, match="only once"):
        kind(model, CE_SUM, zip([x], [y], strict=True))
    with pytest.raises(TypeError, match="DataLoader"):
        kind(model, CE_SUM, TensorDataset(x, y))
    with pytest.raises(TypeError, match="batch"):
        kind(model, CE_SUM, x)
    with pytest.raises(TypeError, match="pair"):
        kind(model, CE_SUM, [x, y, x])
    with pytest.raises(TypeError, match="batch"):
        kind(model, CE_SUM, 3)
    with pytest.raises(ValueError, match="no batch"):
        kind(model, CE_SUM, [])


def test_data_that_shrink_are_noticed():
    model, (x, y) = mlp_and_batch()
    data = [(x, y), (x, y)]
    H = Hessian(model, CE_SUM, data)
    data.pop()
    with pytest.raises(ValueError, match="2 batches"):
        H @ np.ones(H.shape[0])


@pytest.mark.parametrize("loss", [nn.BCEWithLogitsLoss, nn.MultiLabelSoftMarginLoss])
def test_weights_that_a_mean_does_not_divide_by_are_exact(loss):
    model, (x, _) = mlp_and_batch()
    y = (x[:, :3] > 0).double()
    weighted = loss(weight=torch.tensor([2.0, 3.0, 0.5]).double())
    H = Hessian(model, weighted, [(x[:2], y[:2]), (x[2:], y[2:])])
    assert worst(H, oracle_hessian(model, weighted, x, y)) <= 1e-14
