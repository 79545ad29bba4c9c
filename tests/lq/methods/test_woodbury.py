"""Gauss-Newton inverses in function space, against Jᵀ(∇²loss)J from autograd's Jacobian, assembled densely."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as f

import linop_hess as lh
from linop_hess.errors import FactorizationError
from linop_hess.lq import Analysis, Inverse
from linop_hess.lq.elimination.function_space import FunctionSpace
from linop_hess.lq.inverse import entries
from linop_hess.lq.methods import woodbury
from linop_hess.lq.methods.base import EVERYTHING
from linop_hess.lq.pivots.inertia import Inertia
from tests.helpers import make_batch, make_mlp, oracle_jacobian
from tests.lq.graphs import SAMPLES, Chain, residual_of_samples, shared
from tests.lq.methods.conformance import DAMPINGS as DAMPINGS_OF_FACTORS
from tests.lq.methods.conformance import Setting, SolveConformance, eye, largest
from tests.lq.problems import Blocks, backward_error, gauss_newton_blocks, random_blocks
from tests.test_linearization import NETWORKS, network

DAMPINGS = (1.0, 1e-2, 1e-4, 1e-7, -3e-2)


def cross_entropy(output, target):
    return f.cross_entropy(output, target)


def squared(output, target):
    return (output - target[:, None]).square().sum()


def nonconvex(output, target):
    """Its Hessian has eigenvalues of both signs in every sample."""
    return f.cross_entropy(output, target) + output.sin().prod(1).sum()


def coupled(output, target):
    """Samples interact, so that its Hessian is one dense block."""
    return (
        f.cross_entropy(output, target) + 0.3 * (output - output.mean(0)).pow(4).mean() + output.mean(0).square().sum()
    )


def coupled_and_nonconvex(output, target):
    return f.cross_entropy(output, target) - 0.7 * output.mean(0).square().sum()


LOSSES = [cross_entropy, squared, nonconvex, coupled, coupled_and_nonconvex]


def gauss_newton_matrix(model, loss_fn, x, y) -> np.ndarray:
    J = oracle_jacobian(model, x)
    with torch.no_grad():
        output = model(x)
    C = torch.autograd.functional.hessian(lambda z: loss_fn(z, y), output)
    return J.T @ C.reshape(output.numel(), output.numel()).double().numpy() @ J


def more_layers() -> dict[str, tuple[nn.Module, torch.Tensor, torch.Tensor]]:
    """Layers that the catalogue of `tests.test_linearization` has not."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        images = torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float64)
        words = torch.tensor([[0, 2, 1], [3, 3, 0], [1, 4, 2]])
        labels = torch.tensor([0, 2, 1])
        found = {
            "images": (
                nn.Sequential(
                    nn.Conv2d(2, 3, 3, padding=1), nn.GroupNorm(1, 3), nn.SiLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 3)
                ),
                images,
                labels,
            ),
            "batch normalization": (
                nn.Sequential(nn.Conv2d(2, 2, 2), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)).eval(),
                images,
                labels,
            ),
            "words": (
                nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)),
                words,
                labels,
            ),
        }  # fmt: skip
    return {name: (model.double(), x, y) for name, (model, x, y) in found.items()}


def cases() -> list[str]:
    return [*NETWORKS, "images", "batch normalization", "words", "more samples than inputs"]


def setting(name: str):
    if name in ("images", "batch normalization", "words"):
        return more_layers()[name]
    if name == "more samples than inputs":
        return make_mlp([2, 4, 3], gain=1.3), *make_batch(2, 3, 9)
    model, _, x, y = network(name)
    return model, x, y


@pytest.mark.parametrize("loss_fn", LOSSES)
@pytest.mark.parametrize("name", cases())
def test_against_the_dense_matrix(name, loss_fn):
    model, x, y = setting(name)
    H = gauss_newton_matrix(model, loss_fn, x, y)
    eigenvalues = np.linalg.eigvalsh(H)
    norm = np.abs(eigenvalues).max()
    assert norm > 1e-2
    ggn = lh.linearize(model, loss_fn, x, y).gauss_newton()
    g = np.random.default_rng(0).standard_normal((len(H), 2))
    for damping in DAMPINGS:
        shifted = eigenvalues + damping
        if np.abs(shifted).min() <= 1e-12 * norm:
            continue
        inverse = ggn.inverse(damping, "woodbury")
        solution = inverse.solve(g)
        assert solution.method == "woodbury"
        assert backward_error(H, damping, solution.x, g) <= 1e-14
        found = inverse.inertia()
        assert (found.negative, found.zero, found.positive) == ((shifted < 0).sum(), 0, (shifted > 0).sum())
        sign, logdet = inverse.slogdet()
        doubt = 2 * len(H) * np.finfo(float).eps * norm * (1 / np.abs(shifted)).sum()
        assert sign == (-1) ** int((shifted < 0).sum())
        assert abs(logdet - np.log(np.abs(shifted)).sum()) <= 1e-10 * abs(logdet) + doubt


