"""Hessian and GaussNewton against dense truths."""

import numpy as np
import pytest
import torch
from torch import nn

from linop_hess.autograd import GaussNewton, Hessian
from linop_hess.errors import UnsupportedModelError
from linop_hess.operators import Operator, to_dense
from tests.autograd.settings import (
    CE_MEAN,
    CE_SUM,
    CURVATURES,
    DTYPES,
    Attention,
    HalfIdle,
    Recurrent,
    Tied,
    gauss_newton_truth,
    mlp_and_batch,
    worst,
)
from tests.helpers import (
    differenced_hessian,
    make_batch,
    make_mlp,
    oracle_gradient,
    oracle_hessian,
)
from tests.operators.conformance import check_operator


@pytest.mark.parametrize("dtype", DTYPES)
def test_hessian_conforms(dtype):
    model, (x, y) = mlp_and_batch(dtype)
    truth = oracle_hessian(model, CE_MEAN, x, y)
    assert np.abs(truth).max() > 0.05 and np.linalg.eigvalsh(truth)[0] < -1e-3
    H = Hessian(model, CE_MEAN, (x, y))
    check_operator(H, truth)
    check_operator(H.damped(0.3), truth + 0.3 * np.eye(len(truth)))
    tolerance = 1e3 * np.finfo(H.dtype).eps
    np.testing.assert_allclose(H.gradient, oracle_gradient(model, CE_MEAN, x, y), atol=tolerance)
    assert H.gradient.dtype == H.dtype and H.gradient.flags.writeable
    assert isinstance(H.loss, float) and abs(H.loss - CE_MEAN(model(x), y).item()) <= tolerance


@pytest.mark.parametrize("dtype", DTYPES)
def test_gauss_newton_conforms(dtype):
    model, (x, y) = mlp_and_batch(dtype)
    G = GaussNewton(model, CE_SUM, (x, y))
    truth = gauss_newton_truth(model, CE_SUM, x, y)
    assert np.linalg.eigvalsh(truth)[0] > -1e-12
    check_operator(G, truth)
    check_operator(G.damped(1e-3), truth + 1e-3 * np.eye(len(truth)))


MODELS = {
    "layer norm": lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)),
    "group norm": lambda: nn.Sequential(nn.Linear(4, 6), nn.GroupNorm(2, 6), nn.SiLU(), nn.Linear(6, 3)),
    "batch norm": lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.GELU(), nn.Linear(6, 3)).eval(),
    "dropout": lambda: nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Softplus(), nn.Linear(6, 3)).eval(),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 2, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)
    ),
    "inplace relu": lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)),
    "attention": lambda: Attention().eval(),
    "recurrent": Recurrent,
    "tied": Tied,
}


@pytest.mark.parametrize("name", MODELS)
def test_any_model_agrees_with_differences_of_the_gradient(name):
    torch.manual_seed(0)
    model = MODELS[name]().double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    x, y = make_batch(4, 3, 5)
    assert worst(Hessian(model, CE_MEAN, (x, y)), differenced_hessian(model, CE_MEAN, x, y)) < 1e-7
    assert worst(GaussNewton(model, CE_MEAN, (x, y)), gauss_newton_truth(model, CE_MEAN, x, y)) < 1e-12


def test_linear_regression_in_closed_form():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(6, n, generator=generator, dtype=torch.float64) for n in (3, 2))
    extended = torch.cat([x, torch.ones(6, 1, dtype=torch.float64)], dim=1)
    model = nn.Linear(3, 2).double()
    weights = np.kron(np.eye(2), 2 * (x.T @ x).numpy())
    for kind in CURVATURES:
        op = kind(model, nn.MSELoss(reduction="sum"), (x, y))
        dense = to_dense(op)
        np.testing.assert_allclose(dense[:6, :6], weights, atol=1e-12)
        np.testing.assert_allclose(dense[6:, 6:], 12 * np.eye(2), atol=1e-12)
        residual = (extended @ torch.cat([model.weight.T, model.bias[None]]) - y).detach()
        gradient = torch.cat([(2 * residual.T @ x).reshape(-1), 2 * residual.sum(0)])
        np.testing.assert_allclose(op.gradient, gradient, atol=1e-12)
        assert op.loss == pytest.approx(float((residual**2).sum()))


def test_logistic_regression_in_closed_form():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(2, (9, 1), generator=generator).double()
    model = nn.Linear(4, 1, bias=False).double()
    p = torch.sigmoid(x @ model.weight.T).detach()
    truth = (x.T @ (p * (1 - p) * x)).numpy()
    for kind in CURVATURES:
        assert worst(kind(model, nn.BCEWithLogitsLoss(reduction="sum"), (x, y)), truth) < 1e-14


def test_differentiation_may_be_off_or_in_low_precision_outside():
    model, (x, y) = mlp_and_batch(torch.float32)
    truth = to_dense(Hessian(model, CE_MEAN, (x, y)))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        np.testing.assert_array_equal(to_dense(Hessian(model, CE_MEAN, (x, y))), truth)
    with torch.inference_mode():
        H = Hessian(model, CE_MEAN, (x.clone(), y))
        np.testing.assert_array_equal(to_dense(H), truth)
        assert not (H @ torch.ones(H.shape[0])).is_inference()


