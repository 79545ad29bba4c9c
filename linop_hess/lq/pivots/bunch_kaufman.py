"""Symmetric indefinite matrices as a congruence with a diagonal: S = T diag(θ) Tᵀ, T well conditioned in practice.

Bunch-Kaufman (LAPACK sytrf), its 1×1 and 2×2 pivots rotated to diagonal form; of complex symmetric S too, whose 2×2 pivots have a
Takagi factorization U diag(σ) Uᵀ, U unitary, σ ≥ 0, where real ones have eigenvectors. With T as arrays every later step is a triangular
solve or a matrix product, three times faster than LAPACK's own solves from the packed factor, and the signs of θ are the inertia of S.

On a CPU sytrf is SciPy's as a rule, not torch's: on the processors that it was measured on (AMD's) OpenBLAS takes half to four fifths of
the time that MKL does (`tests/benchmarks/factorizations.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import lapack
from torch import Tensor

_SYCONV = {
    torch.float64: lapack.dsyconv,
    torch.float32: lapack.ssyconv,
    torch.complex128: lapack.zsyconv,
    torch.complex64: lapack.csyconv,
}
_SYTRF = {
    torch.float64: (lapack.dsytrf, lapack.dsytrf_lwork),
    torch.float32: (lapack.ssytrf, lapack.ssytrf_lwork),
    torch.complex128: (lapack.zsytrf, lapack.zsytrf_lwork),
    torch.complex64: (lapack.csytrf, lapack.csytrf_lwork),
}


# From this order on the threads of torch's last operation have gone to sleep long before those of SciPy's LAPACK are done; below it both
# wait for work on the same cores, and a chain of blocks takes twice the time.
THREADS_FROM = 2048


def is_for_scipy(S: Tensor) -> bool:
    """Whether SciPy's LAPACK is to factor a matrix, and not torch's."""
    return S.device.type == "cpu" and S.numel() > 0 and (torch.get_num_threads() == 1 or len(S) >= THREADS_FROM)


def packed_factor(S: Tensor, is_own: bool = False) -> tuple[Tensor, Tensor]:
    """Bunch-Kaufman's factor as LAPACK packs it, column-major, and its interchanges; the lower triangle of S is read.

    Where S `is_own`, its triangles are the same and it is written over.
    """
    columns = (S if is_own else S.mT.clone(memory_format=torch.contiguous_format)).mT
    n = S.shape[0]
    if is_for_scipy(S):
        sytrf, workspace = _SYTRF[S.dtype]
        best, _ = workspace(n, lower=1)
        packed, interchanges, _ = sytrf(columns.numpy(), lower=1, lwork=int(best.real), overwrite_a=1)
        return torch.from_numpy(packed), torch.from_numpy(interchanges)
    interchanges, info = (torch.empty(shape, dtype=torch.int32, device=S.device) for shape in ((n,), ()))
    torch.linalg.ldl_factor_ex(columns, out=(columns, interchanges, info))
    return columns, interchanges


@dataclass(frozen=True)
class SymmetricFactor:
    """S = T diag(θ) Tᵀ with T = Pᵀ L W: a permutation, a unit lower triangle, and rotations of the 2×2 pivots.

    Attributes
    ----------
    L : Tensor, shape (n, n)
        Unit lower triangle; only its strict lower part is used.
    permutation : Tensor of int, shape (n,)
        Rows of S in pivot order.
    theta : Tensor, shape (n,)
    pairs : Tensor of int, shape (m,)
        First index of each 2×2 pivot.
    rotations : Tensor, shape (m, 2, 2)
        Eigenvectors of the 2×2 pivots, or their Takagi vectors.
    """

    L: Tensor
    permutation: Tensor
    theta: Tensor
    pairs: Tensor
    rotations: Tensor

    @classmethod
    def of(cls, S: Tensor, is_own: bool = False) -> SymmetricFactor:
        """Factor a symmetric (n, n) matrix, whose lower triangle is read; one that `is_own` may be written over, its triangles the same."""
        return cls.from_packed(*packed_factor(S, is_own))

    @classmethod
    def from_packed(cls, packed: Tensor, pivots: Tensor) -> SymmetricFactor:
        """Unpack what `torch.linalg.ldl_factor` gives; `packed` is overwritten."""
        S = packed
        if not S.shape[0]:
            empty = torch.zeros(0, dtype=torch.int64, device=S.device)
            return cls(S, empty, S.new_zeros(0), empty, S.new_zeros(0, 2, 2))
        # syconv takes the off-diagonals of 2×2 pivots out of L and applies the interchanges to it, so that L is a plain triangle.
        ipiv = pivots.cpu().numpy()
        lower = np.asfortranarray(packed.cpu().numpy())
        lower, off, _ = _SYCONV[S.dtype](lower, ipiv, lower=1, way=0, overwrite_a=1)
        order = _pivot_order(ipiv)
        diagonal = np.diagonal(lower).copy()
        first = np.flatnonzero(_starts_pair(ipiv))
        blocks = np.empty((first.size, 2, 2), dtype=lower.dtype)
        blocks[:, 0, 0], blocks[:, 1, 1] = diagonal[first], diagonal[first + 1]
        blocks[:, 0, 1] = blocks[:, 1, 0] = off[first]
        values, vectors = _takagi(blocks) if S.is_complex() else np.linalg.eigh(blocks)
        diagonal[first], diagonal[first + 1] = values[:, 0], values[:, 1]
        to = S.device
        return cls(
            torch.from_numpy(lower).to(to),
            torch.from_numpy(order).to(to),
            torch.from_numpy(diagonal).to(to),
            torch.from_numpy(first).to(to),
            torch.from_numpy(vectors).to(to),
        )

    def _rotate(self, X: Tensor, rotations: Tensor) -> Tensor:
        if not self.pairs.numel():
            return X
        members = torch.stack([self.pairs, self.pairs + 1], 1).flatten()
        X[members] = (rotations @ X[members].view(-1, 2, X.shape[1])).flatten(0, 1)
        return X

    def whiten(self, X: Tensor) -> Tensor:
        """T⁻¹ X for X of shape (n, k)."""
        if not X.numel():
            return X.clone()
        # Column-major, as the solve wants it; gathered, which takes a third of what indexing does.
        permuted = X.mT.gather(1, self.permutation.expand(X.shape[1], -1)).mT
        Y = torch.linalg.solve_triangular(self.L, permuted, upper=False, unitriangular=True)
        return self._rotate(Y, self.rotations.conj().mT)  # unitary

    def unwhiten(self, Y: Tensor) -> Tensor:
        """T⁻ᵀ Y for Y of shape (n, k)."""
        if not Y.numel():
            return Y.clone()
        Y = self._rotate(Y.clone(), self.rotations.conj())
        X = torch.linalg.solve_triangular(self.L.mT, Y, upper=True, unitriangular=True)
        out = torch.empty_like(X)
        out[self.permutation] = X
        return out

    def solve(self, X: Tensor) -> Tensor:
        """S⁻¹ X for X of shape (n, k)."""
        return self.unwhiten(self.whiten(X) / self.theta[:, None])

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.L.nbytes + self.theta.nbytes + self.permutation.nbytes + self.rotations.nbytes

    @property
    def smallest_pivot_ratio(self) -> float:
        """Min |θ| / max |θ|: near zero, S is close to singular."""
        if not self.theta.numel():
            return 1.0
        size = self.theta.abs()
        largest = float(size.max())
        return float(size.min()) / largest if largest > 0 and np.isfinite(largest) else 0.0


def _takagi(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """σ, (m, n), and unitary U, (m, n, n), of complex symmetric blocks U diag(σ) Uᵀ.

    A conj(u) = σ u for u = x + iy is a real symmetric eigenproblem for (x, y), whose eigenvalues are ±σ and whose orthonormal eigenvectors
    of the positive half make U unitary even where values coincide.
    """
    n = blocks.shape[-1]
    B, C = blocks.real, blocks.imag
    values, vectors = np.linalg.eigh(np.block([[B, C], [C, -B]]))
    return values[:, n:], vectors[:, :n, n:] + 1j * vectors[:, n:, n:]


def packed_pivots(packed: Tensor, pivots: Tensor) -> Tensor:
    """θ of K blocks factored by `torch.linalg.ldl_factor`, packed (K, n, n) and pivots (K, n), as (K, n), as `SymmetricFactor` has it."""
    theta = packed.diagonal(dim1=1, dim2=2).clone()
    second = pivots < 0
    if not bool(second.any()):
        return theta
    # The entries of 2×2 pivots come in pairs, so the odd ones among the negative entries of a row begin one.
    begins = (second & (second.cumsum(1) % 2 == 1))[:, :-1]
    a, b, off = theta[:, :-1][begins], theta[:, 1:][begins], packed.diagonal(-1, 1, 2)[begins]
    middle, radius = (a + b) / 2, torch.hypot((a - b) / 2, off)
    larger = torch.where(middle < 0, middle - radius, middle + radius)
    smaller = a * (b / larger) - off * (off / larger)
    theta[:, :-1][begins] = torch.minimum(larger, smaller)  # ascending, as `SymmetricFactor` has them
    theta[:, 1:][begins] = torch.maximum(larger, smaller)
    return theta


def _starts_pair(ipiv: np.ndarray) -> np.ndarray:
    """Mark the first index of each 2×2 pivot: LAPACK gives both its entries the same negative number."""
    starts = np.zeros(ipiv.size, dtype=bool)
    starts[np.flatnonzero(ipiv < 0)[::2]] = True
    return starts


def _pivot_order(ipiv: np.ndarray) -> np.ndarray:
    """Permutation made by the interchanges of sytrf (lower): of a 2×2 pivot, whose entries name the same row, the second one's."""
    at = np.arange(ipiv.size)
    target = np.abs(ipiv) - 1
    starts = _starts_pair(ipiv)
    target[starts] = at[starts]
    order = at.tolist()
    moved = np.flatnonzero(target != at)
    for k, to in zip(moved.tolist(), target[moved].tolist(), strict=True):
        order[k], order[to] = order[to], order[k]
    return np.array(order, dtype=np.int64)
