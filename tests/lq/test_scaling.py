"""Networks whose states move by many orders of magnitude: what is compared with ‖H‖ must be measured in the controls' units."""

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import minres
from torch import nn
from torch.nn import functional as f

import linop_hess as lh


def chain(depth, activation, gain, width, outputs, batch, loss_fn):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for _ in range(depth):
            linear = nn.Linear(width, width).double()
            nn.init.orthogonal_(linear.weight, gain=gain)
            layers += [linear, activation()]
        model = nn.Sequential(*layers, nn.Linear(width, outputs).double())
        x = torch.randn(batch, width).double()
        labels = loss_fn is f.cross_entropy
        y = torch.randint(outputs, (batch,)) if labels else torch.randn(batch, outputs).double()
    return lh.linearize(model, loss_fn, x, y)


def far_inputs(widths, activation, loss_fn, scale, batch=4):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for a, b in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Linear(a, b), activation()]
        model = nn.Sequential(*layers[:-1]).double()
        x = scale * torch.randn(batch, widths[0]).double()
        labels = loss_fn is f.cross_entropy
        y = torch.randint(widths[-1], (batch,)) if labels else torch.randn(batch, widths[-1]).double()
    return lh.linearize(model, loss_fn, x, y)


def total(output, target):
    return output.sum()


CASES = {
    "20 linear layers": lambda: chain(20, nn.Identity, 1.3, 3, 3, 4, f.cross_entropy),
    "55 linear layers": lambda: chain(55, nn.Identity, 1.3, 4, 2, 6, f.cross_entropy),
    "50 linear layers of gain 2": lambda: chain(50, nn.Identity, 2.0, 2, 2, 3, f.mse_loss),
    "30 leaky layers": lambda: chain(30, nn.LeakyReLU, 1.3, 3, 3, 4, f.mse_loss),
    "45 leaky layers": lambda: chain(45, nn.LeakyReLU, 1.3, 2, 3, 8, f.cross_entropy),
    "large inputs, relu": lambda: far_inputs((3, 3, 3), nn.ReLU, f.cross_entropy, 1e3),
    "large inputs, linear": lambda: far_inputs((3, 4, 4, 2), nn.Identity, f.mse_loss, 1e3),
    "large inputs, sum": lambda: far_inputs((2, 5, 3), nn.ReLU, total, 1e3),
    "small inputs": lambda: far_inputs((3, 4, 4, 2), nn.Tanh, f.mse_loss, 1e-6),
}


@pytest.mark.parametrize("name", CASES)
def test_inertia_determinant_diagonal_and_minres(name):
    lin = CASES[name]()
    H = lh.to_dense(lin.H)
    H = (H + H.T) / 2
    eigenvalues, N = np.linalg.eigvalsh(H), len(H)
    norm = np.abs(eigenvalues).max()
    checked = 0
    for share in (0.1, 1e-3, -1e-2, 1e-6, -1e-6, 1e-8, 1e-9):
        damping = share * norm
        shifted = eigenvalues + damping
        if np.abs(shifted).min() <= 1e-11 * norm:
            continue
        checked += 1
        inverse = lin.inverse(damping)
        found = inverse.inertia()
        assert (found.negative, found.zero, found.positive) == ((shifted < 0).sum(), 0, (shifted > 0).sum()), share
        truth = np.log(np.abs(shifted)).sum()
        doubt = 2 * N * np.finfo(float).eps * norm * (1 / np.abs(shifted)).sum()
        assert abs(inverse.slogdet()[1] - truth) <= 1e-10 * abs(truth) + doubt, share
        K, condition = H + damping * np.eye(N), np.abs(shifted).max() / np.abs(shifted).min()
        if condition <= 1e8:  # the truth by LAPACK has errors of κ roundings too
            expected = np.diag(np.linalg.inv(K))
            atol = 3e-14 * condition * np.abs(expected).max()
            np.testing.assert_allclose(inverse.diagonal(), expected, rtol=0, atol=atol)
            g = np.random.default_rng(0).standard_normal(N)
            scaled = K / norm  # SciPy's minres takes small matrices for zero
            positive = lh.to_dense(inverse.positive()) * norm
            iterates = []
            minres(scaled, g, M=positive, rtol=1e-15, maxiter=3, callback=lambda x: iterates.append(x.copy()))  # noqa: B023
            x = iterates[-1]
            assert np.linalg.norm(g - scaled @ x) <= 1e-8 * (np.linalg.norm(x) * np.abs(shifted).max() / norm + 1), (
                share
            )
    assert checked >= 4


