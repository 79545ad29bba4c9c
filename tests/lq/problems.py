"""Random LQ problems, and their Hessian assembled without the package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch

from linop_hess import lq


@dataclass(frozen=True)
class Blocks:
    """One A, B, C, F and G a stage, float64."""

    A: list[np.ndarray]
    B: list[np.ndarray]
    C: list[np.ndarray]
    F: list[np.ndarray]
    G: list[np.ndarray]

    def problem(self, dtype: torch.dtype = torch.float64) -> lq.Problem:
        groups = (self.A, self.B, self.C, self.F, self.G)
        return lq.Problem.from_blocks(*([torch.tensor(b, dtype=dtype) for b in group] for group in groups))

    def rounded(self, dtype: torch.dtype) -> Blocks:
        """Return the blocks as `dtype` holds them, in float64."""
        groups = (self.A, self.B, self.C, self.F, self.G)
        return Blocks(*([torch.tensor(b, dtype=dtype).double().numpy() for b in group] for group in groups))

    def hessian(self) -> np.ndarray:
        """A + B P M⁻¹ G + Gᵀ M⁻ᵀ Pᵀ Bᵀ + Gᵀ M⁻ᵀ Pᵀ C P M⁻¹ G, every factor written out densely."""
        n_in = [F.shape[1] for F in self.F]
        n_out = [F.shape[0] for F in self.F]
        M = np.eye(sum(n_out))
        P = np.zeros((sum(n_in), sum(n_out)))
        row, column = n_out[0], 0
        for l in range(1, len(self.F)):
            M[row : row + n_out[l], column : column + n_in[l]] = -self.F[l]
            row, column = row + n_out[l], column + n_in[l]
        P[n_in[0] :, :column] = np.eye(column)
        A, B, C, G = (diagonal_of_blocks(blocks) for blocks in (self.A, self.B, self.C, self.G))
        D = P @ np.linalg.solve(M, G)
        return A + B @ D + D.T @ B.T + D.T @ C @ D


def diagonal_of_blocks(blocks: Sequence[np.ndarray]) -> np.ndarray:
    """Return the block diagonal matrix; blocks may be empty in either direction."""
    out = np.zeros(np.sum([b.shape for b in blocks], axis=0))
    row = column = 0
    for block in blocks:
        out[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    return out


def random_blocks(n: Sequence[int], p: Sequence[int], seed: int, *, with_A: str = "some") -> Blocks:
    """Return an indefinite problem with states of sizes n (L + 1 of them) and p controls a stage.

    `with_A` is "none", "some" (every second stage) or "all". B and C are never zero; some columns of G are.
    """
    rng = np.random.default_rng(seed)
    A, B, C, F, G = [], [], [], [], []
    for l, (before, after, controls) in enumerate(zip(n[:-1], n[1:], p, strict=True)):
        a = rng.standard_normal((controls, controls))
        zero = with_A == "none" or (with_A == "some" and l % 2 == 1)
        A.append(np.zeros_like(a) if zero else (a + a.T) / 2)
        B.append(rng.standard_normal((controls, before)))
        c = rng.standard_normal((before, before))
        C.append((c + c.T) / 2)
        F.append(rng.standard_normal((after, before)) / np.sqrt(max(before, 1)))
        g = rng.standard_normal((after, controls))
        if controls > 2 and l % 3 == 0:
            g[:, 1] = g[:, 0]
        G.append(g)
    return Blocks(A, B, C, F, G)


def gauss_newton_blocks(
    n: Sequence[int], p: Sequence[int], seed: int, *, samples: int = 1, convex: bool = True
) -> Blocks:
    """Return a problem whose only curvature is C of its last stage, which has no controls; p has one entry less than stages.

    C is block diagonal over `samples`, and of half rank if convex; F of the last stage is a row.
    """
    blocks = random_blocks([*n, 1], [*p, 0], seed)
    for part in (*blocks.A, *blocks.B, *blocks.C):
        part[:] = 0
    rng = np.random.default_rng(seed + 1)
    i = n[-1] // samples
    own = []
    for _ in range(samples):
        half = rng.standard_normal((i, max(1, i // 2) if convex else i))
        own.append(half @ half.T if convex else (half + half.T) / 2)
    blocks.C[-1][:] = diagonal_of_blocks(own)
    return blocks


def backward_error(H: np.ndarray, damping: float, x: np.ndarray, g: np.ndarray) -> float:
    """max over columns of ‖g − (H + εI)x‖ / (‖H + εI‖₂‖x‖ + ‖g‖), in float64, from the dense matrix."""
    K = H + damping * np.eye(len(H))
    x, g = (np.atleast_2d(np.asarray(v, dtype=np.float64).T).T for v in (x, g))
    norm = np.linalg.norm(K, 2) if K.size else 0.0
    scale = norm * np.linalg.norm(x, axis=0) + np.linalg.norm(g, axis=0)
    return float(np.max(np.linalg.norm(g - K @ x, axis=0) / np.where(scale > 0, scale, 1.0), initial=0.0))


def pendulum(seconds: int) -> tuple[Blocks, np.ndarray, np.ndarray, float]:
    """Blocks of a pendulum held upright, 25 steps a second, a g, (H⁻¹g) and log det H by the textbook recursion in NumPy.

    ‖H‖ grows like exp(6.3 T) while all pivots of the recursion are about 0.005.
    """
    L, dt = 25 * seconds, 0.04
    E = scipy.linalg.expm(dt * np.array([[0, 1.0, 0], [9.81, 0, 1], [0, 0, 0]]))
    F, G, Q, R = E[:2, :2], E[:2, 2:], np.diag([10.0, 0.0]) * dt, np.array([[0.1]]) * dt
    end = scipy.linalg.solve_discrete_are(F, G, Q, R)
    g = np.random.default_rng(0).standard_normal(L)
    P, p, gains, steps, log = end, np.zeros(2), [], [], 0.0
    for load in g[::-1]:
        S = R + G.T @ P @ G
        log += np.log(S[0, 0])
        K, k = np.linalg.solve(S, G.T @ P @ F), np.linalg.solve(S, load - G.T @ p)
        p = F.T @ p + F.T @ P @ G @ k
        P = Q + F.T @ P @ (F - G @ K)
        gains.append(K)
        steps.append(k)
    state, u = np.zeros(2), []
    for K, k in zip(gains[::-1], steps[::-1], strict=True):
        u.append(k - K @ state)
        state = F @ state + G @ u[-1]
    z = np.zeros
    blocks = Blocks(
        A=[R] * L + [z((0, 0))],
        B=[z((1, 2))] * L + [z((0, 2))],
        C=[Q] * L + [end],
        F=[F] * L + [z((0, 2))],
        G=[G] * L + [z((0, 0))],
    )
    return blocks, g, np.concatenate(u), log


def of_blocks(*stages: Sequence[float]) -> Blocks:
    """Return a chain of stages with one control and one state each, from numbers (A, B, C, F, G)."""
    return Blocks(*([np.array([[number]]) for number in group] for group in zip(*stages, strict=True)))
