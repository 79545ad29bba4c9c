"""Named blocks of an operator over parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import methodcaller
from typing import Any

import numpy as np
import torch
from torch import Tensor

from linop_hess.operators.operator import Operator, damped
from linop_hess.operators.parameters import Named


class Block(Operator):
    """The rows and columns of an operator at some places, multiplied by the whole operator with zeros elsewhere.

    Parameters
    ----------
    operator : Operator, shape (m, n)
    rows, columns : array_like of int
        The places, each once.

    Attributes
    ----------
    rows, columns : torch.Tensor of int64

    Raises
    ------
    ValueError
        If there are places outside the operator, or one comes twice.
    """

    fresh = True

    def __init__(self, operator: Operator, rows: Any, columns: Any) -> None:
        places = [_checked(places, length) for places, length in zip((rows, columns), operator.shape, strict=True)]
        super().__init__((places[0].size, places[1].size), operator.torch_dtype, operator.device)
        self.args = (operator,)
        self.rows, self.columns = (torch.from_numpy(one).to(self.device) for one in places)
        self.symmetric = operator.symmetric and np.array_equal(places[0], places[1])

    @property
    def formula(self) -> str:
        """How it is written where it is shown."""
        return f"block of {type(self.args[0]).__name__}"

    def damped(self, damping: float) -> Operator:
        """Return this block plus ``damping`` times the identity.

        Parameters
        ----------
        damping : float
            ε, real and finite.

        Returns
        -------
        Operator, shape (n, n)

        Raises
        ------
        TypeError
            If `damping` is not a real number.
        ValueError
            If `damping` is NaN or infinite, or the block is not square.
        """
        return damped(self, damping)

    def _padded(self, X: Tensor, places: Tensor, length: int) -> Tensor:
        out = X.new_zeros(length, X.shape[1])
        out[places] = X
        return out

    def _apply(self, X: Tensor) -> Tensor:
        operator = self.args[0]
        return operator._apply(self._padded(X, self.columns, operator.shape[1]))[self.rows]

    def _apply_adjoint(self, Y: Tensor) -> Tensor:
        operator = self.args[0]
        return operator._apply_adjoint(self._padded(Y, self.rows, operator.shape[0]))[self.columns]


class NamedOperator(Named, Operator):
    """A square operator over the parameters of a `parameter_table`."""

    def block(self, rows: str | Iterable[str], columns: str | Iterable[str] | None = None) -> Block:
        """Return the block in the rows of some parameters and the columns of the same or others.

        Its products are those of the whole operator, with zeros in the other columns. It is of this operator itself: the block of an
        inverse is not the inverse of a block.

        Parameters
        ----------
        rows : str or iterable of str
            Names or glob patterns, as in `slice`; the parameters keep the order of the flat vectors and need not lie side by side.
        columns : str or iterable of str, optional
            The same for columns; without, those of the rows, and the block of a symmetric operator is symmetric.

        Returns
        -------
        Block
            An operator like any other, of the sizes of the parameters matched.

        Raises
        ------
        ValueError
            If a pattern matches nothing; the nearest names are given.
        TypeError
            If a pattern is no string or iterable of strings.
        """
        places = self.indices(rows)
        return Block(self, places, places if columns is None else self.indices(columns))


def _checked(places: Any, length: int) -> np.ndarray:
    index = np.array(places, dtype=np.int64).reshape(-1)
    if index.size and not (0 <= index.min() and index.max() < length) or np.unique(index).size < index.size:
        raise ValueError(
            f"expected different places of 0, …, {length - 1} for a block, got others: pass each row and column once"
        )
    return index


class PositiveOperator(Operator):
    """The positive definite operator of `HessianInverse.positive`.

    Parameters
    ----------
    inverse : HessianInverse
    product : callable
        Of a block of vectors.
    """

    symmetric = True

    def __init__(self, inverse: Operator, product: Callable[[Tensor], Tensor]) -> None:
        super().__init__(inverse.shape, inverse.torch_dtype, inverse.device)
        self._inverse, self._product = inverse, product
        self.formula = f"positive part of the {inverse.formula}"

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Operator]]:
        """Pickle the inverse."""
        return methodcaller("positive"), (self._inverse,)

    def _apply(self, X: Tensor) -> Tensor:
        return self._product(X)
