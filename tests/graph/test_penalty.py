"""Separable penalties: taken out of the graph where they are, left in where they are not, and exact either way."""

from __future__ import annotations

import copy
import resource
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as f

import linop_hess as lh
from linop_hess.errors import UnsupportedModelError
from linop_hess.graph.build import AUTOGRAD
from linop_hess.graph.lowering import opened
from linop_hess.graph.penalty import without_penalty
from linop_hess.graph.recording.node import Trace
from tests.graph.case import drawn, labels, mlp, normal
from tests.helpers import dense_hessian
from tests.lq.problems import backward_error

Penalty = Callable[[dict[str, Tensor]], Tensor]


def per_tensor(term: Callable[[Tensor], Tensor], only: str = "") -> Penalty:
    return lambda params: sum(term(p) for name, p in params.items() if only in name)


SEPARABLE: dict[str, Penalty] = {
    "square": per_tensor(lambda p: 0.01 * p.square().sum()),
    "power": per_tensor(lambda p: 0.01 * (p**2).sum()),
    "product": per_tensor(lambda p: 0.02 / 2 * (p * p).sum()),
    "norm squared": per_tensor(lambda p: 0.01 * p.norm() ** 2),
    "norm by itself": per_tensor(lambda p: (lambda n: 0.01 * (n * n))(torch.linalg.vector_norm(p))),
    "dot": per_tensor(lambda p: 0.01 * torch.dot(p.flatten(), p.flatten())),
    "mse": per_tensor(lambda p: f.mse_loss(p, torch.zeros_like(p))),
    "smooth l1": per_tensor(lambda p: 0.1 * f.smooth_l1_loss(p, torch.zeros_like(p), reduction="sum", beta=0.4)),
    "proximal": per_tensor(lambda p: 0.03 * torch.linalg.vector_norm(p - 0.1) ** 2),
    "one vector": lambda params: 0.01 * (torch.cat([p.flatten() for p in params.values()]) ** 2).sum(),
    "weights only": per_tensor(lambda p: 0.01 * p.square().sum(), "weight"),
    "a mean a tensor": per_tensor(lambda p: 0.1 * p.square().mean()),
    "log cosh": per_tensor(lambda p: 0.1 * p.cosh().log().sum()),
    "elastic, smooth": per_tensor(lambda p: 0.02 * ((p**2 + 0.01).sqrt() + p**2).sum()),
    "barrier": per_tensor(lambda p: -0.01 * ((6 - p).log() + (6 + p).log()).sum()),
    "cubic": per_tensor(lambda p: 0.02 * p.abs().pow(3).sum()),
    "huber by hand": per_tensor(lambda p: torch.where(p.abs() < 0.3, p**2, 0.6 * p.abs() - 0.09).sum()),
    "concave": per_tensor(lambda p: -0.01 * p.square().sum()),
    "of both signs": per_tensor(lambda p: 0.05 * p.sin().sum()),
    "in place": per_tensor(lambda p: 0.01 * p.clone().mul_(2).pow_(2).sum()),
    "strided": per_tensor(lambda p: 0.01 * (p[::2] ** 2).sum()),
    "an entry several times": lambda params: 0.01 * (params["0.weight"][[0, 0, 1]] ** 3).sum(),
    "weighed": per_tensor(lambda p: (torch.linspace(0.01, 0.1, p.numel(), dtype=p.dtype) * p.flatten() ** 2).sum()),
    "weighed by a dot": per_tensor(lambda p: torch.linspace(0.01, 0.1, p.numel(), dtype=p.dtype) @ p.flatten() ** 2),
}
COUPLED: dict[str, Penalty] = {
    "norm": per_tensor(lambda p: 0.1 * p.norm()),
    "a function of the sum": lambda params: (1 + sum(p.square().sum() for p in params.values())).log(),
    "a sum used twice": lambda params: (lambda s: 0.1 * s + 0.01 * s.sin())(
        sum(p.square().sum() for p in params.values())
    ),
    "orthogonality": lambda params: 0.05 * (params["0.weight"].T @ params["0.weight"]).square().sum(),
    "differences": lambda params: 0.05 * (params["0.weight"][1:] - params["0.weight"][:-1]).square().sum(),
    "of pairs": lambda params: 0.1 * (params["0.bias"] * params["2.weight"][0]).square().sum(),
}


