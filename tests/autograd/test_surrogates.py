"""Surrogates: near their operation at high sharpness, with second derivatives in closed form."""

import math

import pytest
import torch
import torch.nn.functional as F

from linop_hess.autograd.kinks.surrogates import is_curved, is_kinked, operation_name, surrogate
from linop_hess.autograd.kinks.windows import adaptive_windows, pooling_windows
from tests.helpers import HAS_AMINMAX

aten = torch.ops.aten
BETA = 5.0


def points(*shape, seed=0):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, Y, W = points(3, 4), points(3, 4, seed=1), points(4, seed=2)
IMAGE, VOLUME = points(2, 3, 7, 6), points(1, 2, 5, 4, 5)

# Overload, its arguments after the first, and keywords.
CALLS = [
    (aten.relu.default, X, (), {}),
    (aten.relu_.default, X, (), {}),
    (aten.leaky_relu.default, X, (), {}),
    (aten.leaky_relu_.default, X, (0.2,), {}),
    (aten._prelu_kernel.default, X, (W,), {}),
    (aten.elu.default, X, (1.7, 1.05), {}),
    (aten.elu_.default, X, (2.0, 1.0, 0.7), {}),
    (aten.hardtanh.default, X, (), {}),
    (aten.hardtanh_.default, X, (0.0, 6.0), {}),
    (aten.clamp.default, X, (-0.5, 1.0), {}),
    (aten.clamp.default, X, (), {"max": 0.3}),
    (aten.clamp_.default, X, (0.1,), {}),
    (aten.clamp.Tensor, X, (Y - 2, Y + 1), {}),
    (aten.clamp.Tensor, X, (), {"max": Y}),
    (aten.clamp_min.default, X, (0.2,), {}),
    (aten.clamp_min_.Tensor, X, (Y,), {}),
    (aten.clamp_max.default, X, (0.2,), {}),
    (aten.clamp_max.Tensor, X, (Y,), {}),
    (aten.threshold.default, X, (0.3, 0.3), {}),
    (aten.threshold_.default, X, (0.0, 0.0), {}),
    (aten.softshrink.default, X, (0.4,), {}),
    (aten.hardsigmoid.default, X, (), {}),
    (aten.hardsigmoid_.default, X, (), {}),
    (aten.hardswish.default, X, (), {}),
    (aten.hardswish_.default, X, (), {}),
    (aten.abs.default, X, (), {}),
    (aten.abs_.default, X, (), {}),
    (aten.maximum.default, X, (Y,), {}),
    (aten.minimum.default, X, (Y,), {}),
    (aten.fmax.default, X, (Y,), {}),
    (aten.fmin.default, X, (Y,), {}),
    (aten.max.other, X, (Y,), {}),
    (aten.min.other, X, (Y,), {}),
    (aten.amax.default, X, ([1],), {}),
    (aten.amax.default, X, (), {"keepdim": True}),
    (aten.amin.default, X, ([0, 1],), {}),
    (aten.max.default, X, (), {}),
    (aten.min.default, X, (), {}),
    (aten.max.dim, X, (1,), {}),
    (aten.min.dim, X, (0, True), {}),
    *([(aten.aminmax.default, X, (), {"dim": 1})] if HAS_AMINMAX else []),
    (aten.cummax.default, X, (1,), {}),
    (aten.cummin.default, X, (0,), {}),
    (aten.linalg_vector_norm.default, X, (1,), {}),
    (aten.linalg_vector_norm.default, X, (math.inf, [1]), {}),
    (aten.linalg_vector_norm.default, X, (-math.inf, [1], True), {}),
    (aten.linalg_vector_norm.default, X, (3, [0]), {}),
    (aten.norm.ScalarOpt_dim, X, (1, [1]), {}),
    (aten.norm.Scalar, X, (), {}),
    (aten.max_pool2d_with_indices.default, IMAGE, ([2, 2],), {}),
    (aten.max_pool2d_with_indices.default, IMAGE, ([3, 2], [2, 1], [1, 1], [2, 1], True), {}),
    (aten.max_pool2d_with_indices.default, IMAGE, ([3], [2], [1], [1], False), {}),
    (aten.max_pool3d_with_indices.default, VOLUME, ([2, 2, 2], [2, 1, 2], [1, 0, 1], [1, 1, 1], True), {}),
    (aten.adaptive_max_pool2d.default, IMAGE, ([3, 4],), {}),
    (aten.adaptive_max_pool3d.default, VOLUME, ([2, 3, 2],), {}),
]
IDS = [f"{func}-{k}" for k, (func, *_) in enumerate(CALLS)]


