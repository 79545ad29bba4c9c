"""Control tasks against double backward through the whole rollout, and Newton's ends against dense eigenvalues."""

import numpy as np
import pytest
import torch

import linop_hess as lh
from linop_hess.lq import Inverse
from linop_hess.lq.problem import Problem
from linop_hess.lq.stages import DenseStage
from linop_hess.tasks import CartPole, Expansion, Pendulum, as_network, lbfgs, newton, refined, regulator
from tests.helpers import dense_hessian

TASKS = {"pendulum": Pendulum(14, 1.2, (2.9, 0.3)), "cart-pole": CartPole(11, 0.8, (0.1, 2.5, -0.2, 0.4))}


def cost_of(task, v, at=None, K=None):
    """The cost of controls, in the loop closed by K about a trajectory, as one graph of torch."""
    x, total = [torch.tensor(s, dtype=torch.float64) for s in task.start], 0.0
    for l in range(task.length):
        u = v[l]
        if K is not None:
            u = u + sum(K[l, i] * (x[i] - at.x[l, i]) for i in range(len(x)))
        total = total + task.running(x, u, torch)
        x = task.step(x, u, torch)
    return total + task.terminal(x, torch)


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("name", TASKS)
def test_derivatives(name, closed):
    task, rng = TASKS[name], np.random.default_rng(1)
    at = task.rollout(3 * rng.standard_normal(task.length))
    K = rng.standard_normal((task.length, len(task.start))) if closed else None
    u = torch.from_numpy(at.u)
    assert float(cost_of(task, u, at, K)) == pytest.approx(at.cost, rel=1e-14)
    truth = dense_hessian(lambda v: cost_of(task, v, at, K), u)
    slope = torch.autograd.functional.jacobian(lambda v: cost_of(task, v, at, K), u)
    found = task.expand(at, K)
    H = found.problem.hessian_product(torch.eye(task.length, dtype=torch.float64))
    assert (H - truth).norm() <= 1e-13 * truth.norm()
    assert np.linalg.norm(found.gradient - slope.numpy()) <= 1e-13 * slope.norm()
    if not closed:
        assert (torch.linalg.eigvalsh(truth) < 0).any()  # not the easy case
        assert np.array_equal(task.gradient(at), found.gradient)
    new = task.rollout(at.u + 0.1, at, K)
    assert float(cost_of(task, u + 0.1, at, K)) == pytest.approx(new.cost, rel=1e-13)
    # The same cost by the controls that the loop came to.
    assert task.rollout(new.u).cost == pytest.approx(new.cost, rel=1e-13)


@pytest.mark.parametrize("name", TASKS)
def test_gauss_newton_is_semidefinite_and_leaves_out_the_dynamics(name):
    task = TASKS[name]
    at = task.rollout(np.sin(np.arange(task.length)))
    eye = torch.eye(task.length, dtype=torch.float64)
    G = task.expand(at, gauss_newton=True).problem.hessian_product(eye)
    H = task.expand(at).problem.hessian_product(eye)
    assert torch.linalg.eigvalsh(G)[0] > 0  # every control costs something
    assert (G - H).norm() > 1e-3 * H.norm()


@pytest.mark.parametrize("name", TASKS)
def test_as_a_network(name):
    """A layer a stage through `linearize` is the same gradient and Hessian as the stages alone."""
    task = TASKS[name]
    u = 2 * np.cos(np.arange(task.length))
    lin = lh.linearize(*as_network(task, u))
    at = task.rollout(u)
    alone = task.expand(at)
    H = alone.problem.hessian_product(torch.eye(task.length, dtype=torch.float64)).numpy()
    assert lin.loss == pytest.approx(at.cost, rel=1e-14)
    assert np.linalg.norm(lin.gradient - alone.gradient) <= 1e-13 * np.linalg.norm(alone.gradient)
    assert np.linalg.norm(lin.H @ np.eye(task.length) - H) <= 1e-13 * np.linalg.norm(H)
    x = lin.inverse(0.01).solve(lin.gradient)
    assert x.backward_error <= 1e-14


def test_regulator_is_the_solution_of_the_lq_problem():
    """Its first control is that of a dense solve, in all controls at once."""
    rng, n, L = np.random.default_rng(2), 3, 6
    F, G, weight = rng.standard_normal((L, n, n)), rng.standard_normal((L, n)), np.array([1.0, 2.0, 0.5])
    root, end = rng.standard_normal((L, n + 1, n + 1)), rng.standard_normal((n, n))
    W = np.swapaxes(root, 1, 2) @ root  # of (state, control), with a cross term
    stages = [
        {"A": W[l, n:, n:], "B": W[l, n:, :n], "C": W[l, :n, :n], "F": F[l], "G": G[l, :, None]} for l in range(L)
    ]
    tensors = {key: torch.from_numpy(np.stack([stage[key] for stage in stages])) for key in "FGABC"}
    stacks = [DenseStage.plain(*tensors.values())]
    stacks.append(
        DenseStage.plain(
            torch.zeros(1, 0, n, dtype=torch.float64), None, None, None, torch.from_numpy(end.T @ end)[None]
        )
    )
    expansion = Expansion(np.zeros(L), Problem(stacks, np.array([(0, l) for l in range(L)] + [(1, 0)])), F, G)
    start = rng.standard_normal(n)
    rows, free = [np.zeros((n, L))], [start]
    for l in range(L):
        rows.append(F[l] @ rows[-1])
        rows[-1][:, l] += G[l]
        free.append(F[l] @ free[-1])
    H, g = np.zeros((L, L)), np.zeros(L)
    for l in range(L + 1):
        of_control = np.zeros((1, L)) if l == L else np.eye(L)[l : l + 1]
        M, m = np.vstack([rows[l], of_control]), np.append(free[l], 0.0)
        S = np.zeros((n + 1, n + 1))
        S[:n, :n] = np.diag(weight) + (end.T @ end if l == L else 0.0)
        S += 0.0 if l == L else W[l]
        H, g = H + M.T @ S @ M, g + M.T @ S @ m
    v = -np.linalg.solve(H, g)
    assert regulator(expansion, weight)[0] @ start == pytest.approx(v[0], rel=1e-9)


