"""nonsmooth="smooth" and "error": curvature of surrogates, loss and gradient the model's, no kink unseen."""

import math
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from linop_hess.autograd import GaussNewton, Hessian
from linop_hess.autograd.kinks.watch import KinkWatch
from linop_hess.errors import UnsupportedModelError
from linop_hess.operators import to_dense
from tests.autograd.settings import CE_MEAN, CE_SUM, CURVATURES, gauss_newton_truth
from tests.helpers import make_batch, make_mlp, oracle_hessian

BETA = 3.0
X, Y = make_batch(4, 3, 5)


def custom(first, second, forward):
    """A function whose backward pass has the slope `first`, and whose second derivative is `second`."""

    class Slope(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return first(x)

        @staticmethod
        def backward(ctx, g):
            return g * second(ctx.saved_tensors[0])

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return forward(x)

        @staticmethod
        def backward(ctx, g):
            return g * Slope.apply(ctx.saved_tensors[0])

    return Function.apply


def bump(x):
    return BETA * torch.sigmoid(BETA * x) * torch.sigmoid(-BETA * x)


step = lambda x: (x > 0).to(x.dtype)  # noqa: E731
RELU = custom(step, bump, lambda x: x.clamp(min=0))
ABS = custom(torch.sign, lambda x: BETA**-2 * (x * x + BETA**-2) ** -1.5, torch.abs)
CLAMP = custom(
    lambda x: ((x > -0.5) & (x < 0.8)).to(x.dtype),
    lambda x: bump(x + 0.5) - bump(x - 0.8),
    lambda x: x.clamp(-0.5, 0.8),
)
LEAKY = custom(lambda x: 0.1 + 0.9 * step(x), lambda x: 0.9 * bump(x), lambda x: torch.where(x > 0, x, 0.1 * x))


class Residual(nn.Module):
    """Two layers, a skip and a function on both."""

    def __init__(self, function):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.function = function

    def forward(self, x):
        hidden = self.function(self.first(x))
        return self.last(hidden + self.function(self.second(hidden)))


def residual(function, seed=0):
    torch.manual_seed(seed)
    model = Residual(function)
    for layer in (model.first, model.second, model.last):
        nn.init.orthogonal_(layer.weight, gain=1.5)
    return model.double()


def in_place_on_a_view(x):
    y = x.clone()
    y[:, :2].relu_()
    return torch.cat([y[:, :2], F.relu(y[:, 2:])], 1)


def of_a_transposed_base(x):
    y = (2 * x).t().contiguous().t() / 2
    y[1:, ::2].clamp_min_(0)
    even = torch.cat([y[:1, ::2].relu(), y[1:, ::2]])
    return torch.stack([even, y[:, 1::2].relu()], 2).flatten(1)


def overwritten_later(x):
    y = x * 1.0
    z = torch.relu(y)
    y.mul_(7.0)
    return z + 0 * y


@cache
def compiled():
    return torch.compile(torch.relu, backend="eager")  # not when tests are collected: it imports the compiler


def compiled_relu(x):
    return compiled()(x)


SPELLINGS = {
    "relu": (
        RELU,
        [
            F.relu,
            torch.relu,
            lambda x: x.relu(),
            nn.ReLU(),
            nn.ReLU(inplace=True),
            lambda x: x.relu_(),
            torch.relu_,
            lambda x: x.clamp(min=0),
            lambda x: x.clamp_min_(0),
            lambda x: torch.clip(x, 0),
            lambda x: torch.maximum(x, torch.zeros_like(x)),
            lambda x: torch.max(torch.zeros_like(x), x),
            nn.Threshold(0.0, 0.0, inplace=True),
            in_place_on_a_view,
            of_a_transposed_base,
            overwritten_later,
            lambda x: checkpoint(F.relu, x, use_reentrant=False),
            lambda x: -torch.minimum(-x, torch.zeros_like(x)),
            torch.vmap(torch.relu),
            compiled_relu,
        ],
    ),
    "abs": (ABS, [torch.abs, lambda x: x.abs(), abs, lambda x: x.abs_(), torch.absolute]),
    "clamp": (
        CLAMP,
        [
            lambda x: x.clamp(-0.5, 0.8),
            lambda x: torch.clip(x, -0.5, 0.8),
            nn.Hardtanh(-0.5, 0.8),
            nn.Hardtanh(-0.5, 0.8, inplace=True),
            lambda x: F.hardtanh_(x, -0.5, 0.8),
            lambda x: x.clamp_(-0.5, 0.8),
            lambda x: x.clamp(torch.full_like(x, -0.5), torch.full_like(x, 0.8)),
        ],
    ),
    "leaky relu": (
        LEAKY,
        [
            lambda x: F.leaky_relu(x, 0.1),
            nn.LeakyReLU(0.1, inplace=True),
            lambda x: F.leaky_relu_(x, 0.1),
            lambda x: F.prelu(x, torch.tensor([0.1], dtype=x.dtype)),
            lambda x: F.rrelu(x, 0.05, 0.15),
        ],
    ),
}
CASES = [(name, k) for name, (_, functions) in SPELLINGS.items() for k in range(len(functions))]


@pytest.mark.parametrize(("name", "k"), CASES)
def test_every_spelling_agrees_with_a_function_of_that_definition(name, k):
    reference, functions = SPELLINGS[name]
    truth = oracle_hessian(residual(reference), CE_MEAN, X, Y)
    plain = Hessian(residual(functions[k]), CE_MEAN, (X, Y))
    H = Hessian(residual(functions[k]), CE_MEAN, (X, Y), nonsmooth="smooth", sharpness=BETA)
    dense = to_dense(H)
    assert np.abs(dense - truth).max() < 1e-14 * np.abs(truth).max()
    assert np.abs(dense - to_dense(plain)).max() > 0.05 * np.abs(truth).max()  # the kinks count
    assert H.loss == plain.loss
    np.testing.assert_array_equal(H.gradient, plain.gradient)


def test_the_gradient_recorded_with_corrections_is_bitwise_the_gradient():
    model = residual(F.relu)
    parameters = list(model.parameters())
    watch = KinkWatch(parameters, model)
    with watch.watching():
        loss = CE_MEAN(model(X), Y)
    points, slopes = watch.corrections(loss, BETA)
    assert len(points) == 2 and all(not slope.any() and slope.requires_grad for slope in slopes)
    with_them = torch.autograd.grad([loss, *points], parameters, [None, *slopes], retain_graph=True)
    without = torch.autograd.grad(CE_MEAN(model(X), Y), parameters)
    assert all(torch.equal(a, b) for a, b in zip(with_them, without, strict=True))


def test_whether_surrogates_have_something_to_smooth():
    for function, has in ((F.relu, True), (torch.tanh, False), (lambda u: u.sin() + 0 * F.relu(u).detach(), False)):
        model = residual(function)
        watch = KinkWatch(list(model.parameters()), model)
        with watch.watching():
            loss = CE_MEAN(model(X), Y)
        assert watch.has_surrogates(loss) == has


def assembled(model, split, surrogate, loss_fn):
    """H + Jᵀ(Σ b_i ∇²s_i)J, each factor dense: J the Jacobian of what goes in at the kink, b the adjoint behind it."""
    first, kink, rest = split
    params = [p for p in model.parameters() if p.requires_grad]
    z = first(X)
    rows = [torch.autograd.grad(e, params, retain_graph=True, allow_unused=True) for e in z.reshape(-1)]
    J = torch.stack(
        [
            torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(r, params, strict=True)])
            for r in rows
        ]
    )
    out = kink(z.detach()).requires_grad_()
    (b,) = torch.autograd.grad(loss_fn(rest(out), Y), out)
    Q = torch.autograd.functional.hessian(lambda u: (b * surrogate(u)).sum(), z.detach())
    Q = Q.reshape(z.numel(), z.numel())
    return oracle_hessian(model, loss_fn, X, Y) + (J.T @ Q @ J).detach().numpy()


