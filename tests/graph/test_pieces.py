"""Everything a linearization of a recorded model is asked, its states live sets and its places permuted, against LAPACK."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import linalg
from torch import nn
from torch.nn import functional as f

import linop_hess as lh
from linop_hess.graph.build import Chain
from tests.graph.oracle import gauss_newton, inertia, made, truth
from tests.graph.test_models import linearized
from tests.graph.zoo import CASES

SOME = (
    "residual_pre_norm",
    "densenet",
    "mixture_of_experts",
    "gpt_tied",
    "gru_bidirectional",
    "tied_autoencoder",
    "two_towers",
    "lora",
    "unused_parameter",
    "penalty_separable",
    "pinn_in_the_loss",
)
LIFTED = tuple(
    name for name in SOME if name not in ("gpt_tied", "gru_bidirectional", "penalty_separable", "pinn_in_the_loss")
)
DAMPING = 1e-2
INSIDE = "pinn_in_the_loss"  # whose loss differentiates the model


def decay_slope(name):
    """The gradient of a separable penalty, which is in no stage: 0.01 p² + 0.02 |p|³, the latter of weights."""
    if name != "penalty_separable":
        return 0.0
    parts = [0.02 * p + (0.06 * p * p.abs() if p.dim() > 1 else 0.0) for p in made(name, 3).model.parameters()]
    return nn.utils.parameters_to_vector(parts).detach().numpy()


@pytest.mark.parametrize("name", SOME)
def test_four_terms(name):
    _, gradient, H = truth(name, 3)
    lin = linearized(name, 3)
    path = lin.P @ lin.M_inv @ lin.D_x
    found = lin.DD_xx + lin.DD_zx @ path + path.H @ lin.DM_xz + path.H @ lin.DM_zz @ path
    assert np.linalg.norm(found @ np.eye(len(H)) - H, 2) <= 1e-14 * np.linalg.norm(H, 2)
    last = np.zeros(lin.M.shape[0])
    last[-1] = 1.0
    through = lin.D_x.H @ (lin.M_inv.H @ last) + decay_slope(name)
    assert np.linalg.norm(through - gradient) <= 1e-14 * np.linalg.norm(gradient)


@pytest.mark.parametrize("name", LIFTED)
def test_lifted_system(name):
    """𝒦 eliminates to H + εI; with rows reordered it is symmetric, each state adding one eigenvalue of each sign."""
    _, gradient, H = truth(name, 3)
    lin, N = linearized(name, 3), len(H)
    size = lin.augmented(DAMPING).shape[0]
    n = (size - N) // 2
    K = lin.augmented(DAMPING) @ np.eye(size)
    x = np.linalg.solve(K, np.concatenate([gradient, np.zeros(2 * n)]))[:N]
    assert np.linalg.norm(H @ x + DAMPING * x - gradient) <= 1e-13 * np.linalg.norm(gradient)
    symmetric = np.vstack([K[:N], -K[N + n :], -K[N : N + n]])
    assert np.array_equal(symmetric, symmetric.T)
    expected = inertia(H, DAMPING)
    values = np.linalg.eigvalsh(symmetric)
    assert ((values < 0).sum(), (values > 0).sum()) == (expected.negative + n, expected.positive + n)
    tridiagonal = lin.block_tridiagonal(DAMPING) @ np.eye(size)
    block = np.repeat(np.arange(lin.block_sizes.size), lin.block_sizes)
    assert block.size == size and not tridiagonal[abs(block[:, None] - block) > 1].any()


@pytest.mark.parametrize("name", SOME)
def test_files(name, tmp_path):
    lin = linearized(name, 3)
    lin.save(tmp_path / "file")
    again = lh.load(tmp_path / "file")
    np.testing.assert_array_equal(lh.to_dense(again.H), lh.to_dense(lin.H))
    assert str(again.stages) == str(lin.stages) and str(again.plan().cuts) == str(lin.plan().cuts)


@pytest.mark.parametrize("name", SOME)
def test_questions(name):
    _, gradient, H = truth(name, 3)
    N, norm = len(H), np.linalg.norm(H, 2)
    values = np.linalg.eigvalsh((H + H.T) / 2)
    lin = pickle.loads(pickle.dumps(linearized(name, 3)))
    inverse = pickle.loads(pickle.dumps(lin.inverse(DAMPING)))
    K = H + DAMPING * np.eye(N)
    X = np.linalg.inv(K)
    rounding = 1e-15 * np.linalg.cond(K)
    assert abs(inverse.diagonal() - np.diag(X)).max() <= rounding * abs(X).max()
    places = lin.parameter_table.modules()
    for module, block in inverse.block_diagonal().items():
        assert abs(block - X[np.ix_(places[module], places[module])]).max() <= rounding * abs(X).max(), module
    sign, logarithm = inverse.slogdet()
    assert sign == np.linalg.slogdet(K)[0] and logarithm == pytest.approx(np.linalg.slogdet(K)[1], rel=1e-12, abs=1e-12)
    b = values[-1] / 3
    assert lin.count_eigenvalues(-DAMPING, b) == ((values > -DAMPING) & (values <= b)).sum()
    assert np.allclose(lin.extreme_eigenvalues(), values[[0, -1]], rtol=0, atol=1e-7 * norm)
    positive = inverse.positive() @ np.eye(N)
    assert abs(positive @ K @ positive @ K - np.eye(N)).max() <= 1e-10
    convex = inverse.with_damping(0.1 - 1.5 * values[0])
    assert convex.solve(gradient).backward_error <= 1e-14 and convex.is_positive_definite
    nearest = values[np.argsort(abs(values - values[-1]))[:4]]
    found = lh.spectrum.eigsh(lin, 4, sigma=values[-1])
    assert np.allclose(np.sort(found.values), np.sort(nearest), rtol=0, atol=1e-7 * norm)
    density = lh.spectrum.density(lin, 12)
    assert density.counts.sum() + density.nullity == N


@pytest.mark.parametrize("name", ["residual_pre_norm", "tied_autoencoder", "unused_parameter"])
def test_samples(name):
    """White noise through the factors: the covariance of what `sample` makes of unit vectors is the inverse."""
    H = truth(name, 3)[2]
    damping = 0.1 - 1.5 * np.linalg.eigvalsh(H)[0]
    draws = linearized(name, 3).inverse(damping).sample(40000, torch.Generator().manual_seed(0))
    half = linalg.cholesky(H + damping * np.eye(len(H)))
    covariance = np.cov(half @ draws)
    assert abs(covariance - np.eye(len(H))).max() <= 6 * 2**0.5 / 200


@pytest.mark.parametrize("name", CASES)
def test_gauss_newton(name):
    """All curvature of the loss is kept, penalties included, and none of the model's."""
    lin = linearized(name, 3)
    if name == INSIDE:
        with pytest.raises(lh.errors.UnsupportedModelError, match="before its output, in aten.tanh_backward"):
            lin.gauss_newton()
        return
    G = gauss_newton(made(name, 3))
    found = lin.gauss_newton()
    assert np.linalg.norm(found @ np.eye(len(G)) - G, 2) <= 1e-14 * np.linalg.norm(G, 2)
    assert found.inverse(DAMPING).solve(lin.gradient).backward_error <= 1e-14
    assert found.inertia(DAMPING) == inertia(G, DAMPING)