def test_newton_swings_up_and_certifies():
    task = Pendulum(60)
    zero = task.rollout(np.zeros(60))
    assert np.linalg.norm(task.gradient(zero)) < 1e-12  # a stationary point, and no minimum:
    assert not Inverse(task.expand(zero).problem, 0.0).is_positive_definite
    found = newton(task)
    assert found.is_minimum and found.records[-1].gradient_norm <= 1e-10
    assert found.trajectory.cost < 0.05 * zero.cost
    assert abs(np.sin(found.trajectory.x[-1, 0] / 2)) < 0.02  # upright, this way round or that
    assert all(record.backward_error <= 1e-14 for record in found.records[:-1])
    H = task.expand(found.trajectory).problem.hessian_product(torch.eye(60, dtype=torch.float64))
    assert torch.linalg.eigvalsh(H)[0] > 0
    costs = [record.cost for record in found.records]
    assert all(b <= a * (1 + 1e-12) for a, b in zip(costs, costs[1:], strict=False))


def test_newton_swings_a_cart_pole_up():
    """From hanging at rest, a saddle, to a minimum by inertia and by dense eigenvalues, at a quadratic rate in the end."""
    task = CartPole(50)
    found = newton(task)
    assert found.is_minimum and found.iterations <= 80 and found.records[-1].gradient_norm <= 1e-10
    assert abs(np.sin(found.trajectory.x[-1, 1] / 2)) < 0.02 and abs(found.trajectory.x[-1, 0]) < 0.02
    assert abs(found.trajectory.x[:, 0]).max() > 0.3  # the cart had to move
    assert all(record.backward_error <= 1e-12 for record in found.records[:-1])
    H = task.expand(found.trajectory).problem.hessian_product(torch.eye(50, dtype=torch.float64))
    assert torch.linalg.eigvalsh(H)[0] > 0
    assert all(record.damping == 0.0 for record in found.records[-4:])
    # From near by, since where the path from afar turns to the minimum depends on rounding.
    near = newton(task, found.trajectory.u + 1e-3 * np.cos(np.arange(50)))
    last = [record.gradient_norm for record in near.records[-3:]]
    assert last[1] <= 1e-2 * last[0] and last[2] <= 1e-2 * last[1]
    lin = lh.linearize(*as_network(task, found.trajectory.u))  # each stage a module of its own
    signs = lin.inertia(0.0)
    assert (signs.negative, signs.zero) == (0, 0) and np.linalg.norm(lin.gradient) <= 1e-10


def test_refined_controls_are_those_of_the_same_signal():
    """Of a linear one exactly, but for the two half stages at the ends."""
    u = np.linspace(0.0, 1.0, 11)[:-1] + 0.05
    assert np.allclose(refined(u, 20)[1:-1], (np.arange(20) + 0.5)[1:-1] / 20, atol=1e-15)
    assert np.array_equal(refined(u, 10), u)
    with pytest.raises(ValueError, match="expected finite controls"):
        refined(np.array([np.nan, 1.0]), 3)
    task = CartPole(500)
    signal = np.sin(3.0 * task.h * (np.arange(500) + 0.5))
    assert CartPole(2000).rollout(refined(signal, 2000)).cost == pytest.approx(task.rollout(signal).cost, rel=0.02)


def test_gauss_newton_and_lbfgs_find_a_minimum_too():
    task = Pendulum(40, 1.0, (0.6, 0.0))
    best = newton(task)
    again = newton(task, curvature="gauss-newton", gtol=1e-8)
    other = lbfgs(task, gtol=1e-8)
    assert best.is_minimum and not again.is_minimum and not other.is_minimum  # these do not look at inertia
    for found in (again, other):
        assert (
            min(record.gradient_norm for record in found.records) <= 1e-7
        )  # L-BFGS ends near the rounding of the cost
        assert np.linalg.norm(found.trajectory.u - best.trajectory.u) <= 1e-5 * np.linalg.norm(best.trajectory.u)
    assert best.iterations < again.iterations < other.iterations


def test_bad_input():
    with pytest.raises(ValueError, match="at least one stage"):
        Pendulum(0)
    with pytest.raises(ValueError, match=r"expected controls of shape \(5,\)"):
        Pendulum(5).rollout(np.zeros(4))
    with pytest.raises(ValueError, match=r"expected controls of shape"):
        refined(np.zeros((2, 3)), 5)
    with pytest.raises(ValueError, match="length"):
        refined(np.zeros(3), 0)
    with pytest.raises(ValueError, match="finite cost"):
        newton(Pendulum(5), np.full(5, 1e200))
    with pytest.raises(ValueError, match="finite cost"):
        newton(CartPole(5), np.full(5, np.nan))
    for options, words in (({"curvature": "exakt"}, "curvature"), ({"gtol": 0.0}, "gtol"), ({"most": 0}, "most")):
        with pytest.raises(ValueError, match=words):
            newton(Pendulum(5), **options)