@pytest.mark.parametrize("loss_fn", [cross_entropy, squared, coupled])
@pytest.mark.parametrize("name", cases())
def test_what_the_gram_matrix_knows(name, loss_fn, monkeypatch):
    monkeypatch.setattr(entries, "SOLVED_UP_TO", 0)
    model, x, y = setting(name)
    H = gauss_newton_matrix(model, loss_fn, x, y)
    N = len(H)
    lin = lh.linearize(model, loss_fn, x, y)
    for damping in (0.5, 1e-2, 1e-4):
        K = H + damping * np.eye(N)
        expected = np.linalg.inv(K)
        atol = 1e-14 * np.linalg.cond(K) * np.abs(expected).max()
        inverse = lin.gauss_newton().inverse(damping, "woodbury")
        factors = inverse._inverse.factors.answering("sample")
        assert factors.method == "woodbury"
        np.testing.assert_allclose(inverse.diagonal(), np.diag(expected), rtol=0, atol=atol)
        np.testing.assert_allclose(inverse.trace(), np.trace(expected), rtol=0, atol=N * atol)
        start = 0
        for block in inverse.block_diagonal().values():
            stop = start + len(block)
            np.testing.assert_allclose(block, expected[start:stop, start:stop], rtol=0, atol=3 * atol)
            start = stop
        assert start == N
        np.testing.assert_allclose(lh.to_dense(inverse.positive()), expected, rtol=0, atol=3 * atol)
        with torch.no_grad():
            root = factors.color(torch.eye(factors.noise, dtype=torch.float64)).numpy()
        np.testing.assert_allclose(root @ root.T, expected, rtol=0, atol=10 * atol)


@pytest.mark.parametrize("loss_fn", [nonconvex, coupled_and_nonconvex])
def test_a_nonconvex_cost(loss_fn):
    """The Gram matrix solves; what needs a congruence comes from the block LDLᵀ."""
    model, x, y = setting("unequal widths")
    H = gauss_newton_matrix(model, loss_fn, x, y)
    lin = lh.linearize(model, loss_fn, x, y)
    K = H + 1e-2 * np.eye(len(H))
    assert np.linalg.eigvalsh(K)[0] < 0
    inverse = lin.gauss_newton().inverse(1e-2, "woodbury")
    assert inverse.method == "woodbury" and inverse._inverse.factors.answering("positive").method in (
        "riccati",
        "dense",
    )
    positive = lh.to_dense(inverse.positive())
    assert np.linalg.eigvalsh((positive + positive.T) / 2)[0] > 0
    np.testing.assert_allclose(np.abs(np.linalg.eigvals(positive @ K)), 1, atol=1e-6)
    expected = np.linalg.inv(K)
    atol = 1e-14 * np.linalg.cond(K) * np.abs(expected).max()
    np.testing.assert_allclose(inverse.diagonal(), np.diag(expected), rtol=0, atol=atol)
    with pytest.raises(lh.errors.NotPositiveDefiniteError, match="negative"):
        inverse.sample(2)


def test_samples():
    model, x, y = setting("unequal widths")
    H = gauss_newton_matrix(model, cross_entropy, x, y)
    inverse = lh.linearize(model, cross_entropy, x, y).gauss_newton().inverse(0.1, "woodbury")
    samples = inverse.sample(50_000, torch.Generator().manual_seed(0))
    np.testing.assert_array_equal(samples, inverse.sample(50_000, torch.Generator().manual_seed(0)))
    white = np.linalg.cholesky(H + 0.1 * np.eye(len(H))).T @ samples
    assert abs(white @ white.T / 50_000 - np.eye(len(H))).max() <= 0.05


