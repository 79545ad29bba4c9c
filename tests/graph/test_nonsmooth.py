"""`lh.linearize(..., nonsmooth=, sharpness=)` against `lh.Hessian`, and closed forms."""

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as f

import linop_hess as lh
from linop_hess.errors import UnsupportedModelError
from tests.graph.oracle import made
from tests.graph.small_nets import CE, LINEAR, Net, dense, gap, prepared, residual
from tests.graph.zoo import CASES
from tests.graph.zoo_operations import OPERATIONS
from tests.helpers import HAS_AMINMAX
from tests.lq.problems import backward_error


def pooled(pool: Callable[[Tensor], Tensor], features: int) -> Net:
    return Net(lambda s, x: s.c(pool(s.a(x)).flatten(1)), a=nn.Conv2d(1, 2, 3), c=LINEAR(features, 3))


def maxima(s: Net, x: Tensor) -> Tensor:
    u = s.a(x).view(len(x), 3, 2)
    ends = u.max(1).values + s.b(x).view(len(x), 3, 2).min(-2)[0]
    both = torch.aminmax(u, dim=1).max if HAS_AMINMAX else u.amax(1)
    return s.c(ends) + u.amin(2) + torch.linalg.vector_norm(u, 1, 2) + both.sum(1, keepdim=True)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.last = LINEAR(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(f.relu(self.attention(x, x, x)[0]).mean(1))


IMAGES, VECTORS, TOKENS = (3, 1, 7, 7), (5, 4), (3, 5, 4)
KINKED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "chain": (
        lambda: nn.Sequential(LINEAR(4, 6), nn.ReLU(), LINEAR(6, 5), nn.ReLU(inplace=True), LINEAR(5, 3)),
        VECTORS,
    ),
    "chain of images": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.ReLU6(), nn.Flatten(), LINEAR(8, 3)),
        IMAGES,
    ),
    "chain of many": (
        lambda: nn.Sequential(
            LINEAR(4, 6),
            nn.PReLU(6),
            LINEAR(6, 5),
            nn.ELU(0.5),
            LINEAR(5, 4),
            nn.Hardswish(),
            LINEAR(4, 4),
            nn.Softshrink(),
            LINEAR(4, 3),
        ),
        VECTORS,
    ),
    "relu": (lambda: residual(f.relu), VECTORS),
    "relu in place": (lambda: residual(lambda u: f.relu_(u.mul(2))), VECTORS),
    "leaky relu": (lambda: residual(lambda u: f.leaky_relu(u, 0.2)), VECTORS),
    "clamp": (lambda: residual(lambda u: u.clamp(-0.5, 0.7) + u.clamp(min=0.1).sin()), VECTORS),
    "clamp by tensors": (lambda: residual(lambda u: torch.clamp(u, max=u.detach().mean(0))), VECTORS),
    "abs": (lambda: residual(lambda u: u.abs().sin()), VECTORS),
    "hardtanh": (lambda: residual(lambda u: f.hardtanh(u, -0.3, 0.4) + f.threshold(u, 0.2, 0.2)), VECTORS),
    "maximum": (
        lambda: Net(
            lambda s, x: s.c(torch.maximum(s.a(x), s.b(x)) + torch.minimum(s.a(x), s.b(x)).sin()),
            a=LINEAR(4, 4),
            b=LINEAR(4, 4),
            c=LINEAR(4, 3),
        ),
        VECTORS,
    ),
    "maxima": (lambda: Net(maxima, a=LINEAR(4, 6), b=LINEAR(4, 6), c=LINEAR(2, 3)), VECTORS),
    "cumulative maximum": (lambda: residual(lambda u: torch.cummax(u, 1).values), VECTORS),
    "pooling of ties": (lambda: pooled(lambda u: f.max_pool2d(f.relu(u), 2), 8), IMAGES),
    "pooling": (lambda: pooled(lambda u: f.max_pool2d(u.tanh(), 3, 2, 1), 18), IMAGES),
    "dilated pooling": (lambda: pooled(lambda u: f.max_pool2d(u, 2, 1, dilation=2), 18), IMAGES),
    "rounded pooling": (lambda: pooled(lambda u: f.max_pool2d(u, 3, 2, ceil_mode=True), 8), IMAGES),
    "adaptive pooling": (lambda: pooled(lambda u: f.adaptive_max_pool2d(u, (2, 3)), 12), IMAGES),
    "pooling of signals": (lambda: pooled(lambda u: f.max_pool1d(u.flatten(1, 2), 2), 20), IMAGES),
    "pooling of volumes": (lambda: pooled(lambda u: f.max_pool3d(u, (2, 2, 2)), 4), IMAGES),
    "attention": (Attention, TOKENS),
    "encoder": (
        lambda: Net(
            lambda s, x: s.c(s.layer(x).mean(1)),
            layer=nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True),
            c=LINEAR(4, 3),
        ),
        TOKENS,
    ),
}