@pytest.mark.parametrize("name", ["penalty_separable", "penalty_coupled", "nested_outputs", "gru"])
def test_gauss_newton_agrees_with_the_one_by_autograd(name):
    case = made(name, 3)
    ours = linearized(name, 3).gauss_newton()
    theirs = lh.GaussNewton(case.model, case.loss_fn, (case.inputs, case.targets))
    v = np.random.default_rng(0).standard_normal((theirs.shape[0], 3))
    assert np.linalg.norm(ours @ v - theirs @ v) <= 1e-13 * np.linalg.norm(theirs @ v)


@pytest.mark.parametrize("method", ["riccati", "banded", "dense"])
def test_gauss_newton_of_a_penalty_by_every_method(method):
    G = gauss_newton(made("penalty_coupled", 3))
    lin = linearized("penalty_coupled", 3)
    x = lin.gauss_newton().inverse(DAMPING, method) @ lin.gradient
    assert np.linalg.norm(G @ x + DAMPING * x - lin.gradient) <= 1e-13 * np.linalg.norm(lin.gradient)
    assert "curvature" in lin.gauss_newton().plan().costs["woodbury"].why_not


class Backwards(nn.Module):
    """Parameters registered in another order than they are used in, biases before weights that are stored transposed."""

    def __init__(self, wide: int = 6) -> None:
        super().__init__()
        self.last = nn.Linear(5, 3)
        self.bias = nn.Parameter(torch.randn(5))
        self.weight = nn.Parameter(torch.randn(wide, 5) / wide**0.5)
        self.first = nn.Linear(4, wide)

    def forward(self, x):
        return self.last(torch.tanh(self.bias + torch.tanh(self.first(x)) @ self.weight))


