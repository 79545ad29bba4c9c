"""SciPy's `LinearOperator` contract over torch, and its algebra: sums, products, multiples and powers of operators."""

from __future__ import annotations

from typing import Any, overload

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from linop_hess._validate import finite_real, is_scalar, whole
from linop_hess.operators.convert import refuse_scalar, require_alike
from linop_hess.operators.formula import described
from linop_hess.operators.products import Foreign, Products


class Operator(Products):
    """A real linear operator backed by torch.

    A subclass implements `_apply` and, unless it sets ``symmetric = True``, `_apply_adjoint`, on column
    blocks. Everything else follows: products with NumPy arrays give fresh NumPy arrays of the operator's
    dtype, products with torch tensors give tensors on the operator's device without a trip through the host,
    and sums, products, multiples and powers of operators are operators. Nothing is recorded for
    differentiation.

    Parameters
    ----------
    shape : tuple of int
        ``(rows, columns)``.
    dtype : torch.dtype
        ``torch.float32`` or ``torch.float64``.
    device : torch.device or str, optional
        Where the operator computes.

    Attributes
    ----------
    symmetric : bool
        Whether the operator is its own adjoint by construction.
    torch_dtype : torch.dtype
        The dtype of the arithmetic and of results; `dtype` is the same as a NumPy dtype.
    device : torch.device
    fresh : bool
        Whether what `_apply` returns is memory of its own: neither its operand's nor the operator's.

    Raises
    ------
    TypeError
        If `dtype` is neither float32 nor float64.
    """

    __repr__ = described

    @overload
    def dot(self, x: Operator | float) -> Operator: ...
    @overload
    def dot(self, x: Tensor) -> Tensor: ...
    @overload
    def dot(self, x: Foreign) -> LinearOperator: ...
    @overload
    def dot(self, x: ArrayLike) -> np.ndarray: ...
    def dot(self, x: Any) -> Any:
        """Return A x for a vector or a block, the composition for an operator, the multiple for a scalar.

        Parameters
        ----------
        x : array_like, torch.Tensor, LinearOperator or scalar

        Returns
        -------
        numpy.ndarray, torch.Tensor or LinearOperator
            An `Operator` where both factors are, SciPy's composition where `x` is another `LinearOperator`.
        """
        if isinstance(x, Operator):
            return Product(*_parts(self, Product), *_parts(x, Product))
        if isinstance(x, LinearOperator):
            return LinearOperator.dot(self._beside(x), x)
        if is_scalar(x):
            return self._scaled(x)
        return self._times(x)

    @overload
    def rdot(self, x: Operator | float) -> Operator: ...
    @overload
    def rdot(self, x: Tensor) -> Tensor: ...
    @overload
    def rdot(self, x: Foreign) -> LinearOperator: ...
    @overload
    def rdot(self, x: ArrayLike) -> np.ndarray: ...
    def rdot(self, x: Any) -> Any:
        """Return x A, as `dot` from the right; x of shape (rows,), or (..., k, rows) with one vector a row."""
        if isinstance(x, LinearOperator):
            return x.dot(self if isinstance(x, Operator) else self._beside(x))
        return self._scaled(x) if is_scalar(x) else self._times_from_left(x)

    _rdot = rdot  # its name before SciPy 1.18

    @overload
    def __mul__(self, x: Operator | float) -> Operator: ...
    @overload
    def __mul__(self, x: Tensor) -> Tensor: ...
    @overload
    def __mul__(self, x: Foreign) -> LinearOperator: ...
    @overload
    def __mul__(self, x: ArrayLike) -> np.ndarray: ...
    def __mul__(self, x: Any) -> Any:
        return self.dot(x)

    @overload
    def __rmul__(self, x: float) -> Operator: ...
    @overload
    def __rmul__(self, x: Tensor) -> Tensor: ...
    @overload
    def __rmul__(self, x: ArrayLike) -> np.ndarray: ...
    def __rmul__(self, x: Any) -> Any:
        return self.rdot(x)

    @overload
    def __matmul__(self, x: Operator) -> Operator: ...
    @overload
    def __matmul__(self, x: Tensor) -> Tensor: ...
    @overload
    def __matmul__(self, x: Foreign) -> LinearOperator: ...
    @overload
    def __matmul__(self, x: ArrayLike) -> np.ndarray: ...
    def __matmul__(self, x: Any) -> Any:
        refuse_scalar(x)
        return self.dot(x)

    @overload
    def __rmatmul__(self, x: Tensor) -> Tensor: ...
    @overload
    def __rmatmul__(self, x: ArrayLike) -> np.ndarray: ...
    def __rmatmul__(self, x: Any) -> Any:
        refuse_scalar(x)
        return self.rdot(x)

    @overload
    def __call__(self, x: Operator) -> Operator: ...
    @overload
    def __call__(self, x: Tensor) -> Tensor: ...
    @overload
    def __call__(self, x: Foreign) -> LinearOperator: ...
    @overload
    def __call__(self, x: ArrayLike) -> np.ndarray: ...
    def __call__(self, x: Any) -> Any:
        return self @ x

    @overload
    def __add__(self, other: Operator) -> Operator: ...
    @overload
    def __add__(self, other: Foreign) -> LinearOperator: ...
    def __add__(self, other: Any) -> Any:
        if isinstance(other, Operator):
            return Sum(*_parts(self, Sum), *_parts(other, Sum))
        return (
            LinearOperator.__add__(self._beside(other), other) if isinstance(other, LinearOperator) else NotImplemented
        )

    def __radd__(self, other: float) -> Operator:
        # Python's sum begins with 0.
        return self if is_scalar(other) and other == 0 else NotImplemented

    @overload
    def __sub__(self, other: Operator) -> Operator: ...
    @overload
    def __sub__(self, other: Foreign) -> LinearOperator: ...
    def __sub__(self, other: Any) -> Any:
        return self + (-other) if isinstance(other, LinearOperator) else NotImplemented

    def __neg__(self) -> Operator:
        return self._scaled(-1.0)

    def __truediv__(self, x: Any) -> Operator:
        if not is_scalar(x):
            raise ValueError(
                f"Can only divide a linear operator by a scalar. Expected one, got {type(x).__name__}: to solve with an operator use an "
                "inverse or an iterative solver"
            )
        value = finite_real(x, "the divisor", self.torch_dtype)
        if value == 0:
            raise ValueError("expected a divisor that is not zero, got 0: divide by another number")
        return self._scaled(1.0 / value)

    def __pow__(self, exponent: Any) -> Operator:
        if not is_scalar(exponent):
            return NotImplemented
        try:
            count = whole(exponent, "the exponent of an operator")
        except TypeError as error:
            raise ValueError(str(error)) from None
        if self.shape[0] != self.shape[1]:
            raise ValueError(f"expected a square operator to take a power of, got shape {self.shape}")
        if count < 0:
            raise ValueError(
                f"expected an exponent of 0, 1, 2, …, got {count}: negative powers need a factorization, use "
                "linearize(...).inverse(damping)"
            )
        if count == 0:
            return Identity(self.shape[0], self.torch_dtype, self.device)
        return Product(*_parts(self, Product) * count)

    def _scaled(self, factor: Any) -> Operator:
        """Return the multiple, with nested multiples multiplied out."""
        value = finite_real(factor, "the factor", self.torch_dtype)
        if isinstance(self, Scaled):
            return Scaled(self.args[0], value * self.args[1])
        return Scaled(self, value)

    def adjoint(self) -> Operator:
        """Return Aᵀ, an operator of shape (columns, rows)."""
        return self._adjoint()

    def transpose(self) -> Operator:
        """Return Aᵀ, an operator of shape (columns, rows)."""
        return self._adjoint()

    @property
    def H(self) -> Operator:
        """Aᵀ."""
        return self._adjoint()

    @property
    def T(self) -> Operator:
        """Aᵀ."""
        return self._adjoint()

    def _adjoint(self) -> Operator:
        return self if self.symmetric else Adjoint(self)

    def _transpose(self) -> Operator:
        return self._adjoint()


