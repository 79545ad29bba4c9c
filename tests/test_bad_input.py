"""Bad input of `linearize` and of what it returns: a typed error that says what to do, and nothing lost."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as f
from torch.utils.data import DataLoader, TensorDataset

import linop_hess as lh
from linop_hess.errors import FactorizationError, UnsupportedModelError
from linop_hess.tasks import Pendulum, neural_ode
from tests.helpers import make_batch, make_mlp, oracle_hessian


@pytest.fixture
def setting():
    return make_mlp([3, 4, 3], seed=1), *make_batch(3, 3, 4)


@pytest.fixture(scope="module")
def lin():
    return lh.linearize(make_mlp([3, 4, 3], seed=1), f.cross_entropy, *make_batch(3, 3, 4))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda v: v[:-1], ValueError, "shape"),
        (lambda v: np.append(v, 1.0), ValueError, "shape"),
        (lambda v: v[:, None, None], ValueError, "shape"),
        (lambda v: v + 1j, TypeError, "real"),
        (lambda v: np.where(np.arange(v.size) == 2, np.nan, v), ValueError, "NaN or Inf"),
        (lambda v: np.where(np.arange(v.size) == 2, np.inf, v), ValueError, "NaN or Inf"),
        (lambda v: v.astype(str), TypeError, "numbers"),
        (lambda v: torch.from_numpy(v).float(), TypeError, "torch.float64"),
    ],
)
def test_operands(lin, change, error, match):
    v = change(np.ones(lin.H.shape[0]))
    inverse = lin.inverse(0.1)
    for use in (lambda: lin.H @ v, lambda: lin.D_x @ v, lambda: inverse @ v, lambda: inverse.solve(v)):
        with pytest.raises(error, match=match):
            use()


def test_integer_operand_is_cast(lin):
    ones = np.ones(lin.H.shape[0], dtype=int)
    np.testing.assert_array_equal(lin.inverse(0.1) @ ones, lin.inverse(0.1) @ ones.astype(float))


def test_integer_inputs(setting):
    model, x, y = setting
    with pytest.raises(TypeError, match="torch.float64.*torch.int64: cast inputs"):
        lh.linearize(model, f.cross_entropy, x.long(), y)


@pytest.mark.parametrize(
    ("x", "error", "match"),
    [
        (lambda x: x.numpy(), TypeError, "must be Tensor, not numpy"),
        (lambda x: x.float(), TypeError, "torch.float64.*torch.float32: cast inputs"),
        (lambda x: x + 0j, UnsupportedModelError, "real numbers, got complex ones in aten.addmm in module '0'"),
        (lambda x: x / 0, ValueError, "NaN or Inf"),
        (lambda x: x.to("meta"), ValueError, "on meta"),
    ],
)
def test_inputs(setting, x, error, match):
    model, inputs, y = setting
    with pytest.raises(error, match=match):
        lh.linearize(model, f.cross_entropy, x(inputs), y)


@pytest.mark.parametrize(
    ("loss", "error", "match"),
    [
        (lambda o, t: f.cross_entropy(o, t, reduction="none"), ValueError, r"scalar tensor, got shape \(4,\)"),
        (lambda o, t: 1.0, TypeError, "scalar tensor, got float"),
        (lambda o, t: torch.tensor(2.0, dtype=torch.float64), ValueError, "depend"),
        (lambda o, t: o.detach().sum(), ValueError, "depend"),
        (lambda o, t: (o.sum() - o.sum()).log(), ValueError, "finite loss, got -inf"),
        (lambda o, t: (o.sum() - o.sum()).sqrt(), ValueError, "NaN or Inf"),
        ("mse", TypeError, "callable"),
    ],
)
def test_losses(setting, loss, error, match):
    model, x, y = setting
    with pytest.raises(error, match=match):
        lh.linearize(model, loss, x, y)


def test_derivatives_that_are_not_finite_name_the_layer():
    class Root(nn.Module):
        def forward(self, x):
            return (x - x).sqrt() + x

    model = nn.Sequential(*make_mlp([3, 4]), Root(), *make_mlp([4, 3]))
    with pytest.raises(ValueError, match=r"NaN or Inf in the derivatives of layer 3 \(1: sqrt\)"):
        lh.linearize(model, f.cross_entropy, *make_batch(3, 3, 4))


def test_parameters_that_are_not_finite_name_the_layer(setting):
    model, x, y = setting
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN|nan"):
        lh.linearize(model, f.cross_entropy, x, y)


def test_nothing_to_train(setting):
    model, x, y = setting
    with pytest.raises(ValueError, match="at least one trainable parameter"):
        lh.linearize(nn.Sequential(nn.Tanh()), f.cross_entropy, x, y)
    with pytest.raises(ValueError, match="at least one"):
        lh.linearize(model, f.cross_entropy, x, y, params=[])
    with pytest.raises(ValueError, match="no parameter 9.weight"):
        lh.linearize(model, f.cross_entropy, x, y, params=["9.weight"])
    with pytest.raises(TypeError, match="string"):
        lh.linearize(model, f.cross_entropy, x, y, params=[0])
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen"):
        lh.linearize(model, f.cross_entropy, x, y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(setting, dtype):
    model, x, y = setting
    with pytest.raises(TypeError, match=f"torch.float32 or.*got {dtype}"):
        lh.linearize(model.to(dtype), f.cross_entropy, x.to(dtype), y)


def test_not_a_module(setting):
    _, x, y = setting
    with pytest.raises(TypeError, match="torch.nn.Module"):
        lh.linearize(torch.tanh, f.cross_entropy, x, y)


@pytest.mark.parametrize(
    ("layer", "match"),
    [
        (nn.Dropout(0.5), r"random operation aten.bernoulli_ in module '2': call model.eval\(\)"),
        (
            nn.BatchNorm1d(4).double(),
            r"changes 2.running_mean, 2.running_var, 2.num_batches_tracked: call model.eval\(\)",
        ),
    ],
)
def test_layers_in_training_mode(layer, match):
    model = nn.Sequential(*make_mlp([3, 4]), nn.Tanh(), layer, *make_mlp([4, 3])).train()
    with pytest.raises(UnsupportedModelError, match=match):
        lh.linearize(model, f.cross_entropy, *make_batch(3, 3, 4))
    lh.linearize(model.eval(), f.cross_entropy, *make_batch(3, 3, 4))


def test_shared_parameters():
    """One layer twice, and one weight in two layers, are exact; two parameters on one memory are two parameters."""
    linear = nn.Linear(3, 3).double()
    tied = nn.Linear(3, 3, bias=False).double()
    tied.weight = linear.weight
    overlapping = nn.Linear(3, 3, bias=False).double()
    overlapping.weight = nn.Parameter(linear.weight.detach().t())
    x, y = make_batch(3, 3, 4)
    for other, size in ((linear, 12), (tied, 12), (overlapping, 21)):
        model = nn.Sequential(linear, nn.Tanh(), other)
        lin = lh.linearize(model, f.cross_entropy, x, y)
        H = oracle_hessian(model, f.cross_entropy, x, y)
        assert H.shape == (size, size) and np.abs(H).max() > 1e-2
        np.testing.assert_allclose(lh.to_dense(lin.H), H, rtol=0, atol=1e-14)
        assert lin.inverse(-0.01).solve(lin.gradient).backward_error <= 1e-14


def test_parameters_in_one_storage_are_not_shared():
    """As torch's own vector_to_parameters leaves them."""
    model = make_mlp([3, 4, 3])
    x, y = make_batch(3, 3, 4)
    expected = lh.to_dense(lh.linearize(model, f.cross_entropy, x, y).H)
    flat = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(flat, model.parameters())
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == 1
    np.testing.assert_array_equal(lh.to_dense(lh.linearize(model, f.cross_entropy, x, y).H), expected)


