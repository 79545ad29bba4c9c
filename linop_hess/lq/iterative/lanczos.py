"""Lanczos iterations on H: a basis of the directions in which it is large, and what its spectrum looks like from a few products.

Source: G. Golub and G. Meurant, Matrices, Moments and Quadrature with Applications (2010), chapter 4 (Lanczos and Gauss quadrature); G.
Golub and R. Underwood, The block Lanczos method for computing eigenvalues (1977).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from linop_hess.lq.accuracy import SKETCH_SPANNED

# Columns of a block where so many directions are asked for: products with many columns are faster a column, longer chains of them reach
# further. Where it is not known how many it will be, so few that 32 directions are a chain of four.
_BLOCK = 32
_LEAST_BLOCKS = 8
OPEN_BLOCK = 8


@dataclass(frozen=True)
class Seen:
    """What a run has seen of H when it has multiplied a block.

    Attributes
    ----------
    have : int
        Number of directions.
    size : float
        The norm of H on the newest block.
    largest : float
        The largest of these so far.
    lowest, highest : float
        Of the eigenvalues of H restricted to the newest block.
    """

    have: int
    size: float
    largest: float
    lowest: float
    highest: float


@dataclass(frozen=True)
class Basis:
    """Orthonormal directions, (N, s), and what H is on them.

    Attributes
    ----------
    directions : Tensor, shape (N, s)
    seen : Seen or None
        What has been seen of H on them; None where no block was multiplied.
    """

    directions: Tensor
    seen: Seen | None

    @property
    def remaining(self) -> float:
        """The norm of H on the newest block of which it is known, relative to the largest of all."""
        return self.seen.size / self.seen.largest if self.seen is not None and self.seen.largest else 0.0

    @property
    def nbytes(self) -> int:
        """Bytes that the directions keep: those of all that lies in memory with them, as of a run that went further."""
        return self.directions.untyped_storage().nbytes()


class BlockLanczos:
    """Directions in which H is large, by block Lanczos with full reorthogonalization; a run goes on where it ended.

    Parameters
    ----------
    product : callable
        H times a block of vectors, (N, k).
    like : Tensor, shape (N,)
        Of the dtype and device of the vectors.
    width : int
        Columns of a block.
    """

    def __init__(self, product: Callable[[Tensor], Tensor], like: Tensor, width: int) -> None:
        self._product, self._like, self._width = product, like, min(width, like.numel())
        self._generator = torch.Generator().manual_seed(0)
        self._Q = like.new_empty(like.numel(), 0)
        self._have, self._newest = 0, self._width
        self._following: Tensor | None = product(self._fresh(self._width))
        self._seen: list[Seen] = []

    def until(self, rank: int, enough: Callable[[Seen], bool] | None = None) -> Basis:
        """Return at most `rank` directions; fewer once it is enough.

        Parameters
        ----------
        rank : int
        enough : callable, optional
            Told what has been seen.
        """
        rank, known = min(rank, self._like.numel()), 0
        while True:
            for seen in self._seen[known:] if enough is not None else ():
                known += 1
                if seen.have <= rank and enough is not None and enough(seen):
                    return self._basis(seen.have)
            if self._have >= rank:
                return self._basis(rank)
            self._step(rank)
            if enough is not None and self._following is None:
                self._multiply()

    def _step(self, most: int) -> None:
        """Add the next block, a whole one however few are asked for: who asks for more later goes on with the same run.

        Memory is for `most` directions.
        """
        if self._following is None:
            self._multiply()
        assert self._following is not None
        Q, room = self._Q[:, : self._have], min(self._width, self._like.numel() - self._have)
        new = _against(Q, self._following)
        if new.shape[1] < room:  # H has no more to show: the rest is as good as any
            more = _against(torch.cat([Q, new], 1), self._fresh(room - new.shape[1]))
            new = torch.cat([new, more], 1)
        new = new[:, :room]
        if self._have + room > self._Q.shape[1]:
            grown = self._Q.new_empty(self._Q.shape[0], max(self._have + room, min(most, 2 * self._Q.shape[1])))
            grown[:, : self._have] = Q
            self._Q = grown
        self._Q[:, self._have : self._have + new.shape[1]] = new
        self._have, self._newest, self._following = self._have + new.shape[1], new.shape[1], None

    def _multiply(self) -> None:
        """H times the newest block."""
        newest = self._Q[:, self._have - self._newest : self._have]
        self._following = self._product(newest)
        values = torch.linalg.eigvalsh((newest.mT @ self._following).double())
        size = float(torch.linalg.matrix_norm(self._following.double(), 2))
        largest = max([size] + [seen.largest for seen in self._seen[-1:]])
        self._seen.append(Seen(self._have, size, largest, float(values[0]), float(values[-1])))

    def _basis(self, rank: int) -> Basis:
        seen = [seen for seen in self._seen if seen.have <= rank]
        return Basis(self._Q[:, :rank], seen[-1] if seen else None)

    def _fresh(self, columns: int) -> Tensor:
        like = self._like
        drawn = torch.randn(like.numel(), columns, generator=self._generator, dtype=torch.float64, device="cpu")
        return drawn.to(like.dtype).to(like.device)


def block_for(rank: int) -> int:
    """Return the columns of a block where `rank` directions are to be found."""
    return max(1, min(_BLOCK, -(-rank // _LEAST_BLOCKS)))


def krylov_basis(product: Callable[[Tensor], Tensor], like: Tensor, rank: int, tol: float | None) -> Basis:
    """Directions in which H is large, by block Lanczos with full reorthogonalization.

    Parameters
    ----------
    product : callable
        H times a block of vectors, (N, k).
    like : Tensor, shape (N,)
        Of the dtype and device of the vectors.
    rank : int
        The most directions.
    tol : float or None
        Stop where ‖H Q_k‖ of the newest block falls below this part of the largest seen; None: at `rank`.

    Returns
    -------
    Basis
    """
    rank = min(rank, like.numel())
    return BlockLanczos(product, like, block_for(rank)).until(rank, None if tol is None else falls_below(tol))


def falls_below(tol: float) -> Callable[[Seen], bool]:
    """Whether H on the newest block is at most this part of the largest."""
    return lambda seen: seen.size <= tol * seen.largest


def _against(Q: Tensor, new: Tensor) -> Tensor:
    """An orthonormal basis of what is in `new` and not in Q."""
    size = torch.linalg.vector_norm(new, dim=0)
    for _ in range(2):
        new = new - Q @ (Q.mT @ new)
    U, sigma, _ = torch.linalg.svd(new / torch.where(size > 0, size, 1.0), full_matrices=False)
    new = U[:, sigma > SKETCH_SPANNED[new.dtype]]
    new = new - Q @ (Q.mT @ new)
    return torch.linalg.qr(new).Q


@dataclass(frozen=True)
class Spectrum:
    """What a few products tell of the eigenvalues of H: Gauss quadrature, nodes θ and weights that add up to one.

    Attributes
    ----------
    nodes, weights : Tensor, shape (m,)
        In double precision; ascending.
    size : int
        N.
    """

    nodes: Tensor
    weights: Tensor
    size: int

    def count_beyond(self, radius: float) -> float:
        """About how many eigenvalues of H are larger than `radius`: N times the weights of the nodes there."""
        return self.size * float(self.weights[self.nodes.abs() > radius].sum())

    def least_beyond(self, radius: float) -> float:
        """The same from below: each node's weight lies between its neighbours, so that of the innermost on either side may lie within.

        Of the vector that the run began with this is a bound (the inequalities of Chebyshev, Markov and Stieltjes); of the count of
        eigenvalues it is one as far as that vector is like the average of all.
        """
        upper, lower = (self.weights[self.nodes * sign > radius] for sign in (1.0, -1.0))
        return self.size * float(upper[1:].sum() + lower[:-1].sum())

    def residuals(self, damping: float) -> np.ndarray:
        """What GMRES on H + εI leaves of the vector that the run began with, relatively, after 0 to m − 1 iterations.

        A polynomial of degree below m has the same norm on it by the quadrature as by H, so that this is exact.
        """
        values, left = self.nodes.numpy() + damping, np.sqrt(np.maximum(self.weights.numpy(), 0.0))
        found, space, v = [1.0], np.zeros((values.size, 0)), left
        for _ in range(values.size - 1):
            for _ in range(2):
                v = v - space @ (space.T @ v)
            if not np.linalg.norm(v) > 0.0:
                break
            space = np.column_stack([space, v / np.linalg.norm(v)])
            product = values[:, None] * space
            found.append(float(np.linalg.norm(left - product @ np.linalg.lstsq(product, left, rcond=None)[0])))
            v = product[:, -1]
        return np.array(found)

    def size_of(self, rank: int, *, least: bool = False) -> float:
        """About how large the eigenvalue is that comes `rank`-th by size; 0 where there are not so many nodes' worth.

        Each node stands in the middle of the eigenvalues that its weight counts, and sizes between nodes are interpolated; with `least`
        it is the largest node beyond which there are as many by the count from below.
        """
        order = self.nodes.abs().argsort(descending=True)
        sizes = self.nodes.abs()[order].tolist()
        if least:
            return next((size for size in sizes if self.least_beyond(math.nextafter(size, 0.0)) >= rank), 0.0)
        weights = self.size * self.weights[order]
        middles = (weights.cumsum(0) - weights / 2).tolist()
        if not sizes or rank > float(weights.sum()):
            return 0.0
        return float(np.interp(rank, middles, sizes))


class Probing:
    """Lanczos on a random vector with full reorthogonalization, a few products at a time; threads take turns.

    Parameters
    ----------
    product : callable
    like : Tensor, shape (N,)
    """

    def __init__(self, product: Callable[[Tensor], Tensor], like: Tensor) -> None:
        self._product, self._size = product, like.numel()
        drawn = torch.randn(like.numel(), generator=torch.Generator().manual_seed(1), dtype=torch.float64, device="cpu")
        self._Q = [(drawn / drawn.norm()).to(like.dtype).to(like.device)]
        self._alpha: list[float] = []
        self._beta: list[float] = []
        self._lock = threading.Lock()

    def after(self, steps: int) -> Spectrum:
        """What is known after so many products, or as many as were taken already."""
        with self._lock:
            while len(self._alpha) < min(steps, self._size) and len(self._Q) > len(self._alpha):
                self._step()
            alpha, beta = (torch.tensor(x, dtype=torch.float64, device="cpu") for x in (self._alpha, self._beta))
        off = beta[: max(0, len(alpha) - 1)]
        nodes, vectors = torch.linalg.eigh(torch.diag(alpha) + torch.diag(off, 1) + torch.diag(off, -1))
        return Spectrum(nodes, vectors[0].square(), self._size)

    def _step(self) -> None:
        q = self._Q[-1]
        w = self._product(q[:, None])[:, 0]
        self._alpha.append(float(w @ q))
        basis = torch.stack(self._Q)
        for _ in range(2):
            w = w - basis.mT @ (basis @ w)
        self._beta.append(float(w.norm()))
        if self._beta[-1] > SKETCH_SPANNED[q.dtype] * max(map(abs, self._alpha)):
            self._Q.append(w / self._beta[-1])


def spectrum(product: Callable[[Tensor], Tensor], like: Tensor, steps: int) -> Spectrum:
    """Quadrature of H from that many products with a random vector.

    Parameters
    ----------
    product : callable
    like : Tensor, shape (N,)
    steps : int
        Products taken.

    Returns
    -------
    Spectrum
    """
    return Probing(product, like).after(steps)
