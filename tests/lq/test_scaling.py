"""Networks whose states move by many orders of magnitude: what is compared with ‖H‖ must be measured in the controls' units."""

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import minres
from torch import nn
from torch.nn import functional as f

import linop_hess as lh
from linop_hess import lq
from linop_hess.lq import scaling
from linop_hess.lq.scaling import state_scales
from linop_hess.operators.inverse import HessianInverse
from tests.lq.methods.conformance import DTYPES, SIZES, WIRED, setting
from tests.lq.problems import random_blocks


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
    "45 linear layers": lambda: chain(45, nn.Identity, 1.3, 3, 2, 4, f.cross_entropy),
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


def test_states_that_move_together():
    """Three states move by one together, and by 2^-16 against each other: the cost of their differences is 2^32 ‖H‖."""
    s = 2.0**16
    generator = torch.Generator().manual_seed(0)
    A = torch.randint(-(2**25), 2**25, (2, 2), generator=generator).double() / 2**25
    widths = [(1, 1), (1, 3), (3, 2)]
    model = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in widths)).double()
    with torch.no_grad():
        model[0].weight[:] = 1 / s
        model[1].weight[:] = 1
        model[2].weight[:] = torch.cat([A, -A.sum(1, keepdim=True)], 1) * s
    C = torch.tensor([[1.0, 0.3], [0.3, 0.7]]).double()
    lin = lh.linearize(model, lambda o, t: (o @ C * o).sum() / 2, torch.ones(1, 1).double(), None)
    H = lh.to_dense(lin.H)
    eigenvalues = np.linalg.eigvalsh((H + H.T) / 2)
    norm = np.abs(eigenvalues).max()
    for share in (-5.6e-7, 5.6e-7, 1e-3, -1e-9, 0.1):
        shifted = eigenvalues + share * norm
        inverse = lin.inverse(share * norm)
        for found in (inverse.inertia(), lin.inertia(share * norm)):
            assert (found.negative, found.zero, found.positive) == ((shifted < 0).sum(), 0, (shifted > 0).sum())
        doubt = 5e-15 * norm * (1 / np.abs(shifted)).sum()  # products with H cancel by 2^32 here
        assert abs(inverse.slogdet()[1] - np.log(np.abs(shifted)).sum()) <= 1e-10 + doubt


@pytest.mark.parametrize("bias", [False, True])
def test_samples_of_all_sizes(bias):
    """LayerNorm makes a sample of size 1e-6 count as much as one of size 1e6: rows of G to relative precision."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 4, bias=bias), nn.LayerNorm(4, eps=0.0), nn.Linear(4, 2)).double()
        x = torch.randn(4, 8).double() * (10.0 ** torch.linspace(-6, 6, 4).double())[:, None]
        y = torch.randint(2, (4,))
    lin = lh.linearize(model, f.cross_entropy, x, y)
    H = lh.to_dense(lin.H)
    eigenvalues = np.linalg.eigvalsh((H + H.T) / 2)
    norm = np.abs(eigenvalues).max()
    for value in eigenvalues[np.abs(eigenvalues) > 1e-6 * norm]:
        for side in (-3e-11, 3e-11):
            shifted = eigenvalues - value + side * norm
            found = lin.inertia(float(side * norm - value))
            assert (found.negative, found.positive) == ((shifted < 0).sum(), (shifted > 0).sum())
    shifted = np.abs(eigenvalues + 0.1 * norm)
    assert lin.inverse(0.1 * norm).slogdet()[1] == pytest.approx(np.log(shifted).sum(), rel=1e-11)


def test_states_that_hardly_move():
    """A zero sample, and a unit so saturated that it moves by 1e-57."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        x = torch.randn(7, 8).double() * torch.tensor([1e3, 1e2, 0, 1, 1, 1, 1]).double()[:, None]
        layers = [
            nn.Linear(8, 4, bias=False),
            nn.SiLU(),
            nn.Linear(4, 4, bias=False),
            nn.SiLU(),
            nn.Linear(4, 2, bias=False),
        ]
        model = nn.Sequential(*layers).double()
    with torch.no_grad():
        model[0].weight[1] = -60 * torch.linalg.pinv(x) @ torch.tensor([1.0, 1, 0, 1, 1, 1, 1]).double()
    lin = lh.linearize(model, total, x, None)
    H = lh.to_dense(lin.H)
    eigenvalues = np.linalg.eigvalsh((H + H.T) / 2)
    for share in (0.3, 1e-3, -1e-2):
        damping = share * np.abs(eigenvalues).max()
        truth = np.log(np.abs(eigenvalues + damping)).sum()
        assert lin.inverse(damping).slogdet()[1] == pytest.approx(truth, rel=1e-11)


@pytest.mark.parametrize("scale", [1e50, 1e-60])
def test_determinants_of_losses_of_extreme_size(scale):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
        x, y = torch.randn(5, 3).double(), torch.randint(2, (5,))
    lin = lh.linearize(model, lambda o, t: scale * f.cross_entropy(o, t), x, y)
    H = lh.to_dense(lin.H)
    eigenvalues = np.linalg.eigvalsh((H + H.T) / 2 / scale)
    damping = 0.5 * np.abs(eigenvalues).max()
    truth = np.log(np.abs(eigenvalues + damping)).sum() + len(H) * np.log(scale)
    assert lin.inverse(damping * scale).slogdet()[1] == pytest.approx(truth, rel=1e-12)


