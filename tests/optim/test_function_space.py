"""Gauss-Newton steps by rows of the Jacobian against dense matrices by double backward."""

import numpy as np
import pytest
import torch
from torch import nn

import linop_hess as lh
from linop_hess.errors import FactorizationError, UnsupportedModelError
from linop_hess.optim import ConditionNumber, Fixed, GainRatio, GaussNewton, HessianFree, JustConvex
from linop_hess.optim.objective import Batch
from linop_hess.optim.quadratic.function_space import function_space
from linop_hess.optim.record import Tally
from linop_hess.tasks import poisson

CE = nn.CrossEntropyLoss()


def problem(samples, sizes=(3, 6, 2), seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    layers = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(a, b), nn.Tanh()]
        nn.init.orthogonal_(layers[-2].weight, 1.5)
    model = nn.Sequential(*layers[:-1]).to(dtype)
    x = torch.randn(samples, sizes[0], dtype=dtype)
    x[-1] = x[0]
    y = torch.randn(samples, sizes[-1], dtype=dtype)
    y[-1] = y[0]
    return model, x, y


def weighted(output, target):
    return (torch.tensor([[1.0, 3.0]], dtype=output.dtype) * (output - target) ** 2).sum() + (
        output[:, 0] * output[:, 1]
    ).sum()


def huber(output, target):
    return nn.functional.huber_loss(output, target, delta=0.3)  # flat curvature where it is linear


LOSSES = {
    "mse": nn.MSELoss(),
    "cross entropy": lambda z, t: CE(z, t[:, 0].gt(0).long()),
    "outputs coupled": weighted,
    "partly linear": huber,
    "linear": lambda z, t: (z * t).sum(),
}


def space(model, loss, x, y, tally=None):
    return function_space(Batch(dict(model.named_parameters()), model, loss, x, y), tally or Tally())


def dense(model, loss, x, y):
    G = torch.from_numpy(lh.to_dense(lh.GaussNewton(model, loss, (x, y))))
    g = torch.cat([p.flatten() for p in torch.autograd.grad(loss(model(x), y), list(model.parameters()))])
    return G, g


@pytest.mark.parametrize("samples", [4, 40])  # fewer rows than parameters, and more
@pytest.mark.parametrize("loss", LOSSES)
def test_the_model_is_that_of_the_dense_matrix(loss, samples):
    model, x, y = problem(samples)
    f = LOSSES[loss]
    tally = Tally()
    rows = space(model, f, x, y, tally)
    G, g = dense(model, f, x, y)
    N, norm = len(g), float(torch.linalg.matrix_norm(G, 2))
    V = torch.randn(N, 3, dtype=torch.float64)
    assert float((rows.gradient - g).norm()) <= 1e-14 * float(g.norm())
    assert float((rows.product(V) - G @ V).norm()) <= 1e-13 * norm * float(V.norm())
    assert (
        abs(rows.change(V[:, 0]) - float(g @ V[:, 0] + V[:, 0] @ G @ V[:, 0] / 2))
        <= 1e-13 * (norm + float(g.norm())) * N
    )
    assert 0.8 * norm <= rows.norm() <= norm * (1 + 1e-12) or norm == rows.norm() == 0.0
    assert tuple(rows.inertia(0.1)) == (0, 0, N) and rows.smallest_convex_damping() == 0.0
    for damping in (1.0, 1e-3 * norm, 1e-6 * norm) if norm else (1.0,):
        solve = rows.factored(damping)
        for v in (g, rows.gradient, V[:, 0]):
            s = solve(v)
            residual = G @ s + damping * s - v
            assert float(residual.norm()) <= 1e-13 * ((norm + damping) * float(s.norm()) + float(v.norm()))
            assert tally.backward_error <= 1e-14
    assert tally.method == "function-space" and tally.factorizations == (3 if norm else 1)


