"""Products by differences of the gradient: their accuracy, and what they are for."""

import copy
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset

from linop_hess.autograd import GaussNewton, Hessian
from linop_hess.autograd.finite import Differenced, finite_difference_hessian, step_size
from linop_hess.errors import UnsupportedModelError
from linop_hess.operators import to_dense
from tests.autograd.settings import CE_MEAN, Attention, Recurrent, Tied
from tests.helpers import make_batch, make_mlp, oracle_hessian

X, Y = make_batch(4, 3, 5)

# Rounding of the gradient over the step, eps/h with h of 3e-4, is 1e-12 of ‖g‖; truncation, h⁴, is less for these models.
# In float32 eps/h is 1e-5. Ten times that for what conditioning makes of it; single entries of H are smaller than products.
BOUND = {torch.float64: 2e-11, torch.float32: 5e-4}

MODELS = {
    "perceptron": lambda: make_mlp([4, 5, 5, 3]),
    "layer norm": lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)),
    "group norm": lambda: nn.Sequential(nn.Linear(4, 6), nn.GroupNorm(2, 6), nn.SiLU(), nn.Linear(6, 3)),
    "recurrent": Recurrent,
    "tied": Tied,
    "weight norm": lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)),
        nn.Tanh(),
        nn.utils.parametrizations.spectral_norm(nn.Linear(5, 3)),
    ).eval(),
}


def prepared(name):
    torch.manual_seed(0)
    model = MODELS[name]().double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def gap(ours, truth, columns=3):
    V = np.random.default_rng(0).standard_normal((len(truth), columns)).astype(ours.dtype)
    images = truth @ V.astype(np.float64)
    return (np.linalg.norm(ours @ V - images, axis=0) / np.linalg.norm(images, axis=0)).max()


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("name", MODELS)
def test_products_agree_with_double_backward(name, dtype):
    model = prepared(name)
    if name == "weight norm":  # of which torch's second derivatives are wrong
        truth = central(model)
    else:
        truth = oracle_hessian(model, CE_MEAN, X, Y)
    assert np.abs(truth).max() > 0.05 and np.linalg.eigvalsh(truth)[0] < -1e-3
    H = Hessian(copy.deepcopy(model).to(dtype), CE_MEAN, (X.to(dtype), Y), differentiation="finite")
    assert gap(H, truth) < (1e-8 if name == "weight norm" and dtype == torch.float64 else BOUND[dtype])


def central(model, step=1e-5):
    names = [n for n, _ in model.named_parameters()]
    rows = []
    for name in names:
        for k in range(dict(model.named_parameters())[name].numel()):
            sides = []
            for sign in (1, -1):
                twin = copy.deepcopy(model)
                with torch.no_grad():
                    dict(twin.named_parameters())[name].view(-1)[k] += sign * step
                grads = torch.autograd.grad(CE_MEAN(twin(X), Y), list(twin.parameters()))
                sides.append(torch.cat([g.reshape(-1) for g in grads]))
            rows.append((sides[0] - sides[1]) / (2 * step))
    return torch.stack(rows).numpy()


def test_entries_and_blocks():
    model = prepared("perceptron")
    truth = oracle_hessian(model, CE_MEAN, X, Y)
    H = Hessian(model, CE_MEAN, (X, Y), differentiation="finite")
    assert np.abs(to_dense(H) - truth).max() < 1e-9 * np.abs(truth).max()
    V = np.random.default_rng(1).standard_normal((len(truth), 3))
    np.testing.assert_array_equal(H @ V, np.stack([H @ v for v in V.T], 1))
    for factor in (1e-150, 1e150):  # lengths neither vanish nor overflow
        assert gap(H, truth) < 2e-11 and np.allclose(
            H @ (factor * V[:, 0]) / factor, H @ V[:, 0], rtol=1e-10, atol=1e-12
        )
    assert not (H @ np.zeros(len(truth))).any()


