"""`lh.linearize(..., differentiation="finite")` against models whose operations are twice differentiable."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as f

import linop_hess as lh
from linop_hess.errors import UnsupportedModelError
from tests.graph.small_nets import CE, LINEAR, Net, dense, gap, prepared, residual

if not hasattr(torch.library, "custom_op"):
    pytest.skip("torch.library.custom_op came with torch 2.4", allow_module_level=True)


def distances(a: Tensor, b: Tensor) -> Tensor:
    return (a[:, None] - b[None]).square().sum(-1).sqrt()


def own_distances(a: Tensor) -> Tensor:
    i, j = torch.triu_indices(len(a), len(a), 1)
    return (a[i] - a[j]).square().sum(-1).sqrt()


@torch.library.custom_op("linop_hess_tests::cube", mutates_args=())
def cube(x: Tensor) -> Tensor:
    return x**3


@torch.library.custom_op("linop_hess_tests::cube_backward", mutates_args=())
def cube_backward(x: Tensor, gradient: Tensor) -> Tensor:
    return 3 * x**2 * gradient


@torch.library.custom_op("linop_hess_tests::square", mutates_args=())
def square(x: Tensor) -> Tensor:
    return x**2


@torch.library.custom_op("linop_hess_tests::forgetful", mutates_args=())
def forgetful(x: Tensor) -> Tensor:
    return x.sin()


def _keep(ctx, inputs, output):
    ctx.x = inputs[0]


cube.register_autograd(lambda ctx, gradient: cube_backward(ctx.x, gradient), setup_context=_keep)
square.register_autograd(lambda ctx, gradient: 2 * ctx.x * gradient, setup_context=_keep)
forgetful.register_autograd(lambda ctx, gradient: gradient * ctx.x.detach().cos(), setup_context=_keep)


def hard_sigmoid(u: Tensor) -> Tensor:
    """With the slope that torch's backward pass has in any precision, off by 3e-8 of that of its values."""
    sloped = (u + 3).clamp(0, 6) * float(torch.tensor(1 / 6))
    return sloped + (f.hardsigmoid(u) - sloped).detach()


ONCE: dict[str, tuple[Callable[[Net, Tensor], Tensor], Callable[[Net, Tensor], Tensor], str]] = {
    "cdist": (lambda s, u: torch.cdist(u, s.b.weight), lambda s, u: distances(u, s.b.weight), "_cdist_forward"),
    "two of cdist": (
        lambda s, u: torch.cdist(torch.cdist(u, s.b.weight).tanh(), s.b.weight),
        lambda s, u: distances(distances(u, s.b.weight).tanh(), s.b.weight),
        "_cdist_forward",
    ),
    "after a kink": (
        lambda s, u: torch.cdist(f.relu(u), s.b.weight),
        lambda s, u: distances(f.relu(u), s.b.weight),
        "_cdist_forward",
    ),
    "pdist": (
        lambda s, u: f.pdist(s.b(u)).view(5, 2).repeat(1, 2),
        lambda s, u: own_distances(s.b(u)).view(5, 2).repeat(1, 2),
        "_pdist_forward",
    ),
    "of another library": (lambda s, u: cube(s.b(u)), lambda s, u: s.b(u) ** 3, "linop_hess_tests.cube"),
    "silently constant": (lambda s, u: forgetful(s.b(u)), lambda s, u: s.b(u).sin(), "linop_hess_tests.forgetful"),
}


def once(name: str, which: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    function = ONCE[name][which]
    torch.manual_seed(0)
    inner = Net(lambda s, u: function(s, u), b=LINEAR(4, 4))
    return prepared(Net(lambda s, x: s.c(s.inner(s.a(x))), a=LINEAR(4, 4), inner=inner, c=LINEAR(4, 3)), 5, 4)


@pytest.mark.parametrize("name", ONCE)
def test_second_derivatives_by_differences(name):
    model, (x, y) = once(name, 0)
    H = dense(lh.Hessian(once(name, 1)[0], CE, (x, y)))
    assert np.abs(H).max() > 1e-1
    lin = lh.linearize(model, CE, x, y, differentiation="finite")
    assert gap(dense(lin.H), H) < 1e-10
    said = [str(stage) for stage in lin.problem.names if "by differences" in str(stage)]
    assert said == [f"inner: {ONCE[name][2]} (by differences)"] * (2 if name == "two of cdist" else 1)
    assert lin.verify() < 1e-9
    single = lh.linearize(model.float(), CE, x.float(), y, differentiation="finite")
    assert gap(dense(single.H), H) < 1e-5


@pytest.mark.parametrize("name", ONCE)
def test_differences_are_never_taken_silently(name):
    model, (x, y) = once(name, 0)
    with pytest.raises(UnsupportedModelError, match=f"{ONCE[name][2]} in module 'inner'.*differentiation=\"finite\""):
        lh.linearize(model, CE, x, y)


def test_operations_of_another_library():
    """Whose backward pass autograd can differentiate."""
    make = [residual(square), residual(torch.square)]
    (model, (x, y)), (plain, _) = (prepared(net, 5, 4) for net in make)
    for options in ({}, {"differentiation": "finite"}):
        lin = lh.linearize(model, CE, x, y, **options)
        assert gap(dense(lin.H), dense(lh.Hessian(plain, CE, (x, y)))) < 1e-14
        assert not any("by differences" in str(stage) for stage in lin.problem.names) and lin.verify() < 1e-13


def test_operations_of_another_library_without_gradients():
    def gated(u: Tensor, squared: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.no_grad():
            gate = squared(u)
        return u * gate + squared(u.detach())

    nets = [residual(lambda u: gated(u, square)), residual(lambda u: gated(u, torch.square))]
    (model, (x, y)), (plain, _) = (prepared(net, 5, 4) for net in nets)
    assert gap(dense(lh.linearize(model, CE, x, y).H), dense(lh.Hessian(plain, CE, (x, y)))) < 1e-14


def test_a_loss_without_second_derivative():
    targets = torch.randn(6, 3, dtype=torch.float64)
    for net in (residual(torch.tanh), nn.Sequential(LINEAR(4, 5), nn.Tanh(), LINEAR(5, 3))):
        model, (x, y) = prepared(net, 5, 4)
        H = dense(lh.Hessian(model, lambda z, t: distances(z, targets).square().mean() + z.square().sum(), (x, y)))

        def loss(z: Tensor, t: Tensor) -> Tensor:
            return torch.cdist(z, targets).square().mean() + z.square().sum()

        with pytest.raises(UnsupportedModelError, match='differentiation="finite"'):
            lh.linearize(model, loss, x, y)
        lin = lh.linearize(model, loss, x, y, differentiation="finite")
        assert gap(dense(lin.H), H) < 1e-10 and lin.verify() < 1e-9
        assert "loss: _cdist_forward (by differences)" in map(str, lin.problem.names)


def test_an_operation_without_curvature_needs_no_differences():
    """Hardsigmoid has no double backward in torch, and no curvature: with torch's own slope, a sixth in single precision."""
    net = residual(f.hardsigmoid)
    model, (x, y) = prepared(net, 5, 4)
    lin = lh.linearize(model, CE, x, y)
    assert not any("by differences" in str(stage) for stage in lin.problem.names)
    known, _ = prepared(residual(hard_sigmoid), 5, 4)
    assert gap(dense(lin.H), dense(lh.Hessian(known, CE, (x, y)))) < 1e-7
