"""A linear operator as a dense matrix."""

from __future__ import annotations

from typing import Any, Literal, overload

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from torch import Tensor

from linop_hess import _memory
from linop_hess._validate import whole
from linop_hess.operators.convert import Arrays, require_arrays
from linop_hess.operators.operator import Operator
from linop_hess.processes import ALONE, Processes

_BLOCK_BYTES = 2**26


@overload
def to_dense(op: Any, chunk: int | None = ..., *, to: Literal["numpy"] = ...) -> np.ndarray: ...
@overload
def to_dense(op: Any, chunk: int | None = ..., *, to: Literal["torch"]) -> Tensor: ...
def to_dense(op: Any, chunk: int | None = None, *, to: Arrays = "numpy") -> Any:
    """Return the matrix of a linear operator, computed by blocks of columns.

    Parameters
    ----------
    op : LinearOperator, shape (m, n)
        An operator of this package or any SciPy one.
    chunk : int, optional
        Columns multiplied at once. By default as many as keep a block under 64 MiB.
    to : {"numpy", "torch"}
        What to return: an array, or a tensor on the operator's device, which is the CPU for operators of others.

    Returns
    -------
    numpy.ndarray or Tensor, shape (m, n)
        Of the operator's dtype.

    Raises
    ------
    MemoryError
        If the result does not fit in the available memory; raised before anything is allocated.
    TypeError
        If `op` is not a linear operator, or `chunk` no integer.
    ValueError
        If `chunk` is less than one, or `to` is none of the two.

    Examples
    --------
    >>> from linop_hess.operators import Identity, to_dense
    >>> to_dense(2 * Identity(2))
    array([[2., 0.],
           [0., 2.]])
    """
    as_tensors = require_arrays(to)
    if not isinstance(op, LinearOperator):
        try:
            op = aslinearoperator(op)
        except TypeError:
            raise TypeError(
                f"expected a LinearOperator, got {type(op).__name__}: wrap it with aslinearoperator"
            ) from None
    rows, columns = op.shape
    dtype = np.dtype(np.float64 if op.dtype is None else op.dtype)
    tallest = max(rows, columns, 1) * dtype.itemsize
    if chunk is None:
        chunk = max(1, _BLOCK_BYTES // tallest)
    else:
        chunk = whole(chunk, "chunk", least=1)
    chunk = min(chunk, max(columns, 1))
    what = f"a dense {rows}×{columns} matrix of {dtype}"
    with _processes(op).together(what):  # else those that have the memory would wait for one that has not
        _memory.require(rows * columns * dtype.itemsize + 2 * chunk * tallest, what)
        out = np.empty((rows, columns), dtype=dtype)
    for start in range(0, columns, chunk):
        stop = min(start + chunk, columns)
        out[:, start:stop] = _columns(op, start, stop, dtype)
    if as_tensors:
        return torch.from_numpy(out).to(op.device if isinstance(op, Operator) else "cpu")
    return out


def _processes(op: Any) -> Processes:
    """The processes that multiply with an operator, or with one that it is made of, together."""
    found = getattr(op, "processes", None) or getattr(getattr(op, "problem", None), "processes", None)
    if isinstance(found, Processes):
        return found
    parts = (_processes(part) for part in getattr(op, "args", ()) if isinstance(part, LinearOperator))
    return next((several for several in parts if several.are_several), ALONE)


def _columns(op: LinearOperator, start: int, stop: int, dtype: np.dtype) -> np.ndarray:
    """Return columns start, …, stop−1 of the operator's matrix."""
    width = stop - start
    if isinstance(op, Operator):
        block = torch.zeros(op.shape[1], width, dtype=op.torch_dtype, device=op.device)
        block[start:stop].fill_diagonal_(1)
        return op.matmat(block).cpu().numpy()
    unit = np.zeros((op.shape[1], width), dtype=dtype)
    unit[np.arange(start, stop), np.arange(width)] = 1
    return op.matmat(unit)