def test_least_squares_with_hardly_any_damping():
    """In function space nothing is divided by λ: the step of λ → 0 is the shortest that solves the linearized equations."""
    model, x, y = problem(3)
    x[-1] += 1.0  # without a sample twice J has full rank
    rows = space(model, nn.MSELoss(), x, y)
    step = -rows.factored(1e-13 * rows.norm())(rows.gradient)
    with torch.enable_grad():
        z = model(x).flatten()
        J = torch.stack(
            [
                torch.cat([g.flatten() for g in torch.autograd.grad(e, list(model.parameters()), retain_graph=True)])
                for e in z
            ]
        )
    expected = torch.linalg.lstsq(J, (y.flatten() - z).detach()[:, None], driver="gelsd").solution[:, 0]
    assert float((step - expected).norm()) <= 1e-9 * float(expected.norm())


def test_a_matrix_that_is_singular_to_working_precision():
    model, x, y = problem(40)
    rows = space(model, nn.MSELoss(), x[:, :] * 0.0, y)  # J has hardly any rank
    with pytest.raises(FactorizationError, match="singular"):
        rows.factored(1e-22)


@pytest.mark.parametrize("form", ["levenberg-marquardt", "trust-region"])
@pytest.mark.parametrize("loss", ["mse", "cross entropy"])
def test_both_ways_take_the_same_steps(form, loss):
    found = []
    for method in ("function-space", "riccati", "auto"):
        model, x, y = problem(9)
        opt = GaussNewton(model, LOSSES[loss], method=method, form=form, tolerance=1e-14)
        for _ in range(2):
            opt.step(x, y)
        found.append((torch.cat([p.detach().flatten() for p in model.parameters()]), opt.last.method))
    (rows, first), (chain, second), (auto, third) = found
    assert (first, second, third) == ("function-space", "riccati", "function-space")
    assert float((rows - chain).norm()) <= 1e-9 * float(chain.norm()) and torch.equal(rows, auto)


