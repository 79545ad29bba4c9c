"""Arrays into an operator and out of it: the checks, in one place, and the conversions."""

from __future__ import annotations

import numbers
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from scipy.sparse import issparse
from torch import Tensor

NUMPY_DTYPES: dict[torch.dtype, np.dtype] = {
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
}


@contextmanager
def plain_arithmetic(device: torch.device) -> Iterator[None]:
    """Compute in full precision and without recording, whatever is switched on outside."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def is_scalar(x: Any) -> bool:
    """Tell whether `x` is a number, a NumPy scalar, or an array or tensor without dimensions."""
    if isinstance(x, np.ndarray | Tensor):
        return x.ndim == 0
    return isinstance(x, numbers.Number | np.generic)


def real_scalar(x: Any, dtype: torch.dtype) -> float:
    """Return a scalar as a float, checked to be real and finite in `dtype`.

    Parameters
    ----------
    x : scalar
        What `is_scalar` accepts.
    dtype : torch.dtype
        The dtype in which the factor will be used.

    Returns
    -------
    float

    Raises
    ------
    TypeError
        If `x` is complex or not a number.
    ValueError
        If `x` is NaN, infinite, or overflows `dtype`.
    """
    value = x.item() if isinstance(x, np.generic | np.ndarray | Tensor) else x
    if isinstance(value, complex) or not isinstance(value, numbers.Real):
        raise TypeError(
            f"a real operator can be scaled by a real number only; got {x!r} of type {type(x).__name__}. "
            "Take the real part, or apply the complex factor to the result."
        )
    try:
        value = float(value)
    except OverflowError:
        value = float("inf")
    if not abs(value) <= torch.finfo(dtype).max:
        raise ValueError(f"the factor must be finite in {dtype}; got {x!r}. Scale by a finite number.")
    return value


def as_tensor(
    x: Any, length: int, *, ndims: tuple[int, ...], dtype: torch.dtype, device: torch.device, who: str
) -> Tensor:
    """Return an operand as a checked tensor of the operator's dtype on its device.

    The result may share memory with `x`: read it only.

    Parameters
    ----------
    x : array_like or torch.Tensor, shape (length,) or (length, k)
        The operand. NumPy input of any real dtype is cast; a floating torch tensor must already have `dtype`.
    length : int
        The length a column must have.
    ndims : tuple of int
        The numbers of dimensions allowed: 1, 2 or both.
    dtype : torch.dtype
        The operator's dtype.
    device : torch.device
        The operator's device.
    who : str
        The operator's name, for messages.

    Returns
    -------
    torch.Tensor, shape (length,) or (length, k)

    Raises
    ------
    ValueError
        Wrong length or number of dimensions, NaN or Inf, a tensor on another device.
    TypeError
        Complex, sparse, masked or non-numeric input, a tensor of another floating dtype.
    """
    if isinstance(x, Tensor):
        tensor = _from_torch(x, dtype, device, who)
    else:
        tensor = _from_numpy(x, dtype, device, who)
    if tensor.ndim not in ndims or tensor.shape[0] != length:
        expected = " or ".join(f"({length},)" if n == 1 else f"({length}, k)" for n in ndims)
        raise ValueError(
            f"{who} needs an operand of shape {expected}; got {tuple(tensor.shape)}. "
            "Pass a flat vector, or a matrix with one vector a column."
        )
    if not _all_finite(tensor):
        bad = int((~torch.isfinite(tensor)).sum())
        raise ValueError(
            f"{who} needs finite numbers in {dtype}; {bad} of {tensor.numel()} entries are NaN or Inf. "
            "Find where they arise before multiplying."
        )
    return tensor


def to_numpy(out: Tensor) -> np.ndarray:
    """Return a fresh, writable, C-ordered NumPy copy of a tensor."""
    return np.array(out.detach().cpu().numpy(), order="C", copy=True)


def _from_torch(x: Tensor, dtype: torch.dtype, device: torch.device, who: str) -> Tensor:
    if x.layout != torch.strided:
        raise TypeError(f"{who} needs a dense tensor; got layout {x.layout}. Call .to_dense() on it.")
    if x.device != device:
        raise ValueError(f"{who} is on {device}; got a tensor on {x.device}. Move it with .to({str(device)!r}).")
    if x.is_complex():
        raise TypeError(f"{who} is real; got a {x.dtype} tensor. Multiply real and imaginary parts separately.")
    if x.is_floating_point() and x.dtype != dtype:
        raise TypeError(f"{who} computes in {dtype}; got a {x.dtype} tensor. Cast it with .to({dtype}).")
    return x.detach().to(dtype)


def _from_numpy(x: Any, dtype: torch.dtype, device: torch.device, who: str) -> Tensor:
    if issparse(x):
        raise TypeError(
            f"{who} multiplies dense arrays; got a sparse {type(x).__name__}. "
            "Call .toarray() on it, or compose with scipy.sparse.linalg.aslinearoperator of it."
        )
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{who} has no notion of a mask; got a masked array. Call .filled(value) on it.")
    array = np.asarray(x)
    if array.dtype.kind == "c":
        raise TypeError(f"{who} is real; got a {array.dtype} array. Multiply real and imaginary parts separately.")
    if array.dtype.kind not in "biuf":
        raise TypeError(
            f"{who} needs an array of real numbers; got dtype {array.dtype} from {type(x).__name__}. "
            "Convert it with numpy.asarray(x, dtype=float)."
        )
    with np.errstate(over="ignore"):  # an overflow becomes Inf, which the caller reports
        array = np.asarray(array, dtype=NUMPY_DTYPES[dtype], order="C")
    if not array.flags.writeable:  # torch warns about read-only memory
        array = array.copy()
    return torch.from_numpy(array).to(device)


def _all_finite(tensor: Tensor) -> bool:
    # One pass without a mask; a sum that overflows is looked at again.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())
