import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from linop_hess.autograd import GaussNewton, Hessian
from linop_hess.errors import UnsupportedModelError
from linop_hess.operators import Operator, to_dense
from tests.helpers import (
    differenced_hessian,
    make_batch,
    make_mlp,
    oracle_gradient,
    oracle_hessian,
    oracle_jacobian,
)
from tests.operators.conformance import check_operator

DTYPES = [torch.float32, torch.float64]
CURVATURES = [Hessian, GaussNewton]
CE_MEAN, CE_SUM = nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")


class Attention(nn.Module):
    """A transformer layer and a head over the mean of three tokens made of each input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        tokens = x.unsqueeze(1) * torch.linspace(1, 2, 3, dtype=x.dtype)[None, :, None]
        return self.head(self.layer(tokens).mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(2, 3, batch_first=True)
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.cell(x.reshape(len(x), 2, 2))[0][:, -1])


class Tied(nn.Module):
    """One weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, inputs):
        return self.layer(inputs["a"]) * self.layer(inputs["b"])


def mlp_and_batch(dtype=torch.float64, samples=7):
    return make_mlp([4, 5, 5, 3], dtype=dtype), make_batch(4, 3, samples, dtype=dtype)


def gauss_newton_truth(model, loss_fn, x, y):
    """Jᵀ (∇²_z ℓ) J from dense factors, in float64."""
    J = oracle_jacobian(model, x)
    with torch.no_grad():
        z = model.double()(x.double())
    curvature = torch.autograd.functional.hessian(lambda u: loss_fn(u.reshape(z.shape), y), z.reshape(-1))
    return J.T @ curvature.numpy() @ J


def worst(op, truth):
    return np.abs(to_dense(op) - truth).max() / np.abs(truth).max()


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


@pytest.mark.parametrize("kind", CURVATURES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss_fn", [CE_MEAN, CE_SUM], ids=["mean", "sum"])
def test_unequal_batches_are_one_batch(kind, dtype, loss_fn):
    model, (x, y) = mlp_and_batch(dtype, samples=11)
    whole = kind(model, loss_fn, (x, y))
    batches = list(zip(x.split([1, 3, 7]), y.split([1, 3, 7]), strict=True))
    tolerance = 100 * float(np.finfo(whole.dtype).eps)
    for data in (
        batches,
        [list(batch) for batch in batches],
        tuple(batches),
        DataLoader(TensorDataset(x, y), batch_size=4),
        DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True),
    ):
        parts = kind(model, loss_fn, data)
        assert parts.loss == pytest.approx(whole.loss, rel=tolerance)
        np.testing.assert_allclose(parts.gradient, whole.gradient, atol=tolerance * np.abs(whole.gradient).max())
        assert worst(parts, to_dense(whole)) < tolerance


def test_two_batches_are_not_taken_for_one():
    model, (x, y) = mlp_and_batch()
    halves = [(x[:3], y[:3]), (x[3:], y[3:])]
    truth = oracle_hessian(model, CE_SUM, x, y)
    assert worst(Hessian(model, CE_SUM, halves), truth) < 1e-13
    assert worst(Hessian(model, CE_SUM, [x, y]), truth) < 1e-13
    with pytest.raises(ValueError, match="not clear"):
        Hessian(model, CE_SUM, tuple(halves))


def test_the_reduction_of_a_function_is_asked_for_and_used():
    model, (x, y) = mlp_and_batch()
    batches = [(x[:2], y[:2]), (x[2:], y[2:])]
    with pytest.raises(ValueError, match='reduction="sum" or reduction="mean"'):
        Hessian(model, functional.cross_entropy, batches)
    truth = oracle_hessian(model, functional.cross_entropy, x, y)
    assert worst(Hessian(model, functional.cross_entropy, batches, reduction="mean"), truth) < 1e-13
    assert worst(Hessian(model, functional.cross_entropy, (x, y)), truth) < 1e-13
    with pytest.raises(ValueError, match="contradicts"):
        Hessian(model, CE_MEAN, batches, reduction="sum")
    with pytest.raises(ValueError, match="'none'"):
        Hessian(model, functional.cross_entropy, (x, y), reduction="none")


