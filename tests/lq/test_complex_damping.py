"""Complex dampings: (H + iδI)⁻¹ of real chains, against LAPACK on the dense complex matrix."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

import linop_hess as lh
from linop_hess import lq
from linop_hess.lq.accuracy import BACKWARD_ERROR
from linop_hess.lq.analysis import Analysis
from linop_hess.lq.pivots.bunch_kaufman import SymmetricFactor

METHODS = ["riccati", "banded", "dense"]


def network(widths, batch, act=nn.Tanh, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    layers = []
    for a, b in zip(widths[:-2], widths[1:-1], strict=True):
        layers += [nn.Linear(a, b), act()]
    model = nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1])).double()
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight, 1.5)
            nn.init.normal_(layer.bias, std=0.3)
    x, y = torch.randn(batch, widths[0]).double(), torch.randint(widths[-1], (batch,))
    x[-1], y[-1] = x[0], y[0]
    return model.to(dtype), nn.CrossEntropyLoss(), x.to(dtype), y


def dense_hessian(model, loss_fn, x, y):
    """By double backward, column by column."""
    params = list(model.parameters())
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss_fn(model(x), y), params, create_graph=True)])
    rows = [torch.cat([r.reshape(-1) for r in torch.autograd.grad(g, params, retain_graph=True)]) for g in gradient]
    H = torch.stack(rows).detach()
    return (H + H.T).numpy() / 2


CASES = {
    "narrow": ((4, 3, 5, 4, 3), 6),
    "wide": ((12, 14, 11, 13, 6), 9),
}


@pytest.fixture(scope="module", params=CASES, ids=CASES)
def case(request):
    widths, batch = CASES[request.param]
    args = network(widths, batch)
    H = dense_hessian(*args)
    values = np.linalg.eigvalsh(H)
    assert values[0] < -1e-3 * values[-1]  # indefinite, and not by little
    lin = lh.linearize(*args)
    assert lin.analysis.is_narrow == (request.param == "narrow")
    return lin, H


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("relative", [1.0, 1e-5, -1e-3])
def test_solves_are_those_of_lapack(case, method, relative):
    lin, H = case
    norm, delta = np.linalg.norm(H, 2), relative * np.linalg.norm(H, 2)
    for real_part in (0.0, 0.3 * norm) if relative < 0 else (0.0,):
        damping = complex(real_part, delta)
        solver = lq.Solver(lin.analysis, damping, method)
        assert solver.method == method
        g = np.random.default_rng(0).standard_normal((len(H), 3)) + 0j
        g[:, 1] = lin.gradient
        g[:, 2] *= 1j
        found = solver.solve(g)
        x = found.x.numpy()
        assert found.x.dtype == torch.complex128 and found.backward_error <= BACKWARD_ERROR[torch.float64]
        K = H + damping * np.eye(len(H))
        residual = np.linalg.norm(g - K @ x, axis=0)
        assert (
            residual <= 1e-13 * (np.linalg.norm(K, 2) * np.linalg.norm(x, axis=0) + np.linalg.norm(g, axis=0))
        ).all()
        expected = scipy.linalg.solve(K, g)
        # Two solutions of small backward error differ by that times the condition, which the imaginary part bounds.
        gap = np.linalg.norm(x - expected, axis=0) / np.linalg.norm(expected, axis=0)
        assert (gap <= 1e-13 * np.linalg.norm(K, 2) / abs(delta)).all()


@pytest.mark.parametrize("method", METHODS)
def test_factors_need_no_refinement_where_the_damping_is_not_small(case, method):
    lin, H = case
    damping = 1e-2j * np.linalg.norm(H, 2)
    factors = lq.METHODS[method].factor(lin.analysis, damping)
    assert factors.damping == damping and factors.answers == {"solve"} and factors.nbytes > 0
    g = torch.from_numpy(lin.gradient)[:, None].to(torch.complex128)
    x = factors.solve(g)
    r = g - torch.from_numpy(H + damping * np.eye(len(H))) @ x
    assert float(r.norm()) <= 1e-12 * (np.linalg.norm(H, 2) * float(x.norm()) + float(g.norm()))


def test_the_analysis_is_not_made_again(case):
    lin, _ = case
    analysis = Analysis(lin.problem)
    assert analysis.over(0.1) is analysis and analysis.over(0.1j) is analysis.over(0.2j)
    cast = analysis.in_complex
    assert cast.real is analysis and cast.groups[0].space.r == analysis.groups[0].space.r
    assert cast.problem.dtype == torch.complex128 and cast.norm == analysis.norm


def test_damping_without_imaginary_part_is_real():
    lin = lh.linearize(*network((4, 3, 5, 4, 3), 6))
    solver = lq.Solver(lin.analysis, 0.5 + 0j)
    assert isinstance(solver.damping, float) and solver.solve(lin.gradient).x.dtype == torch.float64


def test_the_plan_has_what_is_complex():
    lin = lh.linearize(*network((4, 3, 5, 4, 3), 6))
    plan = lq.make_plan(lin.analysis, 0.1j)
    assert plan.choice in METHODS and plan.costs["woodbury"].why_not and "0.1j" in str(plan)
    real = lq.make_plan(lin.analysis, 0.1)
    assert plan.costs["riccati"].seconds == 4 * real.costs["riccati"].seconds


def test_single_precision_is_solved_in_double():
    args = network((6, 5, 4, 3), 5, dtype=torch.float32)
    lin = lh.linearize(*args)
    found = lq.Solver(lin.analysis, 0.1j).solve(lin.gradient_tensor)
    H = dense_hessian(args[0].double(), args[1], args[2].double(), args[3])
    r = lin.gradient - (H + 0.1j * np.eye(len(H))) @ found.x.numpy()
    assert found.x.dtype == torch.complex128
    assert np.linalg.norm(r) <= 1e-6 * np.linalg.norm(lin.gradient)  # H itself is that of float32


@pytest.mark.parametrize("several", [False, True])
def test_weight_decay_is_part_of_the_damping(several):
    args = network((4, 3, 5, 3), 6)

    def penalized(output, target, params):
        squares = [(0.3 if several and "bias" in name else 0.1) * p.square().sum() for name, p in params.items()]
        return args[1](output, target) + sum(squares)

    H = dense_hessian(*args)
    sizes = [(name, p.numel()) for name, p in args[0].named_parameters()]
    diagonal = np.concatenate([np.full(n, 0.6 if several and "bias" in name else 0.2) for name, n in sizes])
    lin = lh.linearize(args[0], penalized, *args[2:])
    K = H + np.diag(diagonal) + 0.05j * np.eye(len(H))
    for method in METHODS:
        x = lq.Solver(lin.analysis, 0.05j, method).solve(lin.gradient).x.numpy()
        expected = scipy.linalg.solve(K, lin.gradient)
        assert np.linalg.norm(x - expected) <= 1e-11 * np.linalg.norm(expected)


def test_a_model_of_live_sets():
    """Shared parameters, and branches that live on."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            h = x + torch.tanh(self.a(x))
            h = h + torch.tanh(self.b(h)) * torch.sigmoid(self.a(h))
            return self.out(h)

    torch.manual_seed(0)
    args = Residual().double(), nn.MSELoss(), torch.randn(5, 4).double(), torch.randn(5, 2).double()
    lin, H = lh.linearize(*args), dense_hessian(*args)
    for method in METHODS:
        x = lq.Solver(lin.analysis, 1e-2j, method).solve(lin.gradient).x.numpy()
        expected = scipy.linalg.solve(H + 1e-2j * np.eye(len(H)), lin.gradient)
        assert np.linalg.norm(x - expected) <= 1e-11 * np.linalg.norm(expected)