class Reversed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last, self.first = nn.Linear(5, 3), nn.Linear(4, 5)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


def backwards(wide: int = 6) -> lh.Linearization:
    torch.manual_seed(0)
    x, y = torch.randn(3, 4).double(), torch.randn(3, 3).double()
    return lh.linearize(Backwards(wide).double(), f.mse_loss, x, y)


def test_blocks_of_many_parameters_in_another_order():
    """Above `SOLVED_UP_TO` parameters blocks come from the factors, stage by stage, and are put in the order of the places."""
    lin = backwards(wide=130)
    N = lin.problem.size
    assert N > 1000 and lin.problem.places is not None
    K = lin.H @ np.eye(N) + 0.3 * np.eye(N)
    X = np.linalg.inv(K)
    bound = 1e-14 * np.linalg.cond(K) * abs(X).max()
    for method in ("riccati", "dense"):
        inverse = lin.inverse(0.3, method)
        assert abs(inverse.diagonal() - np.diag(X)).max() <= bound
        for module, places in lin.parameter_table.modules().items():
            assert abs(inverse.block_diagonal()[module] - X[np.ix_(places, places)]).max() <= bound, (method, module)


def test_a_problem_by_itself_names_controls_where_they_lie():
    """Stage by stage where those of a stage lie side by side, else all as one."""
    assert lh.HessianInverse(backwards().problem, 0.3).names == ("x",)
    plain = lh.linearize(Reversed().double(), f.mse_loss, torch.ones(3, 4).double(), torch.zeros(3, 3).double())
    problem = plain.problem
    inverse = lh.HessianInverse(problem, 0.3)
    assert inverse.names == ("stages.2.x", "stages.0.x")
    for l in (0, 2):
        assert np.array_equal(inverse.indices(f"stages.{l}.x"), problem.layout.controls(l))
    X = np.linalg.inv(plain.H @ np.eye(problem.size) + 0.3 * np.eye(problem.size))
    for l in (0, 2):
        own = problem.layout.controls(l)
        assert abs(inverse.block_diagonal()[f"stages.{l}"] - X[np.ix_(own, own)]).max() <= 1e-12


def test_verify_names_the_stage():
    """The curvature of the first activation spoiled on purpose; only `first` comes before it, and it is the last of the parameters."""
    lin = backwards()
    assert lin.verify() <= 1e-14
    wrong = next(l for l, row in enumerate(lin.stages) if row.operation == "tanh")
    problem = lin.problem
    blocks = [
        replace(block, c=1.01 * block.c) if b == problem.order[wrong, 0] else block
        for b, block in enumerate(problem.blocks)
    ]
    chain = lin._chain
    assert isinstance(chain, Chain)
    spoiled = lh.Linearization(
        Chain(problem.with_curvature(blocks), chain.loss, chain.gradient, chain.names, chain.shapes, (), chain.cuts),
        lin._reference,
    )
    with pytest.raises(
        ArithmeticError, match=r"at or after stage \d+ \(first: addmm\), where parameter first.weight is used"
    ):
        spoiled.verify()
