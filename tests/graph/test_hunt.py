"""What random models (tests/benchmarks/hunt.py) brought to light, each kind against dense double backward and LAPACK."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as f

import linop_hess as lh
from tests.graph import oracle
from tests.graph.case import Case, normal


def case(function, shapes, loss_fn=None, inputs=3, samples=4):
    """A function of parameters p0, p1, … of those shapes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        params = {f"p{k}": 1.3 * normal(*shape) for k, shape in enumerate(shapes)}
        x, t = normal(samples, inputs), normal(samples, 2)
    loss_fn = loss_fn or (lambda out, t: (out.sin() + out.square()).sum())
    return Case(function, loss_fn, x, t, sum(p.numel() for p in params.values()), params=params)


def linearized(c, **options):
    return lh.linearize(c.model, c.loss_fn, c.inputs, c.targets, params=c.params, **options)


def require_exact(c, tolerance=1e-13):
    """Loss, gradient and Hessian are those of double backward, and solves satisfy it."""
    loss, gradient, H = oracle.hessian(c)
    assert np.abs(H).max() > 1e-2
    lin = linearized(c, verify=True)
    assert abs(lin.loss - loss) <= tolerance * max(abs(loss), 1.0)
    np.testing.assert_allclose(lin.gradient, gradient, rtol=0, atol=tolerance * np.abs(gradient).max())
    np.testing.assert_allclose(lh.to_dense(lin.H), H, rtol=0, atol=tolerance * np.abs(H).max())
    A = H + 0.03 * np.eye(len(H))
    x = lin.inverse(0.03).solve(gradient).x
    assert np.linalg.norm(A @ x - gradient) <= 1e-14 * (
        np.linalg.norm(A, 2) * np.linalg.norm(x) + np.linalg.norm(gradient)
    )
    return lin, H


class TestParametersThatTheLossReads:
    """An output may hold parameters themselves, beside operations that read them."""

    @pytest.mark.parametrize(
        "function",
        [
            lambda p, x: torch.where(torch.tensor([True, False, True]), x * p["p0"], p["p0"]),
            lambda p, x: (x @ p["p1"], p["p1"]),
            lambda p, x: {"a": p["p0"], "b": (x * p["p0"]).sum(1), "c": p["p1"][:1]},
            lambda p, x: torch.cat([p["p0"], p["p0"][:2], (x @ p["p1"]).reshape(-1)]),
            lambda p, x: p["p0"].expand(4, 3),
        ],
        ids=["where", "tuple", "dict", "twice", "expanded"],
    )
    def test_is_exact(self, function):
        def loss_fn(out, t):
            parts = [out] if isinstance(out, torch.Tensor) else list(out.values() if isinstance(out, dict) else out)
            return sum((o.sin() + o.pow(4) / 4).sum() for o in parts)

        require_exact(case(function, [(3,), (3, 2)], loss_fn))


class TestConstantsThatRequireGradients:
    @pytest.mark.parametrize("both", [True, False])
    def test_in_the_output(self, both):
        def function(p, x):
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(x.sin().sum(), x, create_graph=True)
            return (slope, x @ p["p0"]) if both else torch.cat([slope, x @ p["p0"]], 1)

        require_exact(
            case(function, [(3, 2)], lambda out, t: (out[0].sum() * out[1].sin().sum()) if both else out.pow(3).sum())
        )