def lse(x, dim):
    return torch.log(torch.exp(BETA * x).sum(dim)) / BETA


REDUCTIONS = {
    "max": (6, lambda z: z.view(-1, 3, 2).max(2)[0], lambda z: lse(z.view(-1, 3, 2), 2)),
    "amax": (6, lambda z: z.view(-1, 3, 2).amax(2), lambda z: lse(z.view(-1, 3, 2), 2)),
    "amin": (6, lambda z: torch.amin(z.view(-1, 3, 2), -1), lambda z: -lse(-z.view(-1, 3, 2), 2)),
    "max_pool1d": (6, lambda z: F.max_pool1d(z.view(-1, 1, 6), 2).flatten(1), lambda z: lse(z.view(-1, 3, 2), 2)),
    "max_pool2d": (
        12,
        lambda z: nn.MaxPool2d(2)(z.view(-1, 1, 2, 6)).flatten(1),
        lambda z: lse(z.view(-1, 2, 3, 2).transpose(1, 2).flatten(2), 2),
    ),
    "max_pool3d": (
        12,
        lambda z: F.max_pool3d(z.view(-1, 1, 2, 1, 6), (2, 1, 2)).flatten(1),
        lambda z: lse(z.view(-1, 2, 3, 2).transpose(1, 2).flatten(2), 2),
    ),
    "adaptive": (
        6,
        lambda z: F.adaptive_max_pool1d(z.view(-1, 1, 6), 3).flatten(1),
        lambda z: lse(z.view(-1, 3, 2), 2),
    ),
    "norm": (
        6,
        lambda z: z.view(-1, 3, 2).norm(1, 2),
        lambda z: torch.sqrt(z.view(-1, 3, 2) ** 2 + BETA**-2).sum(2),
    ),
}


