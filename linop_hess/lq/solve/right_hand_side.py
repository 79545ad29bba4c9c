"""Right-hand sides: checked, and scaled to size one by powers of two so that nothing under- or overflows on the way."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from linop_hess._validate import NUMPY_DTYPES
from linop_hess.lq.problem import Problem

_SHAPE = "pass a flat vector, or a matrix with one right-hand side a column"


def checked(g: Any, problem: Problem, is_complex: bool = False) -> Tensor:
    """Return a right-hand side as a tensor of the problem's dtype on its device; the memory may be shared.

    Parameters
    ----------
    g : Tensor or array_like, shape (N,) or (N, k)
        Arrays of any real dtype are cast; a floating tensor must have the problem's.
    problem : Problem
    is_complex : bool
        Whether it may be complex; what is returned is complex128 then.

    Returns
    -------
    Tensor
        Of the same shape.

    Raises
    ------
    ValueError
        If the shape is another, a number is NaN or infinite, or a tensor lies on another device.
    TypeError
        If it holds no real numbers, or a tensor has another floating dtype.
    """
    if is_complex and (imaginary := _imaginary(g)) is not None:
        return torch.complex(checked(g.real, problem).double(), checked(imaginary, problem).double())
    tensor = _from_tensor(g, problem) if isinstance(g, Tensor) else _from_array(g, problem)
    if tensor.ndim not in (1, 2) or tensor.shape[0] != problem.size:
        N = problem.size
        raise ValueError(
            f"expected a right-hand side of shape ({N},) or ({N}, k), got shape {tuple(tensor.shape)}: {_SHAPE}"
        )
    if not bool(torch.isfinite(tensor.sum())) and not bool(torch.isfinite(tensor).all()):
        count = int((~torch.isfinite(tensor)).sum())
        raise ValueError(
            f"expected a right-hand side of finite numbers in {problem.dtype}, got {count} NaN or Inf in {tensor.numel()} "
            "entries: find where they arise before solving"
        )
    return tensor.to(torch.complex128) if is_complex else tensor


def _imaginary(g: Any) -> Any:
    """The imaginary part of a complex tensor or array; None of others."""
    if isinstance(g, Tensor):
        return g.imag if g.is_complex() and g.layout == torch.strided else None
    return g.imag if isinstance(g, np.ndarray) and g.dtype.kind == "c" else None


def _from_tensor(g: Tensor, problem: Problem) -> Tensor:
    if g.layout != torch.strided or g.is_complex():
        what = "complex numbers" if g.is_complex() else f"layout {g.layout}"
        raise TypeError(f"expected a right-hand side that is a dense real tensor, got {what}: convert it")
    if g.is_floating_point() and g.dtype != problem.dtype:
        raise TypeError(f"expected a {problem.dtype} tensor as right-hand side, got {g.dtype}: cast it with .to()")
    if g.device != problem.device:
        raise ValueError(f"expected a right-hand side on {problem.device}, got one on {g.device}: move it with .to()")
    return g.detach().to(problem.dtype)


def _from_array(g: Any, problem: Problem) -> Tensor:
    try:
        array = np.asarray(g)
    except ValueError:  # rows of different lengths
        array = np.empty(0, dtype=object)
    if array.dtype.kind not in "biuf" or isinstance(g, np.ma.MaskedArray):
        raise TypeError(
            f"expected a right-hand side that is a torch tensor or an array of real numbers, got {type(g).__name__} of dtype "
            f"{array.dtype}: convert it"
        )
    with np.errstate(over="ignore"):  # an overflow becomes Inf, which the caller reports
        array = array.astype(NUMPY_DTYPES[problem.dtype], order="C")
    return torch.from_numpy(array).to(problem.device)


def to_size_one(g: Tensor) -> tuple[Tensor, np.ndarray]:
    """Scale the columns of g, (N, k), by powers of two to entries of at most one; also the exponents, (k,). Nothing is rounded."""
    exponents = np.frexp(g.abs().amax(0).cpu().numpy())[1]
    return times_power_of_two(g, -exponents), exponents


def times_power_of_two(x: Tensor, exponents: np.ndarray) -> Tensor:
    """X of shape (..., k) with each column times 2^exponent, in two steps, so that the factors are normal numbers of its dtype."""
    # Not torch.ldexp, which in some versions goes through float32.
    half = exponents // 2
    for part in (half, exponents - half):
        factors = np.ldexp(np.ones(1, dtype=NUMPY_DTYPES[x.real.dtype]), part)
        x = x * torch.from_numpy(factors).to(x.device)
    return x


def norms(columns: Tensor) -> Tensor:
    """Norms of columns, in float64, so that those of small or large float32 numbers neither under- nor overflow."""
    return torch.linalg.vector_norm(columns.abs() if columns.is_complex() else columns, dim=0, dtype=torch.float64)