def test_compositions_of_curvatures_take_tensors():
    model, (x, y) = mlp_and_batch()
    H, G = Hessian(model, CE_MEAN, (x, y)), GaussNewton(model, CE_MEAN, (x, y))
    residual = H - G
    assert isinstance(residual, Operator) and residual.symmetric
    v = torch.ones(H.shape[0], dtype=torch.float64)
    torch.testing.assert_close(residual @ v, H @ v - G @ v)


@pytest.mark.parametrize("kind", CURVATURES)
def test_zero_curvature_is_zero(kind):
    model, (x, _) = nn.Linear(4, 3).double(), make_batch(4, 3, 5)
    linear = kind(model, lambda z, t: (z * t).sum(), (x, torch.ones(5, 3, dtype=torch.float64)))
    np.testing.assert_array_equal(to_dense(linear), 0)
    assert np.abs(linear.gradient).max() > 0


@pytest.mark.parametrize("kind", CURVATURES)
def test_an_unused_parameter_has_a_zero_block(kind):
    x, y = make_batch(4, 3, 5)
    model = HalfIdle().double()
    dense = to_dense(kind(model, CE_MEAN, (x, y)))
    assert not dense[:6].any() and not dense[:, :6].any()
    np.testing.assert_allclose(dense[6:, 6:], oracle_hessian(model.used, CE_MEAN, x, y), atol=1e-14)
    with pytest.raises(ValueError, match=r"does not depend.*idle\.weight"):
        kind(model, CE_MEAN, (x, y), params=["idle.weight"])


@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore")
def test_wrong_second_derivatives_of_torch_are_noticed(wrap):
    model = nn.Sequential(wrap(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = make_batch(4, 3, 6)
    plain = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3))
    plain.double()
    with torch.no_grad():
        for p, q in zip(plain.parameters(), model.parameters(), strict=True):
            p.copy_(q)
    truth = differenced_hessian(plain, CE_MEAN, x, y)
    blind = to_dense(Hessian(model, CE_MEAN, (x, y), check_symmetric=False))
    if np.abs(blind - truth).max() < 1e-7:
        pytest.skip("this torch differentiates weight_norm twice correctly")
    with pytest.raises(UnsupportedModelError, match="weight_norm"):
        Hessian(model, CE_MEAN, (x, y))
    assert worst(GaussNewton(model, CE_MEAN, (x, y)), gauss_newton_truth(plain, CE_MEAN, x, y)) < 1e-12


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_saturated_network_is_not_taken_for_a_wrong_one(dtype):
    model = make_mlp([4] + [6] * 20 + [3], gain=3.0, dtype=dtype)
    x, _ = make_batch(4, 3, 5, dtype=dtype)
    y = model(x).argmax(1)
    with torch.no_grad():
        model[-1].weight.mul_(20)
    for kind in CURVATURES:
        for targets in (y, model(x).argmax(1)):
            kind(model, CE_MEAN, (x, targets))


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


def test_an_operation_without_second_derivative_is_named():
    model, batch = mlp_and_batch()
    for loss_fn in (lambda z, t: Once.apply(z).sum(), lambda z, t: Once.apply(z).tanh().sum()):
        with pytest.raises(UnsupportedModelError, match="second derivative, got Once"):
            Hessian(model, loss_fn, batch)


@pytest.mark.parametrize("kind", CURVATURES)
def test_bad_losses(kind):
    model, (x, y) = mlp_and_batch()
    with pytest.raises(ValueError, match=r"scalar tensor, got shape \(7,\)"):
        kind(model, nn.CrossEntropyLoss(reduction="none"), (x, y))
    with pytest.raises(TypeError, match="item"):
        kind(model, lambda z, t: CE_MEAN(z, t).item(), (x, y))
    with pytest.raises(ValueError, match="does not depend"):
        kind(model, lambda z, t: CE_MEAN(z.detach(), t), (x, y))
    with pytest.raises(ValueError, match="NaN or Inf"):
        kind(model, CE_MEAN, (x * float("nan"), y))
    with pytest.raises(ValueError, match="gradient is NaN or Inf"):
        kind(model, lambda z, t: (z - z.detach()).abs().sum().sqrt(), (x, y))
    with pytest.raises(TypeError, match="callable"):
        kind(model, "cross entropy", (x, y))


def test_a_second_derivative_that_is_not_finite_is_an_error():
    model = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        model.weight.zero_()
    one = torch.ones(1, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="product is NaN or Inf.*'weight'"):
        Hessian(model, lambda z, t: (z.abs() ** 1.5).sum(), (one, one))


def test_a_penalty_on_the_models_own_weights_is_not_lost_silently():
    model, (x, y) = mlp_and_batch()
    decay = 0.1

    def penalized(z, t):
        return CE_MEAN(z, t) + decay / 2 * sum((p**2).sum() for p in model.parameters())

    with pytest.raises(UnsupportedModelError, match="damped"):
        Hessian(model, penalized, (x, y))


def test_damping_is_checked():
    model, batch = mlp_and_batch()
    H = Hessian(model, CE_MEAN, batch)
    for bad, error in (
        (float("nan"), ValueError),
        (float("inf"), ValueError),
        (1j, TypeError),
        ("1", TypeError),
    ):
        with pytest.raises(error):
            H.damped(bad)


def test_gauss_newton_needs_tensors():
    class Text(nn.Linear):
        def forward(self, x):
            return "text"

    with pytest.raises(TypeError, match="tuples, lists and dicts"):
        GaussNewton(Text(4, 3).double(), lambda z, t: z, make_batch(4, 3, 5))
