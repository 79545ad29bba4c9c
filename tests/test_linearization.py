"""The pieces, their compositions, and what they are pieces of."""

import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as f

import linop_hess as lh
from linop_hess.errors import UnsupportedModelError
from linop_hess.lq.transition import Transition
from tests.helpers import make_batch, make_mlp, oracle_gradient, oracle_hessian, oracle_jacobian
from tests.operators.conformance import check_operator

DAMPING = 0.03


def curved(output, target):
    return f.cross_entropy(output, target) + 0.1 * output.square().sum(1).sin().mean()


class Quadratic(nn.Module):
    """Curved in its parameters, so that A ≠ 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.linspace(-1, 1, width, dtype=torch.float64))

    def forward(self, x):
        return x * self.w**2 + torch.sin(self.w + x.flip(-1))


def network(name: str, dtype: torch.dtype = torch.float64):
    """(model, loss, inputs, targets)."""
    x, y = make_batch(3, 3, 4)
    x[2], x[3] = x[0], 0
    model = {
        "equal widths": lambda: make_mlp([3, 3, 3, 3, 3], gain=1.3),
        "unequal widths": lambda: make_mlp([3, 5, 2, 4, 1, 3], gain=1.5),
        "one layer": lambda: make_mlp([3, 3], gain=1.3),
        "width one": lambda: make_mlp([3, 1, 1, 3], gain=1.5),
        "activation first": lambda: nn.Sequential(nn.Tanh(), nn.Sigmoid(), *make_mlp([3, 4, 3], gain=1.3)),
        "activation last": lambda: nn.Sequential(*make_mlp([3, 4, 3], gain=1.3), nn.Tanh()),
        "curved in its parameters": lambda: nn.Sequential(*make_mlp([3, 4], gain=1.3), Quadratic(4), nn.Linear(4, 3).double()),
        "normalized": lambda: nn.Sequential(*make_mlp([3, 4], gain=1.3), nn.LayerNorm(4).double(), *make_mlp([4, 3])),
        "convolution": lambda: convolutional(),
        "saturated": lambda: saturated(),
    }[name]()  # fmt: skip
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, dtype=torch.float64))
    return model.to(dtype), curved, x.to(dtype), y


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3)).double()


def saturated() -> nn.Module:
    model = make_mlp([3, 4, 3], gain=1.3)
    with torch.no_grad():
        model[0].weight[:2] *= 1e3
    return model


NETWORKS = [
    "equal widths", "unequal widths", "one layer", "width one", "activation first", "activation last",
    "curved in its parameters", "normalized", "convolution", "saturated",
]  # fmt: skip


@pytest.fixture(scope="module", params=NETWORKS)
def case(request):
    model, loss, x, y = network(request.param)
    return lh.linearize(model, loss, x, y), oracle_hessian(model, loss, x, y), (model, loss, x, y)


def dense(*operators):
    return [lh.to_dense(op) for op in operators]


def assert_close(actual, expected, tolerance=1e-12):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * max(np.abs(expected).max(), 1e-300))


def composed(lin):
    """H as the composition of its pieces."""
    inner = lin.P @ lin.M_inv @ lin.D_x
    return (
        lin.DD_xx
        + lin.DD_zx @ inner
        + lin.D_x.T @ lin.M_inv.T @ lin.P.T @ lin.DM_xz
        + lin.D_x.T @ lin.M_inv.T @ lin.P.T @ lin.DM_zz @ inner
    )


def test_hessian_is_autograds(case):
    lin, H, _ = case
    assert np.abs(H).max() > 1e-2
    assert_close(lh.to_dense(lin.H), H)


def test_composition_of_the_pieces_is_the_hessian(case):
    lin, H, _ = case
    assert_close(lh.to_dense(composed(lin)), H)


def test_dense_pieces_compose_as_well(case):
    """With NumPy's own inverse of M."""
    lin, H, _ = case
    M, P, D_x, DD_xx, DD_zx, DM_xz, DM_zz = dense(lin.M, lin.P, lin.D_x, lin.DD_xx, lin.DD_zx, lin.DM_xz, lin.DM_zz)
    inner = P @ np.linalg.inv(M) @ D_x
    assert_close(DD_xx + DD_zx @ inner + inner.T @ DM_xz + inner.T @ DM_zz @ inner, H)


