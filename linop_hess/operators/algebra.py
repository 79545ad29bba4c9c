"""Sums, products, multiples and powers of operators."""

from __future__ import annotations

import operator as python_operator
from typing import Any

from torch import Tensor

from linop_hess.operators.base import Operator
from linop_hess.operators.convert import is_scalar, real_scalar
from linop_hess.operators.permutation import Identity, Permutation

__all__ = [
    "Identity",
    "Permutation",
    "Power",
    "Product",
    "Scaled",
    "Sum",
    "add",
    "damped",
    "divided",
    "power",
    "product",
    "scaled",
]


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
                raise ValueError(
                    f"cannot add operators of shapes {first.shape} and {term.shape}. Both need the same shape."
                )
            _require_alike(first, term)
        super().__init__(first.shape, first.torch_dtype, first.device)
        self.args = terms
        self.symmetric = all(term.symmetric for term in terms)

    def _apply(self, X: Tensor) -> Tensor:
        total = self.args[0]._apply(X)
        for term in self.args[1:]:
            total = total + term._apply(X)
        return total

    def _apply_adjoint(self, Y: Tensor) -> Tensor:
        total = self.args[0]._apply_adjoint(Y)
        for term in self.args[1:]:
            total = total + term._apply_adjoint(Y)
        return total


class Product(Operator):
    """The product A₁ A₂ … A_k, applied from the right.

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
                    f"cannot multiply operators of shapes {left.shape} and {right.shape}. "
                    "The columns of the left one must be as many as the rows of the right one."
                )
            _require_alike(left, right)
        super().__init__((factors[0].shape[0], factors[-1].shape[1]), factors[0].torch_dtype, factors[0].device)
        self.args = factors

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
        self.args = (operator, real_scalar(factor, operator.torch_dtype))
        self.symmetric = operator.symmetric

    def _apply(self, X: Tensor) -> Tensor:
        return self.args[1] * self.args[0]._apply(X)

    def _apply_adjoint(self, Y: Tensor) -> Tensor:
        return self.args[1] * self.args[0]._apply_adjoint(Y)


class Power(Operator):
    """The power Aᵖ of a square operator with p = 0, 1, 2 and so on.

    Parameters
    ----------
    operator : Operator, shape (n, n)
        A.
    exponent : int
        p, not negative.

    Raises
    ------
    ValueError
        If the operator is not square or the exponent is negative.
    TypeError
        If the exponent is not an integer.
    """

    def __init__(self, operator: Operator, exponent: int) -> None:
        try:
            exponent = python_operator.index(exponent)
        except TypeError:
            raise TypeError(f"a power of an operator needs an integer exponent; got {exponent!r}.") from None
        if operator.shape[0] != operator.shape[1]:
            raise ValueError(f"only a square operator has powers; got shape {operator.shape}.")
        if exponent < 0:
            raise ValueError(
                f"the exponent must be 0, 1, 2, …; got {exponent}. Negative powers need a factorization: "
                "use linearize(...).inverse(damping)."
            )
        super().__init__(operator.shape, operator.torch_dtype, operator.device)
        self.args = (operator, exponent)
        self.symmetric = operator.symmetric

    def _apply(self, X: Tensor) -> Tensor:
        for _ in range(self.args[1]):
            X = self.args[0]._apply(X)
        return X

    def _apply_adjoint(self, Y: Tensor) -> Tensor:
        for _ in range(self.args[1]):
            Y = self.args[0]._apply_adjoint(Y)
        return Y


def add(left: Operator, right: Operator) -> Operator:
    """Return ``left + right``, with nested sums made flat."""
    return Sum(*_parts(left, Sum), *_parts(right, Sum))


def product(left: Operator, right: Operator) -> Operator:
    """Return ``left @ right``, with nested products made flat."""
    return Product(*_parts(left, Product), *_parts(right, Product))


def scaled(operator: Operator, factor: Any) -> Operator:
    """Return ``factor * operator``, with nested multiples multiplied out."""
    value = real_scalar(factor, operator.torch_dtype)
    if isinstance(operator, Scaled):
        operator, inner = operator.args
        return Scaled(operator, value * inner)
    return Scaled(operator, value)


def divided(operator: Operator, divisor: Any) -> Operator:
    """Return ``operator / divisor``.

    Raises
    ------
    TypeError
        If `divisor` is not a real scalar.
    ValueError
        If `divisor` is zero, NaN or infinite.
    """
    if not is_scalar(divisor):
        raise TypeError(
            f"an operator can be divided by a scalar only; got {type(divisor).__name__}. "
            "To solve with an operator use an inverse or an iterative solver."
        )
    value = real_scalar(divisor, operator.torch_dtype)
    if value == 0:
        raise ValueError("cannot divide an operator by zero. Pass a divisor that is not zero.")
    return scaled(operator, 1.0 / value)


def power(operator: Operator, exponent: Any) -> Operator:
    """Return ``operator ** exponent``."""
    return Power(operator, exponent)


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
    return add(operator, scaled(identity, damping))


def _parts(operator: Operator, kind: type[Operator]) -> tuple[Operator, ...]:
    return operator.args if type(operator) is kind else (operator,)


def _require_alike(left: Operator, right: Operator) -> None:
    if left.torch_dtype != right.torch_dtype:
        raise TypeError(
            f"cannot combine operators of {left.torch_dtype} and {right.torch_dtype}. "
            "Build both from models of one precision."
        )
    if left.device != right.device:
        raise ValueError(f"cannot combine operators on {left.device} and {right.device}. Build both on one device.")
