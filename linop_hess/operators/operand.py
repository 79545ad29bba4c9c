"""Arrays of any number of dimensions as one block of columns, and results back into the dimensions that came."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from linop_hess.operators.convert import converted, mismatch, require_finite


class Fold(Enum):
    """How an array is read."""

    VECTORS = "a vector (n,), or a batch (..., n) with one vector a row"
    MATRICES = "a matrix (n, k) with one vector a column, or a batch (..., n, k) of such"
    EITHER = "a vector (n,), or matrices (..., n, k)"


@dataclass(frozen=True)
class Operand:
    """A checked operand as one block.

    Attributes
    ----------
    block : torch.Tensor, shape (length, k)
        One vector a column. It may share memory with what came: read it only.
    batch : tuple of int
        The leading dimensions that were folded into the columns.
    columns : int or None
        Of each matrix of a batch; None where the vectors came as rows.
    """

    block: Tensor
    batch: tuple[int, ...]
    columns: int | None

    def unfold(self, out: Tensor) -> Tensor:
        """Return a result of shape (rows, k) in the dimensions of what came."""
        if self.columns is None:
            return out.T.reshape(*self.batch, out.shape[0])
        return out.reshape(out.shape[0], *self.batch, self.columns).movedim(0, -2) if self.batch else out


def as_operand(x: Any, length: int, *, fold: Fold, dtype: torch.dtype, device: torch.device, who: str) -> Operand:
    """Return an array or tensor as one block of columns.

    Parameters
    ----------
    x : array_like or torch.Tensor, shape (length,), (..., length) or (..., length, k), as `fold` says
    length : int
        The length of each vector.
    fold : Fold
        How `x` is read.
    dtype, device, who
        As in `as_tensor`.

    Returns
    -------
    Operand

    Raises
    ------
    ValueError
        Wrong length or number of dimensions, NaN or Inf, a tensor on another device.
    TypeError
        Complex, sparse, masked or non-numeric input, a tensor of another floating dtype.
    """
    tensor = converted(x, dtype=dtype, device=device, who=who)
    if fold is Fold.MATRICES and tensor.ndim < 2:
        raise ValueError(
            f"Expected at least 2-d array for {who}, got shape {tuple(tensor.shape)}: use matvec (rmatvec) or @ for a "
            "vector"
        )
    rows = fold is Fold.VECTORS or fold is Fold.EITHER and tensor.ndim == 1
    axis = -1 if rows else -2
    if tensor.ndim < -axis or tensor.shape[axis] != length:
        expected = {
            Fold.VECTORS: f"(..., {length})",
            Fold.MATRICES: f"(..., {length}, k)",
            Fold.EITHER: f"({length},) or (..., {length}, k)",
        }
        raise mismatch(tensor, expected[fold], who)
    require_finite(tensor, who)
    if rows:
        batch = tuple(tensor.shape[:-1])
        return Operand(tensor.reshape(math.prod(batch), length).T.contiguous(), batch, None)
    batch, columns = tuple(tensor.shape[:-2]), tensor.shape[-1]
    block = tensor.movedim(-2, 0).reshape(length, math.prod(batch) * columns) if batch else tensor
    return Operand(block, batch, columns)
