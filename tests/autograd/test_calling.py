"""How models and losses are called: inputs and outputs of any shape, losses of three arguments, data with graphs, and refusals."""

import copy
import functools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as f

import linop_hess as lh
from linop_hess.autograd import GaussNewton, Hessian
from linop_hess.autograd.calling import as_data, call_model, constant, in_double, takes_parameters
from linop_hess.errors import UnsupportedModelError
from linop_hess.operators import to_dense
from tests.autograd.settings import CE_MEAN, CE_SUM, CURVATURES, gauss_newton_truth, mlp_and_batch, worst
from tests.helpers import make_batch, make_mlp, oracle_hessian


class Towers(nn.Module):
    """Two inputs, and a nest of outputs of which one is no tensor and one needs no gradient."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = make_mlp([4, 5, 3], seed=1), make_mlp([2, 3], seed=2)

    def forward(self, a, b):
        return {"logits": self.left(a) * self.right(b).exp(), "other": (self.right(b), b), "name": "towers"}


def two_headed(z, t):
    return (
        f.cross_entropy(z["logits"], t) + (z["other"][0] ** 2).sum() * z["other"][1].mean() + z["logits"].sin().mean()
    )


def dense(function, parameters):
    """Hessian of a scalar function of a model's parameters, by double backward in rows."""
    gradient = torch.autograd.grad(function(), parameters, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradient])
    rows = [torch.autograd.grad(g, parameters, retain_graph=True, materialize_grads=True) for g in flat]
    return torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows]).detach().numpy()


def test_a_tuple_of_inputs_is_the_arguments():
    model = Towers()
    a, (b, _), t = torch.randn(6, 4).double(), make_batch(2, 2, 6), torch.arange(6) % 3
    truth = dense(lambda: two_headed(model(a, b), t), list(model.parameters()))
    assert np.abs(truth).max() > 0.1
    np.testing.assert_allclose(
        to_dense(Hessian(model, two_headed, ((a, b), t))), truth, atol=1e-14 * np.abs(truth).max()
    )
    halves = [((a[:2], b[:2]), t[:2]), ((a[2:], b[2:]), t[2:])]

    def summed(z, t):
        return f.cross_entropy(z["logits"], t, reduction="sum")

    truth = dense(lambda: summed(model(a, b), t), list(model.parameters()))
    H = Hessian(model, summed, halves, reduction="sum")
    np.testing.assert_allclose(to_dense(H), truth, atol=1e-13 * np.abs(truth).max())
    named = torch.return_types.max((a, b))
    assert call_model(lambda x: x, named) is named and call_model(lambda x, y: (y, x), (1, 2)) == (2, 1)
    assert call_model(lambda x: x, [1, 2]) == [1, 2]


def test_gauss_newton_of_a_nest_of_outputs():
    model = Towers()
    a, (b, _), t = torch.randn(6, 4).double(), make_batch(2, 2, 6), torch.arange(6) % 3
    parameters = list(model.parameters())
    z = model(a, b)
    outputs = torch.cat([z["logits"].reshape(-1), z["other"][0].reshape(-1)])
    rows = [torch.autograd.grad(o, parameters, retain_graph=True, materialize_grads=True) for o in outputs]
    J = torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])

    def flat_loss(u):
        logits, other = u.split([18, 18])
        return two_headed({"logits": logits.view(6, 3), "other": (other.view(6, 3), b)}, t)

    truth = (J.T @ torch.autograd.functional.hessian(flat_loss, outputs.detach()) @ J).numpy()
    ours = GaussNewton(model, two_headed, ((a, b), t))
    np.testing.assert_allclose(to_dense(ours), truth, atol=1e-13 * np.abs(truth).max())
    columns = np.random.default_rng(0).standard_normal((len(truth), 3))
    np.testing.assert_allclose(ours @ columns, truth @ columns, atol=1e-12 * np.abs(truth).max())


def penalized(z, t, params):
    return CE_MEAN(z, t) + sum((0.1 * k * p**4 + p.sin()).sum() for k, p in enumerate(params.values(), 1))