def test_pieces_are_block_diagonal(case):
    lin, _, _ = case
    q = lin.problem.layout
    for op, rows, columns in (
        (lin.D_x, q.out_offsets, q.x_offsets),
        (lin.DD_xx, q.x_offsets, q.x_offsets),
        (lin.DD_zx, q.x_offsets, q.in_offsets),
        (lin.DM_xz, q.in_offsets, q.x_offsets),
        (lin.DM_zz, q.in_offsets, q.in_offsets),
    ):
        outside = lh.to_dense(op)
        assert outside.shape == (rows[-1], columns[-1])
        for l in range(q.length):
            outside[rows[l] : rows[l + 1], columns[l] : columns[l + 1]] = 0
        assert not outside.any()


def test_shift_and_transition_are_what_they_say(case):
    lin, _, _ = case
    q = lin.problem.layout
    M, M_inv, P = dense(lin.M, lin.M_inv, lin.P)
    expected = np.zeros_like(P)
    kept = q.size_out - q.n_out[-1]
    expected[q.n_in[0] :, :kept] = np.eye(kept)
    np.testing.assert_array_equal(P, expected)
    assert_close(M @ M_inv, np.eye(len(M)))
    assert_close(M_inv @ M, np.eye(len(M)))
    np.testing.assert_array_equal(np.triu(M, 1), 0)
    np.testing.assert_array_equal(np.diag(M), 1)
    for l in range(q.length):
        for k in range(l - 1):
            assert not M[q.out_offsets[l] : q.out_offsets[l + 1], q.out_offsets[k] : q.out_offsets[k + 1]].any()


def test_blocks_of_M_are_the_jacobians_of_the_layers():
    model, loss, x, y = network("unequal widths")
    lin = lh.linearize(model, loss, x, y)
    q = lin.problem.layout
    M = lh.to_dense(lin.M)
    z = x
    for l, layer in enumerate(model):
        after = layer(z).detach()
        if l:
            F = torch.autograd.functional.jacobian(layer, z).reshape(after.numel(), z.numel()).numpy()
            block = M[q.out_offsets[l] : q.out_offsets[l + 1], q.out_offsets[l - 1] : q.out_offsets[l]]
            assert_close(-block, F)
        z = after


@pytest.mark.parametrize("banded", [True, False])
@pytest.mark.parametrize("name", ["unequal widths", "activation first", "convolution", "one layer"])
def test_both_substitutions(name, banded, monkeypatch):
    """Whichever way M⁻¹ is applied, one band solve or stage by stage."""
    monkeypatch.setattr(Transition, "is_banded", banded)
    model, loss, x, y = network(name)
    lin = lh.linearize(model, loss, x, y)
    M, M_inv = dense(lin.M, lin.M_inv)
    assert_close(M @ M_inv, np.eye(len(M)))
    assert_close(lh.to_dense(lin.M_inv.T), M_inv.T)
    H = oracle_hessian(model, loss, x, y)
    assert_close(lh.to_dense(lin.H), H)
    check_operator(lin.M_inv, np.linalg.inv(M), rtol=1e-12)


def test_wide_chain_goes_stage_by_stage():
    model = make_mlp([4, 80, 80, 3])
    x, y = make_batch(4, 3, 30)
    lin = lh.linearize(model, f.cross_entropy, x, y)
    assert not lin.problem.transition.is_banded
    v = np.random.default_rng(0).standard_normal((lin.M.shape[0], 2))
    assert_close(lin.M @ (lin.M_inv @ v), v)
    assert_close(lin.M.T @ (lin.M_inv.T @ v), v)
    assert lin.verify() < 1e-11


