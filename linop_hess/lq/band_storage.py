"""LAPACK band matrices: filled with many dense blocks at once, and factored."""

from __future__ import annotations

import numpy as np
import torch
from scipy.linalg import lapack
from torch import Tensor

# Factorization and solves, by dtype.
_LAPACK = {
    torch.float64: (lapack.dgbtrf, lapack.dgbtrs),
    torch.float32: (lapack.sgbtrf, lapack.sgbtrs),
    torch.complex128: (lapack.zgbtrf, lapack.zgbtrs),
}


class BandMatrix:
    """Band storage, written block by block.

    Entry (i, j) of the matrix is kept at `storage[j, shift + i − j]`, so `storage.T` is LAPACK's array without a copy.

    Parameters
    ----------
    n : int
        Order of the matrix.
    height : int
        Rows of LAPACK's band array.
    shift : int
        LAPACK's row of the diagonal.
    dtype : dtype

    Examples
    --------
    A tridiagonal matrix of order 3, its subdiagonal and diagonal written as 1 × 1 blocks:

    >>> band = BandMatrix(3, 3, 1, np.dtype(float))
    >>> band.put(np.array([0, 1, 2]), np.array([0, 1, 2]), np.full((3, 1, 1), 2.0))
    >>> band.put(np.array([1, 2]), np.array([0, 1]), np.full((2, 1, 1), -1.0))
    >>> band.storage.T
    array([[ 0.,  0.,  0.],
           [ 2.,  2.,  2.],
           [-1., -1.,  0.]])
    """

    def __init__(self, n: int, height: int, shift: int, dtype: np.dtype) -> None:
        self.storage = np.zeros((n, height), dtype=dtype)
        self._shift = shift

    def put(self, rows: np.ndarray, columns: np.ndarray, blocks: np.ndarray) -> None:
        """Write blocks[k] (shape (a, c)) with its top left corner at (rows[k], columns[k])."""
        if not blocks.size:
            return
        where = self._where(rows, columns, blocks.shape)
        if isinstance(where, np.ndarray):
            where[...] = blocks
        else:
            self.storage.reshape(-1)[where[0]] = blocks

    def add(self, rows: np.ndarray, columns: np.ndarray, blocks: np.ndarray) -> None:
        """Add blocks, no two of which overlap, to what is there."""
        if not blocks.size:
            return
        where = self._where(rows, columns, blocks.shape)
        if isinstance(where, np.ndarray):
            where += blocks
        else:
            self.storage.reshape(-1)[where[0]] += blocks

    def _where(self, rows: np.ndarray, columns: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | tuple[np.ndarray]:
        """The entries of blocks, as a view into the storage where they are evenly spaced, else their index, in a tuple.

        One column to the right in a band is one row up, hence height − 1. The view needs no index array as large as the blocks.
        """
        K, a, c = shape
        height = self.storage.shape[1]
        starts = columns * height + self._shift + rows - columns
        steps = np.diff(starts)
        if K > 1 and not (steps == steps[0]).all():
            return (starts[:, None, None] + np.arange(a)[:, None] + (height - 1) * np.arange(c),)
        flat = self.storage.reshape(-1)
        step, item = int(steps[0]) if K > 1 else 0, flat.itemsize
        return np.lib.stride_tricks.as_strided(
            flat[int(starts[0]) :], (K, a, c), (step * item, item, (height - 1) * item)
        )


class BandLU:
    """LU of a band matrix by LAPACK, with partial pivoting, in the memory of its storage.

    Parameters
    ----------
    band : BandMatrix
        Of height 3·bandwidth + 1, its diagonal in row 2·bandwidth.
    bandwidth : int
        Diagonals above the main one, and below it.

    Attributes
    ----------
    singular_at : int or None
        The first row whose pivot is exactly zero; None if there is none.
    """

    def __init__(self, band: BandMatrix, bandwidth: int) -> None:
        self._bandwidth = bandwidth
        self._lu, self._pivots, self.singular_at = band.storage.T, np.zeros(0, dtype=np.int32), None
        self._gbtrf, self._gbtrs = _LAPACK[torch.from_numpy(band.storage[:0]).dtype]
        if self._lu.size:
            self._lu, self._pivots, info = self._gbtrf(self._lu, bandwidth, bandwidth, overwrite_ab=1)
            self.singular_at = int(info) - 1 if info > 0 else None

    @property
    def pivots(self) -> np.ndarray:
        """The diagonal of U."""
        return self._lu[2 * self._bandwidth]

    def solve(self, rhs: Tensor) -> Tensor:
        """Solve for right-hand sides of shape (order, k).

        Raises
        ------
        ValueError
            If LAPACK refuses an argument, which is a defect here.
        """
        if not rhs.numel():
            return rhs
        solution, info = self._gbtrs(self._lu, self._bandwidth, self._bandwidth, rhs.numpy(), self._pivots)
        if info != 0:
            raise ValueError(f"LAPACK gbtrs refused its argument {-info}")
        return torch.from_numpy(np.ascontiguousarray(solution))

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return int(self._lu.nbytes + self._pivots.nbytes)