class Quadratic(nn.Module):
    """Outputs that are quadratic in the parameters, so that their second derivatives are known: those of z² are 2."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.7, -1.1, 0.4], dtype=torch.float64))

    def forward(self, x):
        return (x * self.w).square() + x * self.w.flip(0)


def test_the_turn_is_the_second_derivative_of_the_damped_path():
    torch.manual_seed(0)
    model, x, y = Quadratic(), torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    loss, damping = nn.MSELoss(reduction="sum"), 2.0
    before = model.w.detach().clone()
    G, g = dense(model, loss, x, y)
    damped = G + damping * torch.eye(3, dtype=torch.float64)
    step = -torch.linalg.solve(damped, g)
    bend = 2.0 * (x * step).square()
    with torch.enable_grad():
        z = model(x)
        (pulled,) = torch.autograd.grad(z, model.w, 2.0 * bend)  # the loss's second derivatives are 2
    turn = -0.5 * torch.linalg.solve(damped, pulled)
    assert 0.0 < float(turn.norm()) < float(step.norm())
    opt = GaussNewton(model, loss, damping=Fixed(damping), geodesic=True, extrapolate=False)
    opt.step(x, y)
    assert opt.last.accepted
    assert float((model.w.detach() - before - step - turn).norm()) <= 1e-12 * float(step.norm())


def test_single_precision():
    model, x, y = problem(9, dtype=torch.float32)
    rows = space(model, nn.MSELoss(), x, y)
    twin = problem(9)[0]
    twin.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    G, g = dense(twin, nn.MSELoss(), x.double(), y.double())
    assert rows.gradient.dtype == torch.float64 and float((rows.gradient - g).norm()) <= 1e-6 * float(g.norm())
    opt = GaussNewton(model, nn.MSELoss(), geodesic=True)
    losses = [opt.step(x, y) for _ in range(20)]
    assert opt.last.method == "function-space" and losses[-1] < 1e-3 * losses[0]


class MeanOverTheBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = problem(4)[0]

    def forward(self, x):
        z = self.inner(x)
        return z - z.mean(0)


def concave(output, target):
    return (output - target).square().sum() - 3.0 * (output[0] - target[0]).square().sum()


def test_a_loss_that_is_not_convex_in_the_output():
    model, x, y = problem(6)
    opt = GaussNewton(model, concave)
    opt.step(x, y)
    assert opt.last.method not in ("", "function-space")
    rows = space(model, concave, x, y)
    convex = space(model, lambda z, t: (z[1:] - t[1:]).square().sum(), x, y)
    V = torch.eye(len(rows.gradient), dtype=torch.float64)
    assert not rows.is_convex and convex.is_convex
    assert float((rows.product(V) - convex.product(V)).norm()) <= 1e-13 * convex.norm()  # its positive part
    opt = GaussNewton(model, concave, method="function-space")
    losses = [opt.step(x, y) for _ in range(3)]
    assert opt.last.method == "function-space" and losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("model", "loss", "options", "words"),
    [
        (MeanOverTheBatch(), nn.MSELoss(), {}, "do not interact"),
        (problem(4)[0], lambda z, t: (z.mean(0) - t.mean(0)).square().sum(), {}, "do not interact"),
        (
            problem(4)[0],
            lambda z, t, params: (z - t).square().sum() + params["0.bias"].square().sum(),
            {},
            "of \\(output, target\\)",
        ),
        (problem(4)[0], nn.MSELoss(), {"nonsmooth": "smooth"}, "generalized"),
    ],
)
def test_where_it_cannot_be_auto_takes_a_chain_and_who_asks_is_told(model, loss, options, words):
    _, x, y = problem(6)
    opt = GaussNewton(model, loss, **options)
    opt.step(x, y)
    assert opt.last.method not in ("", "function-space")
    opt = GaussNewton(model, loss, method="function-space", **options)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(UnsupportedModelError, match=words):
        opt.step(x, y)
    assert all(map(torch.equal, before, model.parameters()))


def test_batches_of_other_sizes_and_closures():
    model, x, y = problem(12)
    opt = GaussNewton(model, nn.MSELoss(), method="function-space")
    first = opt.step(x, y)
    opt.step(x[:5], y[:5])
    opt.step(lambda: (model(x), y))
    opt.step(lambda: (model(x) * model(x).detach().sign(), y))  # more than a call of the model: a closure of its own
    assert opt.step(x, y) < first


@pytest.mark.parametrize("p", [0.5, 1e-3])  # of the second most runs drop nothing
def test_a_random_model_is_refused(p):
    _, x, y = problem(12)
    model = nn.Sequential(nn.Linear(3, 20), nn.Dropout(p), nn.Linear(20, 2)).double()
    for method in ("auto", "function-space"):
        with pytest.raises(UnsupportedModelError, match="same value each time"):
            GaussNewton(model, nn.MSELoss(), method=method).step(x, y)
    assert GaussNewton(model.eval(), nn.MSELoss()).step(x, y) > 0.0


class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = problem(4)[0]
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x):
        self.runs += 1
        return self.inner(x)


def test_a_model_that_changes_its_buffers_is_refused():
    model, (_, x, y) = Counted(), problem(6)
    with pytest.raises(UnsupportedModelError, match="runs"):
        GaussNewton(model, nn.MSELoss()).step(x, y)
    assert model.runs == 1  # of the loss; what rows take is put back


def penalized(model):
    return lambda z, t: nn.functional.mse_loss(z, t) + 0.1 * sum(p.square().sum() for p in model.parameters())


def left_behind(model):
    """A loss of what a layer has left for it."""
    kept = []
    model[0].register_forward_hook(lambda module, args, output: kept.append(output))
    return lambda z, t: nn.functional.mse_loss(z, t) + kept[-1].square().mean()


@pytest.mark.parametrize("make", [penalized, left_behind])
def test_a_loss_that_sees_parameters_past_the_output_is_not_taken(make):
    model, x, y = problem(6)
    assert space(model, make(model), x, y) is None and space(model, nn.MSELoss(), x, y) is not None
    with pytest.raises(UnsupportedModelError, match="output alone"):
        GaussNewton(model, make(model), method="function-space").step(x, y)
    with pytest.raises(TypeError, match="output alone"):  # its gradient too was that by the output alone
        HessianFree(model, make(model)).step(x, y)


def test_a_penalty_on_weights_enters_the_step():
    """The gradient of the penalty was lost where the loss took the weights from the model itself."""

    def of_parameters(model):
        return lambda z, t, own: nn.functional.mse_loss(z, t) + 0.1 * sum(q.square().sum() for q in own.values())

    found = []
    for loss_of in (penalized, of_parameters):
        model, x, y = problem(6)
        opt = GaussNewton(model, loss_of(model))
        opt.step(x, y)
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert float((found[0] - found[1]).norm()) <= 1e-9 * float(found[1].norm())


@pytest.mark.parametrize("method", ["auto", "riccati"])
def test_a_loss_that_is_all_rounding_goes_on(method):
    """In float32 a saturated cross entropy differs in all digits between two ways to compute it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    torch.manual_seed(3)
    x, y = torch.randn(6, 3), torch.randn(6, 2)
    opt = GaussNewton(model, LOSSES["cross entropy"], method=method)
    losses = [opt.step(x, y) for _ in range(20)]
    assert losses[-1] < 1e-6


