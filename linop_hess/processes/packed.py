"""A sum of symmetric matrices over processes that sends half of their numbers, in place."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

_ROWS_AT_ONCE = 128


def summed_in_place(H: Tensor, add: Callable[[Tensor], Tensor]) -> Tensor:
    """Sum a symmetric matrix over processes as N(⌊N/2⌋ + 1) numbers: its first rows, where they are.

    What these rows lack is the triangle of the last diagonal block. It goes where they have a triangle twice, above their diagonal.

    Parameters
    ----------
    H : Tensor, shape (N, N), contiguous
        Changed in place.
    add : callable
        Sums a contiguous tensor over processes; in place or not.

    Returns
    -------
    Tensor
        H, symmetric to the last bit.
    """
    N = H.shape[0]
    if not N:
        return H
    half = N // 2 + 1
    first, rest = H[:half], H[half:, half:]
    above = H[: N - half, 1 : N - half + 1]  # its upper triangle, that is: the diagonal of this is beside that of H
    _copy_upper(rest, above)
    first.copy_(add(first))
    _copy_upper(above, rest)
    _copy_upper(rest, rest.mT)
    square = first[:, :half]
    _copy_upper(square.mT, square)
    H[half:, :half] = first[:, half:].mT
    return H


def _copy_upper(source: Tensor, target: Tensor) -> None:
    """Copy the upper triangle with the diagonal; source and target may be transposes of each other."""
    n = source.shape[0]
    for start in range(0, n, _ROWS_AT_ONCE):
        stop = min(start + _ROWS_AT_ONCE, n)
        square = target[start:stop, start:stop]
        square.copy_(source[start:stop, start:stop].triu() + square.tril(-1))
        target[start:stop, stop:] = source[start:stop, stop:]