class Split(nn.Module):
    def __init__(self, width, kink):
        super().__init__()
        self.before, self.after, self.kink = nn.Linear(4, width), nn.Linear(3, 3), kink

    def first(self, x):
        return 1.5 * torch.sin(2 * self.before(x))

    def rest(self, y):
        return self.after(torch.tanh(y)) * 3

    def forward(self, x):
        return self.rest(self.kink(self.first(x)))


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions_agree_with_dense_factors(name):
    width, kink, smooth = REDUCTIONS[name]
    torch.manual_seed(1)
    model = Split(width, kink).double()
    truth = assembled(model, (model.first, kink, model.rest), smooth, CE_MEAN)
    H = Hessian(model, CE_MEAN, (X, Y), nonsmooth="smooth", sharpness=BETA)
    assert np.abs(to_dense(H) - truth).max() < 1e-14 * np.abs(truth).max()


CURVED = {
    "prelu": (
        nn.PReLU(init=0.2).double(),
        lambda u, w: w * u + (1 - w) * torch.log1p(torch.exp(BETA * u)) / BETA,
    ),
    "hardswish": (
        nn.Hardswish(),
        lambda u, w: u * (torch.log1p(torch.exp(BETA * (u + 3))) - torch.log1p(torch.exp(BETA * (u - 3)))) / (6 * BETA),
    ),
    "selu": (
        nn.SELU(inplace=True),
        lambda u, w: (
            1.0507009873554805 * torch.where(u > 0, u, 1.6732632423543772 * torch.expm1(u))
            + 1.0507009873554805 * (1 - 1.6732632423543772) * (torch.log1p(torch.exp(BETA * u)) / BETA - u.clamp(min=0))
        ),
    ),
}


@pytest.mark.parametrize("name", CURVED)
def test_a_curvature_of_its_own_is_replaced_and_not_added_to(name):
    kink, smooth = CURVED[name]
    torch.manual_seed(2)
    a, b = (torch.randn(5, generator=torch.Generator().manual_seed(k), dtype=torch.float64) for k in (0, 1))

    class Single(nn.Module):
        def __init__(self):
            super().__init__()
            self.u, self.kink = nn.Parameter(3 * a), kink

        def forward(self, x):
            return self.kink(self.u * 1.0)

    model = Single()
    H = to_dense(Hessian(model, lambda z, t: (t * z).sum(), (a, b), nonsmooth="smooth", sharpness=BETA))
    named = dict(model.named_parameters())
    start = torch.cat([p.detach().reshape(-1) for p in named.values()])
    truth = torch.autograd.functional.hessian(lambda v: (b * smooth(v[:5], v[5:])).sum(), start).numpy()
    assert H.shape == truth.shape and np.abs(H - truth).max() < 1e-14 * max(1, np.abs(truth).max())


class Transformer(nn.Module):
    def __init__(self, activation):
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0, activation=activation)
        self.layers, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(4, 3)

    def forward(self, x):
        tokens = x.unsqueeze(1) * torch.linspace(1, 2, 3, dtype=x.dtype)[None, :, None]
        return self.head(self.layers(tokens).mean(1))


