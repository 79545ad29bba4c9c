"""What every optimizer keeps: it trains, leaves a record, refuses what does not help, and says what is wrong with its input."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import linop_hess as lh
from linop_hess.errors import UnsupportedModelError
from linop_hess.optim import (
    ConditionNumber,
    Damping,
    Fixed,
    GainRatio,
    GaussNewton,
    JustConvex,
    PreconditionedSGD,
    ResidualMonitored,
    SaddleFree,
    TrustRegion,
)
from linop_hess.optim.quadratic.chain import Linearizer
from tests.optim.problems import chain, dense_hessian, digits_like

CE = nn.CrossEntropyLoss()
TRIALS = [SaddleFree, GaussNewton]
ALL = [*TRIALS, PreconditionedSGD]


def copies(model):
    return [p.detach().clone() for p in model.parameters()]


def same(model, before):
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def _shown(option):
    return type(option).__name__ if isinstance(option, Damping) else option


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (SaddleFree, {"method": "rational"}),
        (SaddleFree, {"method": "lanczos"}),
        (SaddleFree, {"poles": (1.0, 0.03), "solves": 3, "method": "rational"}),
        (SaddleFree, {"damping": ConditionNumber(1e6)}),
        (GaussNewton, {}),
        (GaussNewton, {"form": "trust-region"}),
        (GaussNewton, {"damping": ResidualMonitored(0.1)}),
        (TrustRegion, {}),
    ],
    ids=lambda value: getattr(value, "__name__", None) or ", ".join(f"{k} {_shown(v)}" for k, v in value.items()),
)
def test_a_deep_narrow_network_is_fitted(kind, options):
    model, x, y = chain(depth=5, width=4)
    opt = kind(model, CE, **options)
    for _ in range(60):
        loss = opt.step(x, y)
        if loss < 1e-8:
            break
    assert loss < 1e-8
    assert all(a.new_loss == b.loss or not a.accepted for a, b in zip(opt.records, opt.records[1:], strict=False))
    assert all(r.new_loss < r.loss for r in opt.records if r.accepted)


def test_the_step_is_that_of_the_dense_matrix():
    """With as many solves as there are parameters the subspace is everything."""
    model, x, y = chain(depth=2, width=3)
    H = torch.from_numpy(dense_hessian(model, CE, x, y))
    values, vectors = torch.linalg.eigh(H)
    assert float(values[0]) < 0
    g = torch.cat([p.reshape(-1) for p in torch.autograd.grad(CE(model(x), y), list(model.parameters()))])
    before = torch.cat([p.reshape(-1) for p in copies(model)])
    opt = SaddleFree(model, CE, damping=Fixed(0.3), method="rational", solves=40)
    opt.step(x, y)
    step = torch.cat([p.reshape(-1) for p in copies(model)]) - before
    expected = -vectors @ ((vectors.T @ g) / (values.abs() + 0.3))
    assert opt.last.accepted and opt.last.damping == 0.3
    assert float((step - expected).norm()) <= 1e-8 * float(expected.norm())


def test_gauss_newton_steps_are_those_of_the_dense_matrix():
    model, x, y = chain(depth=2, width=3)
    J = torch.stack(
        [
            torch.cat([p.reshape(-1) for p in torch.autograd.grad(z, list(model.parameters()), retain_graph=True)])
            for z in model(x).reshape(-1)
        ]
    )
    P = torch.softmax(model(x).detach(), 1)
    C = torch.block_diag(*[(torch.diag(p) - p[:, None] * p) / len(x) for p in P])
    G = J.T @ C @ J
    g = torch.cat([p.reshape(-1) for p in torch.autograd.grad(CE(model(x), y), list(model.parameters()))])
    for form, damping, bound in (("levenberg-marquardt", Fixed(0.3), 1e-7), ("trust-region", Fixed(100.0), 0.1)):
        twin, _, _ = chain(depth=2, width=3)
        before = torch.cat([p.reshape(-1) for p in copies(twin)])
        GaussNewton(twin, CE, damping=damping, form=form, extrapolate=False).step(x, y)
        step = torch.cat([p.reshape(-1) for p in copies(twin)]) - before
        if form == "trust-region":
            assert 0.9 * 0.1 <= float(step.norm()) <= 0.1 * (1 + 1e-12)
            lam = -float(step @ (G @ step + g)) / float(step @ step)
        else:
            lam = 0.3
        expected = -torch.linalg.solve(G + lam * torch.eye(len(G)), g)
        assert lam > 0 and float((step - expected).norm()) <= bound * float(expected.norm())


def test_the_record():
    model, x, y = chain()
    opt = SaddleFree(model, CE, damping=JustConvex(), method="rational")
    with pytest.raises(IndexError, match="step"):
        _ = opt.last
    loss = opt.step(x, y)
    record = opt.last
    H = dense_hessian(*((chain()[0], CE, x, y)))
    least = -float(torch.linalg.eigvalsh(torch.from_numpy(H))[0])
    assert record.step == 1 and record.loss == loss and record.inertia.negative == 0
    assert least <= record.damping <= 1.2 * least * 2**record.trials
    assert record.method in ("riccati", "banded", "dense") and record.backward_error <= 1e-12
    assert record.factorizations >= 2 and record.products > 0 and record.seconds > 0 and record.trials >= 1
    assert "step 1" in repr(record) and record.gain_ratio > 0
    assert opt.records == [record]


@pytest.mark.parametrize("kind", TRIALS)
def test_refused_steps_change_nothing(kind):
    """A loss that rises wherever one goes; then one that is NaN there."""
    for elsewhere in (lambda: 1e3, lambda: math.nan, lambda: math.inf):
        model, x, y = chain()
        before = copies(model)

        def loss_fn(output, target, before=before, elsewhere=elsewhere, model=model):
            here = all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
            return CE(output, target) * (1.0 if here else elsewhere())

        opt = kind(model, loss_fn, max_trials=3, damping=GainRatio(1.0))
        loss = opt.step(x, y)
        assert math.isfinite(loss) and not opt.last.accepted and opt.last.reason and opt.last.trials == 3
        assert same(model, before) and opt.damping.value == 64.0
        assert opt.last.new_loss == loss and opt.last.factorizations <= 3
        if kind is SaddleFree:
            assert opt.last.factorizations == (0 if opt.last.method == "lanczos" else 1)


@pytest.mark.parametrize("kind", ALL)
def test_a_loss_that_is_not_finite_is_refused(kind):
    model, x, y = chain()
    opt = kind(model, CE)
    before, bad = copies(model), x.clone()
    bad[0, 0] = math.nan
    assert math.isnan(opt.step(bad, y))
    assert same(model, before) and not opt.last.accepted and "not finite" in opt.last.reason
    assert math.isfinite(opt.step(x, y)) and opt.last.accepted


@pytest.mark.parametrize("kind", ALL)
def test_a_gradient_that_is_not_finite_is_refused(kind):
    model, x, y = chain()

    def loss_fn(output, target):  # √0: finite, with a slope that is not
        return CE(output, target) + (output[0, 0] - output[0, 0].detach()).abs().sqrt()

    before = copies(model)
    opt = kind(model, loss_fn)
    opt.step(x, y)
    assert same(model, before) and not opt.last.accepted and opt.last.reason


def test_a_factorization_that_fails_is_refused(monkeypatch):
    model, x, y = chain()
    before = copies(model)
    opt = SaddleFree(model, CE, method="rational", max_trials=2)

    def fail(*_):
        raise lh.errors.SingularPivotError(3)

    monkeypatch.setattr("linop_hess.optim.saddle_free._SaddleFree._factored", fail)
    opt.step(x, y)
    assert same(model, before) and "singular" in opt.last.reason and opt.damping.value > 1.0


def test_a_minimum_stays_where_it_is():
    model = nn.Linear(2, 1).double()
    x = torch.zeros(3, 2).double()
    target = model(x).detach()
    before = copies(model)
    for kind in TRIALS:
        opt = kind(model, nn.MSELoss())
        assert opt.step(x, target) == 0.0 and same(model, before) and "gradient is zero" in opt.last.reason


@pytest.mark.parametrize("kind", ALL)
def test_closures_take_the_same_steps_as_batches(kind):
    model, x, y = chain()
    twin, third = chain()[0], chain()[0]

    def made(model):  # a search among dampings decides by the last digits of losses, which differ with the third
        return kind(model, CE, **({"method": "rational", "damping": GainRatio()} if kind is SaddleFree else {}))

    opt, of_closure, of_two = made(model), made(twin), made(third)

    def closure():
        return twin(x), y

    def two_calls():
        return torch.cat([third(x[:2]), third(x[2:])]), y

    for _ in range(3):
        opt.step(x, y)
        of_closure.step(closure)
        of_two.step(two_calls)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert all(
        torch.allclose(p, q, rtol=1e-4, atol=1e-6) for p, q in zip(model.parameters(), third.parameters(), strict=True)
    )


def test_scalar_closures():
    model, x, y = chain()
    opt = SaddleFree(model, None)
    for _ in range(40):
        loss = opt.step(lambda: CE(model(x), y))
    assert loss < 1e-3 and opt.last.method == "lanczos" and opt.last.factorizations == 0
    with pytest.raises(TypeError, match="output, target"):
        GaussNewton(model, CE).step(lambda: CE(model(x), y))
    with pytest.raises(TypeError, match="output, target"):
        SaddleFree(model, CE, method="rational").step(lambda: CE(model(x), y))
    with pytest.raises(TypeError, match="output, target"):
        SaddleFree(model, None, damping=JustConvex()).step(lambda: CE(model(x), y))
    sgd = PreconditionedSGD(model, CE, curvature_batch=lambda: (x, y))
    sgd.step(lambda: CE(model(x), y))
    assert sgd.last.accepted


@pytest.mark.parametrize("kind", TRIALS)
def test_closures_that_return_the_wrong_thing(kind):
    model, x, y = chain()
    opt = kind(model, CE)
    for wrong in (lambda: None, lambda: 3.0, lambda: (model(x), y, 1), lambda: [model(x), y]):
        with pytest.raises(TypeError, match="output, target"):
            opt.step(wrong)
    with pytest.raises(ValueError, match="scalar"):
        opt.step(lambda: model(x))
    with pytest.raises(TypeError, match="targets"):
        opt.step(x)
    with pytest.raises(TypeError, match="loss function"):
        kind(model, None).step(x, y)


def test_closures_that_differentiate():
    model, x, y = chain()

    def closure():
        loss = CE(model(x), y)
        if torch.is_grad_enabled():
            loss.backward()
        return loss

    with pytest.raises(ValueError, match="backward"):
        SaddleFree(model, None).step(closure)
    with pytest.raises(ValueError, match="depends on the parameters"):
        SaddleFree(model, None).step(lambda: CE(model(x), y).detach())


@pytest.mark.parametrize("kind", ALL)
def test_states_and_schedulers(kind):
    model, x, y = chain()
    opt = kind(model, CE)
    opt.step(x, y)
    twin, _, _ = chain()
    twin.load_state_dict(model.state_dict())
    other = kind(twin, CE)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    if kind is PreconditionedSGD:
        opt._forget()  # a curvature is not stored
    for _ in range(2):
        assert other.step(x, y) == opt.step(x, y)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    with pytest.raises(KeyError, match="another optimizer"):
        other.load_state_dict(torch.optim.SGD(twin.parameters(), lr=0.1).state_dict())
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
    before = opt.param_groups[0]["lr"]
    opt.step(x, y)
    scheduler.step()
    assert opt.param_groups[0]["lr"] == before / 2
    opt.step(x, y)
    assert opt.last.accepted
    opt.zero_grad()


@pytest.mark.parametrize("kind", ALL)
def test_groups(kind):
    model, x, y = chain()
    frozen = copies(model)[0]
    opt = kind(model, CE, [{"params": list(model[2].parameters()), "lr": 0.5}, {"params": model[4].parameters()}])
    opt.step(x, y)
    changed = [
        i
        for i, layer in enumerate(model)
        if isinstance(layer, nn.Linear)
        for p in [layer.weight]
        if not torch.equal(p, dict(chain()[0].named_parameters())[f"{i}.weight"])
    ]
    assert changed == [2, 4] and torch.equal(model[0].weight, frozen)
    opt.add_param_group({"params": model[0].parameters()})
    opt.step(x, y)
    assert not torch.equal(model[0].weight, frozen)
    assert kind(model, CE, model[0].parameters()).named_parameters().keys() == {"0.weight", "0.bias"}


@pytest.mark.parametrize("kind", ALL)
def test_groups_and_rates_that_cannot_be(kind):
    model, _, _ = chain()
    with pytest.raises(ValueError, match="empty"):
        kind(model, CE, [])
    with pytest.raises(ValueError, match="empty"):
        kind(model, CE, [{"params": []}])
    with pytest.raises(ValueError, match="of the model"):
        kind(model, CE, [nn.Parameter(torch.zeros(3).double())])
    for lr in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError):
            kind(model, CE, lr=lr)
    with pytest.raises(TypeError, match="Module"):
        kind(lambda x: x, CE)
    with pytest.raises(TypeError, match="loss_fn"):
        kind(model, 3)
    with pytest.raises(ValueError, match="trainable"):
        kind(chain()[0].requires_grad_(False), CE)


@pytest.mark.parametrize("kind", ALL)
def test_models_that_change_between_steps(kind):
    model, x, y = chain()
    opt = kind(model, CE)
    opt.step(x, y)
    model.add_module("more", nn.Linear(3, 3).double())
    with pytest.raises(ValueError, match="new ones, more.weight"):
        opt.step(x, y)
    model.more.requires_grad_(False)
    opt.step(x, y)  # frozen is fine
    model[0] = nn.Linear(5, 4).double()
    with pytest.raises(ValueError, match=r"without its 0.weight"):
        opt.step(x, y)
    model, x, y = chain()
    opt = kind(model, CE)
    model[0].weight.data = torch.zeros(4, 9).double()
    with pytest.raises(ValueError, match=r"0.weight of shape \(4, 5\)"):
        opt.step(x, y)


@pytest.mark.parametrize("kind", ALL)
def test_random_layers(kind):
    model, x, y = chain()
    model.insert(2, nn.Dropout(0.5))
    opt = kind(model, CE)
    with pytest.raises(UnsupportedModelError, match="eval"):
        opt.step(x, y)
    model.eval()
    opt.step(x, y)
    assert opt.last.accepted


@pytest.mark.parametrize("kind", ALL)
def test_batches_of_other_sizes(kind):
    """Each step is on its own batch; a preconditioner may be that of a batch of another size."""
    model, _, _ = chain()
    opt = kind(model, CE)
    for batch in (4, 16, 7):
        opt.step(*digits_like(batch))
        assert opt.last.accepted


@pytest.mark.parametrize("kind", TRIALS)
def test_nothing_of_the_users_changes(kind):
    model, x, y = chain()
    CE(model(x), y).backward()
    grads, rng = [p.grad.clone() for p in model.parameters()], torch.get_rng_state()
    kind(model, CE).step(lambda: (model(x), y))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert torch.equal(torch.get_rng_state(), rng) and not model._forward_hooks
    assert all(p.requires_grad for p in model.parameters()) and torch.is_grad_enabled()


def test_single_precision_and_penalties():
    model, x, y = chain(dtype=torch.float32)
    for kind in ALL:
        opt = kind(model, lambda o, t, params: CE(o, t) + 1e-3 * sum(p.square().sum() for p in params.values()))
        first = opt.step(x, y)
        assert all(opt.step(x, y) <= first for _ in range(3)) and all(
            p.dtype == torch.float32 for p in model.parameters()
        )


@pytest.mark.parametrize("curvature", ["gauss_newton", "positive", "absolute"])
def test_preconditioned_sgd(curvature):
    model, _, _ = chain()
    x, y = digits_like(64)
    opt = PreconditionedSGD(
        model,
        CE,
        lr=0.05 if curvature == "positive" else 0.3,
        momentum=0.5,
        weight_decay=1e-4,
        curvature=curvature,
        damping=0.3,
        every=3,
        clip=None,
        average=2,
        curvature_batch=lambda: (x, y),
    )
    start = float(CE(model(x), y))
    for k in range(24):
        opt.step(x[k % 4 :: 4], y[k % 4 :: 4])
    assert float(CE(model(x), y)) < 0.8 * start
    assert sum(r.factorizations for r in opt.records) == 8 and all(r.accepted for r in opt.records)


def test_mini_batches_with_a_mean_of_curvatures_and_a_bound_on_steps():
    """Better than SGD and Adam in as many steps, at rates chosen for these here; each step within the bound."""
    x, y = digits_like(96)

    def trained(make):
        model, _, _ = chain()
        opt, order = make(model), torch.Generator().manual_seed(0)
        for _ in range(12):
            for chosen in torch.randperm(96, generator=order).split(16):
                opt.zero_grad()
                if isinstance(opt, PreconditionedSGD):
                    opt.step(x[chosen], y[chosen])
                else:
                    CE(model(x[chosen]), y[chosen]).backward()
                    opt.step()
        return float(CE(model(x), y)), opt

    ours, opt = trained(
        lambda m: PreconditionedSGD(m, CE, curvature_batch=lambda: (x, y), every=6, damping=0.03, clip=1e-3)
    )
    adam = min(trained(lambda m, r=r: torch.optim.Adam(m.parameters(), lr=r))[0] for r in (3e-3, 1e-2, 3e-2))
    sgd = min(
        trained(lambda m, r=r: torch.optim.SGD(m.parameters(), lr=r, momentum=0.9))[0] for r in (1e-2, 3e-2, 1e-1)
    )
    assert ours < min(adam, sgd)
    assert sum(r.factorizations for r in opt.records) == 12 and all(r.accepted for r in opt.records)


@pytest.mark.parametrize("rate", [0.1, 1.0])
def test_the_bound_on_a_step(rate):
    """sᵀ(G + λI)s of a step without momentum, against the dense matrix."""
    model, x, y = chain()
    parameters = list(model.parameters())
    groups = [{"params": parameters[:2], "lr": rate}, {"params": parameters[2:], "lr": rate}]
    G = lh.to_dense(lh.linearize(model, CE, x, y).gauss_newton())
    before = torch.cat([p.detach().reshape(-1).clone() for p in parameters]).numpy()
    opt = PreconditionedSGD(model, CE, groups, momentum=0.0, damping=0.2, clip=1e-5)
    opt.step(x, y)
    s = torch.cat([p.detach().reshape(-1) for p in parameters]).numpy() - before
    assert s @ (G + 0.2 * np.eye(len(s))) @ s == pytest.approx(1e-5, rel=1e-3)


def test_options_that_cannot_be():
    model, _, _ = chain()
    with pytest.raises(ValueError, match="method"):
        SaddleFree(model, CE, method="magic")
    with pytest.raises(ValueError, match="poles"):
        SaddleFree(model, CE, poles=())
    with pytest.raises(ValueError, match="at least 1"):
        SaddleFree(model, CE, solves=0)
    with pytest.raises(ValueError, match="form"):
        GaussNewton(model, CE, form="magic")
    with pytest.raises(ValueError, match="method"):
        GaussNewton(model, CE, method="magic")
    with pytest.raises(ValueError, match="curvature"):
        PreconditionedSGD(model, CE, curvature="magic")
    with pytest.raises(ValueError, match="momentum"):
        PreconditionedSGD(model, CE, momentum=1.0)
    with pytest.raises(ValueError, match="damping"):
        PreconditionedSGD(model, CE, damping=0.0)
    for options, words in (
        ({"clip": 0.0}, "clip"),
        ({"decay": 1.0}, "decay"),
        ({"decay": 0.5, "curvature": "positive"}, "decay=0.0"),
        ({"decay": 0.5, "average": 3}, "decay=0.0"),
    ):
        with pytest.raises(ValueError, match=words):
            PreconditionedSGD(model, CE, **options)


@pytest.mark.parametrize(("kind", "closure"), [(SaddleFree, False), (GaussNewton, True)])
def test_steps_reuse_what_numbers_do_not_change(kind, closure, monkeypatch):
    """Bit for bit the steps of derivatives taken anew, and fewer runs of a recorded model."""

    class Recorded(nn.Module):
        runs = 0

        def __init__(self):
            super().__init__()
            self.inner, _, _ = chain(depth=2)

        def forward(self, x):
            Recorded.runs += 1
            return self.inner(x)

    _, x, y = chain()

    def trained():
        model, Recorded.runs = Recorded(), 0
        opt = kind(model, CE, method="riccati") if kind is GaussNewton else kind(model, CE)
        for k in range(4):
            rows = slice(None) if k != 2 else slice(0, 4)  # a batch of another size between
            opt.step(lambda rows=rows: (model(x[rows]), y[rows])) if closure else opt.step(x[rows], y[rows])
        return copies(model), Recorded.runs

    found, runs = trained()
    linearize = Linearizer.__call__

    def anew(self, objective):
        self._told = None
        return linearize(self, objective)

    monkeypatch.setattr(Linearizer, "__call__", anew)
    again, more = trained()
    assert all(map(torch.equal, found, again)) and runs < more


def test_sharpness_may_be_raised_between_steps_where_kinks_are_smoothed():
    model, x, y = chain(act=nn.ReLU)
    opt, sharp = SaddleFree(model, CE, nonsmooth="smooth", sharpness=2.0), SaddleFree(model, CE, method="lanczos")
    assert opt.sharpness == 2.0 and sharp.sharpness is None
    opt.sharpness = 8.0
    lin = opt._linearize(opt._objective(x, y))
    expected = lh.linearize(model, CE, x, y, nonsmooth="smooth", sharpness=8.0)
    v = torch.ones(lin.problem.size).double().numpy()
    assert (lin.H @ v == expected.H @ v).all()
    with pytest.raises(ValueError, match="positive"):
        opt.sharpness = 0.0
    with pytest.raises(ValueError, match="smooth"):
        sharp.sharpness = 1.0
