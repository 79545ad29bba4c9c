"""GMRES on H + εI itself, preconditioned from the right, for a block of right-hand sides at once.

Every column is approximated from the space that all of them span together, so that eigenvalues which keep one from converging are found k
times as fast. It is flexible: what M made of each vector is kept, so that a preconditioner in single precision costs no digits of the
solution. Restarts begin from the true residual.

Source: Y. Saad, A flexible inner-outer preconditioned GMRES algorithm (1993); for blocks his Iterative Methods for Sparse Linear Systems
(2003), section 6.12.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy.linalg import solve_triangular
from torch import Tensor

from linop_hess.lq.accuracy import SKETCH_SPANNED
from linop_hess.lq.methods.base import Watching
from linop_hess.lq.problem import Problem

# Numbers that the vectors of a cycle may take, and the longest one.
_NUMBERS = 1 << 28
LONGEST = 300
# Columns that are iterated together: orthogonalizing takes their square, products take their number.
_COLUMNS = 64
# Iterations after which a solve is given up.
MOST_ITERATIONS = 1000
# Every so many iterations the size of the solution is looked at.
_LOOK = 5


def vectors_nbytes(problem: Problem, columns: int) -> float:
    """Most bytes that the vectors of `gmres` take."""
    return float(problem.dtype.itemsize * min(_NUMBERS, 2 * LONGEST * problem.size * min(columns, _COLUMNS)))


@dataclass(frozen=True)
class Iterated:
    """Where it ended.

    Attributes
    ----------
    x : Tensor, shape (N, k)
    iterations : int
        Of the block that took the most; a product of all its columns each.
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
    allowed: Callable[[Tensor, Tensor], Tensor],
    most: int,
    watch: Watching | None = None,
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
        Residual norms that are small enough for solutions and right-hand sides of these norms, all (k,) in float64.
    most : int
        Iterations after which it gives up.
    watch : Watching, optional
        Told of the columns of each block before its first iteration, and after each how far it is; its factors, which it may replace, are
        those of `precondition`.

    Returns
    -------
    Iterated
    """
    blocks = []
    for part in g.split(_COLUMNS, 1):
        if watch is not None:
            watch.begin(part.shape[1])
        blocks.append(_of_block(product, precondition, part, allowed, most, watch))
    x = torch.cat([block.x for block in blocks], 1)
    return Iterated(x, max(block.iterations for block in blocks), all(block.reached for block in blocks))


def _of_block(
    product: Callable[[Tensor], Tensor],
    precondition: Callable[[Tensor], Tensor],
    g: Tensor,
    allowed: Callable[[Tensor, Tensor], Tensor],
    most: int,
    watch: Watching | None,
) -> Iterated:
    (N, k), sizes = g.shape, _norms(g)
    x, r = torch.zeros_like(g), g
    length = max(2, min(LONGEST, most, N, _NUMBERS // (2 * max(1, N * k))))
    done, last = 0, math.inf
    while done < most:
        enough, factors = partial(_enough, allowed, sizes), None if watch is None else watch.factors
        correction, steps = cycle(product, precondition, r, x, enough, min(length, most - done), watch)
        done += steps
        x = x + correction
        r = g - product(x)
        if not bool((_norms(r) > enough(_norms(x))).any()):
            return Iterated(x, done, True)
        size = float((_norms(r) / sizes.clamp_min(torch.finfo(g.dtype).tiny)).max())
        has_stalled = not size < 0.5 * last and (watch is None or watch.factors is factors)
        if not steps or has_stalled:  # a whole cycle, with the factors in use, did not halve the residual
            break
        last = size
    return Iterated(x, done, False)


def _enough(allowed: Callable[[Tensor, Tensor], Tensor], of_g: Tensor, of_x: Tensor) -> Tensor:
    return allowed(of_x, of_g)


def cycle(
    product: Callable[[Tensor], Tensor],
    precondition: Callable[[Tensor], Tensor],
    r: Tensor,
    x: Tensor,
    allowed: Callable[[Tensor], Tensor],
    length: int,
    watch: Watching | None = None,
) -> tuple[Tensor, int]:
    """One cycle of flexible GMRES, every column from the space that all of them span together.

    Parameters
    ----------
    product, precondition : callable
        As of `gmres`.
    r : Tensor, shape (N, k)
        The residual that it begins from.
    x : Tensor, shape (N, k)
        The solution so far, whose size `allowed` is told.
    allowed : callable
        Residual norms that are small enough for solutions of these norms, both (k,) in float64.
    length : int
        Most steps.
    watch : Watching, optional
        As of `gmres`.

    Returns
    -------
    correction : Tensor, shape (N, k)
    steps : int
        Products with blocks of vectors.
    """
    sizes = _norms(r)
    scaled = r / sizes.clamp_min(torch.finfo(r.dtype).tiny).to(r.dtype)
    space, kept = _Space(r, length), sizes.cpu().numpy()
    least = _LeastSquares(space.begin(scaled), kept)
    enough = allowed(_norms(x)).cpu().numpy()
    for j in range(length):
        v = space.newest
        if not v.shape[1]:  # the space holds the solution
            return space.combined(least.solution(), r.dtype), max(j, 1)
        z = precondition(v).to(r.dtype)
        w = product(z) if bool(torch.isfinite(z).all()) else z
        if not bool(
            torch.isfinite(w).all()
        ):  # M is so far off, as of too small a sketch, that products leave the range
            return space.combined(least.solution(), r.dtype), j
        residuals = least.add(*space.add(z, w))
        ended = bool((residuals <= enough).all())
        if ended or j == length - 1 or j % _LOOK == _LOOK - 1:
            moved = space.combined(least.solution(), r.dtype)
            enough = allowed(_norms(x + moved)).cpu().numpy()
            if (residuals <= enough).all() or j == length - 1:
                return moved, j + 1
        if watch is not None:
            watch.after(float(np.log(np.maximum(residuals / np.maximum(enough, np.finfo(float).tiny), 1.0)).max()))
    return torch.zeros_like(r), 0


class _Space:
    """Orthonormal vectors V, and what the preconditioner made of them, Z, as rows; blocks shrink where products add nothing new."""

    def __init__(self, like: Tensor, length: int) -> None:
        N, k = like.shape
        self._V, self._Z = like.new_empty(min((length + 1) * k, N + k), N), like.new_empty(min(length * k, N + k), N)
        self._known, self._have = 0, 0

    @property
    def newest(self) -> Tensor:
        """The block that no product was taken of yet, (N, b)."""
        return self._V[self._known : self._have].mT

    def begin(self, r: Tensor) -> np.ndarray:
        """Begin with the columns of r; their coordinates, (b, k)."""
        Q, T = _spanned(r, torch.linalg.vector_norm(r, dim=0))
        self._append(Q)
        return T.double().cpu().numpy()

    def add(self, z: Tensor, w: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Add w = (H + εI) z of the newest block; its coordinates in V, (m, b), and in what is new, (b', b)."""
        V, sizes = self._V[: self._have], torch.linalg.vector_norm(w, dim=0)
        self._Z[self._known : self._have] = z.mT
        self._known = self._have
        along = V @ w
        w = w - V.mT @ along
        again = V @ w
        w, along = w - V.mT @ again, along + again
        new, T = _spanned(w, sizes)
        if new.shape[1] > 1:
            # Of a block nearly dependent on itself the small directions hold what rounding left of V.
            again = V @ new
            new, R = torch.linalg.qr(new - V.mT @ again)
            along, T = along + again @ T, R @ T
        room = self._V.shape[0] - self._have
        new, T = new[:, :room], T[:room]
        self._append(new)
        return along.double().cpu().numpy(), T.double().cpu().numpy()

    def _append(self, new: Tensor) -> None:
        self._V[self._have : self._have + new.shape[1]] = new.mT
        self._have += new.shape[1]

    def combined(self, y: np.ndarray, dtype: torch.dtype) -> Tensor:
        """Z y, (N, k)."""
        return self._Z[: y.shape[0]].mT @ torch.from_numpy(y).to(self._Z.device, dtype)