def test_single_precision():
    model, x, y = setting("unequal widths")
    H = gauss_newton_matrix(model, cross_entropy, x, y)
    ggn = lh.linearize(model.float(), cross_entropy, x.float(), y).gauss_newton()
    g = np.random.default_rng(0).standard_normal((len(H), 2)).astype(np.float32)
    for damping in (0.1, 1e-4):
        inverse = ggn.inverse(damping, "woodbury")
        assert inverse.method == "woodbury" and backward_error(H, damping, inverse.solve(g).x, g) <= 2e-6
        assert inverse.diagonal().dtype == np.float32 and inverse.is_positive_definite
        assert (
            inverse._inverse.factors.answering("sample").method == "woodbury"
        )  # the flat direction of softmax is none of negative curvature


def test_repeated_and_zero_samples():
    """Γ is singular then."""
    model = make_mlp([3, 5, 4, 2], bias=False)
    x, y = make_batch(3, 2, 6)
    x[1], x[3] = x[0], 0
    H = gauss_newton_matrix(model, squared, x, y)
    assert np.linalg.matrix_rank(H) < 12
    g = np.random.default_rng(0).standard_normal((len(H), 2))
    for damping in (1e-1, 1e-5):
        solution = lh.linearize(model, squared, x, y).gauss_newton().inverse(damping, "woodbury").solve(g)
        assert solution.method == "woodbury" and backward_error(H, damping, solution.x, g) <= 1e-14


def test_the_plan_takes_it_where_it_is_cheaper():
    """Wide layers and few samples; with more samples × outputs than parameters there is nothing to gain."""
    loss_fn = cross_entropy
    wide = lh.linearize(make_mlp([8, 200, 200, 3]), loss_fn, *make_batch(8, 3, 5))
    inverse = wide.gauss_newton().inverse(1e-2)
    assert inverse.method == wide.gauss_newton().plan(1e-2).choice == "woodbury"
    assert wide.plan(1e-2).choice != "woodbury"
    assert "curvature" in str(wide.plan(1e-2))
    deep = lh.linearize(make_mlp([3] * 40), loss_fn, *make_batch(3, 3, 160))
    assert deep.gauss_newton().plan(1e-2).choice != "woodbury"


def test_bad_input():
    lin = lh.linearize(make_mlp([3, 4, 3]), cross_entropy, *make_batch(3, 3, 4))
    with pytest.raises(ValueError, match="woodbury.*only for Gauss-Newton"):
        lin.inverse(1e-2, "woodbury")
    with pytest.raises(FactorizationError, match="damping=0"):
        lin.gauss_newton().inverse(0.0, "woodbury")
    small = lh.linearize(make_mlp([3, 3]), cross_entropy, *make_batch(3, 3, 5)).gauss_newton()
    with pytest.raises(ValueError, match="15 batch × outputs are more than the 12 parameters"):
        small.inverse(1e-2, "woodbury")


def test_a_cost_without_curvature():
    """Gauss-Newton is zero then, and its damped inverse I/ε."""
    ggn = lh.linearize(make_mlp([3, 4, 2]), lambda o, t: o.sum(), *make_batch(3, 2, 4)).gauss_newton()
    inverse = ggn.inverse(0.25, "woodbury")
    g = np.random.default_rng(0).standard_normal(ggn.shape[0])
    np.testing.assert_allclose(inverse @ g, 4 * g, rtol=1e-15)
    np.testing.assert_allclose(inverse.diagonal(), 4.0)
    assert inverse.slogdet() == (1.0, pytest.approx(ggn.shape[0] * np.log(0.25)))


GAUSS_NEWTON = {
    "one stage": ([3, 2], [4]),
    "equal": ([3, 3, 3, 4], [3, 3, 3]),
    "more controls than outputs": ([2, 2, 3, 4], [8, 9, 7]),
    "fewer controls than outputs": ([4, 5, 6, 4], [2, 2, 3]),
    "stages without controls": ([2, 4, 3, 5, 2], [0, 6, 0, 0]),
    "an empty state": ([2, 3, 0, 4], [3, 4, 9]),
    "narrow, wide, narrow": ([3, 5, 60, 62, 4], [4, 6, 70, 9]),
}


@cache
def gauss_newton_setting(shape, dtype, convex):
    blocks = gauss_newton_blocks(*GAUSS_NEWTON[shape], seed=3, convex=convex).rounded(dtype)
    H = blocks.hessian()
    return Setting(blocks.problem(dtype), H, np.linalg.eigvalsh(H))


