"""Every check of a scalar, a dtype or a loss, so that one mistake is told in one voice: "expected …, got …: do …"."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from linop_hess.errors import NotFiniteError, ProcessError, UnsupportedModelError

NUMPY_DTYPES: dict[torch.dtype, np.dtype] = {
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
}
"""The dtypes computed in, with NumPy's names of them."""

Nonsmooth = Literal["generalized", "smooth", "error"]
"""What second derivatives are at kinks."""
Differentiation = Literal["autograd", "finite"]
"""How operations without a second derivative in torch are differentiated."""
Reduction = Literal["sum", "mean"]
"""What a loss does with its terms."""
_FEW = 4
"""Parts of data that an error names."""


def is_scalar(value: Any) -> bool:
    """Tell whether `value` is a number, a NumPy scalar, or an array or tensor without dimensions."""
    if isinstance(value, np.ndarray | Tensor):
        return value.ndim == 0
    return isinstance(value, numbers.Number | np.generic)


def finite_real(value: Any, name: str, dtype: torch.dtype = torch.float64) -> float:
    """Return a finite real number as a float.

    Parameters
    ----------
    value : scalar
        What `is_scalar` accepts.
    name : str
        The argument, for the message.
    dtype : torch.dtype
        In which it must be finite.

    Raises
    ------
    TypeError
        If it is complex or no number.
    ValueError
        If it is NaN or infinite, or overflows `dtype`.
    """
    plain = value.item() if isinstance(value, np.generic | np.ndarray | Tensor) and is_scalar(value) else value
    if not isinstance(plain, numbers.Real):
        raise TypeError(
            f"expected {name} to be a real number, got {value!r} of type {type(value).__name__}: pass a float"
        )
    try:
        number = float(plain)
    except OverflowError:
        number = math.inf
    if not abs(number) <= torch.finfo(dtype).max:
        within = "" if dtype == torch.float64 else f" in {dtype}"
        raise ValueError(f"expected {name} to be finite{within}, got {value!r}: pass a finite number")
    return number


def finite_damping(value: Any) -> complex:
    """Return a damping as a float, or where it is complex and not real as a complex number.

    Raises
    ------
    TypeError
        If it is no number.
    ValueError
        If it is NaN or infinite.
    """
    plain = value.item() if isinstance(value, np.generic | np.ndarray | Tensor) and is_scalar(value) else value
    if not isinstance(plain, numbers.Complex) or isinstance(plain, numbers.Real) or not plain.imag:
        return finite_real(plain.real if isinstance(plain, complex) else value, "damping")
    number = complex(plain)
    if not (math.isfinite(number.real) and math.isfinite(number.imag)):
        raise ValueError(f"expected damping to be finite, got {value!r}: pass a finite number")
    return number


def real_damping(value: Any) -> float:
    """Return the damping of an operator, which is real.

    Raises
    ------
    TypeError
        If it is complex, or no number.
    ValueError
        If it is NaN or infinite.
    """
    if isinstance(value, complex):
        raise TypeError(
            f"expected damping to be a real number, got {value:g}: operators are real; for solves at a complex damping use "
            "lq.Solver(lin.analysis, damping)"
        )
    return finite_real(value, "damping")


def require_real_damping(damping: complex, what: str) -> float:
    """Return a real damping, or say that `what` is no question at a complex one.

    Raises
    ------
    TypeError
        If it is complex: H + damping·I is then not Hermitian.
    """
    if isinstance(damping, complex):
        raise TypeError(
            f"expected a real damping for {what}, got {damping:g}: at a complex one H + damping·I is complex symmetric, its eigenvalues "
            "have no sign, and it can only be solved with"
        )
    return damping