def _spanned(w: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis Q of what w is made of, and T with w = Q T; what is rounding in columns of these sizes is left out."""
    Q, R = torch.linalg.qr(w)
    if w.shape[1] == 1:
        return (Q, R) if float(R.abs()) > SKETCH_SPANNED[w.dtype] * float(sizes) else (Q[:, :0], R[:0])
    U, sigma, Vt = torch.linalg.svd(R, full_matrices=False)
    kept = sigma > SKETCH_SPANNED[w.dtype] * sizes.max()
    return Q @ U[:, kept], sigma[kept, None] * Vt[kept]


class _LeastSquares:
    """min ‖S − H y‖ for a block Hessenberg matrix H that grows, by an orthogonal factor for each block of columns.

    Parameters
    ----------
    begin : ndarray, shape (b, k)
        S: the rows of the first block; zero below.
    sizes : ndarray, shape (k,)
        By which columns are multiplied in the end.
    """

    def __init__(self, begin: np.ndarray, sizes: np.ndarray) -> None:
        self._sizes = sizes
        self._turned = begin
        self._columns: list[np.ndarray] = []
        self._factors: list[tuple[int, np.ndarray]] = []
        self._done = 0

    def add(self, along: np.ndarray, below: np.ndarray) -> np.ndarray:
        """Add columns, (m, b) in what is known and (b', b) below; the norm of what is left of each right-hand side, (k,)."""
        b = along.shape[1]
        column = np.concatenate([along, below])
        self._turned = np.concatenate([self._turned, np.zeros((below.shape[0], self._turned.shape[1]))])
        for start, Qt in self._factors:
            stop = start + len(Qt)
            column[start:stop] = Qt @ column[start:stop]
        start = self._done
        Q, R = np.linalg.qr(column[start:], mode="complete")
        column[start:] = R
        self._turned[start:] = Q.T @ self._turned[start:]
        self._factors.append((start, Q.T))
        self._columns.append(column[: start + b])
        self._done += b
        return np.linalg.norm(self._turned[self._done :], axis=0) * self._sizes

    def solution(self) -> np.ndarray:
        """Y, (m, k)."""
        m = self._done
        if not m:
            return np.zeros((0, self._sizes.size))
        R = np.zeros((m, m))
        stop = 0
        for column in self._columns:
            start, stop = stop, stop + column.shape[1]
            R[:stop, start:stop] = column
        if not np.abs(R.diagonal()).min() > SKETCH_SPANNED[torch.float64] * np.abs(R).max():
            y = np.linalg.lstsq(R, self._turned[:m], rcond=SKETCH_SPANNED[torch.float64])[0]
        else:
            y = solve_triangular(R, self._turned[:m])
        return y * self._sizes


def _norms(columns: Tensor) -> Tensor:
    return torch.linalg.vector_norm(columns, dim=0, dtype=torch.float64)