class TestFactors(SolveConformance):
    """Bare factors for LQ problems, against LAPACK."""

    shapes = tuple(GAUSS_NEWTON)
    convex = True

    def factor(self, analysis, damping):
        return woodbury.factor(analysis, damping)

    def setting(self, shape, dtype):
        return gauss_newton_setting(shape, dtype, self.convex)

    def amplified(self, damping):
        return 1 / abs(damping)

    def test_inertia_and_determinant(self, shape, damping):
        truth = self.setting(shape, torch.float64)
        found = self.factor(truth.analysis, damping)
        values = truth.eigenvalues + damping
        expected = Inertia(int((values < 0).sum()), 0, int((values > 0).sum()))
        assert found.inertia(0.0) == expected
        assert abs(found.logabsdet() - np.log(np.abs(values)).sum()) <= truth.doubt(damping, 1e-14) + 1e-13

    def test_what_it_answers(self, shape, damping):
        truth = self.setting(shape, torch.float64)
        found, N = self.factor(truth.analysis, damping), len(truth.H)
        if truth.eigenvalues[0] < -1e-9 or damping < 0:
            assert found.answers == {"solve", "inertia", "determinant"} and not found.is_convex
            return
        if found.answers != EVERYTHING:
            assert not self.convex  # a C of both signs of which only one is seen
            return
        K = truth.shifted(damping)
        expected = np.linalg.inv(K)
        atol = 1e-13 * np.linalg.cond(K) * largest(expected)
        root = found.color(eye(found.noise, torch.float64)).numpy()
        np.testing.assert_allclose(root @ root.T, expected, rtol=0, atol=10 * atol)
        np.testing.assert_allclose(found.positive(eye(N, torch.float64)).numpy(), expected, rtol=0, atol=atol)
        np.testing.assert_allclose(found.diagonal().numpy(), np.diag(expected), rtol=0, atol=atol)
        blocks = iter(found.blocks())
        for own in truth.controls():
            np.testing.assert_allclose(next(blocks), expected[np.ix_(own, own)], rtol=0, atol=atol)
        assert next(blocks, None) is None


class TestFactorsOfNonconvexCosts(TestFactors):
    convex = False


def test_dampings_of_both_signs_are_looked_at():
    assert min(DAMPINGS_OF_FACTORS) < 0 < max(DAMPINGS_OF_FACTORS)


@pytest.mark.parametrize("curved", ["A", "B", "none"])
def test_controls_of_the_last_stage_are_refused(curved):
    """Their curvature, and they themselves, are no part of the function space."""
    blocks = random_blocks([2, 3, 3, 2], [4, 4, 3], seed=1)
    for name in "ABC":
        for l, block in enumerate(getattr(blocks, name)):
            if l < 2 or name not in ("C", curved):
                block[:] = 0
    with pytest.raises(ValueError, match="the last, has controls"):
        Inverse(blocks.problem(), 0.3, "woodbury")
    cost = woodbury.estimate(Analysis(blocks.problem()))
    assert cost.seconds == np.inf
    values = np.linalg.eigvalsh(blocks.hessian()) + 0.3
    assert Inverse(blocks.problem(), 0.3).inertia.negative == (values < 0).sum()


class TestWiredFactors(TestFactors):
    """Wired stages, an idle parameter and controls in any place; samples are apart, or interact."""

    shapes = ("samples, places", "samples", "shared")

    def setting(self, shape, dtype):
        if shape == "shared":
            nodes = [flat(node) for node in shared().nodes]
            made = Chain(nodes, np.random.default_rng(0).permutation(14)).rounded(dtype)
            return Setting(made.problem(dtype), made.hessian(), np.linalg.eigvalsh(made.hessian()))
        problem, _ = residual_of_samples(shape == "samples, places", self.convex)
        problem = problem.gauss_newton()
        if dtype == torch.float32:
            problem = problem.to(dtype).to(torch.float64)
        # The truth by the dense blocks of the stages, which their own tests compare with autograd.
        names = "ABCFG"
        own = {name: [getattr(stage, f"dense_{name}")()[0].numpy() for stage in problem.stages] for name in names}
        places, H = problem.layout.places, Blocks(**own).hessian()
        if places is not None:
            inverse = np.argsort(places)
            H = H[np.ix_(inverse, inverse)]
        found = Setting(problem.to(dtype), H, np.linalg.eigvalsh(H))
        assert FunctionSpace(found.analysis).samples == SAMPLES
        return found


class TestWiredFactorsNonconvex(TestWiredFactors):
    convex = False


def flat(node):
    """Without the curvature of all but the objective, which is convex and of rank one."""
    zero = {name: 0 * node.blocks[name] for name in "ABC"}
    if node.kind == "objective":
        f = node.blocks["F"]
        zero["C"] = f.T @ f
    return replace(node, blocks=node.blocks | zero)