def test_lockstep():
    """A chain of width one with a gain above one, and with inputs of size 100."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        layers: list[nn.Module] = []
        for _ in range(212):
            linear = nn.Linear(1, 1).double()
            nn.init.orthogonal_(linear.weight, gain=1.05)
            layers += [linear, nn.Identity()]
        model = nn.Sequential(*layers, nn.Linear(1, 2).double())
        torch.manual_seed(0)
        x = torch.randn(3, 1).double()
    for scale in (1.0, 100.0):
        lin = lh.linearize(model, f.cross_entropy, scale * x, torch.zeros(3, dtype=torch.long))
        H = lh.to_dense(lin.H)
        eigenvalues = np.linalg.eigvalsh((H + H.T) / 2)
        norm = np.abs(eigenvalues).max()
        for share in (0.1, 1e-3, 1e-6):
            shifted = eigenvalues + share * norm
            found = lin.inertia(share * norm)
            assert (found.negative, found.zero, found.positive) == ((shifted < 0).sum(), 0, (shifted > 0).sum())


def test_a_pivot_of_zero_is_no_eigenvalue():
    """θ = 1e-16 with a coupling of 3e-8: eigenvalues ±3e-8 and 1."""
    a, c = 1e-5, 3e-8
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 2, bias=False)).double()
    with torch.no_grad():
        model[0].weight[:] = a
        model[1].weight[:] = 0

    def loss_fn(o, t):
        return 0.5 * (o[:, 0] - c).square().sum() + 0.5 / a**2 * o[:, 1].square().sum()

    lin = lh.linearize(model, loss_fn, torch.ones(1, 1).double(), None)
    H = lh.to_dense(lin.H)
    for off in (1e-16, -1e-16):
        damping = -H[1, 1] + off
        eigenvalues = np.linalg.eigvalsh(H + damping * np.eye(3))
        np.testing.assert_allclose(eigenvalues, [-3e-8, 3e-8, 1.0], rtol=1e-2)
        assert lin.inertia(damping) == lh.Inertia(1, 0, 2)
        assert lin.count_eigenvalues(-1.0, -damping) == 1
        assert lin.inverse(damping).slogdet()[0] == -1.0


@pytest.mark.parametrize("scale", [1e-24, 1e-12, 1e12])
def test_single_precision_at_any_scale_of_the_loss(scale):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        x, y = torch.randn(5, 3), torch.randn(5, 2)
    lin = lh.linearize(model, lambda o, t: scale * (o - t).square().sum(), x, y)
    H = lh.to_dense(lin.H).astype(float)
    eigenvalues = np.linalg.eigvalsh((H + H.T) / 2)
    damping = float(0.1 * np.abs(eigenvalues).max())
    assert eigenvalues[0] + damping < -1e-3 * damping or eigenvalues[0] + damping > 1e-3 * damping
    inverse = lin.inverse(damping)
    g = np.ones(len(H), dtype=np.float32) * np.float32(scale)
    x = inverse.solve(g).x.astype(float)
    assert np.linalg.norm(g - H @ x - damping * x) <= 1e-5 * (10 * damping * np.linalg.norm(x) + np.linalg.norm(g))
    assert inverse.inertia().negative == (eigenvalues + damping < 0).sum()
    least = lin.smallest_convex_damping()
    assert abs(least + eigenvalues[0]) <= 2e-3 * abs(eigenvalues[0])


def test_no_right_hand_sides():
    lin = CASES["large inputs, relu"]()
    inverse = lin.inverse(lin.smallest_convex_damping(margin=0.5))
    N = inverse.shape[0]
    assert inverse.solve(np.zeros((N, 0))).x.shape == (N, 0)
    assert inverse.sample(0).shape == (N, 0)
    v = torch.ones(N, dtype=torch.float64, requires_grad=True)
    assert inverse.quadratic_form(v) == pytest.approx(float(v.detach() @ torch.from_numpy(inverse @ np.ones(N))))