def test_a_loss_of_three_arguments():
    model, (x, y) = mlp_and_batch()
    parameters = list(model.parameters())
    truth = dense(lambda: penalized(model(x), y, dict(model.named_parameters())), parameters)
    H = Hessian(model, penalized, (x, y))
    assert worst(H, truth) <= 1e-14
    penalty = truth - oracle_hessian(model, CE_MEAN, x, y)
    assert np.abs(penalty).max() > 0.1
    G = GaussNewton(model, penalized, (x, y))
    assert worst(G, gauss_newton_truth(model, CE_MEAN, x, y) + penalty) <= 1e-13
    # Two batches of a mean count the penalty once, whatever their sizes; of a sum they would count it twice.
    assert worst(Hessian(model, penalized, [(x[:2], y[:2]), (x[2:], y[2:])], reduction="mean"), truth) <= 1e-13
    with pytest.raises(ValueError, match="once a batch"):
        Hessian(model, penalized, [(x[:2], y[:2]), (x[2:], y[2:])], reduction="sum")


def test_a_penalty_is_of_the_chosen_parameters():
    model, (x, y) = mlp_and_batch()
    seen = []

    def loss(z, t, params):
        seen.append(tuple(params))
        return CE_MEAN(z, t) + sum((p**4).sum() for p in params.values())

    names = [name for name, _ in model.named_parameters()][:2]
    H = Hessian(model, loss, (x, y), params=names)
    assert H.names == tuple(names) and set(seen) == {tuple(names)}


def test_a_penalty_that_couples_output_and_parameters():
    """The cross term of output and parameters belongs to the Gauss-Newton matrix of a loss of both."""
    model = nn.Linear(2, 1, bias=False).double()
    x, y = torch.tensor([[1.0, 2.0]]).double(), None

    def loss(z, t, params):
        return (z * params["weight"]).sum() + z.square().sum()

    G = GaussNewton(model, loss, (x, y))
    J, cross = np.array([[1.0, 2.0]]), np.ones((1, 2))
    np.testing.assert_allclose(to_dense(G), 2 * J.T @ J + J.T @ cross + cross.T @ J, atol=1e-15)
    np.testing.assert_allclose(to_dense(Hessian(model, loss, (x, y))), to_dense(G), atol=1e-15)


class Method:
    def loss(self, z, t, params):
        return z

    def __call__(self, z, t):
        return z


class LossModule(nn.Module):
    def forward(self, z, t, params):
        return z


@pytest.mark.parametrize(
    ("loss", "three"),
    [
        (lambda z, t: z, False),
        (lambda z, t, params: z, True),
        (lambda z, t, weight=None: z, False),
        (lambda *args: args[0], False),
        (lambda z, t, *rest: z, False),
        (lambda z, t, params, *, scale=1.0: z, True),
        (lambda z, t, params, scale: z, False),
        (f.cross_entropy, False),
        (nn.MSELoss(), False),
        (LossModule(), True),
        (Method().loss, True),
        (Method(), False),
        (functools.partial(penalized), True),
        (functools.partial(lambda z, t, params, scale: z, scale=2.0), True),
        (functools.partial(lambda scale, z, t: z, 2.0), False),
        (torch.dist, False),
    ],
)
def test_whether_a_loss_takes_parameters(loss, three):
    assert takes_parameters(loss) is three


@pytest.mark.parametrize("at", ["targets", "closure", "both inputs and targets in a dict"])
def test_losses_that_differentiate_the_model(at):
    """Physics-informed losses: the graph is recorded with the very inputs that the loss differentiates by, and kept."""
    model = make_mlp([1, 6, 1])
    x = torch.linspace(0, 1, 8).double()[:, None].requires_grad_()

    def residual(u, x):
        first = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
        return (torch.autograd.grad(first.sum(), x, create_graph=True)[0] + u.sin()).square().mean()

    losses = {
        "targets": (residual, (x, x)),
        "closure": (lambda u, _: residual(u, x), (x, None)),
        "both inputs and targets in a dict": (lambda u, t: residual(u, t["x"][0]), (x, {"x": [x]})),
    }
    loss, data = losses[at]
    truth = dense(lambda: residual(model(x), x), list(model.parameters()))
    H = Hessian(model, loss, data)
    assert worst(H, truth) <= 1e-12 and H.retained_graphs == 1
    with torch.no_grad():
        x += 0.25
    assert worst(H, dense(lambda: residual(model(x), x), list(model.parameters()))) <= 1e-12
    assert x.grad is None
    with pytest.raises(UnsupportedModelError, match=r"linop_hess\.Hessian"):
        GaussNewton(model, loss, data) @ np.ones(H.shape[0])