def network(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(4)
    return drawn(mlp(3, 4, 5, 3)).to(dtype), normal(3, 3).to(dtype), labels(3)


def penalized(penalty: Penalty) -> Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]:
    return lambda output, target, params: f.cross_entropy(output, target) + penalty(params)


def truth(model: nn.Module, loss_fn: Callable[..., Tensor], x: Tensor, y: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Gradient and Hessian in float64 by `torch.autograd.functional`."""
    model, x = copy.deepcopy(model).double(), x.double()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])

    def loss(theta: Tensor) -> Tensor:
        parts = theta.split([shape.numel() for shape in shapes.values()])
        params = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return loss_fn(torch.func.functional_call(model, params, (x,)), y, params)

    gradient = torch.autograd.functional.jacobian(loss, flat)
    return gradient.numpy(), dense_hessian(loss, flat).numpy()


@cache
def without(dtype: torch.dtype) -> lh.Linearization:
    model, x, y = network(dtype)
    return lh.linearize(model, penalized(lambda params: torch.zeros(())), x, y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", SEPARABLE)
def test_what_is_separable_is_a_diagonal(name, dtype):
    """The chain is that of the loss without it, so that no parameter becomes a state; H is that of double backward."""
    model, x, y = network(dtype)
    loss_fn = penalized(SEPARABLE[name])
    lin = lh.linearize(model, loss_fn, x, y)
    plain = without(dtype).problem
    assert lin.problem.diagonal is not None and lin.problem.length == plain.length
    assert [type(block) for block in lin.problem.blocks] == [type(block) for block in plain.blocks]
    gradient, H = truth(model, loss_fn, x, y)
    rounding = 1e-14 if dtype == torch.float64 else 3e-6
    assert np.linalg.norm(lin.gradient - gradient) <= rounding * np.linalg.norm(gradient)
    found = lin.H @ np.eye(len(H), dtype=lin.problem.numpy_dtype)
    assert np.linalg.norm(found - H, 2) <= rounding * np.linalg.norm(H, 2)
    values = np.linalg.eigvalsh(H)
    all_four, place = (1e-1, 1e-3, 1e-6, -1e-2), list(SEPARABLE).index(name)
    for damping in all_four if dtype == torch.float64 else (all_four[place % 4], all_four[(place + 2) % 4]):
        inverse = lin.inverse(damping)
        try:
            inverse.solve(lin.gradient)
        except lh.errors.FactorizationError:  # the damping takes a penalty's curvature off
            assert np.abs(values + damping).min() < np.finfo(lin.problem.numpy_dtype).eps * np.abs(values).max()
            continue
        x_ = inverse @ lin.gradient
        assert backward_error(found.astype(float), damping, x_, lin.gradient) <= (
            1e-14 if dtype == torch.float64 else 1e-6
        )
        if np.abs(values + damping).min() > 10 * rounding * np.abs(values).max():
            signs = inverse.inertia()
            assert (signs.negative, signs.positive) == ((values < -damping).sum(), (values > -damping).sum())


@pytest.mark.parametrize("name", COUPLED)
def test_what_is_coupled_stays(name):
    """Beside a separable one, which goes: where it is added on the way to the loss."""
    model, x, y = network()
    loss_fn = penalized(lambda params: COUPLED[name](params) + SEPARABLE["square"](params))
    lin = lh.linearize(model, loss_fn, x, y)
    gradient, H = truth(model, loss_fn, x, y)
    assert bool((lin.problem.diagonal == lin.problem.diagonal[0]).all())
    assert np.linalg.norm(lin.gradient - gradient) <= 1e-14 * np.linalg.norm(gradient)
    assert np.linalg.norm(lin.H @ np.eye(len(H)) - H, 2) <= 1e-14 * np.linalg.norm(H, 2)
    for damping in (1e-3, 1e-6, -1e-2):
        assert backward_error(H, damping, lin.inverse(damping) @ gradient, gradient) <= 1e-14
    alone = lh.linearize(model, penalized(COUPLED[name]), x, y)
    assert alone.problem.diagonal is None


def decay(params: dict[str, Tensor]) -> Tensor:
    return 0.02 * sum(p.square().sum() for p in params.values())


@pytest.mark.parametrize(
    "loss_fn, expected",
    [
        (lambda o, t, p: (f.cross_entropy(o, t) + decay(p)) / 4, 0.01),
        (lambda o, t, p: f.cross_entropy(o, t) - decay(p), -0.04),
        (lambda o, t, p: torch.stack([f.cross_entropy(o, t), decay(p)]).sum(), 0.04),
        (lambda o, t, p: torch.add(f.cross_entropy(o, t), decay(p), alpha=2), 0.08),
        (lambda o, t, p: 3 + f.cross_entropy(o, t) + decay(p), 0.04),
        (lambda o, t, p: f.cross_entropy(o, t) + (o * p["4.bias"]).sum() + decay(p), 0.04),
        (lambda o, t, p: f.cross_entropy(o, t) + decay({k: v for k, v in p.items()}) + 0 * p["0.bias"].sum(), 0.04),
        (lambda o, t, p: f.cross_entropy(o, t) * (1 + decay(p)), None),
        (lambda o, t, p: torch.maximum(f.cross_entropy(o, t), 0.01 * decay(p)), None),
        (lambda o, t, p: f.cross_entropy(o, t) + sum((v.detach() * v).sum() for v in p.values()), None),
    ],
)
def test_how_it_enters_the_loss(loss_fn, expected):
    model, x, y = network()
    lin = lh.linearize(model, loss_fn, x, y)
    D = lin.problem.diagonal
    assert D is None if expected is None else torch.allclose(D, torch.full_like(D, expected), rtol=1e-15)
    gradient, H = truth(model, loss_fn, x, y)
    assert np.linalg.norm(lin.gradient - gradient) <= 1e-14 * np.linalg.norm(gradient)
    assert np.linalg.norm(lin.H @ np.eye(len(H)) - H, 2) <= 1e-14 * np.linalg.norm(H, 2)


def test_nothing_but_a_penalty():
    model, x, y = network()
    lin = lh.linearize(model, lambda o, t, p: decay(p), x, y)
    np.testing.assert_allclose(lin.H @ np.eye(lin.problem.size), 0.04 * np.eye(lin.problem.size), atol=1e-16)


def test_a_penalty_by_the_models_own_parameters():
    model, x, y = network()
    inside = lh.linearize(model, lambda o, t: f.cross_entropy(o, t) + decay(dict(model.named_parameters())), x, y)
    given = lh.linearize(model, penalized(decay), x, y)
    assert torch.equal(inside.problem.diagonal, given.problem.diagonal)
    np.testing.assert_array_equal(inside.H @ np.eye(inside.problem.size), given.H @ np.eye(given.problem.size))


def test_outputs_that_are_parameters_are_not_counted_twice():
    class Returns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp(3, 4, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.inner(x), self.inner[0].weight

    torch.manual_seed(0)
    model = drawn(Returns())
    x, y = normal(2, 3), labels(2)

    def loss_fn(output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        return f.cross_entropy(output[0], target) + 0.1 * output[1].square().sum()

    lin = lh.linearize(model, loss_fn, x, y)
    H = truth(model, lambda o, t, p: loss_fn(o, t), x, y)[1]
    assert np.linalg.norm(lin.H @ np.eye(len(H)) - H, 2) <= 1e-14 * np.linalg.norm(H, 2)


@pytest.mark.parametrize("name", ["square", "weights only", "log cosh"])
def test_gauss_newton_keeps_it(name):
    model, x, y = network()
    lin = lh.linearize(model, penalized(SEPARABLE[name]), x, y)
    plain = lh.linearize(model, f.cross_entropy, x, y)
    eye = np.eye(lin.problem.size)
    truth = plain.gauss_newton() @ eye + np.diag(lin.problem.diagonal.numpy())
    np.testing.assert_allclose(lin.gauss_newton() @ eye, truth, rtol=0, atol=1e-15)
    g = lin.gradient
    for method in ("woodbury", "riccati", "dense"):
        assert backward_error(truth, 1e-3, lin.gauss_newton().inverse(1e-3, method) @ g, g) <= 1e-14


def test_the_four_terms_and_the_augmented_system():
    model, x, y = network()
    lin = lh.linearize(model, penalized(SEPARABLE["weights only"]), x, y)
    J = lin.P @ lin.M_inv @ lin.D_x
    H = lin.DD_xx + lin.DD_zx @ J + J.H @ lin.DM_xz + J.H @ lin.DM_zz @ J
    eye = np.eye(lin.problem.size)
    np.testing.assert_allclose(H @ eye, lin.H @ eye, rtol=0, atol=1e-14)
    K = lin.augmented(0.1) @ np.eye(lin.augmented(0.1).shape[0])
    load = np.zeros(len(K))
    load[: lin.problem.size] = lin.gradient
    np.testing.assert_allclose(
        np.linalg.solve(K, load)[: lin.problem.size], lin.inverse(0.1) @ lin.gradient, atol=1e-11
    )


@pytest.mark.parametrize(
    "name, dampings", [("square", (1e-2,)), ("weights only", (1e-6, -5e-3)), ("log cosh", (1e-6,))]
)
def test_nothing_is_p_by_p(name, dampings):
    """With 65,536 weights in a layer a p × p pivot is 32 GiB; unpenalized biases, D an entry, and ε + D of both signs, included."""
    torch.manual_seed(0)
    model = mlp(10, 256, 256, 256, 4).double()
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.orthogonal_(p, 1.4)
    x, y = normal(3, 10), labels(3, classes=4)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lin = lh.linearize(model, penalized(SEPARABLE[name]), x, y)
    largest = 0
    for damping in dampings:
        plan = lin.plan(damping)
        largest = max(largest, plan.costs["riccati"].nbytes)
        inverse = lin.inverse(damping)
        solution = inverse.solve(lin.gradient)
        residual = lin.H @ solution.x + damping * solution.x - lin.gradient
        scale = lin.analysis.damped_norm(damping) * np.linalg.norm(solution.x) + np.linalg.norm(lin.gradient)
        assert solution.backward_error <= 1e-14 and np.linalg.norm(residual) <= 1e-14 * scale
        signs = inverse.inertia()
        assert signs.zero == 0 and 0 < signs.negative < signs.positive
    assert largest <= 2**28
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 <= 2**30


@pytest.mark.parametrize("sharpness", [2.0, 20.0])
def test_kinks_have_the_curvature_of_surrogates(sharpness):
    """They stay in the graph, beside what is smooth and goes; without surrogates they have a slope alone."""
    model, x, y = network()
    kinked = per_tensor(lambda p: 0.05 * p.abs().sum() + 0.01 * p.square().sum())
    smooth = per_tensor(lambda p: 0.05 * (p**2 + sharpness**-2).sqrt().sum() + 0.01 * p.square().sum())
    lin = lh.linearize(model, penalized(kinked), x, y, nonsmooth="smooth", sharpness=sharpness)
    gradient, H = truth(model, penalized(kinked), x, y)
    almost = truth(model, penalized(smooth), x, y)[1]
    eye = np.eye(len(H))
    assert np.linalg.norm(lin.gradient - gradient) <= 1e-14 * np.linalg.norm(gradient)
    assert np.linalg.norm(lin.H @ eye - almost, 2) <= 1e-14 * np.linalg.norm(almost, 2)
    assert torch.equal(lin.problem.diagonal, torch.full_like(lin.problem.diagonal, 0.02))
    assert backward_error(almost, 1e-3, lin.inverse(1e-3) @ gradient, gradient) <= 1e-14
    plain = lh.linearize(model, penalized(kinked), x, y)
    assert np.linalg.norm(plain.H @ eye - H, 2) <= 1e-14 * np.linalg.norm(H, 2)
    assert plain.problem.length < lin.problem.length
    with pytest.raises(UnsupportedModelError, match="without kinks.*abs"):
        lh.linearize(model, penalized(kinked), x, y, nonsmooth="error")


@pytest.mark.parametrize("differentiation", ["autograd", "finite"])
def test_what_autograd_cannot_differentiate_twice_stays(differentiation):
    """Hardsigmoid has no second derivative in torch, and so nothing to verify against; it has a rule."""
    model, x, y = network()
    loss_fn = penalized(per_tensor(lambda p: 0.05 * f.hardsigmoid(p).square().sum()))
    lin = lh.linearize(model, loss_fn, x, y, verify=False, differentiation=differentiation)
    by_hand = penalized(per_tensor(lambda p: 0.05 * (p / 6 + 0.5).square().sum()))  # no parameter is beyond 3
    assert all(float(p.detach().abs().max()) < 3 for p in model.parameters()) and lin.problem.diagonal is None
    H = truth(model, by_hand, x, y)[1]
    assert np.linalg.norm(lin.H @ np.eye(len(H)) - H, 2) <= 1e-7 * np.linalg.norm(H, 2)  # torch's 1/6 is in float32


def test_a_loss_that_differentiates_the_output_beside_a_penalty():
    model, x, y = network()
    x = x.requires_grad_()

    def loss_fn(output: Tensor, target: Tensor, params: dict[str, Tensor], given: Tensor = x) -> Tensor:
        (slope,) = torch.autograd.grad(output.sum(), given, create_graph=True)
        return f.cross_entropy(output, target) + 0.1 * slope.square().sum() + decay(params)

    lin = lh.linearize(model, loss_fn, x, y)
    D = lin.problem.diagonal
    assert torch.allclose(D, torch.full_like(D, 0.04), rtol=1e-15)
    H = lh.to_dense(lh.Hessian(model, loss_fn, (x, y)))
    assert np.linalg.norm(lin.H @ np.eye(len(H)) - H, 2) <= 1e-13 * np.linalg.norm(H, 2)
    with pytest.raises(UnsupportedModelError, match="before its output"):
        lin.gauss_newton()


def test_a_loss_module_in_single_precision():
    """It is differentiated by the output in float64, a copy of it, with the parameters as constants."""
    model, x, y = network(torch.float32)

    class Weighed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.by = nn.CrossEntropyLoss(weight=torch.tensor([0.2, 0.5, 0.3]))

        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            return self.by(output, target) + decay(dict(model.named_parameters()))

    lin = lh.linearize(model, Weighed(), x, y)
    by = nn.CrossEntropyLoss(weight=torch.tensor([0.2, 0.5, 0.3]).double())
    H = truth(model, lambda o, t, p: by(o, t) + decay(p), x, y)[1]
    assert bool((lin.problem.diagonal == lin.problem.diagonal[0]).all())
    assert np.linalg.norm(lin.H @ np.eye(len(H), dtype=np.float32) - H, 2) <= 1e-6 * np.linalg.norm(H, 2)


def test_an_infinite_derivative_is_told():
    model, x, y = network()
    with torch.no_grad():
        model[0].bias.zero_()
    with pytest.raises(ValueError, match="penalty in loss_fn"):
        lh.linearize(model, penalized(per_tensor(lambda p: p.abs().pow(1.5).sum())), x, y)


def test_no_penalty_is_no_work():
    trace = Trace([], 3, 3)
    assert without_penalty(trace, 1, np.zeros(0, dtype=np.int64), AUTOGRAD) is None
    assert opened(trace, [], np.zeros(0, dtype=np.int64)) == [] and trace.ids == 3
