"""Lanczos iterations on H: a basis of the directions in which it is large, and what its spectrum looks like from a few products.

Source: G. Golub and G. Meurant, Matrices, Moments and Quadrature with Applications (2010), chapter 4 (Lanczos and Gauss quadrature); G.
Golub and R. Underwood, The block Lanczos method for computing eigenvalues (1977).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from linop_hess.lq.accuracy import SKETCH_SPANNED

# Columns of a block: products with many columns are faster a column, longer chains of them reach further.
_BLOCK = 32
_LEAST_BLOCKS = 8


@dataclass(frozen=True)
class Basis:
    """Orthonormal directions, (N, s), and what H is on them: the last block's part of H, relative to the largest."""

    directions: Tensor
    remaining: float


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
    N = like.numel()
    rank = min(rank, N)
    width = max(1, min(_BLOCK, -(-rank // _LEAST_BLOCKS)))
    generator = torch.Generator().manual_seed(0)

    def fresh(columns: int) -> Tensor:
        drawn = torch.randn(N, columns, generator=generator, dtype=torch.float64, device="cpu")
        return drawn.to(like.dtype).to(like.device)

    Q = like.new_empty(N, rank)
    have, largest, last = 0, 0.0, 0.0
    new = product(fresh(width))
    while have < rank:
        new = _against(Q[:, :have], new)
        if new.shape[1] < min(width, rank - have):  # H has no more to show: the rest is as good as any
            more = _against(torch.cat([Q[:, :have], new], 1), fresh(min(width, rank - have) - new.shape[1]))
            new = torch.cat([new, more], 1)
        new = new[:, : rank - have]
        Q[:, have : have + new.shape[1]] = new
        have += new.shape[1]
        if have == rank and tol is None:
            break
        new = product(new)
        last = float(torch.linalg.matrix_norm(new.double(), 2))
        largest = max(largest, last)
        if tol is not None and last <= tol * largest:
            break
    return Basis(Q[:, :have], last / largest if largest else 0.0)


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


class Probing:
    """Lanczos on a random vector with full reorthogonalization, a few products at a time.

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

    def after(self, steps: int) -> Spectrum:
        """What is known after so many products, or as many as were taken already."""
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
