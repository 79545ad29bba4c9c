"""States and copies: what goes on as if nothing had been, what is refused, and what a refusal leaves as it was."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from linop_hess.autograd.calling import NOT_GIVEN
from linop_hess.optim import DelayedGratification, GaussNewton, HessianFree, PreconditionedSGD, SaddleFree, TrustRegion
from linop_hess.optim.closures import objective_of
from linop_hess.optim.trials import Course
from tests.optim.problems import chain, dense_hessian

CE = nn.CrossEntropyLoss()
TRIALS = [SaddleFree, GaussNewton, HessianFree, TrustRegion]
ALL = [*TRIALS, PreconditionedSGD]


def trained(kind, steps=3, **how):
    model, x, y = chain()
    opt = kind(model, CE, **how)
    for _ in range(steps):
        opt.step(x, y)
    return opt, x, y


def parameters(opt):
    return [p.detach().clone() for p in opt.model.parameters()]


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))], ids=["copy", "pickle"])
def test_copies_and_pickles_go_on_alone_with_a_model_of_their_own(kind, copied):
    opt, x, y = trained(kind)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)  # which puts a step of its own into the optimizer
    other, before = copied(opt), parameters(opt)
    assert other.model is not opt.model and [p.step for p in other.records] == [1, 2, 3]
    if kind is PreconditionedSGD:
        opt._forget()  # inverses are not copied
    for _ in range(2):
        other.step(x, y)
    assert all(map(torch.equal, parameters(opt), before)) and not all(map(torch.equal, parameters(other), before))
    for _ in range(2):
        opt.step(x, y)
    assert all(map(torch.equal, parameters(opt), parameters(other)))
    scheduler.step()
    assert opt.param_groups[0]["lr"] == other.param_groups[0]["lr"] / 2
    other.model[0].weight.data = torch.zeros(4, 9).double()
    with pytest.raises(ValueError, match=r"0.weight of shape \(4, 5\)"):
        other.step(x, y)


def test_a_copy_with_its_model_stays_with_it():
    opt, x, y = trained(GaussNewton)
    model, other = copy.deepcopy((opt.model, opt))
    other.step(x, y)
    assert other.model is model and CE(model(x), y).item() == pytest.approx(other.last.new_loss)


AFTERWARDS = """
import sys, torch
from linop_hess import optim
from tests.optim.problems import chain
_, x, y = chain()
for name, stored in torch.load(sys.argv[1], weights_only=True).items():
    model, _, _ = chain(seed=7)
    opt = getattr(optim, name)(model, torch.nn.CrossEntropyLoss())
    model.load_state_dict(stored["model"])
    opt.load_state_dict(stored["opt"])
    for _ in range(3):
        loss = opt.step(x, y)
    print(opt.last.step, loss.hex())
