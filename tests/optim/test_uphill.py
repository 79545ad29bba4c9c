"""Steps that go uphill: what is taken, what is remembered, and the way along a narrow curved valley."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from linop_hess.optim import DelayedGratification, GaussNewton, SaddleFree, Searched
from linop_hess.optim.damping import Damping
from linop_hess.optim.trials import Course
from linop_hess.tasks import poisson
from tests.optim.problems import chain

CE = nn.CrossEntropyLoss()


def parameters(*values):
    return [nn.Parameter(torch.tensor([v, 2.0 * v], dtype=torch.float64)) for v in values]


def test_the_damping_rises_by_little_and_falls_by_more():
    damping = DelayedGratification(1.0, raised=1.5, lowered=5.0, least=0.1)
    assert damping.begin(None) is None and damping.value == 1.0
    damping.refused()
    damping.refused()
    assert damping.value == 1.5**2
    damping.accepted(-3.0, math.nan)
    assert damping.value == pytest.approx(0.45)
    for _ in range(5):
        damping.accepted(1.0, math.nan)
    assert damping.value == 0.1
    other = DelayedGratification(7.0, least=0.1)
    other.load_state_dict(damping.state_dict())
    assert vars(other) == vars(damping)
    assert Damping.bold == 0.0 and Searched().bold == 0.0 and damping.bold == 2.0


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"initial": 0.0}, "positive"),
        ({"raised": 1.0}, "raised above 1"),
        ({"lowered": 0.5}, "lowered above 1"),
        ({"bold": -1.0}, "bold to be 0 or more"),
        ({"least": -1e-3}, "least damping"),
        ({"bold": math.nan}, "finite"),
    ],
)
def test_numbers_that_are_not_usable(how, words):
    with pytest.raises(ValueError, match=words):
        DelayedGratification(**how)
    with pytest.raises(TypeError):
        DelayedGratification(bold="2")


@pytest.mark.parametrize("angle", [0.0, 0.3, 1.2, math.pi / 2, 2.0, math.pi])
@pytest.mark.parametrize("bold", [0.0, 1.0, 2.0])
def test_the_rule_of_transtrum_and_sethna(angle, bold):
    course, p = Course(), parameters(1.0)
    course.begin(4.0, p)
    course.went(torch.tensor([3.0, 0.0], dtype=torch.float64), 2.0, p)
    step = 0.7 * torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
    most = 2.0 * min(100.0, (1.0 - math.cos(angle)) ** -bold if angle else math.inf)
    for loss in (0.9 * most, 1.1 * most):
        assert course.leads(step, loss, bold) == (bold > 0.0 and loss <= most)


@pytest.mark.parametrize("bold", [0.5, 1.5, 2000.0])
def test_parallel_steps_whose_cosine_rounding_takes_beyond_one(bold):
    generator, beyond = torch.Generator().manual_seed(0), 0
    for _ in range(200):
        step = torch.randn(3, generator=generator, dtype=torch.float64)
        longer = 0.1 * step
        beyond += float(step @ longer) / float(step.norm() * longer.norm()) > 1.0
        course = Course()
        course.begin(4.0, parameters(1.0))
        course.went(step, 2.0, parameters(1.0))
        assert course.leads(longer, 150.0, bold) and course.leads(-longer, 2.0, bold) is False
    assert beyond > 0


def test_nothing_leads_from_nowhere_nor_below_zero_nor_in_another_objective():
    step = torch.ones(2, dtype=torch.float64)
    course, p = Course(), parameters(1.0)
    course.begin(4.0, p)
    assert not course.leads(step, 4.0, 2.0)  # no step was before
    course.went(step, 3.0, p)
    course.begin(3.0, p)
    assert course.leads(step, 290.0, 2.0) and not course.leads(step, 310.0, 2.0) and not course.leads(step, -1.0, 2.0)
    course.begin(3.1, p)  # other data
    assert not course.leads(step, 3.1, 2.0) and course.least == 3.1
    course.went(step, -1.0, p)
    course.begin(-1.0, p)
    assert not course.leads(step, -0.5, 2.0)  # (1 − cos β)ᵇ makes it smaller, not better
    course.begin(-1.0, parameters(1.0, 2.0))  # a group was added
    assert not course.leads(torch.ones(4, dtype=torch.float64), -1.0, 2.0)


def valley(seed, damping):
    task = poisson(seed, width=16, points=12)
    opt = GaussNewton(task.model, task.loss_fn, damping=damping, geodesic=True)
    return task, opt


def test_a_curved_valley_takes_fewer_steps():
    """Against steps that lower the loss most, of which each tries as many points: the median of five initial points."""
    bold, greedy = [], []
    for seed in range(5):
        for damping, ends in ((DelayedGratification(), bold), (Searched(0.01), greedy)):
            task, opt = valley(seed, damping)
            for _ in range(80):
                opt.step(task.inputs, task.targets)
            ends.append((opt.return_to_least(), sum(r.trials for r in opt.records)))
    (least, trials), (other, others) = np.median(bold, 0), np.median(greedy, 0)
    assert least < 0.1 * other and trials < 1.5 * others


def test_steps_uphill_are_what_the_rule_allows_and_the_least_point_is_kept():
    task, opt = valley(0, None)
    assert isinstance(opt.damping, DelayedGratification)  # the default of geodesic steps
    with pytest.raises(IndexError, match="call step"):
        opt.return_to_least()
    points, losses = [], []
    for _ in range(40):
        opt.step(task.inputs, task.targets)
        points.append(torch.cat([p.detach().flatten() for p in task.model.parameters()]))
        losses.append(opt.last.new_loss)
    steps = [b - a for a, b in zip(points, points[1:], strict=False)]
    uphill = 0
    for k, record in enumerate(opt.records[1:], 1):
        if record.new_loss > record.loss:
            s, before = steps[k - 1], steps[k - 2]
            cosine = float(s @ before / (s.norm() * before.norm()))
            assert (1.0 - cosine) ** 2 * record.new_loss <= min(losses[:k]) * (1.0 + 1e-6)
            assert record.accepted and record.gain_ratio < 0.0
            uphill += 1
    assert uphill >= 3
    least = opt.return_to_least()
    assert least == min(losses) == task.loss().item()
    at = torch.cat([p.detach().flatten() for p in task.model.parameters()])
    assert torch.equal(at, points[int(np.argmin(losses))])
    opt.step(task.inputs, task.targets)
    assert opt.last.loss == least and opt.return_to_least() <= least


@pytest.mark.parametrize("kind", [GaussNewton, SaddleFree])
def test_any_trial_optimizer_goes_on_from_a_stored_state(kind):
    model, x, _ = chain(outputs=1, batch=12)
    y = torch.sin(3.0 * x.sum(1, keepdim=True))
    opt = kind(model, nn.MSELoss(), damping=DelayedGratification(1.0))
    for _ in range(12):
        opt.step(x, y)
    twin = copy.deepcopy(model)
    other = kind(twin, nn.MSELoss(), damping=DelayedGratification())
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for _ in range(12):
        assert other.step(x, y) == opt.step(x, y)
    assert any(r.new_loss > r.loss for r in opt.records)
    assert other.return_to_least() == opt.return_to_least()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_with_other_steps_the_least_point_is_where_they_ended():
    model, x, y = chain()
    opt = GaussNewton(model, CE)
    opt.step(x, y)
    before = [p.detach().clone() for p in model.parameters()]
    assert opt.return_to_least() == opt.last.new_loss
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    for p in model[0].parameters():
        p.requires_grad_(False)
    part = GaussNewton(model, CE, model[2].parameters())
    part.step(x, y)
    part.add_param_group({"params": model[4].parameters()})
    with pytest.raises(ValueError, match="others since"):
        part.return_to_least()