def test_the_model_is_not_moved_and_nothing_is_kept():
    model = prepared("perceptron")
    H = Hessian(model, CE_MEAN, (X, Y), differentiation="finite")
    before = [p.clone() for p in (*model.parameters(), *H.parameters)]
    first = H @ np.ones(H.shape[0])
    assert all(torch.equal(a, b) for a, b in zip(before, (*model.parameters(), *H.parameters), strict=True))
    np.testing.assert_array_equal(H @ np.ones(H.shape[0]), first)
    assert H.retained_graphs == 0 and all(p.grad is None for p in model.parameters())
    results = [None] * 4

    def multiply(k):
        results[k] = H @ np.ones(H.shape[0])

    threads = [threading.Thread(target=multiply, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(result, first) for result in results)


def test_batches_weights_and_chosen_parameters():
    x, y = make_batch(4, 3, 7)
    model = prepared("perceptron")
    data = DataLoader(TensorDataset(x, y), batch_size=3)
    truth = oracle_hessian(model, CE_MEAN, x, y)
    assert gap(Hessian(model, CE_MEAN, data, differentiation="finite"), truth) < BOUND[torch.float64]
    some = ["2.weight", "4.bias"]
    part = oracle_hessian(model, CE_MEAN, x, y, params=some)
    assert gap(Hessian(model, CE_MEAN, data, params=some, differentiation="finite"), part) < BOUND[torch.float64]


def test_flash_attention():
    torch.manual_seed(0)
    model = Attention().double()
    model.layer.activation = F.gelu
    with sdpa_kernel(SDPBackend.MATH):
        truth = oracle_hessian(model, CE_MEAN, X, Y)
    with pytest.raises(RuntimeError, match="flash"):  # that it is in use
        oracle_hessian(model, CE_MEAN, X, Y)
    H = Hessian(model, CE_MEAN, (X, Y), differentiation="finite")
    assert gap(H, truth) < BOUND[torch.float64]
    assert np.abs(to_dense(H) - truth).max() < 1e-10 * np.abs(truth).max()


class Distances(nn.Module):
    """Distances to learned centres by `torch.cdist`, which has no second derivative."""

    def __init__(self, fused=True):
        super().__init__()
        self.centres, self.head, self.fused = nn.Parameter(torch.randn(6, 4)), nn.Linear(6, 3), fused

    def forward(self, x):
        if self.fused:
            return self.head(torch.cdist(x, self.centres))
        return self.head((x[:, None] - self.centres[None]).square().sum(2).sqrt())


class Cubed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


def test_operations_without_second_derivative_say_the_remedy_which_works():
    torch.manual_seed(0)
    fused, plain = Distances().double(), Distances(fused=False).double()
    plain.load_state_dict(fused.state_dict())
    with pytest.raises(UnsupportedModelError, match='differentiation="finite"'):
        Hessian(fused, CE_MEAN, (X, Y))
    truth = oracle_hessian(plain, CE_MEAN, X, Y)
    assert gap(Hessian(fused, CE_MEAN, (X, Y), differentiation="finite"), truth) < BOUND[torch.float64]
    model = prepared("perceptron")
    with pytest.raises(UnsupportedModelError, match='Cubed.*differentiation="finite"'):
        Hessian(model, lambda z, t: Cubed.apply(z).sum(), (X, Y))
    truth = oracle_hessian(model, lambda z, t: (z**3).sum(), X, Y)
    H = Hessian(model, lambda z, t: Cubed.apply(z).sum(), (X, Y), differentiation="finite")
    assert gap(H, truth) < BOUND[torch.float64]


def test_zero_curvature_is_rounding():
    model = nn.Linear(4, 3).double()
    H = Hessian(model, lambda z, t: (z * t).sum(), (X, torch.ones(5, 3).double()), differentiation="finite")
    assert np.abs(to_dense(H)).max() < 1e-10


class Lying(torch.autograd.Function):
    """A square whose backward pass is not its derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        x = ctx.saved_tensors[0]
        return g * x.flip(1).sin() * x


def test_a_gradient_that_is_none_is_noticed():
    with pytest.raises(UnsupportedModelError, match="symmetric"):
        Hessian(prepared("perceptron"), lambda z, t: Lying.apply(z).sum(), (X, Y), differentiation="finite")


def test_kinks_near_the_parameters_are_passed_by_or_refused():
    model = make_mlp([4, 20, 20, 3], act=nn.ReLU)
    truth = oracle_hessian(model, CE_MEAN, X, Y)
    H = Hessian(model, CE_MEAN, (X, Y), differentiation="finite")
    assert gap(H, truth) < 1e-8 and 0 < H.differences_gap < 1e-6
    assert Hessian(model, CE_MEAN, (X, Y)).differences_gap == 0
    with torch.no_grad():
        model[0].bias.copy_(-(model[0].weight @ X[0]))  # all units of one sample are at their kink
    with pytest.raises(UnsupportedModelError, match="kinks"):
        Hessian(model, CE_MEAN, (X, Y), differentiation="finite")
    with pytest.raises(UnsupportedModelError, match="relu in module"):
        Hessian(make_mlp([4, 5, 3], act=nn.ReLU), CE_MEAN, (X, Y), differentiation="finite", nonsmooth="error")


def test_bad_arguments():
    model = make_mlp([4, 5, 3])
    with pytest.raises(ValueError, match='"autograd" or "finite", got .exact'):
        Hessian(model, CE_MEAN, (X, Y), differentiation="exact")
    with pytest.raises(ValueError, match='"smooth"'):
        Hessian(model, CE_MEAN, (X, Y), differentiation="finite", nonsmooth="smooth")
    with pytest.raises(ValueError, match="NaN"):
        Hessian(model, CE_MEAN, (X * float("nan"), Y), differentiation="finite")
    with pytest.raises(TypeError):
        GaussNewton(model, CE_MEAN, (X, Y), differentiation="finite")


def test_products_are_of_fourth_order():
    """Exact for polynomials of degree four in θ: their fifth derivative is zero."""
    origin = torch.linspace(-1, 1, 5, dtype=torch.float64)
    product = Differenced(lambda z: 4 * z**3, origin, shrink=300.0)
    v = torch.linspace(1, 2, 5, dtype=torch.float64)[:, None]
    assert (product(v)[:, 0] - 12 * origin**2 * v[:, 0]).abs().max() < 1e-12
    assert step_size(origin, v[:, 0]) == pytest.approx(step_size(origin, 10 * v[:, 0]) * 10)


def attention_vjp(b):
    def vjp(z):
        parts = [t.reshape(2, 2, 4, 3).detach().requires_grad_() for t in z.split(48)]
        out = F.scaled_dot_product_attention(*parts)
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(out, parts, b)])

    return vjp


def test_one_operation_by_differences_of_its_vjp():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(144, generator=generator, dtype=torch.float64)
    b = torch.randn(2, 2, 4, 3, generator=generator, dtype=torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        truth = torch.autograd.functional.hessian(
            lambda u: (F.scaled_dot_product_attention(*[t.view(2, 2, 4, 3) for t in u.split(48)]) * b).sum(), z
        )
    Q = finite_difference_hessian(attention_vjp(b), z)
    assert torch.equal(Q, Q.mT)
    assert (Q - truth).abs().max() < 1e-11 * truth.abs().max()


def test_a_stack_of_operations_at_once():
    points = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3

    def vjp(z):
        u = z.detach().requires_grad_()
        return torch.autograd.grad((torch.tanh(u).prod(-1) + u.square().sum(-1)).sum(), u)[0]

    Q = finite_difference_hessian(vjp, points)
    assert Q.shape == (3, 2, 4, 4)
    for i in range(3):
        for j in range(2):
            truth = torch.autograd.functional.hessian(lambda u: torch.tanh(u).prod() + u.square().sum(), points[i, j])
            assert (Q[i, j] - truth).abs().max() < 2e-11
    assert finite_difference_hessian(lambda z: z, torch.zeros(2, 0)).shape == (2, 0, 0)


OPERATIONS = {
    "cdist": (
        lambda z: torch.cdist(z[:6].view(1, 3, 2), z[6:].view(1, 2, 2)),
        lambda z: pairs(z[:6].view(3, 2), z[6:].view(2, 2)),
    ),
    "cdist, close": (
        lambda z: torch.cdist(1e-2 * z[:6].view(1, 3, 2), 1e-2 * z[6:].view(1, 2, 2)),
        lambda z: 1e-2 * pairs(z[:6].view(3, 2), z[6:].view(2, 2)),
    ),
    "layer norm": (lambda z: F.layer_norm(z, (10,)), lambda z: (z - z.mean()) / (z.var(correction=0) + 1e-5).sqrt()),
    "short scale": (lambda z: torch.sin(30 * z), lambda z: torch.sin(30 * z)),
    "large": (lambda z: torch.log(z.square() + 1), lambda z: torch.log(z.square() + 1)),
}


def pairs(a, b):
    return (a[:, None] - b[None]).square().sum(-1).sqrt()[None]


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_of_several_scales(name):
    function, plain = OPERATIONS[name]
    z = torch.randn(10, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * (
        50 if name == "large" else 1
    )
    b = torch.randn(function(z).shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)

    def vjp(point):
        u = point.detach().requires_grad_()
        return torch.autograd.grad(function(u), u, b)[0]

    truth = torch.autograd.functional.hessian(lambda u: (b * plain(u)).sum(), z)
    Q = finite_difference_hessian(vjp, z)
    assert (Q - truth).abs().max() < 1e-10 * truth.abs().max()
    single = finite_difference_hessian(lambda u: vjp(u.double()).float(), z.float())
    assert (single - truth).abs().max() < 1e-4 * truth.abs().max()


def test_what_is_no_derivative_or_has_a_kink_is_not_symmetrized():
    z = torch.linspace(-1, 1, 4, dtype=torch.float64)
    with pytest.raises(ArithmeticError, match="symmetric"):
        finite_difference_hessian(lambda z: z.roll(1) ** 2, z)
    with pytest.raises(ArithmeticError, match="converge"):
        finite_difference_hessian(lambda z: (z.sum() > 0) + 0 * z, z)
