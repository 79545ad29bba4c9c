"""Dampings at which a trailing block of H + εI is singular although H + εI is well conditioned.

Without pivoting across stages a recursion divides by that block; the error then grows as 1/δ.
"""

import numpy as np
import pytest
import torch

from linop_hess import lq
from linop_hess.errors import FactorizationError
from linop_hess.lq.methods import riccati
from linop_hess.lq.pivots import rules
from tests.lq.problems import Blocks, backward_error, random_blocks

DELTAS = [1e-6, 1e-10, 1e-13, 0.0]
CHAINS = {
    "narrow": ([3] * 9, [5, 6, 2, 3, 7, 4, 5, 3], "some"),
    "narrow, controls affine": ([2, 3, 3, 4, 2, 3, 2], [7, 9, 8, 9, 7, 8], "none"),
    "wide": ([24, 30, 26, 30, 28], [30, 20, 28, 24], "some"),
    "wide, controls affine": ([20, 24, 22, 26], [40, 50, 45], "none"),
}


def trailing(blocks: Blocks, l: int) -> np.ndarray:
    """The trailing block H_{l:L}: what the backward recursion has pivoted on when it has eliminated stages l, …, L."""
    H = blocks.hessian()
    start = sum(a.shape[0] for a in blocks.A[:l])
    return H[start:, start:]


def singular_damping(blocks: Blocks, l: int, delta: float) -> float | None:
    """The ε at which H + εI is best conditioned of those for which an eigenvalue of H_{l:L} + εI is δ."""
    values = np.linalg.eigvalsh(blocks.hessian())
    dampings = delta - np.linalg.eigvalsh(trailing(blocks, l))
    shifted = np.abs(values + dampings[np.abs(dampings) > 1e-3][:, None])
    conditions = shifted.max(1) / shifted.min(1)
    best = int(conditions.argmin())
    return float(dampings[np.abs(dampings) > 1e-3][best]) if conditions[best] < 1e5 else None


def cases():
    out = []
    for name, (n, p, with_A) in CHAINS.items():
        for l in sorted({1, len(p) // 2, len(p) - 2}):
            out.append(pytest.param(n, p, with_A, l, id=f"{name}, stage {l + 1}"))
    return out


@pytest.fixture(scope="module")
def found():
    return {}


def near_singular(found, n, p, with_A, l, delta):
    key = (tuple(n), tuple(p), l, delta)
    if key not in found:
        blocks = random_blocks(n, p, seed=3, with_A=with_A)
        damping = singular_damping(blocks, l, delta)
        assert damping is not None, "no damping with a moderate condition number: choose another seed"
        smallest = np.abs(np.linalg.eigvalsh(trailing(blocks, l) + damping * np.eye(len(trailing(blocks, l))))).min()
        assert smallest <= 2 * delta + 1e-14 * np.abs(blocks.hessian()).max() * 10
        found[key] = blocks, damping
    return found[key]


@pytest.mark.parametrize(("n", "p", "with_A", "l"), cases())
@pytest.mark.parametrize("delta", DELTAS)
def test_every_method_is_right_or_says_so(found, n, p, with_A, l, delta):
    blocks, damping = near_singular(found, n, p, with_A, l, delta)
    H, problem = blocks.hessian(), blocks.problem()
    g = np.random.default_rng(1).standard_normal((len(H), 2))
    for method in ("auto", "banded", "riccati", "dense", "ldu"):
        try:
            solution = lq.Solver(problem, damping, method).solve(torch.from_numpy(g))
        except FactorizationError:
            # H + εI is well conditioned, so only the paper's algorithm has an excuse.
            assert method == "ldu"
            continue
        assert backward_error(H, damping, solution.x.numpy(), g) <= 1e-14, method
        if method in ("banded", "riccati", "dense"):
            assert solution.method == method


@pytest.mark.parametrize(("n", "p", "with_A", "l"), cases())
@pytest.mark.parametrize("delta", DELTAS)
def test_riccati_delays_few_directions(found, n, p, with_A, l, delta):
    """By itself, without refinement or escalation, and without doing the whole work at the first stage."""
    blocks, damping = near_singular(found, n, p, with_A, l, delta)
    H, problem = blocks.hessian(), blocks.problem()
    g = np.random.default_rng(2).standard_normal((len(H), 2))
    factors = riccati.factor(lq.Analysis(problem), damping)
    assert backward_error(H, damping, factors.solve(torch.from_numpy(g)).numpy(), g) <= 1e-12
    assert sum(factors.delayed.values()) <= 6
    if delta <= 1e-10:
        assert factors.delayed.get(l, 0) >= 1


@pytest.mark.parametrize(("n", "p", "with_A", "l"), cases())
def test_without_delay_the_error_grows(found, n, p, with_A, l, monkeypatch):
    """The sweep is a real one: the same recursion that never delays loses what δ says."""
    monkeypatch.setattr(rules, "PIVOT_SUSPECT", 0.0)
    errors = {}
    for delta in (1e-6, 1e-10):
        blocks, damping = near_singular(found, n, p, with_A, l, delta)
        H = blocks.hessian()
        g = np.random.default_rng(3).standard_normal((len(H), 1))
        factors = riccati.factor(lq.Analysis(blocks.problem()), damping)
        errors[delta] = backward_error(H, damping, factors.solve(torch.from_numpy(g)).numpy(), g)
    assert errors[1e-10] > 1e-11
    assert errors[1e-10] > 20 * errors[1e-6]


@pytest.mark.parametrize("delta", [1e-3, 1e-6, 0.0])
def test_float32(found, delta):
    for name in ("narrow", "wide, controls affine"):
        n, p, with_A = CHAINS[name]
        rounded = random_blocks(n, p, seed=3, with_A=with_A).rounded(torch.float32)
        damping = singular_damping(rounded, 1, delta)
        assert damping is not None
        H, problem = rounded.hessian(), rounded.problem(torch.float32)
        g = np.random.default_rng(4).standard_normal((len(H), 2)).astype(np.float32)
        for method in ("banded", "riccati", "dense"):
            x = lq.Solver(problem, damping, method).solve(torch.from_numpy(g)).x
            assert backward_error(H, damping, x.numpy(), g) <= 1e-6, (name, method)


def test_several_singular_blocks_at_once():
    """Each stage's controls drive the state with no curvature of their own: every trailing block but one is singular."""
    n, p = [2] * 7, [2] * 6
    blocks = random_blocks(n, p, seed=5, with_A="none")
    for l in range(6):
        blocks.C[l][:] = 0
        blocks.B[l][:] = np.eye(2) if l % 2 else blocks.B[l]
    H, problem = blocks.hessian(), blocks.problem()
    eigenvalues = np.linalg.eigvalsh(H)
    g = np.random.default_rng(6).standard_normal((len(H), 1))
    for damping in (1e-3, 1e-7, 1e-11):
        if np.abs(eigenvalues + damping).min() < 1e-9 * np.abs(eigenvalues).max():
            continue
        for method in ("banded", "riccati", "dense"):
            x = lq.Solver(problem, damping, method).solve(torch.from_numpy(g)).x
            assert backward_error(H, damping, x.numpy(), g) <= 1e-14, (method, damping)
