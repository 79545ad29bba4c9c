"""Gradients of the terms of the loss, against one backward pass of torch a sample."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as f

import linop_hess as lh
from linop_hess import per_sample
from linop_hess.cli.models import FAMILIES
from linop_hess.cli.networks import digits_problem
from linop_hess.errors import UnsupportedModelError


def one_by_one(model, terms):
    """A backward pass for each term."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = [torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True) for term in terms]
    filled = [[torch.zeros_like(p) if g is None else g for g, p in zip(row, parameters, strict=True)] for row in rows]
    return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in filled]).numpy()


def agree(lin, expected):
    rows = lin.sample_gradients()
    assert rows.shape == expected.shape
    scale = abs(expected).max()
    assert scale > 1e-3
    assert abs(rows - expected).max() <= 1e-13 * scale
    assert abs(rows.sum(0) - lin.gradient).max() <= 1e-13 * scale


@pytest.mark.parametrize("model", FAMILIES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_models_of_compare(model, reduction, tmp_path):
    p = digits_problem(depth=2, width=4, batch=5, train_steps=3, model=model)
    terms = f.cross_entropy(p.model(p.inputs), p.targets, reduction="none")
    lin = lh.linearize(p.model, nn.CrossEntropyLoss(reduction=reduction), p.inputs, p.targets)
    agree(lin, one_by_one(p.model, terms / (5 if reduction == "mean" else 1)))
    lin.save(tmp_path / "file")
    np.testing.assert_array_equal(lh.load(tmp_path / "file").sample_gradients(), lin.sample_gradients())


class Tied(nn.Module):
    """One layer used twice, a parameter that nothing uses, and statistics of the batch, by which samples interact in the model."""

    def __init__(self):
        super().__init__()
        self.mix, self.idle = nn.Linear(4, 4), nn.Parameter(torch.ones(3))
        self.norm = nn.BatchNorm1d(4, track_running_stats=False)

    def forward(self, x):
        return {"a": self.mix(torch.tanh(self.norm(self.mix(x)))), "b": x @ self.mix.weight}


@pytest.fixture
def tied():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Tied().double(), torch.randn(6, 4).double(), torch.randn(6, 4).double()


def test_shared_weights_several_outputs_and_samples_that_interact_in_the_model(tied):
    model, x, y = tied

    def terms(output):
        return ((output["a"] - y) ** 2).sum(1) + output["b"].sin().prod(1)

    agree(lh.linearize(model, lambda output, _: terms(output).sum(), x, y), one_by_one(model, terms(model(x))))


def test_weights_of_classes_are_in_the_rows(tied):
    model, x, _ = tied
    y, w = torch.tensor([0, 1, 2, 3, 3, 0]), torch.tensor([1.0, 2.0, 0.5, 3.0]).double()
    lin = lh.linearize(model, lambda output, target: f.cross_entropy(output["a"], target, w), x, y)
    terms = f.cross_entropy(model(x)["a"], y, w, reduction="none") / w[y].sum()
    agree(lin, one_by_one(model, terms))


@pytest.mark.parametrize("batch", [1, 7])
def test_outputs_of_one_number_and_a_batch_of_one(batch):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1), nn.Flatten(0)).double()
        x, y = torch.randn(batch, 3).double(), torch.randn(batch).double()
    lin = lh.linearize(model, nn.MSELoss(), x, y)
    agree(lin, one_by_one(model, (model(x) - y) ** 2 / batch))


def test_samples_in_several_passes(monkeypatch):
    p = digits_problem(depth=3, width=4, batch=7)
    lin = lh.linearize(p.model, p.loss_fn, p.inputs, p.targets)
    whole = lin.sample_gradients()
    monkeypatch.setattr(per_sample, "_AT_ONCE_BYTES", 3 * 8 * lin.problem.layout.size_out)
    assert abs(lin.sample_gradients() - whole).max() <= 1e-15 * abs(whole).max()


@pytest.mark.parametrize(
    "loss",
    [
        lambda output, target: output["a"].sum(1).logsumexp(0),
        lambda output, target: output["a"].sum() ** 2,
        lambda output, target, params: output["a"].square().mean() + params["mix.weight"].square().sum(),
    ],
    ids=["contrastive", "of the whole", "with a penalty"],
)
def test_losses_that_are_no_sums_are_refused(loss, tied):
    model, x, y = tied
    lin = lh.linearize(model, loss, x, y)
    with pytest.raises(UnsupportedModelError, match="expected a loss that is a sum over the samples"):
        lin.sample_gradients()


def test_memory_is_asked_for_first(monkeypatch):
    p = digits_problem(depth=2, width=4, batch=5)
    lin = lh.linearize(p.model, p.loss_fn, p.inputs, p.targets)
    monkeypatch.setattr(per_sample, "available_on", lambda device: 10_000)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: pytest.fail("allocated"))
    with pytest.raises(MemoryError, match="gradients of 5 samples by"):
        lin.sample_gradients()


def test_leaving_a_sample_out_moves_the_minimum_by_the_inverse():
    """The sign and the factor that are promised, against the minimum without the sample, of a quadratic loss."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        x, y = torch.randn(9, 3).double(), torch.randn(9).double()
    A, damping = x.numpy(), 0.7
    H = 2 * A.T @ A / 9 + damping * np.eye(3)
    minimum = np.linalg.solve(H, 2 * A.T @ y.numpy() / 9)
    model = nn.Sequential(nn.Linear(3, 1, bias=False), nn.Flatten(0)).double()
    with torch.no_grad():
        model[0].weight[0] = torch.from_numpy(minimum)
    lin = lh.linearize(model, nn.MSELoss(), x, y)
    move = lin.inverse(damping) @ lin.sample_gradients()[4]
    small = 1e-5  # the sample's weight is lowered by this much
    w = np.ones(9)
    w[4] -= small
    without = np.linalg.solve(2 * (A.T * w) @ A / 9 + damping * np.eye(3), 2 * (A.T * w) @ y.numpy() / 9)
    assert abs((without - minimum) / small - move).max() <= 1e-4 * abs(move).max()
