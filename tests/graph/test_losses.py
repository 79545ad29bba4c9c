"""The loss as a stage: every loss against double backward, through a network so that its gradient counts as well."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as f

import linop_hess as lh
from linop_hess.graph.rules.loss import linearize_loss
from tests.helpers import differenced_hessian, make_batch, make_mlp, oracle_gradient, oracle_hessian

SAMPLES, CLASSES = 7, 4


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LABELS = torch.randint(CLASSES, (SAMPLES,), generator=torch.Generator().manual_seed(1))
VALUES = 2 * normal(SAMPLES, CLASSES, seed=2)
PROBABILITIES = normal(SAMPLES, CLASSES, seed=3).softmax(1)
WEIGHTS = torch.tensor([0.2, 1.0, 3.0, 0.5], dtype=torch.float64)
SOME_IGNORED = torch.where(torch.arange(SAMPLES) % 3 == 1, -100, LABELS)


def coupled(output, target):
    """Samples interact through a mean."""
    return (output.mean() - target.mean()) ** 2 + output.sin().sum()


def contrastive(output, target):
    """Samples interact pairwise."""
    return torch.logsumexp(output @ output.T / 3, 1).sum() + (output - target).square().mean()


def neighbours(output, target):
    """Only neighbouring samples interact."""
    return (output[1:] - output[:-1]).square().sum() + f.mse_loss(output, target)


def barely_coupled(output, target):
    """A coupling far below the curvature within samples, but far above rounding."""
    return 1e3 * f.mse_loss(output, target) + 1e-4 * (output[0] * output[-1]).sum()


LOSSES = {
    "cross entropy, module": (nn.CrossEntropyLoss(), LABELS),
    "cross entropy, sum": (nn.CrossEntropyLoss(reduction="sum"), LABELS),
    "cross entropy, smoothed": (nn.CrossEntropyLoss(label_smoothing=0.2), LABELS),
    "cross entropy, weighted": (nn.CrossEntropyLoss(weight=WEIGHTS), LABELS),
    "cross entropy, smoothed, weighted, sum": (
        lambda o, t: f.cross_entropy(o, t, WEIGHTS.to(o.dtype), label_smoothing=0.1, reduction="sum"),
        LABELS,
    ),
    "cross entropy, ignored": (f.cross_entropy, SOME_IGNORED),
    "cross entropy, probabilities": (f.cross_entropy, PROBABILITIES),
    "mse": (f.mse_loss, VALUES),
    "mse, sum": (nn.MSELoss(reduction="sum"), VALUES),
    "huber": (nn.HuberLoss(delta=0.7), VALUES),
    "smooth l1": (nn.SmoothL1Loss(beta=1.3), VALUES),
    "nll": (lambda o, t: f.nll_loss(f.log_softmax(o, 1), t), LABELS),
    "binary": (f.binary_cross_entropy_with_logits, PROBABILITIES),
    "binary, weighted, sum": (
        lambda o, t: f.binary_cross_entropy_with_logits(o, t, pos_weight=WEIGHTS.to(o.dtype), reduction="sum"),
        PROBABILITIES,
    ),
    "binary, probabilities": (lambda o, t: f.binary_cross_entropy(o.sigmoid(), t), PROBABILITIES),
    "kl": (lambda o, t: f.kl_div(o.log_softmax(1), t, reduction="batchmean"), PROBABILITIES),
    "poisson": (nn.PoissonNLLLoss(), VALUES.abs()),
    "gaussian": (lambda o, t: f.gaussian_nll_loss(o[:, :2], t[:, :2], o[:, 2:].exp()), VALUES),
    "soft margin": (nn.MultiLabelSoftMarginLoss(), PROBABILITIES.round()),
    "cosine": (lambda o, t: 1 - f.cosine_similarity(o, t).mean(), VALUES),
    "lambda": (lambda o, t: ((o - t) ** 4).sum(), VALUES),
    "shape (1,)": (lambda o, t: ((o - t) ** 2).mean().reshape(1), VALUES),
    "some samples": (lambda o, t: f.mse_loss(o[:3], t[:3]), VALUES),
    "one entry": (lambda o, t: o[2, 1].sin(), VALUES),
    "target unused": (lambda o, t: o.logsumexp(1).sum(), None),
    "target anything": (lambda o, t: t["scale"] * o.square().sum(), {"scale": 0.3}),
    "coupled": (coupled, VALUES),
    "contrastive": (contrastive, VALUES),
    "neighbours": (neighbours, VALUES),
    "barely coupled": (barely_coupled, VALUES),
    "coupled by a norm": (lambda o, t: (o - t).norm(), VALUES),
}
COUPLED = {"coupled", "contrastive", "neighbours", "barely coupled", "coupled by a norm"}


def expected_and_lin(loss_fn, target, dtype=torch.float64):
    model = make_mlp([3, 5, CLASSES], gain=1.4, dtype=dtype)
    x = normal(SAMPLES, 3, seed=5).to(dtype)
    if isinstance(target, torch.Tensor) and target.is_floating_point():
        target = target.to(dtype)
    lin = lh.linearize(model, loss_fn, x, target)
    target = target.double() if isinstance(target, torch.Tensor) and target.is_floating_point() else target

    def double_target(o, _):
        return loss_fn(o, target).reshape(())

    return lin, model, double_target, x


@pytest.mark.parametrize("name", LOSSES)
def test_loss(name):
    loss_fn, target = LOSSES[name]
    lin, model, loss, x = expected_and_lin(loss_fn, target)
    H = oracle_hessian(model, loss, x, x)
    np.testing.assert_allclose(lh.to_dense(lin.H), H, rtol=0, atol=1e-12 * np.abs(H).max())
    gradient = oracle_gradient(model, loss, x, x)
    np.testing.assert_allclose(lin.gradient, gradient, rtol=0, atol=1e-13 * np.abs(gradient).max())
    np.testing.assert_allclose(lin.loss, float(loss(model(x), None)), rtol=1e-14)
    per_sample = lin.problem.blocks[-1].c.shape[1]
    assert per_sample == (1 if name in COUPLED else SAMPLES)
    inverse = lin.inverse(1e-2)
    assert inverse.solve(lin.gradient).backward_error <= 1e-14


@pytest.mark.parametrize("name", [n for n in LOSSES if n != "cross entropy, weighted"])
def test_loss_in_float32(name):
    loss_fn, target = LOSSES[name]
    lin, model, loss, x = expected_and_lin(loss_fn, target, torch.float32)
    H = oracle_hessian(model, loss, x, x)
    assert lh.to_dense(lin.H).dtype == np.float32
    np.testing.assert_allclose(lh.to_dense(lin.H), H, rtol=0, atol=2e-5 * np.abs(H).max())


@pytest.mark.parametrize("loss_fn", [nn.HuberLoss(delta=0.7), nn.CrossEntropyLoss(label_smoothing=0.2), coupled])
def test_oracle_against_differences(loss_fn):
    target = LABELS if isinstance(loss_fn, nn.CrossEntropyLoss) else VALUES
    lin, model, loss, x = expected_and_lin(loss_fn, target)
    H = differenced_hessian(model, loss, x, x)
    np.testing.assert_allclose(lh.to_dense(lin.H), H, rtol=0, atol=1e-6 * np.abs(H).max())


@pytest.mark.parametrize(
    "loss_fn",
    [nn.L1Loss(), nn.L1Loss(reduction="sum"), lambda o, t: (o * t).sum(), lambda o, t: o.sum(), lambda o, t: o.max()],
    ids=["l1", "l1, sum", "product", "sum", "max"],
)
def test_loss_without_curvature(loss_fn):
    """A piecewise linear loss has none: what is left comes from the network, and its Gauss-Newton matrix is zero."""
    lin, model, loss, x = expected_and_lin(loss_fn, VALUES)
    H = oracle_hessian(model, loss, x, x)
    assert np.abs(H).max() > 1e-3
    np.testing.assert_allclose(lh.to_dense(lin.H), H, rtol=0, atol=1e-12 * np.abs(H).max())
    assert not lh.to_dense(lin.gauss_newton()).any()
    np.testing.assert_allclose(lin.gauss_newton().inverse(0.5) @ np.ones(len(H)), 2, rtol=1e-14)


def test_linear_network_with_a_linear_loss_has_only_mixed_curvature():
    model = make_mlp([3, 2, 2], act=nn.Identity, gain=1.3)
    x = normal(4, 3)
    lin = lh.linearize(model, lambda o, t: o.sum(), x, None)
    H = oracle_hessian(model, lambda o, t: o.sum(), x, x)
    np.testing.assert_allclose(lh.to_dense(lin.H), H, rtol=0, atol=1e-13)
    assert not lh.to_dense(lin.DM_zz).any() and not lh.to_dense(lin.DD_xx).any()
    assert np.abs(lh.to_dense(lin.DD_zx)).max() > 0.1
    for method in ("banded", "riccati", "dense", "auto"):
        solution = lin.inverse(1e-3, method).solve(np.ones(len(H)))
        assert solution.backward_error <= 1e-14


@pytest.mark.parametrize("shape", [(), (1,), (5,), (1, 1), (40, 1), (3, 2, 4), (1, 20)])
def test_outputs_of_any_shape(shape):
    u = normal(*shape)
    parts = linearize_loss(lambda o, t: (o.sin() * (1 + o**2)).sum(), u, None)
    value, stage = parts.value, parts.stage
    H = torch.autograd.functional.hessian(lambda v: (v.sin() * (1 + v**2)).sum(), u).reshape(u.numel(), -1)
    assert np.isclose(value, float((u.sin() * (1 + u**2)).sum()))
    np.testing.assert_allclose(stage.dense_C()[0].numpy(), H.numpy(), rtol=0, atol=1e-13)


def test_curvature_of_some_samples_that_vanishes():
    """Rows of zeros at a sample, and one coupled pair hidden among many samples."""
    u = normal(30, 2)

    def loss(o, _):
        return o[3:].square().sum() + 1e-6 * o[4, 0] * o[25, 1]

    stage = linearize_loss(loss, u, None).stage
    H = torch.autograd.functional.hessian(lambda v: loss(v, None), u).reshape(60, 60)
    np.testing.assert_allclose(stage.dense_C()[0].numpy(), H.numpy(), rtol=0, atol=1e-13)


def test_loss_that_changes_its_argument_in_place():
    def in_place(output, target):
        return f.cross_entropy(output.mul_(2.0), target)

    model = make_mlp([3, 4, 3])
    x, y = make_batch(3, 3, 4)
    lin = lh.linearize(model, in_place, x, y)
    expected = oracle_hessian(model, lambda o, t: f.cross_entropy(2.0 * o, t), x, y)
    np.testing.assert_allclose(lh.to_dense(lin.H), expected, rtol=0, atol=1e-13 * np.abs(expected).max())