WRITES = {
    "pow_ number": lambda u: u.pow_(2),
    "pow_ tensor": lambda u: u.abs_().add_(1).pow_(torch.linspace(1, 2, 2).to(u)),
    "mul_ number": lambda u: u.mul_(2).sin_(),
    "div_ tensor": lambda u: u.div_(u.detach().square() + 1).exp_(),
    "div_ mode": lambda u: u.add_(u.div(0.3, rounding_mode="floor")).sin_(),
    "remainder_": lambda u: u.remainder_(0.7).square_(),
    "fmod_": lambda u: u.fmod_(0.7).square_(),
    "clamp_": lambda u: u.clamp_(-0.5, 0.8).sin_(),
    "clamp_ tensor": lambda u: u.clamp_(torch.tensor([-0.9, -1.9]).to(u), torch.tensor([0.9, 1.2]).to(u)).sin_(),
    "lerp_ number": lambda u: u.clone().lerp_(u.sin(), 0.3),
    "lerp_ tensor": lambda u: u.clone().lerp_(u.sin(), torch.tensor([0.3, 0.6]).to(u)),
    "addcmul_": lambda u: u.clone().addcmul_(u.sin(), u.cos(), value=0.5),
    "addcdiv_": lambda u: u.clone().addcdiv_(u.sin(), u.cos() + 2),
    "atan2_": lambda u: u.clone().atan2_(u.cos() + 2),
    "xlogy_": lambda u: u.xlogy_(u.detach().square() + 1).sin_(),
    "baddbmm_": lambda u: u[None].clone().baddbmm_(u[None].sin(), u[None, :2].cos())[0],
}


@pytest.mark.parametrize("name", WRITES)
def test_operations_in_place(name):
    """`pow_` of a number is no `pow` of that overload, which takes a number to the power of a tensor."""
    require_exact(case(lambda p, x: WRITES[name]((x @ p["p0"]).tanh() + x[:, :2]), [(3, 2)]))


CONSTANTS_WRITTEN_INTO = {
    "a row": lambda b, u: b[-1].add_(u[0]),
    "rows": lambda b, u: b[1:3].mul_(u[1:3]),
    "the first rows": lambda b, u: b[:2].mul_(u[:2]),
    "two parts": lambda b, u: (b[1].mul_(u[1]), b[3].add_(u[2])),
    "a column": lambda b, u: b[:, 0].add_(u[:, 0]),
    "all": lambda b, u: b.add_(u),
}


@pytest.mark.parametrize("name", CONSTANTS_WRITTEN_INTO)
@pytest.mark.parametrize("reads", ["all", "each row"])
def test_constants_written_into_in_part(name, reads):
    """What is not written stays a constant."""

    def function(p, x):
        b = x[:, :2] * 1.5
        CONSTANTS_WRITTEN_INTO[name](b, (x @ p["p0"]).tanh())
        return b.sin() if reads == "all" else torch.stack([row.sin() for row in b])

    require_exact(case(function, [(3, 2)]))


class Module(nn.Module):
    """A function of parameters p0, p1, … as a module."""

    def __init__(self, function, params):
        super().__init__()
        self.function = function
        for name, value in params.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, x):
        return self.function(dict(self.named_parameters()), x)


class TestGaussNewtonProducts:
    def require_exact(self, function, shapes, loss_fn):
        c = case(function, shapes, loss_fn)
        c = replace(c, model=Module(c.model, c.params), params=None)
        G = oracle.gauss_newton(c)
        assert np.abs(G).max() > 1e-4
        found = lh.GaussNewton(c.model, c.loss_fn, (c.inputs, c.targets))
        np.testing.assert_allclose(lh.to_dense(found), G, rtol=0, atol=1e-13 * np.abs(G).max())

    def test_of_penalties_on_numbers(self):
        self.require_exact(
            lambda p, x: torch.tanh(x @ p["p0"]) * p["p1"],
            [(3, 2), (), (1,)],
            lambda out, t, p: f.mse_loss(out, t) + (p["p1"] * p["p2"] - 1).square().sum() + p["p1"] ** 4,
        )

    @pytest.mark.parametrize("softmax", [False, True])
    def test_of_a_backward_pass_without_derivative_at_zero(self, softmax):
        def function(p, x):
            u = torch.tanh(x @ p["p0"]).logcumsumexp(1)
            return u.softmax(1) if softmax else u

        self.require_exact(function, [(3, 2)], f.mse_loss)


def recurrent(p, x):
    """One matrix, three times, so that all parameters are state and no stage has pivots of its own without damping."""
    h = torch.tanh(x)
    for _ in range(3):
        h = torch.tanh(h @ p["p0"] + x)
    return h


