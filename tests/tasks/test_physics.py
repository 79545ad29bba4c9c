"""Residuals and references of physics-informed tasks, against autograd and against what others found."""

import math

import numpy as np
import pytest
import torch

import linop_hess as lh
from linop_hess.tasks import burgers, neural_ode, poisson
from linop_hess.tasks.neural_ode import spiral
from linop_hess.tasks.physics import VISCOSITY, Jets
from linop_hess.tasks.viscous import viscous_burgers
from tests.helpers import oracle_hessian


def derivatives(u, x):
    """u, its gradient and its second derivatives at points, by autograd."""
    x = x.clone().requires_grad_()
    value = u(x)
    (first,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    second = torch.stack([torch.autograd.grad(first[:, i].sum(), x, retain_graph=True)[0][:, i] for i in (0, 1)], 1)
    return value.detach(), first.detach(), second


def moved(task):
    """Parameters at which nothing vanishes."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in task.model.parameters():
            p += 0.5 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return task


def test_jets_are_derivatives():
    torch.manual_seed(0)
    jets, x = Jets([2, 5, 4, 1], (0, 1)).double(), torch.randn(7, 2).double()
    value, first, second = derivatives(lambda z: jets.value(z)[:, 0], x)
    truth = torch.cat([value[:, None], first, second], 1)
    torch.testing.assert_close(jets(x)[:, :, 0], truth, rtol=0, atol=1e-14 * float(truth.abs().max()))


def test_residuals_are_those_of_the_equations():
    task = moved(poisson(width=4, points=3))
    x, inside = task.inputs, 9
    value, _, second = derivatives(task.model.value, x)
    truth = second.sum(1) + 2 * math.pi**2 * torch.sin(math.pi * x).prod(1)
    truth = torch.cat([truth[:inside] / inside**0.5, value[inside:] * (4 / 12) ** 0.5])
    torch.testing.assert_close(task.model(x), truth, rtol=0, atol=1e-13 * float(truth.abs().max()))

    task = moved(burgers(depth=2, width=4, points=4))
    value, first, second = derivatives(task.model.value, task.inputs)
    truth = (first[:, 1] + value * first[:, 0] - VISCOSITY * second[:, 0]) / len(value) ** 0.5
    torch.testing.assert_close(task.model(task.inputs), truth, rtol=0, atol=1e-13 * float(truth.abs().max()))
    edge = torch.tensor([[-1.0, 0.3], [1.0, 0.9], [0.3, 0.0], [-0.7, 0.0]]).double()
    conditions = torch.where(edge[:, 1] == 0, -torch.sin(math.pi * edge[:, 0]), torch.zeros(4).double())
    torch.testing.assert_close(task.model.value(edge), conditions, rtol=0, atol=1e-15)


def test_an_exact_solution_has_no_residual():
    """The equation that the reference solves is the one of the residuals."""
    x, t = np.linspace(-0.95, 0.95, 11), np.full(11, 0.4)
    u = lambda dx=0.0, dt=0.0: viscous_burgers(x + dx, t + dt, 0.05)  # noqa: E731
    h = 1e-3
    first = lambda a, b, c, d: (a - 8 * b + 8 * c - d) / (12 * h)  # noqa: E731
    u_x, u_t = first(u(-2 * h), u(-h), u(h), u(2 * h)), first(u(0, -2 * h), u(0, -h), u(0, h), u(0, 2 * h))
    u_xx = (-u(-2 * h) + 16 * u(-h) - 30 * u() + 16 * u(h) - u(2 * h)) / (12 * h * h)
    assert np.abs(u_t + u() * u_x - 0.05 * u_xx).max() <= 1e-7


def test_the_layer_is_as_steep_as_published():
    """C. Basdevant et al. (1986): a slope of 152.00516 at x = 0, at the time 1.6037/π."""
    h = 1e-5
    near, far = (viscous_burgers(np.array([k * h]), np.array([1.6037 / math.pi]), VISCOSITY)[0] for k in (1, 2))
    assert (far - 8 * near) / (6 * h) == pytest.approx(152.00516, abs=2e-4)
    with pytest.raises(ValueError, match="positive viscosity"):
        viscous_burgers(np.zeros(1), np.zeros(1), 0.0)
    for x, t in ((0.0, -1.0), (0.0, np.nan), (np.nan, 0.0), (np.inf, 1.0)):
        with pytest.raises(ValueError, match="finite"):
            viscous_burgers(np.full(1, x), np.full(1, t), VISCOSITY)


@pytest.mark.parametrize(
    "make",
    [
        lambda: poisson(width=3, points=2),
        lambda: burgers(depth=2, width=3, points=2),
        lambda: neural_ode(depth=2, width=3, batch=4),
        lambda: neural_ode(depth=2, width=3, batch=4, shared=False),
    ],
    ids=["poisson", "burgers", "one field", "a field each"],
)
def test_their_hessians(make):
    task = moved(make())
    lin = lh.linearize(task.model, task.loss_fn, task.inputs, task.targets)
    H = oracle_hessian(task.model, task.loss_fn, task.inputs, torch.zeros(1) if task.targets is None else task.targets)
    assert np.linalg.norm(lh.to_dense(lin.H) - H, 2) <= 1e-13 * np.linalg.norm(H, 2)
    assert np.linalg.eigvalsh(H)[0] < 0


def test_the_parameters_of_jets_are_not_shared():
    """Rows of a product that are read at different times lie between each other: it stays one operation, of samples by themselves."""
    task = poisson(width=4, points=3)
    stages = lh.linearize(task.model, task.loss_fn, task.inputs, task.targets).stages
    assert not [row for row in stages if "shared" in row.operation]
    assert len(stages) < 25


def test_they_are_learned():
    for task, steps in ((poisson(width=3, points=3), 8), (neural_ode(depth=1, width=4, batch=8), 8)):
        before = float(task.loss().detach())
        opt = lh.optim.GaussNewton(task.model, task.loss_fn)
        for _ in range(steps):
            opt.step(task.inputs, task.targets)
        assert opt.last.new_loss <= 0.5 * before
        assert all(np.isfinite(value) for value in task.measured().values()) and task.measured()


def test_the_spiral_is_where_small_steps_lead():
    """A thousand steps of Heun's method, and of half the size, extrapolated to none."""
    x = np.random.default_rng(0).uniform(-1.5, 1.5, (5, 2))

    def heun(steps: int) -> np.ndarray:
        y, h, A = x, 0.5 / steps, np.array([[-0.1, 2.0], [-2.0, -0.1]])
        for _ in range(steps):
            slope = y**3 @ A.T
            y = y + h / 2 * (slope + (y + h * slope) ** 3 @ A.T)
        return y

    assert np.abs(spiral(x) - (4 * heun(2000) - heun(1000)) / 3).max() <= 1e-8
    assert np.abs(spiral(x) - x).max() > 0.3


def test_bad_sizes():
    cases = [(poisson, {"points": 0}), (burgers, {"depth": 0}), (neural_ode, {"batch": 1.5})]
    cases += [(make, {"seed": seed}) for make in (poisson, burgers, neural_ode) for seed in (-1, 1.5)]
    for make, options in cases:
        with pytest.raises((ValueError, TypeError), match=next(iter(options))):
            make(**options)