def test_schur_complement_of_the_augmented_system(case):
    lin, H, _ = case
    N = len(H)
    K = lh.to_dense(lin.augmented(DAMPING))
    assert K.shape == (N + 2 * lin.problem.layout.size_out,) * 2
    schur = K[:N, :N] - K[:N, N:] @ np.linalg.solve(K[N:, N:], K[N:, :N])
    assert_close(schur, H + DAMPING * np.eye(N))
    g = np.random.default_rng(0).standard_normal(N)
    solution = np.linalg.solve(K, np.concatenate([g, np.zeros(len(K) - N)]))
    assert_close(solution[:N], np.linalg.solve(H + DAMPING * np.eye(N), g), 1e-9)


def test_augmented_is_written_as_in_the_paper(case):
    lin, _, _ = case
    D_x, M, P, DD_xx, DD_zx, DM_xz, DM_zz = dense(lin.D_x, lin.M, lin.P, lin.DD_xx, lin.DD_zx, lin.DM_xz, lin.DM_zz)
    zero = np.zeros((len(M), len(M)))
    expected = np.block(
        [
            [DD_xx + DAMPING * np.eye(len(DD_xx)), DD_zx @ P, D_x.T],
            [-D_x, M, zero],
            [-P.T @ DM_xz, -P.T @ DM_zz @ P, M.T],
        ]
    )
    assert_close(lh.to_dense(lin.augmented(DAMPING)), expected, 1e-14)


def test_permuted_system_is_block_tridiagonal(case):
    lin, _, _ = case
    K = lh.to_dense(lin.augmented(DAMPING))
    permutation = lh.to_dense(lin.permutation)
    assert np.array_equal(permutation @ permutation.T, np.eye(len(K)))
    T = lh.to_dense(lin.block_tridiagonal(DAMPING))
    np.testing.assert_allclose(T, permutation @ K @ permutation.T, rtol=0, atol=1e-14 * np.abs(K).max())
    edges = np.concatenate([[0], np.cumsum(lin.block_sizes)])
    assert edges[-1] == len(T) and len(edges) == lin.problem.length + 1
    outside = T.copy()
    for l in range(lin.problem.length):
        outside[edges[l] : edges[l + 1], edges[max(l - 1, 0)] : edges[min(l + 2, lin.problem.length)]] = 0
    assert not outside.any()
    if lin.problem.length > 2:
        off = [T[edges[l + 1] : edges[l + 2], edges[l] : edges[l + 1]] for l in range(lin.problem.length - 1)]
        assert all(block.any() for block in off)


def test_permutation_groups_each_layer(case):
    """(x_l, y_l, z_l) of one layer together, in this order."""
    lin, _, _ = case
    q = lin.problem.layout
    labels = np.concatenate(
        [
            np.concatenate([np.repeat(np.arange(q.length), sizes) * 3 + part])
            for part, sizes in enumerate((q.p, q.n_out, q.n_out))
        ]
    )
    grouped = lin.permutation @ labels.astype(float)
    assert (np.diff(grouped) >= 0).all()


OPERATORS = {
    "M": lambda lin: lin.M,
    "M_inv": lambda lin: lin.M_inv,
    "P": lambda lin: lin.P,
    "D_x": lambda lin: lin.D_x,
    "DD_xx": lambda lin: lin.DD_xx,
    "DD_zx": lambda lin: lin.DD_zx,
    "DM_xz": lambda lin: lin.DM_xz,
    "DM_zz": lambda lin: lin.DM_zz,
    "H": lambda lin: lin.H,
    "damped": lambda lin: lin.damped(DAMPING),
    "augmented": lambda lin: lin.augmented(DAMPING),
    "permutation": lambda lin: lin.permutation,
    "block_tridiagonal": lambda lin: lin.block_tridiagonal(DAMPING),
    "gauss_newton": lambda lin: lin.gauss_newton(),
    "gauss_newton damped": lambda lin: lin.gauss_newton().damped(DAMPING),
    "composed": composed,
}
SYMMETRIC = {"DD_xx", "DM_zz", "H", "damped", "gauss_newton", "gauss_newton damped"}


