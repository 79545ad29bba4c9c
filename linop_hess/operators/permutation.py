"""Permutations."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from linop_hess.operators.operator import Operator


class Permutation(Operator):
    """The permutation Π with (Πx)_i = x_{index[i]}; its adjoint is its inverse.

    Parameters
    ----------
    index : array_like of int, shape (n,)
        Each of 0, …, n−1 once.
    dtype : torch.dtype, optional
    device : torch.device or str, optional

    Attributes
    ----------
    index, inverse_index : torch.Tensor of int64, shape (n,)

    Raises
    ------
    ValueError
        If `index` is not a permutation of 0, …, n−1.
    TypeError
        If `index` does not hold integers.

    Examples
    --------
    >>> Permutation([2, 0, 1]) @ [10, 20, 30]
    array([30., 10., 20.])
    """

    def __init__(self, index: Any, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> None:
        order = np.asarray(index.cpu() if isinstance(index, Tensor) else index)
        if order.dtype.kind not in "iu" and order.size:
            raise TypeError(
                f"expected integers for a permutation, got dtype {order.dtype}: pass an integer index array"
            )
        if order.ndim != 1 or not np.array_equal(np.sort(order), np.arange(order.size)):
            raise ValueError(
                f"expected a flat array with each of 0, …, n−1 once, got another of shape {order.shape}: "
                "look for repeated or missing entries"
            )
        super().__init__((order.size, order.size), dtype, device)
        self.index = torch.as_tensor(order.astype(np.int64), device=self.device)
        self.inverse_index = torch.argsort(self.index)

    def _apply(self, X: Tensor) -> Tensor:
        return X[self.index]

    def _apply_adjoint(self, Y: Tensor) -> Tensor:
        return Y[self.inverse_index]
