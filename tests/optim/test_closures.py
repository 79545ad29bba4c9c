"""What a step is taken on: models, losses and closures that differentiate, and what closures feed a model with."""

import pytest
import torch
from torch import nn

from linop_hess.optim import GainRatio, GaussNewton, HessianFree, PreconditionedSGD, SaddleFree, TrustRegion
from tests.optim.problems import chain

MSE = nn.functional.mse_loss
ALL = [SaddleFree, GaussNewton, TrustRegion, PreconditionedSGD, HessianFree]


class Slope(nn.Module):
    """The derivative of a network by its inputs, by autograd as most write it, without `enable_grad`."""

    def __init__(self):
        super().__init__()
        self.u = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()

    def forward(self, points):
        points = points.detach().requires_grad_()
        return torch.autograd.grad(self.u(points).sum(), points, create_graph=True)[0].sum(1)


def slopes():
    torch.manual_seed(0)
    return Slope(), torch.rand(6, 2).double(), torch.ones(6).double()


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("outside", [torch.enable_grad, torch.no_grad])
def test_models_that_differentiate(kind, outside):
    found = []
    for how in ("batch", "model called", "two calls"):
        model, x, y = slopes()
        # A search among dampings decides by the last digits of losses, which differ with two calls.
        opt = kind(model, MSE, **({"method": "rational", "damping": GainRatio()} if kind is SaddleFree else {}))
        data = {
            "batch": (x, y),
            "model called": (lambda model=model, x=x, y=y: (model(x), y),),
            "two calls": (lambda model=model, x=x, y=y: (torch.cat([model(x[:2]), model(x[2:])]), y),),
        }[how]
        with outside():
            found.append([opt.step(*data) for _ in range(4)])
        assert opt.last.accepted and found[-1][-1] < found[-1][0]
        assert all(p.grad is None for p in model.parameters())
    assert found[0] == found[1]
    assert found[0] == pytest.approx(found[2], rel=1e-5)


def test_losses_that_differentiate():
    model, x, _ = slopes()
    loss = SaddleFree(model, None)
    losses = [loss.step(lambda: MSE(model(x), torch.ones(6).double())) for _ in range(10)]
    assert losses[-1] < 0.1 * losses[0]

    def through_the_output(output, points):
        return (torch.autograd.grad(output.sum(), points, create_graph=True)[0] - 1.0).square().mean()

    points = x.clone().requires_grad_()
    opt = SaddleFree(model.u, through_the_output)
    losses = [opt.step(points, points) for _ in range(10)]
    assert losses[-1] < 0.5 * losses[0] and points.grad is None


class Embedded(nn.Module):
    """A network and the inputs it is fitted with."""

    def __init__(self):
        super().__init__()
        self.points = nn.Parameter(torch.randn(5, 3).double())
        self.f = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)).double()

    def forward(self, x):
        return self.f(x)


class All(Embedded):
    def forward(self, x):
        return self.f(torch.tanh(self.points[x]))


@pytest.mark.parametrize("kind", ALL)
def test_closures_that_feed_a_model_with_its_own_parameters(kind):
    """They are no constants: steps are those of the model that does so inside."""
    models = []
    for make in (Embedded, All):
        torch.manual_seed(0)
        models.append(make())
    index, y = torch.arange(5), torch.randn(5, 1).double()
    one, other = (kind(model, MSE) for model in models)
    for _ in range(2):
        fed = one.step(lambda: (models[0](torch.tanh(models[0].points)), y))
        assert fed == pytest.approx(other.step(index, y), rel=1e-9)
    assert not torch.equal(models[0].points, All().points)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", ALL)
def test_what_other_networks_give_is_constant(kind):
    """As an encoder of inputs, or a teacher: their graphs are dropped, as without gradients."""
    torch.manual_seed(0)
    encoder, teacher = nn.Linear(5, 5).double(), nn.Linear(5, 3).double()
    model, x, _ = chain()
    twin, _, _ = chain()
    one, other = kind(model, MSE), kind(twin, MSE)
    fixed = encoder(x).detach(), teacher(x).detach()
    for _ in range(2):
        assert one.step(lambda: (model(encoder(x)), teacher(x))) == other.step(*fixed)
    with pytest.raises(ValueError, match=r"target is constant.*detach"):
        one.step(lambda: (model(x), 0.5 * model(x)))
    one.step(lambda: (model(x), 0.5 * model(x).detach()))


@pytest.mark.parametrize("kind", ALL)
def test_closures_as_of_first_order_optimizers_are_told_what_is_too_much(kind):
    model, x, y = slopes()
    opt = kind(model, MSE)

    def closure():
        opt.zero_grad()
        loss = MSE(model.u(x)[:, 0], y)
        loss.backward()
        return loss

    with pytest.raises((TypeError, ValueError), match=r"leave backward\(\) out|return both"):
        opt.step(closure)
    with pytest.raises(ValueError, match="depends? on"):
        opt.step(lambda: (model(x).detach(), y))


@pytest.mark.parametrize("kind", ALL)
def test_a_schedule_may_begin_and_end_at_zero(kind):
    model, x, y = chain()
    opt = kind(model, nn.CrossEntropyLoss())
    warm = torch.optim.lr_scheduler.LambdaLR(opt, lambda epoch: (0.0, 0.5, 1.0, 0.0)[min(epoch, 3)])
    damping = opt.damping.value if hasattr(opt, "damping") else opt.damping_value
    before = [p.detach().clone() for p in model.parameters()]
    losses = []
    for k in range(4):
        losses.append(opt.step(x, y))
        if k in (0, 3):
            assert opt.last.accepted is (kind is PreconditionedSGD) or opt.last.reason == "all rates are zero"
        warm.step()
        if k == 0:
            assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
            assert damping == (opt.damping.value if hasattr(opt, "damping") else opt.damping_value)
    assert losses[0] == losses[1] and losses[2] < losses[1] and losses[3] < losses[2]


def test_bad_batches_do_not_end_a_run():
    """Each doubles the damping, to a bound; curvatures that are made halve it again."""
    model, x, y = chain()
    opt = PreconditionedSGD(model, nn.CrossEntropyLoss(), every=1)
    for _ in range(1100):
        opt.step(x * torch.nan, y)
    assert 1e9 < opt.damping_value < torch.inf
    losses = [opt.step(x, y) for _ in range(150)]
    assert opt.damping_value == 0.1 and losses[-1] < 0.5 * losses[0]