def test_single_precision_positive():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))
        x, y = torch.randn(6, 3), torch.randint(3, (6,))
    ggn = lh.linearize(model, f.cross_entropy, x, y).gauss_newton()
    norm = np.linalg.norm(lh.to_dense(ggn).astype(float), 2)
    for share in (1e-5, 1e-7):
        inverse = ggn.inverse(share * norm)
        assert inverse.is_positive_definite
        P = lh.to_dense(inverse.positive()).astype(float)
        assert np.abs(P - P.T).max() <= 1e-6 * np.abs(P).max()
        assert np.linalg.eigvalsh((P + P.T) / 2)[0] > -1e-6 * np.abs(P).max()


def test_what_underflows_in_single_precision_is_right_to_the_smallest_normal_number():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        x, y = torch.randn(5, 3), torch.randn(5, 2)
    lin = lh.linearize(model, lambda o, t: 1e25 * (o - t).square().sum(), x, y)
    inverse = lin.inverse(float(lin.analysis.norm))
    g = np.random.default_rng(0).standard_normal((inverse.shape[0], 3)).astype(np.float32)
    found = inverse.solve(g * np.float32([1e-30, 1e-12, 1.0])).x
    truth = inverse.solve(g).x.astype(float) * [1e-30, 1e-12, 1.0]
    assert np.abs(found - truth).max() <= 1e-37 and not found[:, 0].any() and found[:, 1].any()
    assert np.array_equal(found[:, 2], inverse.solve(g).x[:, 2])  # in a block of other columns
    assert np.allclose(found[:, 2], inverse.solve(g[:, 2]).x, rtol=0.0, atol=4e-7 * np.abs(found[:, 2]).max())


def test_segments_without_visible_controls():
    empty = [np.zeros((2, 2))] * 2
    problem = lq.Problem.from_blocks(
        A=empty, B=[np.zeros((2, 0)), np.zeros((2, 2))], C=[np.zeros((0, 0)), np.eye(2)],
        F=[np.zeros((2, 0)), np.zeros((0, 2))], G=[np.eye(2), np.zeros((0, 2))],
    )  # fmt: skip
    inverse = HessianInverse(problem, 0.5)
    expected = np.array([1 / 1.5, 1 / 1.5, 2.0, 2.0])
    np.testing.assert_allclose(inverse.positive() @ np.ones(4), expected)
    np.testing.assert_allclose(inverse.diagonal(), expected)
    assert inverse.sample(3).shape == (4, 3)
    nothing = lq.Problem.from_blocks(
        A=[np.zeros((3, 3))], B=[np.zeros((3, 0))], C=[np.zeros((0, 0))], F=[np.zeros((0, 0))], G=[np.zeros((0, 3))]
    )
    with pytest.raises(ValueError, match="has controls: only for costs of the last state"):
        HessianInverse(nothing, 0.5, "woodbury")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SIZES, *WIRED])
def test_units_are_norms_of_rows(shape, dtype):
    """How far each entry of each state moves for white controls: row norms of P M⁻¹ D_x, to what eight probes tell."""
    problem = setting(shape, dtype).problem
    scales = state_scales(problem, lq.Analysis(problem).row_spaces)
    assert scales.dtype == dtype and torch.equal(scales, torch.exp2(scales.log2().round()))
    D = problem.layout.shift(problem.transition.substitute(problem.apply_G(torch.eye(problem.size, dtype=dtype))))
    norms = D.norm(dim=1)
    moves = norms > 1e-3
    ratio = scales[moves] / norms[moves]
    assert ratio.numel() == 0 or 0.2 <= float(ratio.min()) <= float(ratio.max()) <= 5.0


def test_units_of_rescaled_states():
    """In another unit of a state its scale changes by that power of two and nothing else."""
    blocks = random_blocks([2, 3, 3, 2], [4, 4, 3], seed=1)
    before = lq.Analysis(blocks.problem())
    old = state_scales(before.problem, before.row_spaces)
    blocks.F[0][:] *= 2.0**20
    blocks.G[0][:] *= 2.0**20
    blocks.F[1][:] /= 2.0**20
    blocks.B[1][:] /= 2.0**20
    blocks.C[1][:] /= 2.0**40
    after = lq.Analysis(blocks.problem())
    new = state_scales(after.problem, after.row_spaces)
    factor = torch.ones(8).double()
    factor[2:5] = 2.0**20
    assert torch.equal(new[2:], (old * factor)[2:])


def test_nothing_moves():
    blocks = random_blocks([2, 3, 2], [2, 2], seed=1)
    for G in blocks.G:
        G[:] = 0
    problem = blocks.problem()
    assert torch.equal(state_scales(problem, lq.Analysis(problem).row_spaces), torch.ones(5).double())


def test_a_plan_asks_for_no_unit(monkeypatch):
    """They take products with all samples; what is factored by the dense matrix has no use for them."""
    made = []
    monkeypatch.setattr(scaling, "state_scales", lambda *args: (made.append(0), state_scales(*args))[1])
    problem = chain(3, nn.Tanh, 1.0, 6, 3, 4, f.cross_entropy).problem
    lq.Inverse(problem, 0.3, "dense").solve(torch.ones(problem.size, dtype=problem.dtype))
    assert not made
    lq.Inverse(problem, 0.3, "riccati").solve(torch.ones(problem.size, dtype=problem.dtype))
    assert len(made) == 1
