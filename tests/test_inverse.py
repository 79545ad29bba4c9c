"""`HessianInverse` on networks: backward errors measured with the dense autograd Hessian and LAPACK's norm."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as f

import linop_hess as lh
from linop_hess import _memory
from linop_hess.errors import FactorizationError
from linop_hess.lq.methods import plan as plan_module
from linop_hess.lq.methods.banded import BandedFactorization
from linop_hess.lq.methods.base import Congruence
from linop_hess.lq.methods.riccati import RiccatiFactorization
from tests.helpers import make_batch, make_mlp, oracle_hessian
from tests.lq.problems import backward_error

CERTIFIED = ("banded", "riccati", "dense")
DAMPINGS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
ACTIVATIONS = (nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.Softplus, nn.ELU, nn.ReLU)


def random_network(seed: int, dtype: torch.dtype = torch.float64):
    """An untrained network with an indefinite Hessian: unequal widths, any batch, repeated and zero samples."""
    rng = np.random.default_rng(seed)
    depth = int(rng.integers(1, 7))
    widths = [int(w) for w in rng.integers(1, 7, depth)] + [int(rng.integers(2, 4))]
    activation = ACTIVATIONS[int(rng.integers(len(ACTIVATIONS)))]
    model = make_mlp(widths, activation, seed, gain=1.2 + rng.random(), bias=bool(rng.integers(4)))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, dtype=torch.float64))
    samples = int(rng.choice([1, 2, 3, 5, 8, 17]))
    x, labels = make_batch(widths[0], widths[-1], samples, seed)
    if samples > 2:
        x[1] = x[0]
        x[2] = 0
    if seed % 3 == 1:
        values = torch.randn(samples, widths[-1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return model.to(dtype), f.mse_loss, x.to(dtype), values.to(dtype)
    return model.to(dtype), f.cross_entropy, x.to(dtype), labels


def right_hand_sides(size: int, columns: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((size, columns))


@pytest.mark.parametrize("batch_of_seeds", range(4))
def test_random_networks(batch_of_seeds):
    indefinite = 0
    for seed in range(10 * batch_of_seeds, 10 * batch_of_seeds + 6):
        model, loss_fn, x, y = random_network(seed)
        lin = lh.linearize(model, loss_fn, x, y)
        H = oracle_hessian(model, loss_fn, x, y)
        eigenvalues = np.linalg.eigvalsh(H)
        indefinite += eigenvalues[0] < -1e-3 * eigenvalues[-1]
        g = np.column_stack([lin.gradient, right_hand_sides(len(H), 1)])
        for damping in DAMPINGS[seed % 3 :: 3]:
            for method in CERTIFIED:
                X = lin.inverse(damping, method) @ g
                assert backward_error(H, damping, X, g) <= 1e-14, (seed, damping, method)
    assert indefinite >= 3


@pytest.mark.parametrize("batch_of_seeds", range(2))
def test_random_networks_in_float32(batch_of_seeds):
    for seed in range(100 + 10 * batch_of_seeds, 106 + 10 * batch_of_seeds):
        model, loss_fn, x, y = random_network(seed, torch.float32)
        lin = lh.linearize(model, loss_fn, x, y)
        # The Hessian the package has at hand: in single precision that of autograd differs by rounding of its own.
        H = lh.to_dense(lin.H).astype(np.float64)
        g = right_hand_sides(len(H)).astype(np.float32)
        for damping in DAMPINGS[seed % 3 :: 3]:
            for method in CERTIFIED:
                inverse = lin.inverse(damping, method)
                X = inverse @ g
                assert X.dtype == np.float32
                assert backward_error(H, damping, X, g) <= 2e-6, (seed, damping, method)
                assert inverse.solve(g).backward_error <= 1e-6


@pytest.mark.parametrize("seed", [200, 203, 207, 212])
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_negative_damping(seed, fraction):
    """A shift between two eigenvalues."""
    model, loss_fn, x, y = random_network(seed)
    lin = lh.linearize(model, loss_fn, x, y)
    H = oracle_hessian(model, loss_fn, x, y)
    eigenvalues = np.linalg.eigvalsh(H)
    k = int(fraction * len(H))
    shift = -(0.5 * eigenvalues[k] + 0.5 * eigenvalues[-1]) - 1e-3
    g = right_hand_sides(len(H))
    for method in CERTIFIED:
        X = lin.inverse(shift, method) @ g
        assert backward_error(H, shift, X, g) <= 1e-14, method
        expected = np.linalg.solve(H + shift * np.eye(len(H)), g)
        condition = np.linalg.cond(H + shift * np.eye(len(H)))
        assert np.linalg.norm(X - expected) <= 1e-14 * condition * np.linalg.norm(expected)


def trained_network():
    model, loss_fn, x, y = random_network(5)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(150):
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
    model.zero_grad()
    return model, loss_fn, x, y


def test_trained_network():
    model, loss_fn, x, y = trained_network()
    lin = lh.linearize(model, loss_fn, x, y)
    H = oracle_hessian(model, loss_fn, x, y)
    g = right_hand_sides(len(H))
    for damping in (1e-1, 1e-4, 1e-8):
        for method in CERTIFIED:
            assert backward_error(H, damping, lin.inverse(damping, method) @ g, g) <= 1e-14


@pytest.mark.parametrize("samples", [1, 4, 40])
def test_batches(samples):
    model = make_mlp([4, 5, 5, 3], seed=1)
    x, y = make_batch(4, 3, samples)
    lin = lh.linearize(model, f.cross_entropy, x, y)
    H = oracle_hessian(model, f.cross_entropy, x, y)
    g = right_hand_sides(len(H))
    for method in CERTIFIED:
        for damping in (1e-2, 1e-7):
            assert backward_error(H, damping, lin.inverse(damping, method) @ g, g) <= 1e-14


@pytest.fixture(scope="module")
def setting():
    model = make_mlp([3, 5, 4, 4, 3], seed=2)
    x, y = make_batch(3, 3, 3)
    lin = lh.linearize(model, f.cross_entropy, x, y)
    return lin, oracle_hessian(model, f.cross_entropy, x, y)


@pytest.mark.parametrize("method", ["auto", *CERTIFIED, "ldu"])
def test_operator(setting, method):
    lin, H = setting
    N = len(H)
    inverse = lin.inverse(1e-2, method)
    K = H + 1e-2 * np.eye(N)
    expected = np.linalg.inv(K)
    assert isinstance(inverse, lh.HessianInverse) and inverse.shape == (N, N) and inverse.damping == 1e-2
    assert method in ("auto", inverse.method)
    atol = 1e-14 * np.linalg.cond(K) * np.abs(expected).max()
    np.testing.assert_allclose(lh.to_dense(inverse), expected, rtol=0, atol=atol)
    np.testing.assert_allclose(lh.to_dense(inverse.T), expected, rtol=0, atol=atol)
    G = right_hand_sides(N, 5)
    blocks = inverse @ G
    np.testing.assert_allclose(blocks, np.column_stack([inverse @ g for g in G.T]), rtol=0, atol=atol * 10)
    tensor = inverse @ torch.from_numpy(G)
    assert isinstance(tensor, torch.Tensor) and not tensor.requires_grad
    np.testing.assert_allclose(tensor.numpy(), blocks, rtol=0, atol=atol * 10)
    assert (inverse @ G[:, :0]).shape == (N, 0)
    assert inverse.nbytes > 0


def test_solution(setting):
    lin, H = setting
    inverse = lin.inverse(1e-3)
    g = right_hand_sides(len(H), 1)[:, 0]
    solution = inverse.solve(g)
    assert isinstance(solution, lh.Solution) and isinstance(solution.x, np.ndarray) and solution.x.shape == g.shape
    assert solution.method == inverse.method == lin.plan(1e-3).choice
    residual = np.linalg.norm(g - H @ solution.x - 1e-3 * solution.x)
    assert residual <= 3 * solution.residual_norm + 1e-14 * np.linalg.norm(H, 2) * np.linalg.norm(solution.x)
    assert 0 <= solution.backward_error <= 1e-14 and solution.refinement_steps >= 0
    block = inverse.solve(torch.from_numpy(np.column_stack([g, 2 * g])))
    assert isinstance(block.x, torch.Tensor) and tuple(block.x.shape) == (len(H), 2)
    zero = inverse.solve(np.zeros(len(H)))
    assert not zero.x.any() and zero.backward_error == 0


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e200])
def test_right_hand_sides_whose_norm_under_or_overflows(setting, scale):
    lin, H = setting
    g = right_hand_sides(len(H), 1)[:, 0]
    for method in CERTIFIED:
        x = lin.inverse(1e-3, method).solve(scale * g).x
        assert backward_error(H, 1e-3, x / scale, g) <= 1e-14


def test_certificate_of_a_tiny_right_hand_side_is_not_vacuous(setting, monkeypatch):
    """A norm that underflows to zero must not certify wrong factors."""
    lin, H = setting
    from linop_hess.lq.methods import banded

    monkeypatch.setattr(banded.BandedFactorization, "solve", lambda self, g: 1.01 * g)
    g = 1e-200 * right_hand_sides(len(H), 1)[:, 0]
    x = lin.inverse(1e-3, "banded").solve(g).x
    assert backward_error(H, 1e-3, x / 1e-200, g / 1e-200) <= 1e-14


def test_tighter_and_looser_tolerances(setting):
    lin, _ = setting
    g = lin.gradient
    assert lin.inverse(1e-3, tolerance=1e-3).solve(g).refinement_steps == 0
    with pytest.raises(FactorizationError, match="backward error"):
        lin.inverse(1e-3, tolerance=1e-40).solve(g)


@pytest.mark.parametrize("method", ["auto", *CERTIFIED, "ldu"])
def test_with_damping(setting, method):
    lin, H = setting
    first = lin.inverse(1e-1, method)
    g = right_hand_sides(len(H))
    before = first @ g
    second = first.with_damping(1e-3)
    np.testing.assert_array_equal(first @ g, before)
    assert first.damping == 1e-1 and second.damping == 1e-3
    assert second.tolerance == first.tolerance
    np.testing.assert_array_equal(second @ g, lin.inverse(1e-3, method) @ g)
    assert backward_error(H, 1e-3, second @ g, g) <= 1e-14


def test_with_damping_computes_no_derivatives(setting, monkeypatch):
    lin, _ = setting
    inverse = lin.inverse(1e-1)

    def forbidden(*args, **kwargs):
        raise AssertionError("autograd was called")

    monkeypatch.setattr(torch.autograd, "grad", forbidden)
    inverse.with_damping(1e-2).solve(lin.gradient)


def test_gauss_newton_inverse():
    """Against a matrix made of an explicit Jacobian."""
    model, loss_fn, x, y = random_network(3)
    lin = lh.linearize(model, loss_fn, x, y)
    G = lh.to_dense(lh.GaussNewton(model, loss_fn, (x, y)))
    assert np.linalg.eigvalsh(G)[0] > -1e-12
    g = right_hand_sides(len(G))
    for damping in (1.0, 1e-3, 1e-7):
        for method in CERTIFIED:
            X = lin.gauss_newton().inverse(damping, method) @ g
            assert backward_error(G, damping, X, g) <= 1e-14


@pytest.mark.parametrize("method", ["auto", *CERTIFIED, "ldu"])
def test_singular_hessian(method):
    """More parameters than the batch can see: H is singular, and the error names a damping that works."""
    model = make_mlp([4, 5, 3], seed=4)
    x, y = make_batch(4, 3, 2)
    lin = lh.linearize(model, f.cross_entropy, x, y)
    g = right_hand_sides(lin.H.shape[0])  # not in the range of H, unlike the gradient
    with pytest.raises(FactorizationError, match="damping=0 .*works") as caught:
        lin.inverse(0.0, method).solve(g)
    assert isinstance(caught.value, np.linalg.LinAlgError) and caught.value.damping == 0.0
    damping = caught.value.suggested_damping
    assert f"{damping:.1e}" in str(caught.value) or f"{damping:g}" in str(caught.value)
    H = oracle_hessian(model, f.cross_entropy, x, y)
    X = lin.inverse(damping) @ lin.gradient
    assert backward_error(H, damping, X, lin.gradient) <= 1e-14


def test_dead_network():
    """Every unit off: the Hessian is zero but for the last bias."""
    model = make_mlp([3, 4, 2], nn.ReLU, seed=6)
    with torch.no_grad():
        model[0].bias.fill_(-100)
    x, y = make_batch(3, 2, 5)
    lin = lh.linearize(model, f.cross_entropy, x, y)
    with pytest.raises(FactorizationError, match="damping") as caught:
        lin.inverse(0.0).solve(np.ones(lin.H.shape[0]))
    damping = caught.value.suggested_damping
    assert damping is not None and lin.inverse(damping).solve(np.ones(lin.H.shape[0])).backward_error <= 1e-14


@pytest.mark.parametrize("bias", [True, False])
def test_damping_zero_on_a_regular_hessian(bias):
    """Over-determined linear regression: the Newton step with no damping is the least-squares solution."""
    model = make_mlp([3, 2], seed=7, bias=bias)
    x, _ = make_batch(3, 2, 9)
    y = torch.randn(9, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    lin = lh.linearize(model, f.mse_loss, x, y)
    Z = np.column_stack([x.numpy()] + [np.ones(9)] * bias)
    best = np.linalg.lstsq(Z, y.numpy(), rcond=None)[0].T
    for method in ("auto", *CERTIFIED):
        step = lin.inverse(0.0, method) @ lin.gradient
        weight = model[0].weight.detach().numpy().ravel()
        start = np.concatenate([weight, model[0].bias.detach().numpy()]) if bias else weight
        found = start - step
        expected = np.concatenate([best[:, :3].ravel(), best[:, 3]]) if bias else best.ravel()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_eigenvalue_shift_is_right_or_an_error(setting):
    lin, H = setting
    g = right_hand_sides(len(H))
    for eigenvalue in np.linalg.eigvalsh(H)[[0, 3, len(H) // 2, -2, -1]]:
        for method in CERTIFIED:
            try:
                X = lin.inverse(-eigenvalue, method) @ g
            except FactorizationError:
                continue
            assert backward_error(H, -eigenvalue, X, g) <= 2e-14


@pytest.mark.parametrize("method", ["auto", *CERTIFIED, "ldu"])
def test_memory_is_asked_for_before_it_is_taken(setting, method, monkeypatch):
    lin, _ = setting
    for module in (_memory, plan_module):
        monkeypatch.setattr(module, "available_bytes", lambda: 1000)

    def forbidden(*args):
        raise AssertionError("factored in spite of the estimate")

    for name, known in plan_module.METHODS.items():
        monkeypatch.setitem(plan_module.METHODS, name, replace(known, factor=forbidden))
    with pytest.raises(MemoryError, match="needs about .* [KMG]?i?B, but only .*B is available"):
        lin.inverse(1e-3, method)


def test_plan_of_a_network_too_large_for_one_method(setting, monkeypatch):
    lin, _ = setting
    plan = lin.plan(1e-3)
    costs = {name: cost.nbytes for name, cost in plan.costs.items()}
    largest = max(CERTIFIED, key=lambda m: costs[m])
    monkeypatch.setattr(plan_module, "available_bytes", lambda: int(costs[largest]) - 1)
    monkeypatch.setattr(_memory, "available_bytes", lambda: int(costs[largest]) - 1)
    assert lin.plan(1e-3).choice != largest and not lin.plan(1e-3).fits(largest)
    assert "does not fit" in str(lin.plan(1e-3))
    with pytest.raises(MemoryError):
        lin.inverse(1e-3, largest)
    assert lin.inverse(1e-3).solve(lin.gradient).backward_error <= 1e-14


def test_escalation_from_useless_factors(setting, monkeypatch):
    """A method whose factors are wrong is found out by the certificate and replaced."""
    lin, H = setting
    from linop_hess.lq.methods import banded

    monkeypatch.setattr(banded.BandedFactorization, "solve", lambda self, g: 1.01 * g)
    solution = lin.inverse(1e-3, "banded").solve(lin.gradient)
    assert solution.method != "banded"
    assert backward_error(H, 1e-3, solution.x, lin.gradient) <= 1e-14


def test_nothing_wrong_is_returned_when_everything_fails(setting, monkeypatch):
    lin, _ = setting
    for factorization in (BandedFactorization, RiccatiFactorization, Congruence):
        monkeypatch.setattr(factorization, "solve", lambda self, g: 1.01 * g)
    with pytest.raises(FactorizationError, match="could not be solved to a backward error"):
        lin.inverse(1e-3).solve(lin.gradient)


def test_certificate_does_not_trust_the_factors(setting, monkeypatch):
    """A factorization of another matrix: its own residual is zero, the certificate's is not."""
    lin, H = setting
    riccati = plan_module.METHODS["riccati"]
    other = replace(riccati, factor=lambda analysis, damping: riccati.factor(analysis, 3 * damping + 1.0))
    monkeypatch.setitem(plan_module.METHODS, "riccati", other)
    solution = lin.inverse(1e-3, "riccati").solve(lin.gradient)
    assert backward_error(H, 1e-3, solution.x, lin.gradient) <= 1e-14