@cache
def kinked(name: str) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    make, shape = KINKED[name]
    torch.manual_seed(0)
    return prepared(make(), *shape)


@pytest.mark.parametrize("sharpness", [None, 2.0])
@pytest.mark.parametrize("name", KINKED)
def test_surrogates_are_those_of_the_operator(name, sharpness):
    model, (x, y) = kinked(name)
    options = {"nonsmooth": "smooth", "sharpness": sharpness}
    H = dense(lh.Hessian(model, CE, (x, y), **options))
    lin = lh.linearize(model, CE, x, y, **options)
    found = dense(lin.H)
    assert gap(found, H) <= 1e-13
    plain = lh.linearize(model, CE, x, y)
    assert gap(dense(plain.H), H) > 1e-2  # the surrogates matter
    assert lin.loss == plain.loss
    np.testing.assert_allclose(lin.gradient, plain.gradient, rtol=0, atol=1e-14 * np.abs(plain.gradient).max())
    assert gap(dense(lin.gauss_newton()), dense(plain.gauss_newton())) <= 1e-14  # it has no kink of the model
    assert lin.verify() < 1e-12


@pytest.mark.parametrize("name", [name for name in (*CASES, *OPERATIONS) if isinstance(made(name, 3).model, nn.Module)])
def test_the_zoo_is_smoothed_alike(name):
    case = made(name, 3)
    options = {"params": case.params, "nonsmooth": "smooth"}
    try:
        H = dense(lh.Hessian(case.model, case.loss_fn, (case.inputs, case.targets), check_symmetric=False, **options))
    except UnsupportedModelError as error:
        with pytest.raises(UnsupportedModelError) as seen:
            lh.linearize(case.model, case.loss_fn, case.inputs, case.targets, **options)
        assert str(seen.value) == str(error)
    else:
        lin = lh.linearize(case.model, case.loss_fn, case.inputs, case.targets, verify=False, **options)
        assert np.linalg.norm(dense(lin.H) - H, 2) <= 1e-13 * np.linalg.norm(H, 2)


def test_surrogates_in_closed_form():
    model, (x, _) = prepared(nn.Sequential(LINEAR(4, 1, bias=False), nn.ReLU(inplace=True)), 6, 4)
    t, beta = torch.randn(6, 1, dtype=torch.float64), 4.0
    z = (x @ model[0].weight.T).detach()
    bump = beta * torch.sigmoid(beta * z) * torch.sigmoid(-beta * z)
    truth = x.T @ ((2 * (z > 0) + 2 * (z.clamp(min=0) - t) * bump) * x)
    lin = lh.linearize(model, nn.MSELoss(reduction="sum"), x, t, nonsmooth="smooth", sharpness=beta)
    assert gap(dense(lin.H), truth.numpy()) < 1e-14


@pytest.mark.parametrize("name", ["chain", "relu", "pooling of ties"])
@pytest.mark.parametrize("damping", [1e-1, 1e-6, -1e-2])
def test_solves(name, damping):
    model, (x, y) = kinked(name)
    H = dense(lh.Hessian(model, CE, (x, y), nonsmooth="smooth"))
    lin = lh.linearize(model, CE, x, y, nonsmooth="smooth")
    inverse = lin.inverse(damping)
    assert backward_error(H, damping, inverse @ lin.gradient, lin.gradient) <= 1e-14
    values = np.linalg.eigvalsh(H + damping * np.eye(len(H)))
    inertia = inverse.inertia()
    assert (inertia.positive, inertia.negative) == ((values > 0).sum(), (values < 0).sum())


def test_surrogates_in_float32():
    for name in ("chain", "pooling", "relu in place"):
        model, (x, y) = kinked(name)
        H = dense(lh.Hessian(model, CE, (x, y), nonsmooth="smooth"))
        single = lh.linearize(model.float(), CE, x.float(), y, nonsmooth="smooth")
        assert gap(dense(single.H), H) < 1e-5 and single.verify() < 1e-4
        model.double()