def whole(value: Any, name: str, least: int | None = None) -> int:
    """Return an integer as an int.

    Parameters
    ----------
    value : int or NumPy integer
    name : str
        The argument, for the message.
    least : int, optional
        The smallest one allowed.

    Raises
    ------
    TypeError
        If it is no integer; True and False are none.
    ValueError
        If it is less than `least`.
    """
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(
            f"expected {name} to be an integer, got {value!r} of type {type(value).__name__}: pass an int"
        ) from None
    if least is not None and number < least:
        raise ValueError(f"expected {name} to be at least {least}, got {number}: pass {least} or more")
    return number


def true_or_false(value: Any, name: str) -> bool:
    """Return a switch as a bool.

    Parameters
    ----------
    value : bool
        Python's or NumPy's; what is merely true, such as a number or a word, is none.
    name : str
        The argument, for the message.

    Raises
    ------
    TypeError
        If it is anything else.
    """
    if not isinstance(value, bool | np.bool_):
        raise TypeError(
            f"expected {name} to be True or False, got {value!r} of type {type(value).__name__}: pass one of the two"
        )
    return bool(value)


def require_dtype(dtype: torch.dtype, what: str) -> None:
    """Raise unless a dtype is one that is computed in.

    Raises
    ------
    TypeError
        If it is neither float32 nor float64; the message names `what` has it.
    """
    if dtype not in NUMPY_DTYPES:
        raise TypeError(
            f"expected {what} in torch.float32 or torch.float64, got {dtype}: convert the model or the arrays with "
            ".float() or .double()"
        )


@contextmanager
def told_of_other_shapes(given: Any, known: Any) -> Iterator[None]:
    """Say of what a model fails on that it is of other shapes than before: torch's words are about one layer.

    Parameters
    ----------
    given, known : object
        Inputs and targets, and such as the model took.

    Raises
    ------
    TypeError, ValueError
        For the TypeError, or another error, of a model or loss.
    """
    try:
        yield
    except (UnsupportedModelError, NotFiniteError, ProcessError):
        raise  # they say what to do
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        shapes, before = (" with ".join(map(_shapes, pair)) for pair in (given, known))
        if shapes == before:
            raise
        said = (
            f"expected inputs and targets such as the model took before, {before}, got {shapes}, on which it fails ({error}): "
            "pass one batch, or call linearize(model, loss_fn, batches) with several"
        )
        if isinstance(error, TypeError):
            raise TypeError(said) from error
        raise ValueError(said) from error


def _shapes(data: Any) -> str:
    """Name a type, and shapes of tensors at any depth, cut where there are many."""
    if isinstance(data, Tensor):
        return f"Tensor {tuple(data.shape)}"
    if isinstance(data, tuple | list):
        more = ", ..." if len(data) > _FEW else ""
        return f"{type(data).__name__} of {', '.join(map(_shapes, data[:_FEW])) or 'nothing'}{more}"
    return type(data).__name__


def require_loss_fn(loss_fn: Any) -> None:
    """Raise TypeError unless a loss can be called."""
    if not callable(loss_fn):
        raise TypeError(
            f"expected loss_fn to be callable as loss_fn(output, targets), got {type(loss_fn).__name__}: pass a function "
            "or a loss module"
        )


def checked_loss(value: Any) -> Tensor:
    """Return what a loss function gave as a tensor without dimensions: it must hold one number, a finite one.

    Raises
    ------
    TypeError
        If it is no tensor.
    ValueError
        If it has several elements or none.
    NotFiniteError
        If it is NaN or infinite.
    """
    if not isinstance(value, Tensor):
        raise TypeError(
            f"expected loss_fn to return a scalar tensor, got {type(value).__name__}: return the tensor itself, which "
            ".item() and float() cut off from the parameters"
        )
    if value.numel() != 1:
        raise ValueError(
            f"expected loss_fn to return a scalar tensor, got shape {tuple(value.shape)}: reduce it with .sum() or "
            '.mean(), or pass reduction="sum" to the loss'
        )
    if not bool(torch.isfinite(value)):
        raise NotFiniteError(
            f"expected a finite loss, got {value.detach().item()}: look for NaN or Inf in inputs, targets and parameters"
        )
    return value.reshape(())