def differentiable(result):
    results = result if isinstance(result, tuple | list) else (result,)
    return [r for r in results if r.is_floating_point()]


@pytest.mark.parametrize("call", CALLS, ids=IDS)
def test_it_tends_to_its_operation_and_its_slope_too(call):
    func, x, args, kwargs = call
    sharp = 1e5
    z, theirs = (x.clone().requires_grad_() for _ in range(2))
    ours = differentiable(surrogate(func, sharp)(z, *args, **kwargs))
    truth = differentiable(func(theirs * 1.0, *args, **kwargs))
    assert len(ours) == len(truth)
    for mine, its in zip(ours, truth, strict=True):
        assert mine.shape == its.shape
        assert (mine - its).abs().max() < 20 / sharp
        weights = torch.linspace(1, 2, its.numel(), dtype=torch.float64).view(its.shape)
        slope, right = (
            torch.autograd.grad((weights * y).sum(), w, retain_graph=True)[0] for y, w in ((mine, z), (its, theirs))
        )
        assert (slope - right).abs().max() < 1e-3 * right.abs().max()


@pytest.mark.parametrize("call", CALLS, ids=IDS)
def test_it_changes_no_argument_and_is_differentiated_twice_under_vmap(call):
    func, x, args, kwargs = call
    smooth = surrogate(func, BETA)
    stack = torch.stack([x, x.flip(0) + 0.1]).requires_grad_()

    def total(z):
        return sum((y**2).sum() for y in differentiable(smooth(z, *args, **kwargs)))

    def curvature(value, by):
        (slope,) = torch.autograd.grad(value, by, create_graph=True)
        return torch.autograd.grad((slope * torch.cos(slope.detach())).sum(), by)[0]

    together = curvature(torch.vmap(total)(stack).sum(), stack)
    for k in range(2):
        one = stack[k].detach().clone().requires_grad_()
        alone = curvature(total(one), one)
        assert torch.equal(one, stack[k])
        torch.testing.assert_close(together[k], alone, rtol=1e-12, atol=1e-12)


def second(smooth, x, *args):
    """∂²/∂x² of a pointwise function."""
    z = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(smooth(z, *args).sum(), z, create_graph=True)
    return torch.autograd.grad(slope.sum(), z)[0]


def bump(x):
    """β σ(βx)(1 − σ(βx)), which integrates to one."""
    return BETA / (4 * torch.cosh(BETA * x / 2) ** 2)


CLOSED_FORMS = [
    (aten.relu.default, (), bump),
    (aten.leaky_relu.default, (0.2,), lambda x: 0.8 * bump(x)),
    (aten.hardtanh.default, (-1.0, 2.0), lambda x: bump(x + 1) - bump(x - 2)),
    (aten.clamp_min.default, (0.3,), lambda x: bump(x - 0.3)),
    (aten.clamp_max.default, (0.3,), lambda x: -bump(x - 0.3)),
    (aten.threshold.default, (0.3, 7.0), lambda x: bump(x - 0.3)),
    (aten.softshrink.default, (0.4,), lambda x: bump(x - 0.4) - bump(x + 0.4)),
    (aten.hardshrink.default, (0.4,), lambda x: bump(x - 0.4) - bump(x + 0.4)),
    (aten.hardsigmoid.default, (), lambda x: (bump(x + 3) - bump(x - 3)) / 6),
    (aten.abs.default, (), lambda x: BETA**-2 / (x**2 + BETA**-2) ** 1.5),
    (aten.maximum.default, (Y,), lambda x: bump(x - Y)),
    (aten.minimum.default, (Y,), lambda x: -bump(x - Y)),
    (aten.elu.default, (2.0, 1.5), lambda x: torch.where(x < 0, 3 * torch.exp(x), 0) - 1.5 * bump(x)),
]