def test_means_that_weights_cannot_make_exact_are_refused():
    model, (x, y) = mlp_and_batch()
    batches = [(x[:2], y[:2]), (x[2:], y[2:])]
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    with pytest.raises(ValueError, match="class-weighted"):
        Hessian(model, weighted, batches)
    assert worst(Hessian(model, weighted, (x, y)), oracle_hessian(model, weighted, x, y)) < 1e-13
    with pytest.raises(ValueError, match="ignore_index=2"):
        Hessian(model, nn.CrossEntropyLoss(ignore_index=2), [(x, torch.full_like(y, 2)), (x, y)])
    with pytest.raises(ValueError, match="shapes"):
        Hessian(nn.Linear(4, 1).double(), nn.MSELoss(), [(x, torch.ones(7, 1)), (x, torch.ones(7, 2))])
    with pytest.raises(ValueError, match="number of samples"):
        Hessian(model, CE_MEAN, [(x[0], y[0]), (x[1], y[1])])


def test_a_subset_of_parameters_is_a_block():
    model, (x, y) = mlp_and_batch()
    whole = oracle_hessian(model, CE_MEAN, x, y)
    sizes = np.cumsum([0] + [p.numel() for p in model.parameters()])
    chosen = np.r_[sizes[1] : sizes[2], sizes[4] : sizes[5]]
    H = Hessian(model, CE_MEAN, (x, y), params=iter(["4.weight", "0.bias"]))
    assert H.names == ("0.bias", "4.weight")
    assert worst(H, whole[np.ix_(chosen, chosen)]) < 1e-13
    np.testing.assert_allclose(H.gradient, oracle_gradient(model, CE_MEAN, x, y)[chosen], atol=1e-14)
    for name, p in model.named_parameters():
        p.requires_grad_(name in H.names)
    assert worst(Hessian(model, CE_MEAN, (x, y)), whole[np.ix_(chosen, chosen)]) < 1e-13
    assert worst(GaussNewton(model, CE_MEAN, (x, y)), gauss_newton_truth(model, CE_MEAN, x, y)) < 1e-13


@pytest.mark.parametrize("kind", CURVATURES)
def test_an_operator_is_a_snapshot(kind):
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Tanh(), nn.Linear(5, 3))
    model = model.double().eval()
    x, y = make_batch(4, 3, 6)
    op = kind(model, CE_MEAN, (x, y))
    v = np.ones(op.shape[0])
    before, gradient, state = op @ v, op.gradient, {k: t.clone() for k, t in model.state_dict().items()}
    op @ v
    op.gradient[:] = 0
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    model.train()
    model(x)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    model[4] = nn.Linear(5, 3)
    np.testing.assert_array_equal(op @ v, before)
    np.testing.assert_array_equal(op.gradient, gradient)


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


class HalfIdle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Linear(2, 2)
        self.used = nn.Linear(4, 3)

    def forward(self, x):
        return self.used(x)


@pytest.mark.parametrize("kind", CURVATURES)
def test_an_unused_parameter_has_a_zero_block(kind):
    x, y = make_batch(4, 3, 5)
    model = HalfIdle().double()
    dense = to_dense(kind(model, CE_MEAN, (x, y)))
    assert not dense[:6].any() and not dense[:, :6].any()
    np.testing.assert_allclose(dense[6:, 6:], oracle_hessian(model.used, CE_MEAN, x, y), atol=1e-14)
    with pytest.raises(ValueError, match=r"does not depend.*idle\.weight"):
        kind(model, CE_MEAN, (x, y), params=["idle.weight"])


def test_inputs_may_be_a_dict():
    x, y = make_batch(4, 3, 5)
    model = TwoInputs().double()
    H = Hessian(model, CE_MEAN, ({"a": x, "b": x.flip(0)}, y))
    ps = list(model.parameters())
    v = torch.linspace(-1, 1, 15, dtype=torch.float64)
    step, theta = 1e-5, nn.utils.parameters_to_vector(ps).detach()
    sides = []
    for sign in (1, -1):
        nn.utils.vector_to_parameters(theta + sign * step * v, ps)
        sides.append(Hessian(model, CE_MEAN, ({"a": x, "b": x.flip(0)}, y)).gradient)
    np.testing.assert_allclose(H @ v.numpy(), (sides[0] - sides[1]) / (2 * step), atol=1e-8)


def test_sparse_embeddings_are_differentiated_densely():
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3)).double()
    x = torch.tensor([[0, 1], [1, 4], [4, 4]])
    y = torch.tensor([0, 1, 2])
    H = Hessian(model, CE_MEAN, (x, y))
    model[0].sparse = False
    assert worst(H, oracle_hessian(model, CE_MEAN, x, y)) < 1e-13