@pytest.mark.parametrize(
    "operator, dtype",
    [*((name, torch.float64) for name in OPERATORS), *((name, torch.float32) for name in ("M_inv", "H", "composed"))],
)
def test_operators_conform(operator, dtype):
    lin = lh.linearize(*network("curved in its parameters", dtype))
    op = OPERATORS[operator](lin)
    check_operator(op)
    if operator in SYMMETRIC:
        assert op.symmetric and op.H is op
        matrix = lh.to_dense(op)
        assert_close(matrix, matrix.T, 100 * np.finfo(op.dtype).eps)


@pytest.mark.parametrize("name", ["unequal widths", "activation first", "convolution"])
@pytest.mark.parametrize("operator", ["M_inv", "D_x", "DD_zx", "DM_zz", "H", "augmented", "gauss_newton"])
def test_operators_of_other_networks_conform(operator, name):
    check_operator(OPERATORS[operator](lh.linearize(*network(name))), products_only=True)


@pytest.mark.parametrize("method", ["auto", "banded", "riccati", "dense", "ldu"])
def test_inverses_conform(method):
    """At a damping where nothing is ill-conditioned, so that rounding is all there is."""
    model, loss, x, y = network("unequal widths")
    lin = lh.linearize(model, loss, x, y)
    H = oracle_hessian(model, loss, x, y)
    damping = 0.7 * np.linalg.norm(H, 2)
    inverse = np.linalg.inv(H + damping * np.eye(len(H)))
    check_operator(lin.inverse(damping, method), inverse, rtol=1e-11, products_only=method not in ("auto", "ldu"))
    if method != "auto":
        return  # operators of the inverses of Gauss-Newton matrices are the same class
    G = lh.to_dense(lin.gauss_newton())
    inverse = np.linalg.inv(G + damping * np.eye(len(H)))
    check_operator(lin.gauss_newton().inverse(damping, method), inverse, rtol=1e-11, products_only=True)


def test_inverse_in_float32_conforms():
    lin = lh.linearize(*network("unequal widths", torch.float32))
    check_operator(lin.inverse(5.0), rtol=2e-3)


def test_loss_and_gradient(case):
    lin, _, (model, loss, x, y) = case
    assert isinstance(lin.loss, float)
    np.testing.assert_allclose(lin.loss, loss(model(x), y).item(), rtol=1e-13)
    gradient = lin.gradient
    assert type(gradient) is np.ndarray and gradient.flags.writeable
    assert_close(gradient, oracle_gradient(model, loss, x, y), 1e-12)
    gradient[:] = 7
    assert not (lin.gradient == 7).any()
    assert lin.names == tuple(name for name, _ in model.named_parameters())


def test_nothing_is_left_on_the_model(case):
    _, _, (model, loss, x, y) = case
    lh.linearize(model, loss, x, y)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not x.requires_grad and x.grad is None


def test_inside_no_grad_and_inference_mode():
    model, loss, x, y = network("unequal widths")
    H = oracle_hessian(model, loss, x, y)
    with torch.no_grad():
        assert_close(lh.to_dense(lh.linearize(model, loss, x, y).H), H)


def test_gauss_newton_is_JHJ(case):
    """Jᵀ ∇²loss J with an explicit Jacobian, one backward pass an output."""
    lin, _, (model, loss, x, y) = case
    J = oracle_jacobian(model, x)
    output = model(x).detach()
    H_L = torch.autograd.functional.hessian(lambda o: loss(o, y), output).reshape(output.numel(), output.numel())
    expected = J.T @ H_L.numpy() @ J
    gauss_newton = lin.gauss_newton()
    assert_close(lh.to_dense(gauss_newton), expected)
    assert_close(lh.to_dense(gauss_newton.damped(DAMPING)), expected + DAMPING * np.eye(len(expected)))
    g = lin.gradient
    solved = gauss_newton.inverse(DAMPING) @ g
    assert_close(solved, np.linalg.solve(expected + DAMPING * np.eye(len(expected)), g), 1e-9)
    assert "banded" in str(gauss_newton.plan(DAMPING))