class Adjoint(Operator):
    """The adjoint Aᵀ, shape (n, m), of an operator A of shape (m, n)."""

    def __init__(self, operator: Operator) -> None:
        super().__init__(operator.shape[::-1], operator.torch_dtype, operator.device)
        self.args = (operator,)

    def _apply(self, X: Tensor) -> Tensor:
        return self.args[0]._apply_adjoint(X)

    def _apply_adjoint(self, Y: Tensor) -> Tensor:
        return self.args[0]._apply(Y)

    def _adjoint(self) -> Operator:
        return self.args[0]


class Sum(Operator):
    """The sum A₁ + … + A_k of operators of one shape.

    Parameters
    ----------
    *terms : Operator, shape (m, n)

    Raises
    ------
    ValueError
        If the shapes or devices differ.
    TypeError
        If the dtypes differ.
    """

    def __init__(self, *terms: Operator) -> None:
        first = terms[0]
        for term in terms[1:]:
            if term.shape != first.shape:
                raise ValueError(f"expected operators of one shape to add, got shapes {first.shape} and {term.shape}")
            require_alike(first, term)
        super().__init__(first.shape, first.torch_dtype, first.device)
        self.args = terms
        self.symmetric = all(term.symmetric for term in terms)

    def _apply(self, X: Tensor) -> Tensor:
        first, *others = self.args
        return sum((term._apply(X) for term in others), first._apply(X))

    def _apply_adjoint(self, Y: Tensor) -> Tensor:
        first, *others = self.args
        return sum((term._apply_adjoint(Y) for term in others), first._apply_adjoint(Y))


