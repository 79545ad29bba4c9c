"""Forward mode inside models and losses, against the same derivatives by plain reverse mode, norms by their formulas."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn import functional as f

import linop_hess as lh
from linop_hess.autograd.backward_graph import require_same
from linop_hess.errors import UnsupportedModelError
from linop_hess.optim import GaussNewton, HessianFree, SaddleFree
from tests.graph.case import drawn
from tests.graph.oracle import primitive_operations
from tests.helpers import double_backward

Function = Callable[[Tensor], Tensor]


class Attention(nn.Module):
    def __init__(self, multihead: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.inner = nn.MultiheadAttention(4, 2, batch_first=True) if multihead else None

    def forward(self, x: Tensor) -> Tensor:
        h = torch.stack([self.first(x), self.first(x).sin(), self.first(x).cos()], -2)
        if self.inner is None:
            return self.last(f.scaled_dot_product_attention(h, h.cos(), h.sin()).mean(-2))
        return self.last(self.inner(h, h, h, need_weights=False)[0].mean(-2))


class Mixed(nn.Module):
    """Integers, truth values, constants and indices beside what has tangents."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.table, self.last = nn.Linear(3, 4), nn.Embedding(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = torch.where(torch.tensor([True, False, True, False]), h.sin(), 2 * h)[..., torch.arange(4).flip(0)]
        h = torch.tanh(h + 0.3 * self.table(torch.tensor([0, 2])).sum(0))
        return self.last(h * torch.arange(4) + torch.zeros_like(h) + torch.ones(4).to(h))


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Unflatten(-1, (1, 3)), nn.Conv1d(1, 2, 2), nn.Tanh(), nn.Flatten(-2), nn.Linear(4, 2))


NETS: dict[str, Callable[[], nn.Module]] = {
    "tanh": lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
    "layer norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)),
    "softmax": lambda: nn.Sequential(nn.Linear(3, 4), nn.Softmax(-1), nn.Linear(4, 2)),
    "convolution": convolutional,
    "attention": lambda: Attention(False),
    "multihead attention": lambda: Attention(True),
    "mixed": Mixed,
}


def direction(x: Tensor) -> Tensor:
    return torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype).view(x.shape)


def of_one(u: Function) -> Function:
    return lambda z: u(z[None])[0]


def total(u: Function) -> Function:
    return lambda z: u(z[None]).sum()