def test_gauss_newton_of_a_network_that_shares_its_outputs_weights():
    """Equal to H where the chain is linear."""
    model = make_mlp([3, 2], gain=1.3)
    x, y = make_batch(3, 2, 6)
    lin = lh.linearize(model, f.cross_entropy, x, y)
    assert_close(lh.to_dense(lin.gauss_newton()), lh.to_dense(lin.H))


def test_snapshot():
    """The model changes, in place and by replacement; the operators do not."""
    model, loss, x, y = network("curved in its parameters")
    H, gradient = oracle_hessian(model, loss, x, y), oracle_gradient(model, loss, x, y)
    lin = lh.linearize(model, loss, x, y)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-3).add_(1)
        x.mul_(2)
        y.zero_()
    model[0].weight = nn.Parameter(torch.zeros_like(model[0].weight))
    model.train()
    assert_close(lh.to_dense(lin.H), H)
    assert_close(lh.to_dense(composed(lin)), H)
    assert_close(lin.gradient, gradient)
    N = len(H)
    assert_close(lin.inverse(1.0) @ gradient, np.linalg.solve(H + np.eye(N), gradient), 1e-10)


@pytest.mark.parametrize("name", ["normalized", "convolution", "saturated"])
def test_snapshot_of_other_layers(name):
    model, loss, x, y = network(name)
    H = oracle_hessian(model, loss, x, y)
    lin = lh.linearize(model, loss, x, y)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
        x.fill_(float("nan"))
    assert_close(lh.to_dense(lin.H), H)


def test_snapshot_of_a_single_layer_without_stacking():
    """One layer of each shape: the stacks must still be copies."""
    model = make_mlp([2, 3, 4, 5])
    x, y = make_batch(2, 5, 1)
    lin = lh.linearize(model, f.cross_entropy, x, y)
    before = lh.to_dense(lin.H)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        x.zero_()
    np.testing.assert_array_equal(lh.to_dense(lin.H), before)
    assert_close(lh.to_dense(lh.linearize(make_mlp([2, 3, 4, 5]), f.cross_entropy, *make_batch(2, 5, 1)).H), before)


def test_snapshot_of_an_embedding_and_batch_norm():
    model = nn.Sequential(nn.Embedding(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2)).double().eval()
    index, y = torch.tensor([0, 2, 2, 1]), torch.tensor([0, 1, 1, 0])
    lin = lh.linearize(model, f.cross_entropy, index, y)
    before = lh.to_dense(lin.H)
    with torch.no_grad():
        index.fill_(3)
        for value in model.state_dict().values():
            value.zero_()
    np.testing.assert_array_equal(lh.to_dense(lin.H), before)


def test_pickling():
    model, loss, x, y = network("curved in its parameters")
    lin = lh.linearize(model, lambda o, t: loss(o, t), x, y)  # the lambda itself cannot be pickled
    back = pickle.loads(pickle.dumps(lin))
    np.testing.assert_array_equal(lh.to_dense(back.H), lh.to_dense(lin.H))
    np.testing.assert_array_equal(back.gradient, lin.gradient)
    assert back.names == lin.names and back.loss == lin.loss
    np.testing.assert_array_equal(back.inverse(0.1) @ lin.gradient, lin.inverse(0.1) @ lin.gradient)
    with pytest.raises(RuntimeError, match="without its model"):
        back.verify()
    inverse = lin.inverse(0.1)
    restored = pickle.loads(pickle.dumps(inverse))
    np.testing.assert_array_equal(restored @ lin.gradient, inverse @ lin.gradient)
    assert restored.with_damping(0.2).damping == 0.2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", NETWORKS)
def test_verify_passes(name, dtype):
    lin = lh.linearize(*network(name, dtype), verify=True)
    assert lin.verify(probes=3) <= (1e-10 if dtype == torch.float64 else 1e-3)