class Product(Operator):
    """The product A₁ A₂ … A_k, applied from the right; symmetric where symmetric factors read alike from both ends.

    Parameters
    ----------
    *factors : Operator
        The columns of each match the rows of the next.

    Raises
    ------
    ValueError
        If neighbouring shapes do not match or devices differ.
    TypeError
        If the dtypes differ.
    """

    def __init__(self, *factors: Operator) -> None:
        for left, right in zip(factors[:-1], factors[1:], strict=True):
            if left.shape[1] != right.shape[0]:
                raise ValueError(
                    "expected as many columns of the left operator as rows of the right one, got shapes "
                    f"{left.shape} and {right.shape}"
                )
            require_alike(left, right)
        super().__init__((factors[0].shape[0], factors[-1].shape[1]), factors[0].torch_dtype, factors[0].device)
        self.args = factors
        mirrored = zip(factors, reversed(factors), strict=True)
        self.symmetric = all(factor.symmetric and factor is other for factor, other in mirrored)

    def _apply(self, X: Tensor) -> Tensor:
        for factor in reversed(self.args):
            X = factor._apply(X)
        return X

    def _apply_adjoint(self, Y: Tensor) -> Tensor:
        for factor in self.args:
            Y = factor._apply_adjoint(Y)
        return Y


class Scaled(Operator):
    """The multiple αA of an operator.

    Parameters
    ----------
    operator : Operator, shape (m, n)
        A.
    factor : float
        α, real and finite.

    Raises
    ------
    TypeError
        If `factor` is complex or no number.
    ValueError
        If `factor` is NaN, infinite, or overflows the operator's dtype.
    """

    def __init__(self, operator: Operator, factor: float) -> None:
        super().__init__(operator.shape, operator.torch_dtype, operator.device)
        self.args = (operator, finite_real(factor, "the factor", operator.torch_dtype))
        self.symmetric = operator.symmetric

    def _apply(self, X: Tensor) -> Tensor:
        return self.args[1] * self.args[0]._apply(X)

    def _apply_adjoint(self, Y: Tensor) -> Tensor:
        return self.args[1] * self.args[0]._apply_adjoint(Y)


class Identity(Operator):
    """The identity I of shape (size, size)."""

    symmetric = True

    def __init__(self, size: int, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> None:
        super().__init__((size, size), dtype, device)

    def _apply(self, X: Tensor) -> Tensor:
        return X


def damped(operator: Operator, damping: Any) -> Operator:
    """Return A + εI for a square operator A.

    Parameters
    ----------
    operator : Operator, shape (n, n)
        A.
    damping : float
        ε, real and finite; zero and negative values shift into the spectrum.

    Returns
    -------
    Operator, shape (n, n)

    Raises
    ------
    TypeError
        If `damping` is not a real number.
    ValueError
        If `damping` is NaN or infinite, or the operator is not square.
    """
    identity = Identity(operator.shape[1], operator.torch_dtype, operator.device)
    return operator + Scaled(identity, finite_real(damping, "damping", operator.torch_dtype))


def _parts(operator: Operator, kind: type[Operator]) -> tuple[Operator, ...]:
    return operator.args if type(operator) is kind else (operator,)
