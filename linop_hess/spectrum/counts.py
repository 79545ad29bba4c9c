"""What is asked of a spectrum: by inertia where there are factorizations, by LAPACK for any other symmetric operator."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from scipy.sparse.linalg import LinearOperator, aslinearoperator

from linop_hess._memory import require
from linop_hess.lq.analysis import Analysis
from linop_hess.lq.inverse.counting import count_up_to
from linop_hess.operators.dense import to_dense
from linop_hess.spectrum.extremes import NULL, extreme_eigenvalues, nullity


class Counts(Protocol):
    """How many eigenvalues lie where."""

    size: int
    norm: float

    def up_to(self, b: float) -> int:
        """Count the eigenvalues λ ≤ b."""
        ...

    def nullity(self) -> int:
        """Count those up to `NULL` times the norm in size."""
        ...

    def ends(self) -> tuple[float, float]:
        """Smallest and largest."""
        ...


class ByInertia:
    """Counts of a chain, from factorizations."""

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        self.size, self.norm = analysis.problem.size, analysis.norm

    def up_to(self, b: float) -> int:
        return count_up_to(self.analysis, b)

    def nullity(self) -> int:
        return nullity(self.analysis)

    def ends(self) -> tuple[float, float]:
        return extreme_eigenvalues(self.analysis)


class ByLapack:
    """Counts of a dense symmetric matrix, from all its eigenvalues."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values
        self.size, self.norm = values.size, float(np.abs(values).max(initial=0.0))

    def up_to(self, b: float) -> int:
        return int((self.values <= b).sum())

    def nullity(self) -> int:
        return int((np.abs(self.values) <= NULL * self.norm).sum())

    def ends(self) -> tuple[float, float]:
        return float(self.values[0]), float(self.values[-1])


def factorable(operator: Any) -> Analysis | None:
    """Return the analysis behind a linearization, its H or its Gauss-Newton matrix, in float64; None of anything else."""
    analysis = getattr(operator, "analysis", None)
    return analysis.in_float64 if isinstance(analysis, Analysis) else None


def dense_symmetric(operator: Any) -> np.ndarray:
    """Return the matrix of a symmetric operator in float64, formed by as many products as it has columns.

    Raises
    ------
    TypeError
        If it is no real linear operator.
    ValueError
        If it is not square, or not symmetric to rounding.
    MemoryError
        If the matrix and LAPACK's work space do not fit; raised before anything is allocated.
    """
    try:
        A: LinearOperator = operator if isinstance(operator, LinearOperator) else aslinearoperator(operator)
    except (TypeError, ValueError):
        raise TypeError(
            f"expected a linearization or a symmetric linear operator, got {type(operator).__name__}: a spectrum is that of "
            "lh.linearize(...), its H or gauss_newton(), lh.Hessian(...), or a matrix"
        ) from None
    N = A.shape[0]
    if A.shape != (N, N) or not N:
        raise ValueError(f"expected a square operator, got shape {A.shape}: only those have eigenvalues")
    if A.dtype is not None and np.issubdtype(A.dtype, np.complexfloating):
        raise TypeError(f"expected a real operator, got one of {A.dtype}: take its real part if it is one")
    require(32.0 * N**2, f"all eigenvalues of an operator that is no linearization, of order {N}")
    matrix = to_dense(A)
    eps = float(np.finfo(matrix.dtype).eps) if np.issubdtype(matrix.dtype, np.floating) else 0.0
    matrix = matrix.astype(np.float64)
    if not np.isfinite(matrix).all():
        raise ValueError("expected an operator of finite entries, got NaN or Inf: look at its products")
    gap, size = float(np.abs(matrix - matrix.T).max()), float(np.abs(matrix).max())
    if gap > eps**0.75 * size:
        raise ValueError(
            f"expected a symmetric operator, got one that differs from its transpose by {gap:.1e} of {size:.1e}: pass "
            "(A + A.T) / 2 if that is what is meant"
        )
    return (matrix + matrix.T) / 2