@pytest.mark.parametrize("factor", [1 + 1e-6, 0.0, -1.0])
@pytest.mark.parametrize("stage", [0, 2, 4, 5])
def test_verify_fails_on_a_tampered_problem(stage, factor):
    """A factor on the adjoint or curvature of any one stage is noticed."""
    model, loss, x, y = network("unequal widths")
    lin = lh.linearize(model, loss, x, y)
    stage = min(stage, lin.problem.length - 1)
    block = lin.problem.stages[stage]
    tensor = block.beta if hasattr(block, "beta") and stage else getattr(block, "c", None)
    tensor = block.Z if tensor is None else tensor
    tensor.mul_(factor)
    with pytest.raises(ArithmeticError, match="differs from double backward .*suspected"):
        lin.verify()


def test_verify_names_the_layer_it_suspects():
    model, loss, x, y = network("curved in its parameters")
    lin = lh.linearize(model, loss, x, y)
    stage = next(b for b, name in enumerate(lin.problem.names) if str(name) == "1: mul")
    getattr(lin.problem.stages[stage], "inner", lin.problem.stages[stage]).c.mul_(1.5)
    with pytest.raises(ArithmeticError, match=r"suspected: at or after stage 1 \(0: addmm\)"):
        lin.verify()


class WrongBackward(torch.autograd.Function):
    """x², whose double backward forgets a half."""

    @staticmethod
    def forward(context, x):
        context.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(context, gradient):
        (x,) = context.saved_tensors
        return 2 * x * gradient


class Custom(nn.Module):
    def forward(self, x):
        return WrongBackward.apply(x)


def test_custom_autograd_function():
    """What it computes inside is not shown to the recording; its name and its place are told."""
    model = nn.Sequential(*make_mlp([3, 4]), Custom(), *make_mlp([4, 3]))
    x, y = make_batch(3, 3, 4)
    with pytest.raises(
        UnsupportedModelError, match="module '2' .*custom autograd.Function WrongBackward.*linop_hess.Hessian"
    ):
        lh.linearize(model, curved, x, y)
    assert_close(lh.to_dense(lh.Hessian(model, curved, (x, y))), oracle_hessian(model, curved, x, y))


def test_verify_refuses_a_changed_model():
    model, loss, x, y = network("unequal widths")
    lin = lh.linearize(model, loss, x, y)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    with pytest.raises(RuntimeError, match="changed since linearize"):
        lin.verify()


@pytest.mark.parametrize("change", ["inputs", "targets", "buffer", "mode"])
def test_verify_after_other_changes(change):
    """Whatever the linearization was made from changed: refuse to compare, or compare with what it was."""
    model = nn.Sequential(*make_mlp([3, 4]), nn.BatchNorm1d(4).double(), nn.Dropout(0.5), *make_mlp([4, 3])).eval()
    x, y = make_batch(3, 3, 4)
    lin = lh.linearize(model, f.cross_entropy, x, y)
    with torch.no_grad():
        if change == "inputs":
            x.mul_(3)
        elif change == "targets":
            y.copy_((y + 1) % 3)
        elif change == "buffer":
            model[1].running_var.mul_(9)
        else:
            model.train()
    try:
        assert lin.verify() <= 1e-10
    except RuntimeError as error:
        assert "changed since linearize" in str(error)


def test_verify_needs_probes():
    lin = lh.linearize(*network("one layer"))
    with pytest.raises(ValueError, match="at least 1"):
        lin.verify(probes=0)


@pytest.mark.parametrize("samples", [1, 2, 13, 40])
def test_batches(samples):
    model = make_mlp([3, 4, 2, 3], gain=1.4)
    x, y = make_batch(3, 3, samples)
    lin = lh.linearize(model, curved, x, y)
    H = oracle_hessian(model, curved, x, y)
    assert_close(lh.to_dense(lin.H), H)
    assert_close(lh.to_dense(composed(lin)), H)