def test_progress_counts_batches(capsys):
    model, (x, y) = mlp_and_batch()
    H = Hessian(model, CE_SUM, [(x[:3], y[:3]), (x[3:], y[3:])], progress=True)
    capsys.readouterr()
    H @ np.ones(H.shape[0])
    shown = capsys.readouterr().err
    assert "Hessian" in shown and "2/2" in shown


def test_progress_without_tqdm_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tqdm", None)
    with pytest.raises(ImportError, match="pip install tqdm"):
        Hessian(*mlp_and_batch()[:1], CE_MEAN, mlp_and_batch()[1], progress=True)


@pytest.mark.parametrize("kind", CURVATURES)
@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm1d(4)], ids=["dropout", "batch norm"])
def test_a_loss_that_is_no_function_of_the_parameters(kind, layer):
    model = nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 3)).double().train()
    batch = make_batch(4, 3, 6)
    with pytest.raises(UnsupportedModelError, match=r"model\.eval\(\)"):
        kind(model, CE_MEAN, batch)
    kind(model, CE_MEAN, batch, check_deterministic=False, check_symmetric=False)
    kind(model.eval(), CE_MEAN, batch)


def test_a_loader_that_drops_samples_at_random_is_refused():
    model, (x, y) = mlp_and_batch()
    loader = DataLoader(TensorDataset(x, y), batch_size=3, shuffle=True, drop_last=True)
    torch.manual_seed(0)
    with pytest.raises(UnsupportedModelError, match="shuffles"):
        Hessian(model, CE_SUM, loader)


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
def test_bad_data(kind):
    model, (x, y) = mlp_and_batch()
    with pytest.raises(TypeError, match="only once"):
        kind(model, CE_SUM, ((x, y) for _ in range(2)))
    with pytest.raises(TypeError, match="only once"):
        kind(model, CE_SUM, zip([x], [y], strict=True))
    with pytest.raises(TypeError, match="DataLoader"):
        kind(model, CE_SUM, TensorDataset(x, y))
    with pytest.raises(TypeError, match="batch"):
        kind(model, CE_SUM, x)
    with pytest.raises(TypeError, match="pair"):
        kind(model, CE_SUM, [x, y, x])
    with pytest.raises(TypeError, match="batch"):
        kind(model, CE_SUM, 3)
    with pytest.raises(ValueError, match="no batch"):
        kind(model, CE_SUM, [])


def test_data_that_shrink_are_noticed():
    model, (x, y) = mlp_and_batch()
    data = [(x, y), (x, y)]
    H = Hessian(model, CE_SUM, data)
    data.pop()
    with pytest.raises(ValueError, match="2 batches"):
        H @ np.ones(H.shape[0])


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


@pytest.mark.parametrize("kind", CURVATURES)
def test_bad_parameters(kind):
    model, batch = mlp_and_batch()
    with pytest.raises(ValueError, match="no parameter 9.weight"):
        kind(model, CE_MEAN, batch, params=["0.weight", "9.weight"])
    with pytest.raises(ValueError, match="at least one"):
        kind(model, CE_MEAN, batch, params=[])
    with pytest.raises(TypeError, match="string"):
        kind(model, CE_MEAN, batch, params="0.weight")
    with pytest.raises(ValueError, match="at least one"):
        kind(nn.Tanh(), CE_MEAN, batch)
    model[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen"):
        kind(model, CE_MEAN, batch, params=["0.weight", "0.bias"])
    with pytest.raises(ValueError, match="at least one"):
        kind(model.requires_grad_(False), CE_MEAN, batch)
    with pytest.raises(TypeError, match="Module"):
        kind(lambda x: x, CE_MEAN, batch)
    for dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(TypeError, match=str(dtype)):
            kind(make_mlp([4, 3], dtype=dtype), CE_MEAN, batch)
    mixed = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3).double())
    with pytest.raises(TypeError, match="one dtype"):
        kind(mixed, CE_MEAN, batch)
    scattered = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3, device="meta"))
    with pytest.raises(ValueError, match="one device"):
        kind(scattered, CE_MEAN, batch)
    with pytest.raises(ValueError, match="no shape"):
        kind(nn.LazyLinear(3), CE_MEAN, batch)
    counts = nn.Linear(4, 3)
    counts.weight = nn.Parameter(torch.ones(3, 4, dtype=torch.int64), requires_grad=False)
    with pytest.raises(TypeError, match="int64"):
        kind(counts, CE_MEAN, batch, params=["weight"])


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


def test_gauss_newton_needs_one_output():
    with pytest.raises(TypeError, match="one tensor"):
        GaussNewton(nn.LSTM(4, 3).double(), lambda z, t: z[0].sum(), make_batch(4, 3, 5))