def test_random_loss(setting):
    model, x, y = setting
    with pytest.raises(UnsupportedModelError, match="random operation aten.rand: "):
        lh.linearize(model, lambda o, t: f.cross_entropy(o, t) * torch.rand(()), x, y)


def test_model_that_fails_says_so_itself(setting):
    model, x, y = setting
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        lh.linearize(model, f.cross_entropy, x[:, :2], y)


def test_nothing_is_left_behind_by_an_error(setting):
    model, x, y = setting
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="scalar"):
        lh.linearize(model, lambda o, t: o, x, y)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters()) and not x.requires_grad
    lh.linearize(model, f.cross_entropy, x, y)


def test_singular_hessian_names_a_damping_that_works():
    model = make_mlp([3, 4, 2], nn.ReLU, seed=6)
    with torch.no_grad():
        model[0].bias.fill_(-100)
    lin = lh.linearize(model, f.cross_entropy, *make_batch(3, 2, 5))
    g = np.ones(lin.H.shape[0])
    with pytest.raises(FactorizationError, match="damping=0 .*damping=.*works") as caught:
        lin.inverse(0.0).solve(g)
    assert lin.inverse(caught.value.suggested_damping).solve(g).backward_error <= 1e-14


def test_losses_are_refused_in_one_voice(setting):
    """By linearize and by Hessian with the same error and the same words."""
    model, x, y = setting
    for loss, error, match in (
        (lambda o, t: f.cross_entropy(o, t, reduction="none"), ValueError, r"scalar tensor, got shape \(4,\)"),
        (lambda o, t: f.cross_entropy(o, t).item(), TypeError, "scalar tensor, got float"),
        (lambda o, t: f.cross_entropy(o, t) / 0, ValueError, "finite loss, got inf"),
    ):
        said = []
        for build in (lambda loss: lh.linearize(model, loss, x, y), lambda loss: lh.Hessian(model, loss, (x, y))):
            with pytest.raises(error, match=match) as caught:
                build(loss)
            said.append(str(caught.value))
        assert said[0] == said[1] and said[0].startswith("expected ") and ", got " in said[0] and ": " in said[0]