def test_ldu_on_networks():
    """The paper's algorithm: right, or an error, never silently wrong."""
    right = 0
    for seed in range(300, 315):
        model, loss_fn, x, y = random_network(seed)
        lin = lh.linearize(model, loss_fn, x, y)
        H = oracle_hessian(model, loss_fn, x, y)
        g = right_hand_sides(len(H))
        for damping in (1.0, 1e-3, 1e-6):
            try:
                X = lin.inverse(damping, "ldu") @ g
            except FactorizationError:
                continue
            assert backward_error(H, damping, X, g) <= 1e-14
            right += 1
    assert right >= 15


@pytest.mark.parametrize("method", ["lu", "", "BANDED", None, 3])
def test_unknown_method(setting, method):
    with pytest.raises(
        ValueError, match="method must be one of .*'auto', 'banded', 'riccati', 'dense', 'woodbury', 'ldu'"
    ):
        setting[0].inverse(1e-3, method)


@pytest.mark.parametrize(
    ("damping", "error"),
    [(np.nan, ValueError), (np.inf, ValueError), (-np.inf, ValueError), (1e-3 + 0j, TypeError), ("1e-3", TypeError),
     (None, TypeError), ([1e-3], TypeError), (np.ones(2), TypeError), (np.complex128(1), TypeError)],
)  # fmt: skip
def test_bad_damping(setting, damping, error):
    lin, _ = setting
    inverse = lin.inverse(1e-3)
    for use in (lin.inverse, lin.damped, lin.augmented, lin.block_tridiagonal, lin.plan, inverse.with_damping,
                lin.gauss_newton().inverse, lin.gauss_newton().damped):  # fmt: skip
        with pytest.raises(error, match="damping"):
            use(damping)


