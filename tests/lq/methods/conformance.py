"""One suite for the factors of every method, against dense eigenvalues and inverses by LAPACK.

A method's tests inherit `SolveConformance`, or `CongruenceConformance` where its factors are a congruence, and say how to `factor`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property, lru_cache

import numpy as np
import pytest
import torch

from linop_hess import lq
from linop_hess.lq.methods.base import EVERYTHING, Congruence, Factorization
from tests.lq.graphs import GRAPHS, Chain
from tests.lq.problems import Blocks, backward_error, random_blocks

DTYPES = (torch.float64, torch.float32)
DAMPINGS = (0.5, 1e-2, 1e-5, -0.3)

# State sizes n_0..n_L and controls p_1..p_L: equal, unequal, one wide among narrow ones, empty in every place.
SHAPES = {
    "one stage": ([3, 2], [4]),
    "equal": ([3, 3, 3, 3, 3], [3, 3, 3, 3]),
    "more controls than outputs": ([2, 2, 3, 2, 1], [8, 9, 7, 5]),
    "fewer controls than outputs": ([4, 5, 6, 5, 4], [1, 2, 1, 3]),
    "wildly varying": ([1, 17, 2, 9, 1, 12, 3], [3, 1, 20, 2, 11, 6]),
    "stages without controls": ([2, 4, 3, 5, 2, 1], [0, 6, 0, 0, 5]),
    "empty states inside": ([2, 3, 0, 4, 0, 2], [3, 4, 2, 5, 3]),
    "no state before the first and after the last": ([0, 3, 2, 0], [5, 0, 4]),
    "a stage with nothing": ([2, 3, 0, 0, 2, 2], [2, 3, 0, 0, 4]),
    "only one control": ([1, 1, 1, 1], [0, 1, 0]),
    "controls in the last stage only": ([2, 3, 2], [0, 3]),
}
# Some segments wider than CONDENSED_UP_TO, with hidden controls, between narrow ones; and nothing but such.
MIXED = {
    "narrow, wide, narrow": ([3, 5, 60, 62, 4, 3], [4, 6, 70, 9, 7]),
    "wide and narrow in turn": ([2, 58, 60, 3, 57, 60, 2], [60, 66, 4, 0, 65, 9]),
    "all wide": ([70, 72, 70, 74], [75, 80, 90]),
}
SIZES = SHAPES | MIXED
# Nodes that act on some of what is live, a parameter that is used twice, controls that nothing sees, controls in any place.
WIRED = tuple(GRAPHS)


@dataclass(frozen=True)
class Setting:
    """A problem and the truth about it."""

    problem: lq.Problem
    H: np.ndarray
    eigenvalues: np.ndarray

    @cached_property
    def analysis(self) -> lq.Analysis:
        """Made once, for all factors and questions, as users do; tests that change how it is made, or count, take a `new_analysis`."""
        return self.new_analysis()

    def new_analysis(self) -> lq.Analysis:
        return lq.Analysis(self.problem)

    def controls(self) -> list[np.ndarray]:
        """Where the controls of each stage that has any lie."""
        layout = self.problem.layout
        return [layout.controls(l) for l in np.flatnonzero(layout.p)]

    @property
    def norm(self) -> float:
        return float(np.abs(self.eigenvalues).max(initial=0.0))

    def shifted(self, damping: float) -> np.ndarray:
        """K = H + εI."""
        return self.H + damping * np.eye(len(self.H))

    def doubt(self, damping: float, relative: float = 0.0) -> float:
        """By how much log|det K| is unknown where eigenvalues are known to `relative` of max(‖H‖, |ε|), and to N roundings anyway."""
        known = (relative + 2 * len(self.H) * np.finfo(float).eps) * max(self.norm, abs(damping))
        return float(known * (1 / np.abs(self.eigenvalues + damping)).sum())


@cache
def setting(shape: str, dtype: torch.dtype = torch.float64, seed: int = 7, with_A: str = "some") -> Setting:
    """A random problem of the shape, its blocks numbers that the dtype holds."""
    made: Blocks | Chain = (
        GRAPHS[shape]() if shape in GRAPHS else random_blocks(*SIZES[shape], seed=seed, with_A=with_A)
    )
    blocks = made.rounded(dtype)
    H = blocks.hessian()
    return Setting(blocks.problem(dtype), H, np.linalg.eigvalsh(H))


def right_hand_side(size: int, columns: int = 3, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((size, columns))


def eye(size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.eye(size, dtype=dtype)


def largest(matrix: np.ndarray) -> float:
    return float(np.abs(matrix).max(initial=0.0))


@lru_cache(maxsize=300)
def factors_of(conformance: type[SolveConformance], shape: str, dtype: torch.dtype, damping: float) -> Factorization:
    """What all cases of one class ask: what is asked first must not change what comes after."""
    made = conformance()
    return made.factor(made.setting(shape, dtype).analysis, damping)


class SolveConformance:
    """Inherit, and define `factor`."""

    shapes = (*SIZES, *WIRED)
    dtypes = DTYPES
    # Backward error of the bare factors in terms of a rounding: no refinement takes part.
    roundings = 1e4

    def factor(self, analysis: lq.Analysis, damping: float) -> Factorization:
        raise NotImplementedError

    def setting(self, shape: str, dtype: torch.dtype) -> Setting:
        return setting(shape, dtype)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "shape" in metafunc.fixturenames:
            metafunc.parametrize("shape", self.shapes)
        if "dtype" in metafunc.fixturenames:
            metafunc.parametrize("dtype", self.dtypes, ids=str)
        if "damping" in metafunc.fixturenames:
            metafunc.parametrize("damping", DAMPINGS)

    def test_solve(self, shape: str, dtype: torch.dtype, damping: float):
        truth = self.setting(shape, dtype)
        g = right_hand_side(len(truth.H)).astype(truth.problem.numpy_dtype)
        factors = factors_of(type(self), shape, dtype, damping)
        assert factors.damping == damping and factors.answers <= EVERYTHING and "solve" in factors.answers
        x = factors.solve(torch.from_numpy(g))
        assert x.dtype == dtype and x.shape == g.shape
        growth = getattr(factors, "growth", 0.0)
        bound = (self.roundings * torch.finfo(dtype).eps + growth) * max(1.0, self.amplified(damping))
        assert backward_error(truth.H, damping, x.numpy(), g) <= bound
        assert factors.nbytes >= 0

    def amplified(self, damping: float) -> float:
        """What a small damping costs a solve without refinement."""
        return 1.0

    def test_solve_without_columns(self, shape: str):
        truth = self.setting(shape, torch.float64)
        assert self.factor(truth.analysis, 0.3).solve(torch.zeros(len(truth.H), 0).double()).shape == (len(truth.H), 0)


class CongruenceConformance(SolveConformance):
    """Inherit, and define `factor`, of bounded growth."""

    def congruence(self, shape: str, dtype: torch.dtype, damping: float) -> Congruence:
        found = factors_of(type(self), shape, dtype, damping)
        assert isinstance(found, Congruence) and found.answers == EVERYTHING
        return found

    def test_inertia_and_determinant(self, shape: str, dtype: torch.dtype, damping: float):
        """Signs are right where `growth` lets them be believed, and log|det| to what that leaves."""
        truth = self.setting(shape, dtype)
        found = self.congruence(shape, dtype, damping)
        values, N = truth.eigenvalues + damping, len(truth.H)
        assert found.theta.numel() + found.hidden == N
        moved = found.growth + 20 * max(N, 1) * torch.finfo(dtype).eps
        scale = max(truth.norm, abs(damping))
        inertia = found.inertia(0.0)
        if np.abs(values).min(initial=np.inf) > moved * scale:
            assert (inertia.negative, inertia.zero, inertia.positive) == ((values < 0).sum(), 0, (values > 0).sum())
            doubt = truth.doubt(damping, moved)
            if doubt < 0.1:
                assert abs(found.logabsdet() - np.log(np.abs(values)).sum()) <= doubt
        assert found.inertia(np.inf).zero == found.theta.numel()

    def test_halves(self, shape: str, dtype: torch.dtype, damping: float):
        """L⁻¹ K L⁻ᵀ = D, and L⁻ᵀ is the transpose of L⁻¹."""
        truth = self.setting(shape, dtype)
        found = self.congruence(shape, dtype, damping)
        N, K, eps = len(truth.H), truth.shifted(damping), torch.finfo(dtype).eps
        half = found.whiten(eye(N, dtype)).double().numpy()
        M = half.shape[0]
        assert M == found.noise == found.pivots.shape[0]
        projected = found.project(eye(M, dtype))
        back = found.unwhiten(projected).double().numpy()
        occurs = projected.double().numpy()
        size = max(1.0, largest(half)) ** 2
        tolerance = 100 * max(N, 1) * (eps + found.growth)
        np.testing.assert_allclose(back, half.T @ occurs, rtol=0, atol=tolerance * size)
        np.testing.assert_allclose(occurs @ half, half, rtol=0, atol=tolerance * size)
        D = occurs.T @ (found.pivots.double().numpy() * occurs)
        np.testing.assert_allclose(half @ K @ half.T, D, rtol=0, atol=tolerance * size * max(truth.norm, abs(damping)))
        assert np.linalg.matrix_rank(occurs, tol=1e-3) == N  # the coordinates that occur

    def test_positive(self, shape: str, dtype: torch.dtype, damping: float):
        """Symmetric positive definite, and (P K)² = I."""
        truth = self.setting(shape, dtype)
        found = self.congruence(shape, dtype, damping)
        N, K = len(truth.H), truth.shifted(damping)
        P = found.positive(eye(N, dtype)).double().numpy()
        condition = np.linalg.norm(P, 2) * np.linalg.norm(K, 2) if N else 1.0
        tolerance = 100 * max(N, 1) * (torch.finfo(dtype).eps + found.growth) * condition
        if not tolerance < 0.1:
            return  # nothing is left of so many digits
        np.testing.assert_allclose(P, P.T, rtol=0, atol=tolerance * largest(P))
        assert np.linalg.eigvalsh((P + P.T) / 2).min(initial=np.inf) > 0
        np.testing.assert_allclose(P @ (K @ (P @ K)), np.eye(N), rtol=0, atol=tolerance * np.linalg.norm(P @ K, 2))

    def test_color(self, shape: str, dtype: torch.dtype):
        """Colored unit vectors are a square root of the inverse."""
        truth = self.setting(shape, dtype)
        damping = 1.5 * max(-truth.eigenvalues.min(initial=0.0), 0.1)
        found = self.congruence(shape, dtype, damping)
        inverse = np.linalg.inv(truth.shifted(damping))
        root = found.color(eye(found.noise, dtype)).double().numpy()
        tolerance = 100 * max(len(inverse), 1) * (torch.finfo(dtype).eps + found.growth)
        tolerance *= np.linalg.cond(truth.shifted(damping)) if len(inverse) else 1.0
        np.testing.assert_allclose(root @ root.T, inverse, rtol=0, atol=tolerance * largest(inverse))