"""


def test_stored_states_go_on_in_another_process(tmp_path):
    opts, stored = [trained(kind)[0] for kind in ALL], {}
    for opt in opts:
        stored[type(opt).__name__] = copy.deepcopy({"model": opt.model.state_dict(), "opt": opt.state_dict()})
        if isinstance(opt, PreconditionedSGD):
            opt._forget()
        for _ in range(3):
            opt.step(*chain()[1:])
    torch.save(stored, tmp_path / "states.pt")
    told = [sys.executable, "-c", AFTERWARDS, str(tmp_path / "states.pt")]
    ran = subprocess.run(told, capture_output=True, text=True, check=True)
    for opt, line in zip(opts, ran.stdout.splitlines(), strict=True):
        step, loss = line.split()
        assert int(step) == 6 and float.fromhex(loss) == pytest.approx(opt.last.loss, rel=1e-9)


@pytest.mark.parametrize("kind", ALL)
def test_a_state_of_an_earlier_version_goes_on_with_what_it_tells(kind):
    opt, x, y = trained(kind)
    state = copy.deepcopy(opt.state_dict())
    for name in ("course", "optimizer", "shapes", "start"):
        state["curvature"].pop(name, None)
    other, _, _ = trained(kind, 0)
    other.model.load_state_dict(opt.model.state_dict())
    other.load_state_dict(state)
    other.step(x, y)
    assert other.last.step == 4 and other.last.accepted
    if kind is not HessianFree:
        assert other.last.loss == pytest.approx(opt.last.new_loss if kind in TRIALS else other.last.loss)
    for name in ("steps", "damping"):
        with pytest.raises(KeyError, match=name):
            other.load_state_dict({**state, "curvature": {k: v for k, v in state["curvature"].items() if k != name}})


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("of", ALL)
def test_states_of_other_optimizers_are_refused_and_nothing_changes(kind, of):
    if kind is of:
        return
    theirs, _, _ = trained(of)
    theirs.param_groups[0]["lr"] = 0.123
    opt, x, y = trained(kind)
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match=f"state of a {kind.__name__}.*{of.__name__}"):
        opt.load_state_dict(theirs.state_dict())
    old = copy.deepcopy(theirs.state_dict())
    del old["curvature"]["optimizer"]
    if type(old["curvature"]["damping"]) is not type(before["curvature"]["damping"]) or kind is SaddleFree:
        with pytest.raises(KeyError, match="another optimizer|same damping"):
            opt.load_state_dict(old)
    assert str(opt.state_dict()) == str(before)


@pytest.mark.parametrize("kind", ALL)
def test_states_of_other_parameters_are_refused_and_nothing_changes(kind):
    opt, x, y = trained(kind)
    before = copy.deepcopy(opt.state_dict())
    for model in (chain(width=3)[0], chain(depth=3)[0]):
        theirs = kind(model, CE)
        theirs.param_groups[0]["lr"] = 0.123
        with pytest.raises(ValueError, match="of these parameters|number of parameter groups"):
            opt.load_state_dict(theirs.state_dict())
    two = kind(opt.model, CE, [{"params": opt.model[0].parameters()}, {"params": opt.model[2].parameters()}])
    with pytest.raises(ValueError):
        opt.load_state_dict(two.state_dict())
    assert str(opt.state_dict()) == str(before)
    opt.step(x, y)
    assert opt.last.accepted


def test_a_radius_is_no_damping():
    opt, _, _ = trained(GaussNewton, form="trust-region")
    with pytest.raises(ValueError, match="levenberg-marquardt.*trust-region"):
        trained(GaussNewton)[0].load_state_dict(opt.state_dict())


@pytest.mark.parametrize("kind", ALL)
def test_a_model_that_is_moved_to_another_dtype_between_steps(kind):
    opt, x, y = trained(kind)
    state = copy.deepcopy(opt.state_dict())
    opt.model.float()
    before = opt.last.new_loss
    for _ in range(2):
        opt.step(x.float(), y)
        assert opt.last.accepted and all(p.dtype == torch.float32 for p in opt.model.parameters())
    if kind in TRIALS:
        assert opt.last.new_loss < before and opt.return_to_least() == opt.last.new_loss
    opt.load_state_dict(state)
    opt.step(x.float(), y)
    opt.model.double()
    opt.step(x, y)
    assert all(p.dtype == torch.float64 for p in opt.model.parameters())


@pytest.mark.parametrize(
    ("kind", "scalar"), [(SaddleFree, True), (SaddleFree, False), (GaussNewton, False), (HessianFree, False)]
)
def test_rates_and_refused_trials(kind, scalar):
    """The model's promise for a step times its rate is a product at the point, not where the last trial went."""
    model, x, y = chain()
    opt = kind(model, CE, lr=2.0, damping=DelayedGratification(1e-7))
    for _ in range(4):
        opt.step(lambda: CE(model(x), y)) if scalar else opt.step(x, y)
    assert max(record.trials for record in opt.records) > 2
    assert all(record.new_loss < record.loss or record.gain_ratio < 0.0 for record in opt.records)


def test_products_are_those_of_the_point_after_a_trial_has_left_it():
    model, x, y = chain()
    _, g, product = objective_of(
        dict(model.named_parameters()), model, None, lambda: CE(model(x), y), NOT_GIVEN
    ).gradient()
    v = torch.linspace(-1.0, 1.0, len(g), dtype=torch.float64)[:, None]
    H = torch.as_tensor(dense_hessian(model, CE, x, y))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    assert torch.allclose(product(v), H @ v, rtol=1e-12, atol=1e-12 * float(H.norm()))


def test_another_objective_with_the_same_loss_is_another():
    """Two batches that the loss does not tell apart: least losses of one are not those of the other."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    x = torch.ones(2, 1).double()
    opt = GaussNewton(model, nn.MSELoss(), damping=DelayedGratification(1.0))
    opt.step(x, torch.ones(2, 1).double())
    here = model.weight.item()
    opt.step(x, torch.full((2, 1), 2.0 * here - 1.0, dtype=torch.float64))  # as far off, on the other side
    assert opt.records[1].loss == pytest.approx(opt.records[0].new_loss, rel=1e-9)
    assert model.weight.item() < here and opt.return_to_least() == opt.records[1].new_loss


def test_what_tells_that_data_are_the_same():
    p, x = [nn.Parameter(torch.ones(2).double())], torch.ones(3)

    def forgets(first, second):
        course = Course()
        course.begin(2.0, p, first)
        course.went(torch.ones(2).double(), 1.0, p)
        course.went(torch.ones(2).double(), 1.5, p)
        course.begin(1.5, p, second)
        return course.least == 1.5

    for same in ((x.clone(), {"a": [1, x]}), (), (object(),)):
        assert not forgets(same, copy.deepcopy(same))
    for one, other in (
        ((x,), (x + 1,)),
        ((x,), (x.double(),)),
        ((x, None), (x, 1)),
        (([x],), ([x, x],)),
        ((x,), ({"a": x},)),
    ):
        assert forgets(one, other)