# Closed forms


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("samples", [1, 4, 20])
def test_linear_regression(samples, outputs):
    """H = (2/(n·o)) I_o ⊗ Z̃ᵀZ̃, the parameters being W row by row and then the bias."""
    model = make_mlp([3, outputs])
    x, _ = make_batch(3, 2, samples)
    y = torch.randn(samples, outputs, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    lin = lh.linearize(model, f.mse_loss, x, y)
    gram = np.column_stack([x.numpy(), np.ones(samples)])
    gram = 2 / (samples * outputs) * gram.T @ gram
    by_output = np.kron(np.eye(outputs), gram).reshape(outputs, 4, outputs, 4)
    order = [(o, i) for o in range(outputs) for i in range(3)] + [(o, 3) for o in range(outputs)]
    expected = np.array([[by_output[o, i, q, j] for q, j in order] for o, i in order])
    assert_close(lh.to_dense(lin.H), expected)
    weight, bias = model[0].weight.detach().numpy(), model[0].bias.detach().numpy()
    residual = x.numpy() @ weight.T + bias - y.numpy()
    np.testing.assert_allclose(lin.loss, np.mean(residual**2), rtol=1e-13)
    gradient = 2 / residual.size * np.concatenate([(residual.T @ x.numpy()).ravel(), residual.sum(0)])
    assert_close(lin.gradient, gradient)


def test_logistic_regression():
    """H = Zᵀ diag(s(1 − s)) Z / n."""
    model = make_mlp([4, 1], bias=False)
    x, y = make_batch(4, 2, 11)
    lin = lh.linearize(model, lambda o, t: f.binary_cross_entropy_with_logits(o[:, 0], t), x, y.double())
    s = 1 / (1 + np.exp(-x.numpy() @ model[0].weight.detach().numpy()[0]))
    assert_close(lh.to_dense(lin.H), x.numpy().T @ np.diag(s * (1 - s)) @ x.numpy() / 11)


def test_softmax_regression():
    """H = Σ_b (diag π_b − π_b π_bᵀ) ⊗ x_b x_bᵀ / n."""
    model = make_mlp([3, 4], bias=False)
    x, y = make_batch(3, 4, 9)
    lin = lh.linearize(model, f.cross_entropy, x, y)
    expected = np.zeros((12, 12))
    for row in x.numpy():
        logits = model[0].weight.detach().numpy() @ row
        pi = np.exp(logits - logits.max())
        pi /= pi.sum()
        expected += np.kron(np.diag(pi) - np.outer(pi, pi), np.outer(row, row)) / 9
    assert_close(lh.to_dense(lin.H), expected)


@pytest.mark.parametrize("depth", [2, 3, 6])
def test_deep_linear_scalar_network(depth):
    """½(w_L ⋯ w_1 x − y)²: every entry of H is a product of the weights."""
    weights = np.random.default_rng(depth).uniform(0.5, 1.5, depth)
    x, y = 1.3, 0.4
    model = nn.Sequential(*[nn.Linear(1, 1, bias=False, dtype=torch.float64) for _ in range(depth)])
    with torch.no_grad():
        for layer, w in zip(model, weights, strict=True):
            layer.weight.fill_(w)
    lin = lh.linearize(model, lambda o, t: 0.5 * (o - t).square().sum(), torch.tensor([[x]], dtype=torch.float64), y)
    full = np.prod(weights) * x
    expected = np.array(
        [[full**2 / (a * b) + (full - y) * full / (a * b) * (i != j) for j, b in enumerate(weights)]
         for i, a in enumerate(weights)]
    )  # fmt: skip
    assert_close(lh.to_dense(lin.H), expected)
    assert_close(lin.gradient, (full - y) * full / weights)
    g = np.ones(depth)
    for method in ("banded", "riccati", "dense", "ldu"):
        assert_close(lin.inverse(0.9, method) @ g, np.linalg.solve(expected + 0.9 * np.eye(depth), g), 1e-11)


def test_large_chain_against_autograd_products():
    model = make_mlp([5] + [6] * 60 + [4], gain=1.2)
    x, y = make_batch(5, 4, 3)
    lin = lh.linearize(model, f.cross_entropy, x, y)
    v = np.random.default_rng(0).standard_normal((lin.H.shape[0], 2))
    theirs = lh.Hessian(model, f.cross_entropy, (x, y)) @ v
    assert_close(lin.H @ v, theirs, 1e-11)
    assert_close(composed(lin) @ v, theirs, 1e-11)