@pytest.mark.parametrize("kind", CURVATURES)
def test_losses_that_work_in_place(kind):
    model, (x, y) = mlp_and_batch()
    target = torch.randn(7, 3, dtype=torch.float64)

    def in_place(z, t):
        return z.sub_(t).square_().sum()

    plain = kind(model, lambda z, t: (z - t).square().sum(), (x, target))
    assert worst(kind(model, in_place, (x, target)), to_dense(plain)) <= 1e-15


@pytest.mark.parametrize("kind", CURVATURES)
def test_data_with_graphs_are_constants(kind):
    student, (x, _) = mlp_and_batch()
    teacher, backbone = make_mlp([4, 3], seed=5), make_mlp([4, 4], seed=6)
    features, target = backbone(x), teacher(x)
    truth = to_dense(kind(student, f.mse_loss, (features.detach(), target.detach())))
    assert worst(kind(student, f.mse_loss, (features, target)), truth) <= 1e-15
    nested = kind(student, lambda z, t: f.mse_loss(z, t["a"][0]), (features, {"a": [target, 3]}))
    assert worst(nested, truth) <= 1e-15
    features.sum().backward()  # the caller's graph is still there
    assert worst(kind(student, f.mse_loss, (nn.Parameter(features.detach()), target)), truth) <= 1e-15


def test_inference_mode_everywhere():
    head, y = make_mlp([3, 4, 2]), torch.arange(7) % 2
    with torch.inference_mode():
        x = torch.randn(7, 3, dtype=torch.float64)
        soft = {"p": [torch.rand(7, 2, dtype=torch.float64)]}
        inside = make_mlp([3, 4, 2])
    truth = oracle_hessian(head, CE_MEAN, x.clone(), y)
    np.testing.assert_allclose(to_dense(lh.linearize(head, CE_MEAN, x, y).H), truth, atol=1e-14)
    assert worst(Hessian(head, CE_MEAN, (x, y)), truth) <= 1e-14
    assert worst(Hessian(inside, CE_MEAN, (x, y)), truth) <= 1e-14
    lin = lh.linearize(inside, lambda o, t: f.mse_loss(o, t["p"][0]), x, soft)
    assert lin.verify() <= 1e-12
    with torch.inference_mode():
        soft["p"][0][0, 0] = 7.0
    with pytest.raises(RuntimeError, match="changed since"):
        lin.verify()


def test_data_are_kept_as_they_are_where_they_can_be():
    leaf = torch.randn(3, requires_grad=True)
    pair = as_data((leaf, {"again": leaf, "made of it": leaf * 2, "text": "x"}))
    assert pair[0] is leaf and pair[1]["again"] is leaf and pair[1]["made of it"].grad_fn is not None
    assert not constant([leaf, leaf * 2])[1].requires_grad

    class Batch(dict):
        pass

    assert type(as_data(Batch(x=leaf))) is dict


def test_in_double_changes_nothing():
    weight = torch.ones(3)
    loss = nn.CrossEntropyLoss(weight=weight)
    double = in_double(functools.partial(f.cross_entropy, weight=weight))
    assert in_double(loss).weight.dtype == torch.float64 == double.keywords["weight"].dtype
    assert loss.weight is weight and weight.dtype == torch.float32
    assert in_double((weight, 3, torch.arange(2)))[2].dtype == torch.int64


def wrapped_models():
    inner = make_mlp([4, 3])
    compiled = torch.compile(make_mlp([4, 3]), backend="eager")
    return {
        "DataParallel": (nn.DataParallel(inner), r"model\.module"),
        "inside": (nn.Sequential(nn.Linear(4, 4).double(), nn.DataParallel(inner)), r"model\.1\.module"),
        "compiled": (compiled, r"model\._orig_mod, the uncompiled"),
        "scripted": (torch.jit.script(make_mlp([4, 3])), r"before torch\.jit\.script"),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["DataParallel", "inside", "compiled", "scripted"])