def test_questions_of_sign_are_refused():
    lin = lh.linearize(*network((4, 3, 5, 4, 3), 6))
    inverse = lq.Inverse(lin.analysis, 0.1j)
    assert inverse.solve(torch.from_numpy(lin.gradient)).backward_error <= 1e-14
    questions = {
        "inertia": lambda: inverse.inertia,
        "is_positive_definite": lambda: inverse.is_positive_definite,
        "slogdet": inverse.slogdet,
        "positive": inverse.positive,
        "report": inverse.report,
        "entries": lambda: inverse.entries,
        "sample": lambda: inverse.sample(1, None),
    }
    for question in questions.values():
        with pytest.raises(TypeError, match="expected a real damping"):
            question()
    with pytest.raises(TypeError, match="lq.Solver"):
        lin.inverse(0.1j)
    with pytest.raises(ValueError, match="woodbury"):
        lq.Solver(lin.gauss_newton().analysis, 0.1j, "woodbury")
    with pytest.raises(TypeError, match="real damping"):
        lq.METHODS["ldu"].factor(lin.analysis, 0.1j)
    with pytest.raises(ValueError, match="finite"):
        lq.Solver(lin.analysis, complex(0.1, np.inf))
    with pytest.raises(TypeError, match="complex numbers"):
        lq.Solver(lin.analysis, 0.1).solve(torch.from_numpy(lin.gradient + 0j))


def test_a_block_of_two_by_two_pivots():
    """Bunch-Kaufman of a complex symmetric matrix with zeros on its diagonal: all its pivots are 2 × 2, some with equal Takagi values."""
    rng = np.random.default_rng(0)
    for n, equal in ((1, False), (6, True), (30, False)):
        S = rng.standard_normal((n, n)) + 1j * rng.standard_normal((n, n))
        S = S + S.T
        if n > 1:
            np.fill_diagonal(S, 0.0)
        if equal:
            S = np.kron(np.diag([1.0, 2.0, 3.0]), [[0.0, 1j], [1j, 0.0]])
        factor = SymmetricFactor.of(torch.from_numpy(S))
        T = np.linalg.inv(factor.whiten(torch.eye(n, dtype=torch.complex128)).numpy())
        rebuilt = T * factor.theta.numpy() @ T.T
        assert np.linalg.norm(rebuilt - S) <= 1e-13 * np.linalg.norm(S) * np.linalg.cond(T)
        x = factor.solve(torch.ones(n, 1, dtype=torch.complex128)).numpy()
        assert np.linalg.norm(S @ x - 1) <= 1e-12 * np.linalg.norm(S) * np.linalg.norm(x)
