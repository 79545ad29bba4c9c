"""What rounding explains is no error, and what it does not explain is one: verify(), checks of symmetry and of gradients, inertia."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as f

import linop_hess as lh
from linop_hess.autograd.rounding import Rounded
from tests.helpers import make_batch


def orthogonal(dtype, gain: float) -> nn.Module:
    """Whose weight is a matrix exponential: torch's derivative of it rounds by far more than an ulp of the parameters does."""
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.orthogonal(nn.Linear(4, 4))
    with torch.no_grad():
        layer.parametrizations.weight.original.normal_(0, gain)
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 3)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("gain", [0.3, 3.0])
def test_matrix_exponentials_are_verified(dtype, gain):
    model, (x, y) = orthogonal(dtype, gain), make_batch(4, 3, 5, dtype=dtype)
    lin = lh.linearize(model, lambda z, t: 1e3 * f.cross_entropy(z, t), x, y)
    assert lin.verify() <= (1e-10 if dtype == torch.float64 else 2e-2)


@pytest.mark.parametrize("wrong", [1e-8, 1e-3])
def test_a_small_error_beside_matrix_exponentials_is_found(wrong):
    model, (x, y) = orthogonal(torch.float64, 1.0), make_batch(4, 3, 5)
    lin = lh.linearize(model, f.cross_entropy, x, y)
    H = lh.to_dense(lin.H)
    lin.__dict__["H"] = torch.from_numpy(H + wrong * np.abs(H).max() * np.eye(len(H)))
    with pytest.raises(ArithmeticError, match="differs from double backward"):
        lin.verify()


def test_maxima_are_still_entries_when_all_else_is_moved():
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    with Rounded(0):
        (gradient,) = torch.autograd.grad(x.square().amax(), x)
    assert torch.isfinite(gradient).all() and int((gradient != 0).sum()) == 1


@pytest.mark.parametrize("batched", [True, False])
def test_zeros_without_memory_are_not_written_to(batched):
    # In a process of its own: writing there ends it.
    code = f"""
import torch
from linop_hess.autograd.differentiate import differentiate
from linop_hess.autograd.rounding import Rounded
x = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64, requires_grad=True)
seed = torch.eye(3, dtype=torch.float64) if {batched} else torch.ones(3, dtype=torch.float64)
with Rounded(0):
    (gradient,) = differentiate([(x * x).abs().sum()], [x], create_graph=True)
    (product,) = differentiate([gradient], [x], [seed], batched={batched})
assert torch.allclose(product, 2 * seed, rtol=1e-14)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_curvature_of_saturated_losses_is_symmetric_to_rounding():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)).double(), 6 * torch.randn(2, 4).double()
    with torch.no_grad():
        model[0].weight.mul_(4)
    z = model(x).detach()
    t = torch.stack([z[0].sign() * 1.5, -z[0].sign() * 0.9])
    if z[1].sign() == z[0].sign():
        model[1].bias.data -= z.mean()
    G = lh.GaussNewton(model, lambda o, t: f.cross_entropy(o @ t.T, torch.arange(2)), (x, t))
    assert np.isfinite(lh.to_dense(G)).all()


@pytest.mark.parametrize("scale", [1.0, 1e9])
def test_where_all_curvature_cancels_rounding_is_no_asymmetry(scale):
    torch.manual_seed(1)
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Softmax(1), nn.Flatten()).double(), torch.randn(3, 4).double()

    def loss(p, t):
        return scale * (p * t).sum() + model_like(p)

    def model_like(p):
        return (p.sum(1) - 1.5).square().sum()

    t = torch.randn(3, 1).double().expand(3, 5)  # the same for all of a sample: softmax sums to one
    lin = lh.linearize(model, loss, x, t)
    assert np.abs(lh.to_dense(lin.H)).max() <= 1e-13 * scale and np.abs(lin.gradient).max() <= 1e-13 * scale


@pytest.mark.parametrize("even", [True, False])
def test_inertia_near_singular_with_a_penalty(even):
    torch.manual_seed(0)
    model, (x, y) = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double(), make_batch(4, 3, 3)

    def loss(z, t, params):
        return f.cross_entropy(z, t) + sum(
            (0.1 if even else 0.1 * (k + 1)) * p.square().sum() for k, p in enumerate(params.values())
        )

    lin = lh.linearize(model, loss, x, y)
    values = np.linalg.eigvalsh(lh.to_dense(lin.H))
    for k in (0, len(values) - 1):
        for off in (1e-13, -1e-13):
            found = lin.inverse(-values[k] + off).inertia()
            below, above = int((values < values[k] - 1e-9).sum()), int((values > values[k] + 1e-9).sum())
            assert found.negative >= below and found.positive >= above
            assert found.negative + found.zero + found.positive == len(values)
    if even:  # the batch of three does not see all parameters: these have the penalty's curvature alone
        with pytest.raises(lh.errors.FactorizationError, match="away from -0.2"):
            lin.inverse(-0.2 + 1e-15).inertia()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_where_double_backward_has_no_derivative_differences_verify(dtype):
    torch.manual_seed(0)
    model, (x, y) = nn.Sequential(nn.Linear(4, 3)).to(dtype), make_batch(4, 3, 5, dtype=dtype)

    def loss(z, t, params):
        return f.cross_entropy(z, t) + sum(f.hardsigmoid(p).square().sum() for p in params.values())

    assert lh.linearize(model, loss, x, y, differentiation="finite").verify() <= 1e-3
    with pytest.raises(lh.errors.UnsupportedModelError, match="without a second derivative"):
        lh.linearize(model, loss, x, y).verify()


def test_gradients_that_are_rounding_altogether_agree():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Unflatten(1, (2, 2))).double(), torch.randn(2, 3).double()

    def loss(z, t):
        one = 1e3 * f.cosine_similarity(z.flatten(1), 1e-3 * t, dim=1).sum()  # of two vectors that are parallel
        return one + z.mul(0).sum()

    t = 2.0 * model(x).detach().flatten(1)
    assert np.abs(lh.linearize(model, loss, x, t).gradient).max() <= 1e-9


def test_what_a_mask_excludes_stays_excluded():
    """−∞ moved by a share of the largest entry was NaN, so that rounding explained nothing."""
    scores = torch.tensor([[1.0, -torch.inf, 0.3], [-torch.inf, 2.0, -0.5]], dtype=torch.float64)
    with Rounded(0):
        weights = scores.softmax(1)
    assert torch.isfinite(weights).all() and bool((weights[scores == -torch.inf] == 0).all())
    assert 0.0 < float((weights - scores.softmax(1)).abs().max()) < 1e-14