def test_wrapped_models_say_what_to_pass(name):
    model, words = wrapped_models()[name]
    x, y = make_batch(4, 3, 5)
    for make in (Hessian, GaussNewton):
        with pytest.raises(UnsupportedModelError, match=words):
            make(model, CE_MEAN, (x, y))
    with pytest.raises(UnsupportedModelError, match=words):
        lh.linearize(model, CE_MEAN, x, y)


@pytest.mark.filterwarnings("ignore")
def test_a_model_compiled_in_place_is_copied_uncompiled():
    model, (x, y) = mlp_and_batch()
    truth = oracle_hessian(copy.deepcopy(model), CE_MEAN, x, y)
    model.compile(backend="aot_eager")
    assert worst(Hessian(model, CE_MEAN, (x, y)), truth) <= 1e-14


def test_models_without_data_are_refused():
    x, y = make_batch(4, 3, 5)
    half = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3, device="meta").requires_grad_(False)).double()
    for model in (make_mlp([4, 3]).to("meta"), half):
        with pytest.raises(ValueError, match="meta device.*load the weights"):
            Hessian(model, CE_MEAN, (x, y))
        with pytest.raises(ValueError, match="meta device"):
            lh.linearize(model, CE_MEAN, x, y)


@pytest.mark.filterwarnings("ignore")
def test_sparse_inputs():
    model, (x, y) = mlp_and_batch()
    x = x * (x > 0)
    truth = oracle_hessian(model, CE_MEAN, x, y)
    for sparse in (x.to_sparse(), x.to_sparse_csr()):
        assert worst(Hessian(model, CE_MEAN, (sparse, y)), truth) <= 1e-14
        with pytest.raises(TypeError, match=r"to_dense\(\)"):
            lh.linearize(model, CE_MEAN, sparse, y)


def test_empty_batches_and_widths_of_zero():
    model, (x, y) = mlp_and_batch()
    assert not to_dense(Hessian(model, CE_SUM, (x[:0], y[:0]))).any()
    with pytest.raises(ValueError, match=r"empty batch, inputs of shape \(0, 4\)"):
        lh.linearize(model, CE_SUM, x[:0], y[:0])
    pruned = nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 3)).double()
    for net, inputs in ((pruned, x), (nn.Sequential(nn.Linear(0, 3)).double(), x[:, :0])):
        truth = oracle_hessian(net, CE_MEAN, inputs, y)
        lin = lh.linearize(net, CE_MEAN, inputs, y)
        np.testing.assert_allclose(to_dense(lin.H), truth, atol=1e-15)
        g = np.ones(len(truth))
        np.testing.assert_allclose(lin.inverse(0.1) @ g, np.linalg.solve(truth + 0.1 * np.eye(len(g)), g), rtol=1e-12)


@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16])
def test_losses_that_compute_in_lower_precision(low):
    """Their derivatives are symmetric to that precision: rounding is not taken for a wrong derivative."""
    model, (x, y) = mlp_and_batch(samples=50)

    def loss(z, t):
        return f.cross_entropy(z.to(low), t)

    truth = oracle_hessian(model, CE_MEAN, x, y)
    eps = torch.finfo(low).eps
    assert worst(Hessian(model, loss, (x, y)), truth) <= 2 * eps
    lin = lh.linearize(model, loss, x, y)
    assert worst(lin.H, truth) <= 2 * eps and lin.verify() <= 2 * eps


def test_means_over_nests_are_weighted_by_samples():
    model, (x, y) = mlp_and_batch()
    loss = functools.partial(lambda z, t: CE_MEAN(z, t["y"]))
    H = Hessian(model, loss, [(x[:2], {"y": y[:2]}), (x[2:], {"y": y[2:]})], reduction="mean")
    assert worst(H, oracle_hessian(model, CE_MEAN, x, y)) <= 1e-14
    with pytest.raises(ValueError, match="ambiguous"):
        unequal = [(x[:2], {"y": torch.zeros(2, 3)}), (x[2:], {"y": torch.zeros(5, 2)})]
        Hessian(model, lambda z, t: z.sum(), unequal, reduction="mean")