@pytest.mark.parametrize("form", CLOSED_FORMS, ids=lambda form: str(form[0]))
def test_second_derivatives_in_closed_form(form):
    func, args, truth = form
    got, right = second(surrogate(func, BETA), X, *args), truth(X)
    assert right.abs().max() > 0.1
    assert (got - right).abs().max() < 1e-14 * (1 + right.abs().max())


def test_far_from_the_kink_nothing_overflows_or_is_cut_off():
    far = torch.tensor([-400.0, -8.0, -3.0, 3.0, 8.0, 400.0], dtype=torch.float64)
    smooth = surrogate(aten.relu.default, BETA)
    assert (second(smooth, far) - bump(far.clamp(-100, 100))).abs().max() < 1e-15
    assert bool((second(smooth, far[2:4]) > 1e-6).all())
    for func in (aten.relu.default, aten.abs.default):
        assert bool(torch.isfinite(second(surrogate(func, BETA), far.float())).all())


def test_a_maximum_has_the_curvature_of_its_softmax():
    x = X[0].clone().requires_grad_()
    hessian = torch.autograd.functional.hessian(surrogate(aten.max.default, BETA), x)
    p = torch.softmax(BETA * X[0], 0)
    assert (hessian - BETA * (torch.diag(p) - torch.outer(p, p))).abs().max() < 1e-14


def test_windows_are_those_of_torch():
    for size, kernel, stride, padding, dilation, ceil in [
        (7, 2, 2, 0, 1, False),
        (7, 3, 2, 1, 1, True),
        (9, 3, 4, 1, 2, True),
        (5, 2, 3, 1, 1, True),
        (6, 4, 1, 2, 1, False),
    ]:
        x = torch.randn(1, 1, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        (places,) = pooling_windows((size,), kernel, stride, padding, dilation, ceil)
        padded = F.pad(x[0, 0], (0, 1), value=-math.inf)
        its = F.max_pool1d(x, kernel, stride, padding, dilation, ceil)[0, 0]
        assert torch.equal(padded[places].amax(1), its)
    for size, out in [(7, 3), (5, 5), (6, 4), (3, 5)]:
        x = torch.randn(1, 1, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        (places,) = adaptive_windows((size,), (out,))
        assert torch.equal(F.pad(x[0, 0], (0, 1), value=-math.inf)[places].amax(1), F.adaptive_max_pool1d(x, out)[0, 0])


def test_what_is_kinked():
    for func, *_ in CALLS[:-10]:
        assert is_kinked(func)
    for func in (aten.sort.default, aten.topk.default, aten.round.default, aten.floor_.default, aten.median.dim):
        assert is_kinked(func) and surrogate(func, BETA) is None
    for func in (
        aten.tanh.default,
        aten.mul.Tensor,
        aten.celu.default,
        aten.smooth_l1_loss.default,
        aten.huber_loss.default,
    ):
        assert not is_kinked(func) and surrogate(func, BETA) is None
    assert is_kinked(aten.linalg_vector_norm.default, X, 1) and not is_kinked(aten.linalg_vector_norm.default, X, 2)
    assert not is_kinked(aten.norm.Scalar, X) and is_kinked(aten.norm.ScalarOpt_dim, X, math.inf, [0])
    assert not is_kinked(aten.elu.default, X) and is_kinked(aten.elu.default, X, 1.67, 1.05)
    assert is_curved(aten.hardswish_.default) and not is_curved(aten.relu.default)
    assert operation_name(aten.clamp_min_.Tensor) == operation_name(aten.clamp_min) == "clamp_min"
