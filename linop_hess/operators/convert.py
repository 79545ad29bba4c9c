"""Arrays into an operator and out of it: the checks, in one place, and the conversions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import numpy as np
import torch
from scipy.sparse import issparse
from torch import Tensor

from linop_hess._validate import NUMPY_DTYPES, is_scalar


def plain_arithmetic(device: torch.device) -> AbstractContextManager[Any]:
    """Compute in full precision and without recording, whatever is switched on outside.

    Of the contexts only those that change something: the others take as long as all else that a small product does around its arithmetic.
    """
    if torch.is_inference_mode_enabled() or _casts(device):
        return _switched_off(device)
    return torch.no_grad()


@contextmanager
def _switched_off(device: torch.device) -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def _casts(device: torch.device) -> bool:
    try:
        return torch.is_autocast_enabled(device.type)
    except TypeError:  # torch 2.3 does not tell of one device
        return True


def refuse_scalar(x: Any) -> None:
    """Raise ValueError if x, a factor of @, is a scalar."""
    if is_scalar(x):
        raise ValueError(f"expected an array or an operator at @, got the scalar {x!r}: use *")


def require_alike(left: Any, right: Any) -> None:
    """Raise TypeError unless two operators have one dtype, ValueError unless one device."""
    if left.torch_dtype != right.torch_dtype:
        raise TypeError(
            f"expected operators of one dtype, got {left.torch_dtype} and {right.torch_dtype}: build both from models "
            "of one precision"
        )
    if left.device != right.device:
        raise ValueError(f"expected operators on one device, got {left.device} and {right.device}: build both on one")


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
    tensor = converted(x, dtype=dtype, device=device, who=who)
    if tensor.ndim not in ndims or tensor.shape[0] != length:
        raise mismatch(tensor, " or ".join(f"({length},)" if n == 1 else f"({length}, k)" for n in ndims), who)
    require_finite(tensor, who)
    return tensor


def require_finite(tensor: Tensor, who: str) -> None:
    """Raise ValueError if an operand of `who` holds NaN or Inf."""
    if not all_finite(tensor):
        bad = int((~torch.isfinite(tensor)).sum())
        raise ValueError(
            f"expected finite numbers in {tensor.dtype} for {who}, got {bad} NaN or Inf in {tensor.numel()} entries: "
            "find where they arise before multiplying"
        )


def mismatch(tensor: Tensor, expected: str, who: str) -> ValueError:
    """Return the error of an operand of the wrong shape; it begins as SciPy's does."""
    return ValueError(
        f"Dimension mismatch: expected an operand of {who} of shape {expected}, got {tuple(tensor.shape)}: "
        "pass a flat vector, or a matrix with one vector a column"
    )


def converted(x: Any, *, dtype: torch.dtype, device: torch.device, who: str) -> Tensor:
    """Return an array or tensor of any shape and any values as `as_tensor` does; the errors of dtype and device are the same."""
    return _from_torch(x, dtype, device, who) if isinstance(x, Tensor) else _from_numpy(x, dtype, device, who)


def to_numpy(out: Tensor, *, fresh: bool = False) -> np.ndarray:
    """Return a tensor as a writable, C-ordered NumPy array of its own memory, of the tensor's where that is `fresh`."""
    array = out.detach().cpu().numpy()
    return np.ascontiguousarray(array) if fresh else np.array(array, order="C", copy=True)


Arrays = Literal["numpy", "torch"]
"""What a method that takes no array gives back: one of NumPy, or a tensor on the operator's device."""


def require_arrays(to: Any) -> bool:
    """Tell whether tensors are asked for; `to` is one of `Arrays`.

    Raises
    ------
    ValueError
        If it is none of them.
    """
    if to not in ("numpy", "torch"):
        raise ValueError(f'expected to="numpy" or to="torch", got {to!r}: pass one of the two')
    return bool(to == "torch")


def handed(out: Tensor, to: Any) -> Any:
    """Return a tensor as one of its own memory, or as a NumPy array, as `to` says."""
    return out.detach().clone() if require_arrays(to) else to_numpy(out)


def _from_torch(x: Tensor, dtype: torch.dtype, device: torch.device, who: str) -> Tensor:
    if x.layout != torch.strided:
        raise TypeError(f"expected a dense tensor for {who}, got layout {x.layout}: call .to_dense() on it")
    if x.device != device:
        raise ValueError(
            f"expected a tensor on device {device} for {who}, got one on {x.device}: move it with .to({str(device)!r})"
        )
    if x.is_complex():
        raise TypeError(f"expected real numbers for {who}, got a {x.dtype} tensor: multiply its two parts separately")
    if x.is_floating_point() and x.dtype != dtype:
        raise TypeError(f"expected a {dtype} tensor for {who}, got {x.dtype}: cast it with .to({dtype})")
    return x.detach().to(dtype)


def _from_numpy(x: Any, dtype: torch.dtype, device: torch.device, who: str) -> Tensor:
    if issparse(x):
        raise TypeError(
            f"expected a dense array for {who}, got a sparse {type(x).__name__}: Try wrapping the matrix with "
            "`aslinearoperator` first, or call .toarray() on it"
        )
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"expected an array without a mask for {who}, got a masked one: call .filled(value) on it")
    array = np.asarray(x)
    if array.dtype.kind == "c":
        raise TypeError(
            f"expected real numbers for {who}, got a {array.dtype} array: multiply its two parts separately"
        )
    if array.dtype.kind not in "biuf":
        raise TypeError(
            f"expected real numbers for {who}, got dtype {array.dtype} from {type(x).__name__}: convert it with "
            "numpy.asarray(x, dtype=float)"
        )
    with np.errstate(over="ignore"):  # an overflow becomes Inf, which the caller reports
        array = np.asarray(array, dtype=NUMPY_DTYPES[dtype], order="C")
    if not array.flags.writeable:  # torch warns about read-only memory
        array = array.copy()
    return torch.from_numpy(array).to(device)


def all_finite(tensor: Tensor) -> bool:
    """Tell whether a tensor holds no NaN or Inf, in one pass without a mask; where the sum overflows, entry by entry."""
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())