@pytest.mark.parametrize("damping", [1, np.float32(0.5), np.int64(1), True])
def test_dampings_that_are_numbers(setting, damping):
    lin, H = setting
    g = lin.gradient
    assert backward_error(H, float(damping), lin.inverse(damping) @ g, g) <= 1e-14


def test_damping_far_above_and_below_the_hessian(setting):
    lin, H = setting
    g = lin.gradient
    np.testing.assert_allclose(lin.inverse(1e12) @ g, g / 1e12, rtol=0, atol=1e-11 * np.abs(g).max() / 1e12)
    for method in CERTIFIED:
        try:
            X = lin.inverse(1e-14, method) @ g
        except FactorizationError:
            continue
        assert backward_error(H, 1e-14, X, g) <= 1e-14


@pytest.mark.parametrize("gap", [1e-5, 1e-8, 1e-13])
def test_shift_that_leaves_almost_nothing(gap):
    """H + damping·I is gap·I: |damping| is no bound of its norm."""
    Q = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    model = nn.Sequential(nn.Linear(5, 3, bias=False)).double()
    lin = lh.linearize(model, nn.MSELoss(reduction="sum"), Q, torch.zeros(5, 3, dtype=torch.float64))
    g = right_hand_sides(15, 1)
    K = lh.to_dense(lin.H) - (2 - gap) * np.eye(15)
    for method in CERTIFIED:
        try:
            x = lin.inverse(-(2 - gap), method) @ g
        except FactorizationError:
            continue
        error = np.linalg.norm(g - K @ x) / (np.linalg.norm(K, 2) * np.linalg.norm(x) + np.linalg.norm(g))
        assert error <= 1e-13, (method, error)
