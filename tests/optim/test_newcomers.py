"""What one does who takes these optimizers for torch's: schedulers, old training loops, models in training mode."""

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, ReduceLROnPlateau

import linop_hess as lh
from linop_hess.errors import UnsupportedModelError
from linop_hess.optim import GaussNewton, HessianFree, PreconditionedSGD, SaddleFree, TrustRegion
from tests.optim.problems import chain

CE = nn.CrossEntropyLoss()
TRIALS = [SaddleFree, GaussNewton, HessianFree, TrustRegion]
ALL = [*TRIALS, PreconditionedSGD]


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(
    "schedule",
    [
        lambda opt: CosineAnnealingLR(opt, 2),
        lambda opt: LambdaLR(opt, lambda epoch: epoch / 2),
        lambda opt: OneCycleLR(opt, 1.0, total_steps=8, cycle_momentum=False),
        lambda opt: ReduceLROnPlateau(opt, patience=0),
    ],
    ids=["cosine", "warm-up", "one cycle", "plateau"],
)
def test_schedulers_and_rates_of_zero(kind, schedule):
    model, x, y = chain()
    opt = kind(model, CE)
    scheduler = schedule(opt)
    for _ in range(4):
        before, rate = [p.detach().clone() for p in model.parameters()], opt.param_groups[0]["lr"]
        loss = opt.step(x, y)
        stays = all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        assert stays == (rate == 0.0 or not opt.last.accepted)
        if rate == 0.0 and kind in TRIALS:
            assert opt.last.reason == "all rates are zero" and opt.last.factorizations == 0
        scheduler.step(*[loss] * isinstance(scheduler, ReduceLROnPlateau))
    assert any(record.accepted for record in opt.records)


@pytest.mark.parametrize("kind", ALL)
def test_a_group_may_rest(kind):
    model, x, y = chain()
    opt = kind(model, CE, [{"params": model[0].parameters()}, {"params": model[2].parameters()}])
    opt.param_groups[1]["lr"] = 0.0
    first, second = model[0].weight.detach().clone(), model[2].weight.detach().clone()
    opt.step(x, y)
    assert opt.last.accepted and torch.equal(model[2].weight, second) and not torch.equal(model[0].weight, first)
    opt.param_groups[1]["lr"] = -1.0
    with pytest.raises(ValueError, match="positive rate"):
        opt.step(x, y)


@pytest.mark.parametrize("kind", ALL)
def test_loops_written_for_other_optimizers(kind):
    model, x, y = chain()
    opt = kind(model, CE)
    CE(model(x), y).backward()
    with pytest.raises(TypeError, match=r"step\(inputs, targets\) or step\(closure\), got nothing"):
        opt.step()

    def closure():  # of torch's L-BFGS
        opt.zero_grad()
        loss = CE(model(x), y)
        loss.backward()
        return loss

    with pytest.raises(ValueError, match=r"leave backward\(\) out"):
        opt.step(closure)
    assert not opt.records


@pytest.mark.parametrize("kind", ALL)
def test_parameters_that_are_frozen_or_halved_after_the_optimizer_was_made(kind):
    model, x, y = chain()
    opt = kind(model, CE)
    model[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="0.weight, which is frozen"):
        opt.step(x, y)
    model[0].weight.requires_grad_(True)
    opt.step(x, y)
    assert opt.last.accepted
    model.half()
    with pytest.raises(TypeError, match="float16"):
        opt.step(x.half(), y)


@pytest.mark.parametrize("how", ["batch", "two calls", "loss"])
@pytest.mark.parametrize("kind", TRIALS)
def test_models_in_training_mode_are_refused(kind, how):
    if how == "loss" and kind is not SaddleFree:
        return
    model, x, y = chain()
    model.insert(1, nn.BatchNorm1d(4).double())
    opt = kind(model, CE)
    data = {
        "batch": (x, y),
        "two calls": (lambda: (torch.cat([model(x[:3]), model(x[3:])]), y),),
        "loss": (lambda: CE(model(x), y),),
    }[how]
    with pytest.raises(UnsupportedModelError, match="1.running_mean.*model.eval"):
        opt.step(*data)
    model.eval()
    opt.step(*data)
    assert opt.last.accepted


def test_the_products_of_a_solve_by_iterations_are_counted():
    model, x, y = chain()
    found = lh.linearize(model, CE, x, y).gauss_newton()
    solved = found.inverse(0.1, "iterative").solve(lh.linearize(model, CE, x, y).gradient)
    opt = GaussNewton(model, CE, damping=0.1, method="iterative", extrapolate=False)
    opt.step(x, y)
    assert opt.last.trials == 1 and solved.iterations > 3
    assert abs(opt.last.products - solved.iterations) <= 3  # those of residuals, and of what was promised