def test_penalties_on_the_weights(setting):
    """By the third argument, and of what the model holds while it runs, exact; of parameters kept elsewhere, refused."""
    model, x, y = setting
    kept = list(model.parameters())

    def penalized(o, t, params):
        return f.cross_entropy(o, t) + sum((p**4).sum() for p in params)

    H = oracle_hessian(model, f.cross_entropy, x, y) + np.diag(12 * nn.utils.parameters_to_vector(kept).detach() ** 2)
    for loss in (
        lambda o, t, params: penalized(o, t, params.values()),
        lambda o, t: penalized(o, t, model.parameters()),
    ):
        lin = lh.linearize(model, loss, x, y)
        np.testing.assert_allclose(lh.to_dense(lin.H), H, rtol=0, atol=1e-14 * np.abs(H).max())
        assert lin.verify() <= 1e-13
    with pytest.raises(UnsupportedModelError, match="penalty on the weights.*take it from params"):
        lh.linearize(model, lambda o, t: penalized(o, t, kept), x, y)
    with pytest.raises(UnsupportedModelError, match="penalty on the weights"):
        lh.Hessian(model, lambda o, t: penalized(o, t, kept), (x, y))


def test_a_loss_of_one_element_is_a_scalar(setting):
    model, x, y = setting
    H = lh.to_dense(lh.linearize(model, f.cross_entropy, x, y).H)
    for shape in ((1,), (1, 1)):

        def loss(o, t, shape=shape):
            return f.cross_entropy(o, t).reshape(shape)

        np.testing.assert_array_equal(lh.to_dense(lh.linearize(model, loss, x, y).H), H)
        np.testing.assert_allclose(lh.to_dense(lh.Hessian(model, loss, (x, y))), H, atol=1e-13)


def test_batches_are_told_from_a_batch(setting):
    model, x, y = setting
    loader = DataLoader(TensorDataset(x, y), batch_size=2)
    hint = "leave targets out, linearize.model, loss_fn, batches"
    cases = [
        ((loader, y), f"got a DataLoader: {hint}"),
        ((loader.dataset,), "got a TensorDataset of single samples: wrap it as torch.utils.data.DataLoader"),
        ((iter(loader), None), hint),
        (((pair for pair in loader), None), f"got a generator: {hint}"),
        (
            ((pair for pair in loader),),
            "got a generator, which can be gone through only once: pass a list of batches or a DataLoader",
        ),
        (((x, y),), "got a pair of both: pass them one by one"),
        ((x,), "expected targets, got none: pass"),
    ]
    for arguments, words in cases:
        with pytest.raises(TypeError, match=words):
            lh.linearize(model, f.cross_entropy, *arguments)
    inputs, targets = next(iter(loader))
    of_one = lh.linearize(model, f.cross_entropy, inputs, targets)
    assert of_one.loss == pytest.approx(float(f.cross_entropy(model(x[:2]), y[:2])), rel=1e-14)
    assert lh.linearize(model, lambda output, _: output.square().sum(), x, None).loss > 0


@pytest.mark.parametrize("value", ["no", 0, 1, [], np.ones(2)])
def test_switches_are_true_or_false(setting, value):
    """What is merely true is refused: "no" would switch on."""
    model, x, y = setting
    record = lh.krylov.run("cg", np.eye(3), np.ones(3))
    pendulum = Pendulum(3)
    at = pendulum.rollout(np.zeros(3))
    lin = lh.linearize(model, f.cross_entropy, x, y)
    given = {
        "extrapolate": [lh.optim.SaddleFree, lh.optim.GaussNewton],
        "geodesic": [lh.optim.GaussNewton],
    }
    for name, kinds in given.items():
        for kind in kinds:
            with pytest.raises(TypeError, match=f"expected {name} to be True or False.*pass one of the two"):
                kind(model, f.cross_entropy, **{name: value})
    for name in ("check_deterministic", "check_symmetric", "retain_graph"):
        for kind in (lh.Hessian, lh.GaussNewton):
            with pytest.raises(TypeError, match=f"expected {name} to be True or False"):
                kind(model, f.cross_entropy, (x, y), **{name: value})
    for call, name in (
        (lambda: lh.linearize(model, f.cross_entropy, x, y, verify=value), "verify"),
        (lambda: lh.linearize(model, f.cross_entropy, [(x, y), (x, y)], reduction="mean", verify=value), "verify"),
        (lambda: lin.again(verify=value), "verify"),
        (lambda: record.as_dict(solution=value), "solution"),
        (lambda: pendulum.expand(at, gauss_newton=value), "gauss_newton"),
        (lambda: neural_ode(shared=value), "shared"),
        (lambda: lh.lq.Solver(lin.analysis, 0.1, escalate=value), "escalate"),
    ):
        with pytest.raises(TypeError, match=f"expected {name} to be True or False"):
            call()
    assert lh.optim.SaddleFree(model, f.cross_entropy, extrapolate=np.False_).extrapolate is False