class TestQuestionsToTheFactors:
    @pytest.mark.parametrize("method", ["auto", "riccati", "dense", "banded", "ldu"])
    def test_without_damping(self, method):
        c = case(
            recurrent, [(3, 3)], lambda out, t: (out.sum(1) - 2 * t[:, 0]).square().sum() + out.pow(3).sum(), samples=6
        )
        lin, H = require_exact(c)
        values = np.linalg.eigvalsh(H)
        assert values[0] < 0 < values[-1] and np.abs(values).min() > 1e-4 * np.abs(values).max()
        wanted = (int((values < 0).sum()), 0, int((values > 0).sum()))
        found, sign = lin.inertia(0.0), -1.0 if wanted[0] % 2 else 1.0
        assert (found.negative, found.zero, found.positive) == wanted
        inverse = lin.inverse(0.0, method)
        assert inverse.inertia() == found
        assert inverse.slogdet()[0] == sign
        assert inverse.slogdet()[1] == pytest.approx(np.log(np.abs(values)).sum(), abs=1e-11)

    def test_singular_without_damping(self):
        lin = linearized(case(lambda p, x: recurrent(p, x) + 0 * p["p1"], [(3, 3), (3,)]))
        with pytest.raises(lh.errors.FactorizationError, match="singular"):
            lin.inertia(0.0)

    @pytest.mark.parametrize("method", ["auto", "riccati", "banded"])
    @pytest.mark.parametrize("damping", [1e-5, 3e-4, 1.0])
    def test_determinants_where_a_state_hardly_moves_the_loss(self, method, damping):
        """The norm of a single entry has no derivative but rounding, and its unit is out of all proportion."""

        def function(p, x):
            h = f.softplus(x @ p["p0"])
            u = f.layer_norm((h * p["p1"])[:, :1, None].expand(-1, 1, 12) + 5, (12,))
            return f.layer_norm(u, (12,), p["p2"]).sum(2) + h.sin() @ p["p3"]

        c = case(function, [(3, 2), (2,), (12,), (2, 1)], lambda out, t: 1e-3 * f.mse_loss(out, t[:, :1]))
        H = oracle.hessian(c)[2]
        sign, log = np.linalg.slogdet(H + damping * np.eye(len(H)))
        found = linearized(c, verify=False).inverse(damping, method).slogdet()
        assert found[0] == sign
        assert found[1] == pytest.approx(log, abs=1e-9)


class TestRoundingIsNoFault:
    def test_gradients_that_cancel(self):
        """A shift of all logits changes nothing: its gradient is rounding."""
        c = case(
            lambda p, x: torch.sin(x @ p["p0"]).detach() + p["p1"],
            [(3, 4), (1,)],
            lambda out, t: f.cross_entropy(out, out.detach().argmin(1)),
        )
        lin = lh.linearize(c.model, c.loss_fn, c.inputs, c.targets, params={"p1": c.params["p1"], "p0": c.params["p0"]})
        assert np.abs(lin.gradient).max() <= 1e-15
        assert np.abs(lh.to_dense(lin.H)).max() <= 1e-15

    def test_hessians_that_cancel(self):
        c = case(
            lambda p, x: torch.sin(x @ p["p0"]).detach() + p["p1"] * p["p2"],
            [(3, 4), (1,), (1,)],
            lambda out, t: f.cross_entropy(out, out.argmin(1)),
        )
        inverse = linearized(c).inverse(1e-2, "dense")
        np.testing.assert_allclose(inverse.diagonal(), 100.0, rtol=1e-12)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    @pytest.mark.parametrize("seed", range(6))
    def test_verify_does_not_raise(self, dtype, seed):
        torch.manual_seed(seed)
        A, x = normal(5, 5).to(dtype), normal(6, 5).to(dtype)

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.W, self.v = nn.Parameter(A), nn.Parameter(A[0].clone())

            def forward(self, x):
                u = torch.linalg.solve(self.W @ self.W.T + 0.02 * torch.eye(5).to(x), (x * self.v).T).T
                norm = f.rms_norm if hasattr(f, "rms_norm") else f.layer_norm  # torch 2.4
                return norm(u @ self.W, (5,)) @ self.W.T

        lin = lh.linearize(Model(), lambda out, t: 1e3 * out.reshape(-1).logsumexp(0), x, None, verify=True)
        assert lin.verify() <= 1e4 * torch.finfo(dtype).eps