@pytest.mark.parametrize("activation", ["relu", F.relu, nn.ReLU(inplace=True), torch.relu_])
@pytest.mark.parametrize("training", [False, True])
def test_inside_attention_layers(activation, training):
    torch.manual_seed(0)
    ours = Transformer(activation).double().train(training)
    theirs = Transformer(RELU).double().train(training)
    theirs.load_state_dict(ours.state_dict())
    with sdpa_kernel(SDPBackend.MATH):
        truth = oracle_hessian(theirs, CE_MEAN, X, Y)
    H = Hessian(ours, CE_MEAN, (X, Y), nonsmooth="smooth", sharpness=BETA)
    assert np.abs(to_dense(H) - truth).max() < 1e-13 * np.abs(truth).max()
    with pytest.raises(UnsupportedModelError, match=r"relu in module 'layers\.layers\.0"):
        Hessian(ours, CE_MEAN, (X, Y), nonsmooth="error")


def test_recurrent_layers_with_relu():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = nn.RNN(2, 3, nonlinearity="relu", batch_first=True), nn.Linear(3, 3)

        def forward(self, x):
            return self.head(self.cell(x.view(-1, 2, 2))[0][:, -1])

        def plain(self, x):
            h = torch.zeros(len(x), 3, dtype=x.dtype)
            for token in x.view(-1, 2, 2).unbind(1):
                c = self.cell
                h = RELU(token @ c.weight_ih_l0.T + c.bias_ih_l0 + h @ c.weight_hh_l0.T + c.bias_hh_l0)
            return self.head(h)

    class Plain(Net):
        forward = Net.plain

    torch.manual_seed(0)
    ours, theirs = Net().double(), Plain().double()
    theirs.load_state_dict(ours.state_dict())
    H = Hessian(ours, CE_MEAN, (X, Y), nonsmooth="smooth", sharpness=BETA)
    truth = oracle_hessian(theirs, CE_MEAN, X, Y)
    assert np.abs(to_dense(H) - truth).max() < 1e-14 * np.abs(truth).max()


def test_single_precision():
    truth = oracle_hessian(residual(RELU), CE_MEAN, X, Y)
    H = Hessian(residual(F.relu).float(), CE_MEAN, (X.float(), Y), nonsmooth="smooth", sharpness=BETA)
    assert H.dtype == np.float32 and np.abs(to_dense(H) - truth).max() < 2e-6 * np.abs(truth).max()


def test_batches_and_weights():
    x, y = make_batch(4, 3, 7)
    whole = to_dense(Hessian(residual(F.relu), CE_MEAN, (x, y), nonsmooth="smooth"))
    data = DataLoader(TensorDataset(x, y), batch_size=3)
    H = Hessian(residual(F.relu), CE_MEAN, data, nonsmooth="smooth")
    assert H.retained_graphs == 3
    assert np.abs(to_dense(H) - whole).max() < 1e-14 * np.abs(whole).max()
    H.release()
    assert np.abs(to_dense(H) - whole).max() < 1e-14 * np.abs(whole).max()


def test_it_tends_to_the_generalized_one_away_from_kinks_and_has_a_default():
    plain = to_dense(Hessian(residual(F.relu), CE_MEAN, (X, Y)))
    sharp = to_dense(Hessian(residual(F.relu), CE_MEAN, (X, Y), nonsmooth="smooth", sharpness=1e6))
    assert np.abs(sharp - plain).max() < 1e-14
    default, five = (Hessian(residual(F.relu), CE_MEAN, (X, Y), nonsmooth="smooth", sharpness=b) for b in (None, 5))
    np.testing.assert_array_equal(to_dense(default), to_dense(five))
    assert default.sharpness == 5.0


def test_without_kinks_all_are_one():
    model = make_mlp([4, 5, 3])
    plain = to_dense(Hessian(model, CE_MEAN, (X, Y)))
    for kind in CURVATURES:
        for nonsmooth in ("smooth", "error"):
            H = kind(model, CE_MEAN, (X, Y), nonsmooth=nonsmooth)
            if kind is Hessian:
                np.testing.assert_array_equal(to_dense(H), plain)


