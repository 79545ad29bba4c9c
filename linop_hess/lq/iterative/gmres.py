"""GMRES on H + εI itself, preconditioned from the right, for several right-hand sides side by side.

It is flexible: what M made of each vector is kept, so that a preconditioner in single precision costs no digits of the solution. Restarts
begin from the true residual. Source: Y. Saad, A flexible inner-outer preconditioned GMRES algorithm (1993).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from linop_hess.lq.problem import Problem

# Numbers that the vectors of a cycle may take, and the longest one.
_NUMBERS = 1 << 28
_LONGEST = 300
# Iterations after which a solve is given up.
MOST_ITERATIONS = 1000
# Every so many iterations the size of the solution is looked at.
_LOOK = 5


def vectors_nbytes(problem: Problem, columns: int) -> float:
    """Most bytes that the vectors of `gmres` take."""
    return float(problem.dtype.itemsize * min(_NUMBERS, 2 * _LONGEST * problem.size * columns))


@dataclass(frozen=True)
class Iterated:
    """Where it ended.

    Attributes
    ----------
    x : Tensor, shape (N, k)
    iterations : int
        Of the column that took the most; a product each.
    reached : bool
        Whether all columns have been accepted.
    """

    x: Tensor
    iterations: int
    reached: bool


def gmres(
    product: Callable[[Tensor], Tensor],
    precondition: Callable[[Tensor], Tensor],
    g: Tensor,
    allowed: Callable[[Tensor], Tensor],
    most: int,
) -> Iterated:
    """Solve until the residual of every column is as small as its solution allows.

    Parameters
    ----------
    product : callable
        (H + εI) times (N, k).
    precondition : callable
        M⁻¹ times (N, k), in any precision.
    g : Tensor, shape (N, k)
    allowed : callable
        Residual norms that are small enough for solutions of these norms, both (k,) in float64.
    most : int
        Iterations after which it gives up.

    Returns
    -------
    Iterated
    """
    N, k = g.shape
    x, r = torch.zeros_like(g), g
    length = max(2, min(_LONGEST, most, N, _NUMBERS // (2 * max(1, N * k))))
    done, last = 0, math.inf
    while done < most:
        correction, steps = cycle(product, precondition, r, x, allowed, min(length, most - done))
        done += steps
        x = x + correction
        r = g - product(x)
        short = _norms(r) - allowed(_norms(x))
        if not bool((short > 0).any()):
            return Iterated(x, done, True)
        size = float((_norms(r) / _norms(g).clamp_min(torch.finfo(g.dtype).tiny)).max())
        if not steps or not size < 0.5 * last:  # a whole cycle did not halve the residual
            break
        last = size
    return Iterated(x, done, False)


def cycle(
    product: Callable[[Tensor], Tensor],
    precondition: Callable[[Tensor], Tensor],
    r: Tensor,
    x: Tensor,
    allowed: Callable[[Tensor], Tensor],
    length: int,
) -> tuple[Tensor, int]:
    """One cycle of flexible GMRES, for each column by itself; products are of all columns.

    Parameters
    ----------
    product, precondition, allowed : callable
        As of `gmres`.
    r : Tensor, shape (N, k)
        The residual that it begins from.
    x : Tensor, shape (N, k)
        The solution so far, whose size `allowed` is told.
    length : int
        Most steps.

    Returns
    -------
    correction : Tensor, shape (N, k)
    steps : int
    """
    N, k = r.shape
    V, Z = r.new_empty(k, length + 1, N), r.new_empty(k, length, N)
    sizes = _norms(r)
    V[:, 0] = (r / sizes.clamp_min(torch.finfo(r.dtype).tiny).to(r.dtype)).mT
    least = _LeastSquares(length, sizes.cpu().numpy())
    y = np.zeros((k, 0))
    enough = allowed(_norms(x)).cpu().numpy()
    for j in range(length):
        z = precondition(V[:, j].mT).to(r.dtype)
        Z[:, j] = z.mT
        w = product(z).mT[..., None]  # (k, N, 1)
        h = torch.zeros(k, j + 1, 1, dtype=r.dtype, device=r.device)
        for _ in range(2):
            along = V[:, : j + 1] @ w
            w = w - V[:, : j + 1].mT @ along
            h += along
        size = _norms(w[..., 0].mT)
        V[:, j + 1] = w[..., 0] / size.clamp_min(torch.finfo(r.dtype).tiny).to(r.dtype)[:, None]
        residuals = least.add(h[..., 0].double().cpu().numpy(), size.cpu().numpy())
        ended = bool((residuals <= enough).all())
        if ended or j == length - 1 or j % _LOOK == _LOOK - 1:
            y = least.solution()
            moved = (torch.from_numpy(y).to(r)[:, None] @ Z[:, : j + 1])[:, 0].mT
            enough = allowed(_norms(x + moved)).cpu().numpy()
            if (residuals <= enough).all() or j == length - 1:
                return moved, j + 1
    return torch.zeros_like(r), 0


class _LeastSquares:
    """min ‖β e₁ − H y‖ for k Hessenberg matrices that grow, by Givens rotations."""

    def __init__(self, length: int, beta: np.ndarray) -> None:
        k = beta.size
        self._R = np.zeros((k, length, length))
        self._turned = np.zeros((k, length + 1))
        self._turned[:, 0] = beta
        self._cos, self._sin = np.zeros((k, length)), np.zeros((k, length))
        self._have = 0

    def add(self, column: np.ndarray, below: np.ndarray) -> np.ndarray:
        """Add a column, (k, j + 1), and the entry below it, (k,); the norm of what is left of each residual, (k,)."""
        j, column = self._have, column.copy()
        for i in range(j):
            c, s = self._cos[:, i], self._sin[:, i]
            upper = c * column[:, i] + s * column[:, i + 1]
            column[:, i + 1] = c * column[:, i + 1] - s * column[:, i]
            column[:, i] = upper
        size = np.hypot(column[:, j], below)
        safe = np.where(size > 0, size, 1.0)
        self._cos[:, j], self._sin[:, j] = np.where(size > 0, column[:, j] / safe, 1.0), below / safe
        column[:, j] = size
        self._R[:, : j + 1, j] = column
        self._turned[:, j + 1] = -self._sin[:, j] * self._turned[:, j]
        self._turned[:, j] *= self._cos[:, j]
        self._have += 1
        return np.abs(self._turned[:, j + 1])

    def solution(self) -> np.ndarray:
        """Y of each, (k, j)."""
        j = self._have
        R, rhs = self._R[:, :j, :j], self._turned[:, :j].copy()
        for i in range(j - 1, -1, -1):
            pivot = R[:, i, i]
            rhs[:, i] = np.where(pivot > 0, rhs[:, i] / np.where(pivot > 0, pivot, 1.0), 0.0)
            rhs[:, :i] -= R[:, :i, i] * rhs[:, i, None]
        return rhs


def _norms(columns: Tensor) -> Tensor:
    return torch.linalg.vector_norm(columns, dim=0, dtype=torch.float64)