def by_dual_numbers(u: Function, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(u(forward_ad.make_dual(x, direction(x)))).tangent


def backward_of_dual_numbers(u: Function, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    with forward_ad.dual_level():
        (slope,) = torch.autograd.grad(u(forward_ad.make_dual(x, direction(x))).sum(), x, create_graph=True)
        return forward_ad.unpack_dual(slope).tangent


def second_by_jvp(u: Function, x: Tensor) -> Tensor:
    def along(z: Tensor) -> Tensor:
        return jvp(u, (z,), (torch.ones_like(z),))[1]

    return jvp(along, (x,), (torch.ones_like(x),))[1]


# By forward mode, and the name of the same by reverse mode alone.
ROUTES: dict[str, tuple[str, Callable[[Function, Tensor], Tensor]]] = {
    "jvp": ("slope", lambda u, x: jvp(u, (x,), (direction(x),))[1]),
    "dual": ("slope", by_dual_numbers),
    "jacfwd": ("jacobian", lambda u, x: vmap(jacfwd(of_one(u)))(x)),
    "jacfwd of all": ("jacobian", lambda u, x: jacfwd(u)(x).sum(2)),
    "hessian": ("hessian", lambda u, x: vmap(hessian(total(u)))(x)),
    "hessian of all": ("hessian", lambda u, x: hessian(lambda z: u(z).sum())(x).sum(2)),
    "jacfwd of jacfwd": ("hessian", lambda u, x: vmap(jacfwd(jacfwd(total(u))))(x)),
    "jacrev of jacfwd": ("hessian", lambda u, x: vmap(jacrev(jacfwd(total(u))))(x)),
    "jacrev of jacrev": ("hessian", lambda u, x: vmap(jacrev(jacrev(total(u))))(x)),
    "jvp of grad": ("curved", lambda u, x: jvp(grad(lambda z: u(z).sum()), (x,), (direction(x),))[1]),
    "grad of jvp": ("curved", lambda u, x: grad(lambda z: jvp(u, (z,), (direction(x),))[1].sum())(x)),
    "dual of grad": ("curved", backward_of_dual_numbers),
    "double backward": ("slope", lambda u, x: torch.autograd.functional.jvp(u, x, direction(x), create_graph=True)[1]),
    "jvp of jvp": ("second", second_by_jvp),
    "third": ("third", lambda u, x: vmap(jacfwd(jacrev(jacfwd(total(u)))))(x)),
}
# Where torch has what the model computes wrong: forward mode within another derivative of a norm.
WRONG = frozenset({"jacfwd of jacfwd", "jacrev of jacfwd", "grad of jvp", "jvp of jvp", "third"})


def slopes(y: Tensor, x: Tensor) -> Tensor:
    """Derivatives of (n, k), whose rows are of those of x, (n, m): (n, k, m)."""
    return torch.stack([torch.autograd.grad(column.sum(), x, create_graph=True)[0] for column in y.unbind(1)], 1)


def by_reverse(kind: str, u: Function, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    jacobian = slopes(u(x), x)
    if kind == "jacobian":
        return jacobian
    if kind == "slope":
        return (jacobian * direction(x)[:, None]).sum(2)
    if kind == "second":
        return slopes(jacobian.sum(2), x).sum(2)
    second = slopes(jacobian.sum(1), x)
    if kind == "curved":
        return (second * direction(x)[:, None]).sum(2)
    return second if kind == "hessian" else slopes(second.flatten(1), x)


def loss_of(output: Tensor, target: object = None) -> Tensor:
    return output.square().mean() + 0.1 * output.sin().sum()


def layer_norm(
    x: Tensor, shape: object, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def truth(net: nn.Module, kind: str, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Gradient and Hessian, in float64."""
    leaves = {name: p.detach().double().requires_grad_() for name, p in net.named_parameters()}
    with primitive_operations(), mock.patch.object(f, "layer_norm", layer_norm):
        loss = loss_of(by_reverse(kind, lambda z: functional_call(net, leaves, (z,)), x.double()))
        parts = torch.autograd.grad(loss, list(leaves.values()), create_graph=True, materialize_grads=True)
        gradient = torch.cat([part.reshape(-1) for part in parts])
        return gradient.detach().numpy(), double_backward(gradient, list(leaves.values())).detach().numpy()


class Inside(nn.Module):
    def __init__(self, net: nn.Module, route: str) -> None:
        super().__init__()
        self.net, self.route = net, route

    def forward(self, x: Tensor) -> Tensor:
        return ROUTES[self.route][1](self.net, x)


def made(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return drawn(NETS[name]())


def points(samples: int) -> Tensor:
    return torch.randn(samples, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def require_exact(
    found: lh.Linearization | lh.Hessian, gradient: np.ndarray, H: np.ndarray, dtype: torch.dtype
) -> None:
    tolerance = 200 * torch.finfo(dtype).eps
    products = found.H if isinstance(found, lh.Linearization) else found
    assert np.abs(H).max() > 1e-3
    assert np.abs(found.gradient - gradient).max() <= tolerance * np.abs(gradient).max()
    assert np.abs(lh.to_dense(products) - H).max() <= tolerance * np.abs(H).max()


RUNS = [(route, samples, torch.float64) for route in ROUTES for samples in (1, 5)]
RUNS += [(route, 5, torch.float32) for route in ("jvp", "dual", "hessian", "jvp of jvp")]


@pytest.mark.parametrize("route, samples, dtype", RUNS)
@pytest.mark.parametrize("name", NETS)
def test_in_the_model(name, route, samples, dtype):
    net, x = made(name), points(samples)
    gradient, H = truth(net, ROUTES[route][0], x)
    model = Inside(net, route).to(dtype)
    for run in (
        lambda: lh.linearize(model, loss_of, x.to(dtype), None),
        lambda: lh.Hessian(model, loss_of, (x.to(dtype), None)),
    ):
        if name == "layer norm" and route in WRONG:
            with pytest.raises(UnsupportedModelError, match=r"forward mode wrong.*jacrev"):
                run()
        else:
            require_exact(run(), gradient, H, dtype)


@pytest.mark.parametrize("route", ["jvp", "dual", "hessian", "jacfwd of jacfwd"])
@pytest.mark.parametrize("samples", [1, 5])
def test_in_the_loss(route, samples):
    net, x = made("tanh"), points(samples)

    def loss_fn(output: Tensor, target: object, params: dict[str, Tensor]) -> Tensor:
        return loss_of(ROUTES[route][1](lambda z: functional_call(net, params, (z,)), x)) + 0 * output.sum()

    expected = truth(net, ROUTES[route][0], x)
    require_exact(lh.linearize(net, loss_fn, x, None), *expected, torch.float64)
    require_exact(lh.Hessian(net, loss_fn, (x, None)), *expected, torch.float64)


def test_outputs_of_one_norm_are_told_apart():
    fused, written = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    with pytest.raises(UnsupportedModelError, match=r"got one of norm 1, and of norm 1 with .*jacrev"):
        require_same(fused, written)
    require_same(fused, fused + 1e-5)


@pytest.mark.parametrize("how", [{"verify": True}, {"nonsmooth": "smooth"}, {"differentiation": "finite"}])
@pytest.mark.parametrize("route", ["jvp", "hessian", "dual"])
def test_options(route, how):
    net, x = made("tanh"), points(4)
    require_exact(
        lh.linearize(Inside(net, route), loss_of, x, None, **how), *truth(net, ROUTES[route][0], x), torch.float64
    )


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(4, track_running_stats=False), nn.LayerNorm(4)])
def test_third_derivatives_of_norms_by_reverse_mode(norm):
    """Torch has mean and variance for constants there, without a word."""
    net, x = drawn(nn.Sequential(nn.Linear(3, 4), norm, nn.Linear(4, 2))), points(5)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.net(x).sin().sum(), x, create_graph=True)[0]

    def norm_by_formula(u: Tensor) -> Tensor:
        axis = 0 if isinstance(norm, nn.BatchNorm1d) else -1
        centred = u - u.mean(axis, keepdim=True)
        scaled = centred / (centred.square().mean(axis, keepdim=True) + norm.eps).sqrt()
        return scaled * norm.weight + norm.bias

    values = list(net.parameters())
    x0 = x.clone().requires_grad_()
    output = net[2](norm_by_formula(net[0](x0)))
    loss = loss_of(torch.autograd.grad(output.sin().sum(), x0, create_graph=True)[0])
    parts = torch.autograd.grad(loss, values, create_graph=True, materialize_grads=True)
    gradient = torch.cat([part.reshape(-1) for part in parts])
    H = double_backward(gradient, values).detach().numpy()
    require_exact(lh.linearize(Model(), loss_of, x, None), gradient.detach().numpy(), H, torch.float64)
    require_exact(lh.Hessian(Model(), loss_of, (x, None)), gradient.detach().numpy(), H, torch.float64)


class Distances(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(self.layer(x), torch.eye(4).to(x))


@pytest.mark.parametrize(
    "run", [lambda m, x: lh.linearize(m, loss_of, x, None), lambda m, x: lh.Hessian(m, loss_of, (x, None))]
)
def test_no_derivative_in_forward_mode_is_told(run):
    with pytest.raises(UnsupportedModelError, match=r"Distances .*_cdist_forward.*jacrev"):
        run(Inside(Distances().double(), "jvp"), points(4))


@pytest.mark.parametrize(
    "run", [lambda m, x: lh.linearize(m, loss_of, x, None), lambda m, x: lh.Hessian(m, loss_of, (x, None))]
)
def test_linearize_hides_parameters(run):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = made("tanh")

        def forward(self, x: Tensor) -> Tensor:
            return torch.func.linearize(self.net, x)[1](direction(x))

    with pytest.raises(UnsupportedModelError, match=r"torch.func.linearize.*torch.func.jvp"):
        run(Model(), points(4))


@pytest.mark.parametrize("route", ["jvp", "dual", "jacfwd of jacfwd", "double backward"])
@pytest.mark.parametrize("optimizer", [GaussNewton, SaddleFree, HessianFree])
def test_optimizers(optimizer, route):
    x, model = points(5), Inside(made("tanh"), route)
    opt = optimizer(model, loss_of)
    losses = [float(loss_of(model(x)).detach())]
    for _ in range(3):
        opt.step(x, None)
        losses.append(float(loss_of(model(x)).detach()))
    assert losses[-1] < losses[0]


def test_graphs_of_transforms_are_hidden_from_optimizers():
    opt = HessianFree(Inside(made("tanh"), "hessian"), loss_of)
    with pytest.raises(UnsupportedModelError, match=r"create_graph=True.*forward mode"):
        opt.step(points(5), None)


def test_gauss_newton():
    net, x = made("tanh"), points(5)
    model = Inside(net, "jvp")
    leaves = list(net.parameters())
    J = double_backward(by_reverse("slope", net, x).reshape(-1), leaves).detach()
    output = ROUTES["jvp"][1](net, x).detach().reshape(-1)
    curvature = torch.diag(2 / output.numel() - 0.1 * output.sin())
    expected = (J.T @ curvature @ J).numpy()
    for found in (lh.GaussNewton(model, loss_of, (x, None)), lh.linearize(model, loss_of, x, None).gauss_newton()):
        np.testing.assert_allclose(lh.to_dense(found), expected, rtol=0, atol=1e-13 * np.abs(expected).max())
