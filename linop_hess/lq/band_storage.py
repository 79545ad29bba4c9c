"""Filling LAPACK band storage with many dense blocks at once."""

from __future__ import annotations

import numpy as np


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
        K, a, c = blocks.shape
        if K == 0 or a == 0 or c == 0:
            return
        height = self.storage.shape[1]
        starts = columns * height + self._shift + rows - columns
        steps = np.diff(starts)
        flat = self.storage.reshape(-1)
        if K == 1 or (steps == steps[0]).all():
            step = int(steps[0]) if K > 1 else 0
            item = flat.itemsize
            view = np.lib.stride_tricks.as_strided(
                flat[int(starts[0]) :],
                (K, a, c),
                (step * item, item, (height - 1) * item),
            )
            view[...] = blocks
        else:
            flat[starts[:, None, None] + np.arange(a)[:, None] + (height - 1) * np.arange(c)] = blocks