def test_surrogates_of_the_loss():
    model, (x, _) = prepared(residual(torch.tanh), 5, 4)
    t = torch.randn(5, 3, dtype=torch.float64)
    losses: list[Callable[..., Tensor]] = [
        nn.L1Loss(reduction="sum"),
        lambda z, t: (z - t).square().clamp(max=4).sum(),
        lambda z, t, p: (z - t).square().sum() + sum(w.abs().sum() for w in p.values()),
    ]
    for loss in losses:
        options = {"nonsmooth": "smooth", "sharpness": 3.0}
        lin = lh.linearize(model, loss, x, t, **options)
        H = dense(lh.Hessian(model, loss, (x, t), **options))
        assert gap(dense(lin.H), H) < 1e-13 and lin.verify() < 1e-13
        assert gap(dense(lh.linearize(model, loss, x, t).H), H) > 1e-3
    lin = lh.linearize(model, losses[0], x, t, nonsmooth="smooth")
    G = dense(lh.GaussNewton(model, losses[0], (x, t), nonsmooth="smooth"))
    assert np.abs(G).max() > 1 and gap(dense(lin.gauss_newton()), G) < 1e-13


def test_without_kinks_all_are_one():
    for model in (residual(torch.tanh), nn.Sequential(LINEAR(4, 5), nn.GELU(), LINEAR(5, 3))):
        model, (x, y) = prepared(model, 5, 4)
        plain = dense(lh.linearize(model, CE, x, y).H)
        for options in ({"nonsmooth": "smooth"}, {"nonsmooth": "error"}, {"differentiation": "finite"}):
            np.testing.assert_array_equal(dense(lh.linearize(model, CE, x, y, **options).H), plain)


@pytest.mark.parametrize(
    "function, named",
    [
        (lambda u: torch.where(u > 0, u, u.sin()), "where .driven by gt. in module 'inner'"),
        (lambda u: u.sort(1).values * torch.arange(6).double(), "sort in module 'inner'"),
        (lambda u: u * (u > 0), "mul .driven by gt. in module 'inner'"),
        (lambda u: u.topk(6).values.cumsum(1), "topk in module 'inner'"),
    ],
)
def test_kinks_without_surrogate_are_named(function, named):
    model, (x, y) = prepared(
        Net(lambda s, x: s.b(s.inner(x)), inner=Net(lambda s, x: function(s.a(x)), a=LINEAR(4, 6)), b=LINEAR(6, 3)),
        5,
        4,
    )
    for nonsmooth in ("smooth", "error"):
        with pytest.raises(UnsupportedModelError, match=named):
            lh.linearize(model, CE, x, y, nonsmooth=nonsmooth)
    lh.linearize(model, CE, x, y)


@pytest.mark.parametrize("name", KINKED)
def test_kinks_are_refused_where_they_are_an_error(name):
    model, (x, y) = kinked(name)
    with pytest.raises(UnsupportedModelError, match='nonsmooth="error"'):
        lh.linearize(model, CE, x, y, nonsmooth="error")


def test_kinks_that_do_not_reach_the_loss_do_not_count():
    model, (x, y) = prepared(residual(lambda u: u.sin() + 0 * f.relu(u).detach()), 5, 4)
    lh.linearize(model, CE, x, y, nonsmooth="error").verify()


def test_nothing_of_the_model_changes():
    model, (x, y) = kinked("pooling of ties")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = torch.get_rng_state()
    for options in ({"nonsmooth": "smooth"}, {"differentiation": "finite"}):
        lh.linearize(model, CE, x, y, **options)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and all(p.grad is None for p in model.parameters())


def test_bad_options():
    model, (x, y) = kinked("relu")
    for options, message in (
        ({"nonsmooth": "yes"}, "generalized"),
        ({"sharpness": 2.0}, "leave sharpness out"),
        ({"nonsmooth": "smooth", "sharpness": 0.0}, "positive"),
        ({"differentiation": "both"}, "autograd"),
        ({"differentiation": "finite", "nonsmooth": "smooth"}, "no surrogate"),
    ):
        with pytest.raises(ValueError, match=message):
            lh.linearize(model, CE, x, y, **options)