def test_gauss_newton_has_the_surrogates_of_its_loss():
    model = residual(F.relu)  # whose own kinks do not count
    targets = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    G = GaussNewton(model, nn.L1Loss(reduction="sum"), (X, targets), nonsmooth="smooth", sharpness=BETA)
    truth = gauss_newton_truth(model, lambda z, t: torch.sqrt((z - targets) ** 2 + BETA**-2).sum(), X, targets)
    assert np.abs(truth).max() > 1 and np.abs(to_dense(G) - truth).max() < 1e-14 * np.abs(truth).max()
    assert not to_dense(GaussNewton(model, nn.L1Loss(), (X, targets))).any()
    with pytest.raises(UnsupportedModelError, match="abs"):
        GaussNewton(model, nn.L1Loss(), (X, targets), nonsmooth="error")
    GaussNewton(model, CE_SUM, (X, Y), nonsmooth="error")


class Once(torch.autograd.Function):
    """A ReLU with a backward pass of its own."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(min=0) + 0

    @staticmethod
    def backward(ctx, g):
        return g * (ctx.saved_tensors[0] > 0)


HIDDEN = {
    "where": (lambda u: torch.where(u > 0, u, 0.1 * u), "where .driven by gt"),
    "where, detached": (lambda u: torch.where(u.detach() > 0, u, 0.1 * u), "where .driven by gt"),
    "where, no_grad": (lambda u: torch.where(nothing(u) > 0, u, 0.1 * u), "where .driven by gt"),
    "data": (lambda u: u * (u.data > 0), "mul .driven by gt"),
    "mask": (lambda u: u * (u > -0.1), "mul .driven by gt"),
    "float mask": (lambda u: u * (u.detach() > -0.1).double().sqrt(), "mul .driven by gt"),
    "sort": (lambda u: u.sort(1)[0], "sort"),
    "argsort": (lambda u: u.gather(1, u.argsort(1)), "gather .driven by"),
    "topk": (lambda u: u + u.topk(2, 1)[0].sum(), "topk"),
    "gather": (lambda u: u + u.gather(1, u.argmax(1, keepdim=True)), "gather .driven by argmax"),
    "index": (lambda u: u.index_select(1, u.sum(0).argmax()[None]) * u, "driven by argmax"),
    "boolean index": (lambda u: u + u[u > 0].sum(), "index .driven by gt"),
    "masked fill": (lambda u: u.masked_fill(u < 0, 0.0), "masked_fill .driven by lt"),
    "scatter": (lambda u: u.scatter(1, u.argmin(1, keepdim=True), 0.0), "scatter .driven by argmin"),
    "median": (lambda u: u - u.median(1, keepdim=True)[0], "median"),
    "round": (lambda u: u + (u.round() - u).detach(), "driven by round"),
    "sign": (lambda u: u * torch.sign(u), "sign"),
    "integer": (lambda u: u * u.detach().long(), "mul .driven by _to_copy"),
    "item": (lambda u: u * u.sum().item(), "read into Python .item"),
    "float": (lambda u: u * float(u.detach().sum()), "read into Python .item"),
    "branch": (lambda u: u * 2 if u.sum() > 0 else u * 3, "read into Python .item"),
    "numpy": (lambda u: u * float(u.detach().numpy().sum()), "read into Python .numpy"),
    "array": (lambda u: u * float(np.asarray(u.detach()).sum()), "read into Python"),
    "list": (lambda u: u * u.detach().tolist()[0][0], "read into Python .tolist"),
    "shape": (lambda u: u * (u > 0).nonzero().shape[0], "a shape that depends on values .nonzero"),
    "masked select": (lambda u: u * X.masked_select(u[:, :4] > 0).shape[0], "a shape that depends on values"),
    "custom": (Once.apply, "clamp .within an operation"),
    "reentrant": (lambda u: checkpoint(F.relu, u, use_reentrant=True), "relu .within an operation"),
    "backward": (lambda u: u * slope_of_relu(u), "threshold_backward|driven by"),
    "into a buffer": (lambda u: torch.zeros_like(u).copy_((u > 0).double()) * u, "mul .driven by gt"),
}


def nothing(u):
    with torch.no_grad():
        return u * 1


def slope_of_relu(u):
    return torch.autograd.grad(torch.relu(u).square().sum(), u, create_graph=True)[0]


@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.filterwarnings("ignore")
def test_hidden_kinks_are_found_and_named(name):
    function, named = HIDDEN[name]
    if name == "reentrant":
        watch = KinkWatch(list((model := residual(function)).parameters()), model)
        with watch.watching():
            loss = CE_MEAN(model(X), Y)
        watch._settle()
        assert any("relu (within an operation" in kink.title for kink in watch.kinks), loss
        return
    with pytest.raises(UnsupportedModelError, match=named):
        Hessian(residual(function), CE_MEAN, (X, Y), nonsmooth="error")
    if "read" not in named and "shape" not in named:
        with pytest.raises(UnsupportedModelError, match="surrogate"):
            Hessian(residual(function), CE_MEAN, (X, Y), nonsmooth="smooth")


def relu_then_sine(u: Tensor) -> Tensor:
    return torch.relu(u).sin()


@pytest.mark.filterwarnings("ignore")
def test_inside_scripts_kinks_are_seen():
    scripted = torch.jit.script(relu_then_sine)
    for _ in range(3):  # then it has a backward pass of its own
        scripted(X.clone().requires_grad_()).sum().backward()
    for nonsmooth in ("smooth", "error"):
        with pytest.raises(
            UnsupportedModelError, match="relu .within an operation that has a backward pass of its own"
        ):
            Hessian(residual(lambda u: scripted(u)), CE_MEAN, (X, Y), nonsmooth=nonsmooth)


@pytest.mark.filterwarnings("ignore:Converting")
def test_what_is_read_into_python_is_a_warning_where_surrogates_are_asked_for():
    with pytest.warns(UserWarning, match="read into Python"):
        Hessian(residual(lambda u: u * u.sum().item()), CE_MEAN, (X, Y), nonsmooth="smooth")


class Physics(nn.Module):
    """A network that is differentiated by its input, and features of the input with kinks."""

    def __init__(self):
        super().__init__()
        self.net = make_mlp([4, 5, 3])

    def forward(self, x):
        x = x.clone().requires_grad_()
        features = (2 * x).abs().relu() + torch.where(x > 0, x, 2 * x)
        (slope,) = torch.autograd.grad(self.net(features).square().sum(), x, create_graph=True)
        return slope[:, :3] + self.net(x)


NO_KINKS = {
    "softmax": lambda u: (u - u.max(1, keepdim=True)[0].detach()).exp(),
    "stopped": lambda u: u * torch.sigmoid(u.detach()),
    "constant mask": lambda u: u * (torch.arange(u.shape[1]) > 2),
    "not used": lambda u: (torch.relu(u), u.sort(1), u * 2)[2],
    "elu": nn.ELU(),
    "celu": nn.CELU(1.3),
    "gelu": nn.GELU(),
    "norm": lambda u: u / u.norm(dim=1, keepdim=True),
    "ones": lambda u: torch.where(torch.ones_like(u) > 0, u, 0.0) * (u.new_zeros(6) >= 0),
    "selected": lambda u: u + u.masked_select(torch.arange(6) > 2).sum(),
    "complex": lambda u: torch.fft.fft(u).abs(),
    "gather": lambda u: u + u.gather(1, torch.zeros(len(u), 1, dtype=torch.long)),
}


@pytest.mark.parametrize("name", NO_KINKS)
def test_what_is_no_kink_is_not_taken_for_one(name):
    Hessian(residual(NO_KINKS[name]), CE_MEAN, (X, Y), nonsmooth="error")


def test_kinks_that_do_not_depend_on_parameters_are_none():
    model = Physics()
    truth = oracle_hessian(model, CE_MEAN, X, Y)
    for nonsmooth in ("smooth", "error"):
        H = to_dense(Hessian(model, CE_MEAN, (X, Y), nonsmooth=nonsmooth))
        assert np.abs(H - truth).max() < 1e-13 * np.abs(truth).max()


def test_bad_arguments():
    model = make_mlp([4, 5, 3])
    for kind in CURVATURES:
        with pytest.raises(ValueError, match='"generalized", "smooth" or "error", got .sharp'):
            kind(model, CE_MEAN, (X, Y), nonsmooth="sharp")
        for bad in (0.0, -1.0, math.inf, math.nan):
            with pytest.raises(ValueError, match="sharpness"):
                kind(model, CE_MEAN, (X, Y), nonsmooth="smooth", sharpness=bad)
        with pytest.raises(TypeError, match="sharpness"):
            kind(model, CE_MEAN, (X, Y), nonsmooth="smooth", sharpness="5")
        with pytest.raises(ValueError, match="leave sharpness out"):
            kind(model, CE_MEAN, (X, Y), sharpness=5.0)