def test_deep_chains_many_outputs_and_rows_that_do_not_fit_go_by_a_chain(monkeypatch):
    deep, wide = problem(4, (2,) + (3,) * 24 + (1,)), problem(4, (3, 4, 48))
    for model, x, y in (deep, wide):
        opt = GaussNewton(model, nn.MSELoss())
        opt.step(x, y)
        assert opt.last.method not in ("", "function-space")

    def full(nbytes, what):
        raise MemoryError(what)

    monkeypatch.setattr("linop_hess.autograd.output_jacobian.require", full)
    model, x, y = problem(4)
    opt = GaussNewton(model, nn.MSELoss())
    opt.step(x, y)
    assert opt.last.method not in ("", "function-space")
    with pytest.raises(MemoryError, match="Jacobian"):
        GaussNewton(model, nn.MSELoss(), method="function-space").step(x, y)


@pytest.mark.parametrize("options", [{"form": "trust-region"}, {"method": "riccati"}])
def test_steps_that_cannot_be_bent_are_refused(options):
    with pytest.raises(ValueError, match="geodesic"):
        GaussNewton(problem(4)[0], nn.MSELoss(), geodesic=True, **options)


def test_a_sample_twice_with_other_targets_and_hardly_any_damping():
    """y is far from the range of K, and dividing by JJᵀ + λI loses digits that refinement brings back."""
    model, x, y = problem(4)
    y[-1] += 1.0
    rows = space(model, nn.MSELoss(), x, y)
    G, g = dense(model, nn.MSELoss(), x, y)
    damping = 1e-12 * rows.norm()
    s = rows.factored(damping)(rows.gradient)
    error = float((G @ s + damping * s - g).norm()) / (rows.norm() * float(s.norm()) + float(g.norm()))
    assert error <= 1e-14


@pytest.mark.parametrize("damping", [ConditionNumber(1e4), JustConvex()])
def test_strategies_that_ask_the_curvature(damping):
    model, x, y = problem(12)
    opt = GaussNewton(model, nn.MSELoss(), damping=damping)
    losses = [opt.step(x, y) for _ in range(10)]
    assert opt.last.method == "function-space" and losses[-1] < losses[0]
    assert (opt.last.inertia is not None) == isinstance(damping, JustConvex)


@pytest.mark.parametrize("pair", [(0, 1), (2, 3), (0, 5), (4, 5)])
def test_a_loss_that_couples_two_samples(pair):
    model, x, y = problem(6)

    def coupled(z, t):
        return (z - t).square().mean() + 1e-12 * (z[pair[0]] * z[pair[1]]).sum()

    assert space(model, coupled, x, y) is None and space(model, nn.MSELoss(), x, y) is not None


def test_saturated_cross_entropy_goes_on_in_function_space():
    """Where p is near 1 the curvature p − p² is rounding, of either sign, and steps go on."""
    model, x, y = problem(6)
    opt = GaussNewton(model, LOSSES["cross entropy"], method="function-space")
    losses = [opt.step(x, y) for _ in range(60)]
    assert losses[-1] < 1e-12


def test_a_physics_informed_network():
    """Three digits more than first-order methods have after as many evaluations; a step is some thousandths of a second."""
    task = poisson(0, width=12, points=10)
    opt = GaussNewton(task.model, task.loss_fn, damping=GainRatio(0.1), geodesic=True)
    for _ in range(60):
        opt.step(task.inputs, task.targets)
    assert opt.last.method == "function-space" and task.measured()["relative L2 error"] < 1e-3
    assert np.median([r.backward_error for r in opt.records]) <= 1e-14
