"""The base of every operator: SciPy's `LinearOperator` contract over torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.sparse import issparse
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from linop_hess.operators.convert import NUMPY_DTYPES, as_tensor, is_scalar, plain_arithmetic, to_numpy

# As Any: the stubs some have installed for SciPy fix result types that compositions here refine.
_ScipyOperator: Any = LinearOperator


class Operator(_ScipyOperator):
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
        Where the operator computes.

    Raises
    ------
    TypeError
        If `dtype` is neither float32 nor float64.
    """

    symmetric: bool = False

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        if dtype not in NUMPY_DTYPES:
            raise TypeError(
                f"{type(self).__name__} needs dtype torch.float32 or torch.float64; got {dtype}. "
                "Convert the model or the arrays with .double() or .float()."
            )
        super().__init__(dtype=NUMPY_DTYPES[dtype], shape=(int(shape[0]), int(shape[1])))
        self.torch_dtype = dtype
        self.device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"

    def _apply(self, X: Tensor) -> Tensor:
        """Return A X, shape (rows, k), for a block X of shape (columns, k) that is read only."""
        raise NotImplementedError(f"{type(self).__name__} must implement _apply")

    def _apply_adjoint(self, Y: Tensor) -> Tensor:
        """Return Aᵀ Y, shape (columns, k), for a block Y of shape (rows, k) that is read only."""
        if self.symmetric:
            return self._apply(Y)
        raise NotImplementedError(f"{type(self).__name__} must implement _apply_adjoint")

    def matvec(self, x: Any) -> Any:
        """Return A x.

        Parameters
        ----------
        x : array_like or torch.Tensor, shape (columns,) or (columns, 1)

        Returns
        -------
        numpy.ndarray or torch.Tensor, shape (rows,) or (rows, 1)

        Raises
        ------
        ValueError
            Wrong shape, NaN or Inf, a tensor on another device.
        TypeError
            Complex, sparse or non-numeric input, a tensor of another floating dtype.
        """
        self._require_one_column(x)
        return self._multiply(x)

    def rmatvec(self, x: Any) -> Any:
        """Return Aᵀ x; as `matvec` with rows and columns exchanged."""
        self._require_one_column(x)
        return self._multiply(x, adjoint=True)

    def matmat(self, X: Any) -> Any:
        """Return A X for X of shape (columns, k); errors as in `matvec`."""
        return self._multiply(X, ndims=(2,))

    def rmatmat(self, X: Any) -> Any:
        """Return Aᵀ X for X of shape (rows, k); errors as in `matvec`."""
        return self._multiply(X, adjoint=True, ndims=(2,))

    # SciPy's own compositions call these four on their operands.
    _matvec = matvec
    _rmatvec = rmatvec
    _matmat = matmat
    _rmatmat = rmatmat

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
            return _algebra().product(self, x)
        if isinstance(x, LinearOperator):
            return super().dot(x)
        if is_scalar(x):
            return _algebra().scaled(self, x)
        return self._multiply(x)

    def _rdot(self, x: Any) -> Any:
        if isinstance(x, LinearOperator):
            return super()._rdot(x)
        if not isinstance(x, Tensor) and not issparse(x):
            x = np.asanyarray(x)
        if x.ndim == 2 and not issparse(x):
            return self._multiply(x.T, adjoint=True).T
        return self._multiply(x, adjoint=True)

    def __mul__(self, x: Any) -> Any:
        return self.dot(x)

    def __rmul__(self, x: Any) -> Any:
        return _algebra().scaled(self, x) if is_scalar(x) else self._rdot(x)

    def __matmul__(self, x: Any) -> Any:
        _refuse_scalar(x)
        return self.dot(x)

    def __rmatmul__(self, x: Any) -> Any:
        _refuse_scalar(x)
        return self._rdot(x)

    def __call__(self, x: Any) -> Any:
        """Return ``self @ x``."""
        return self @ x

    def __add__(self, other: Any) -> Any:
        return _algebra().add(self, other) if isinstance(other, Operator) else super().__add__(other)

    def __sub__(self, other: Any) -> Any:
        return self + (-other) if isinstance(other, LinearOperator) else NotImplemented

    def __neg__(self) -> Operator:
        return _algebra().scaled(self, -1.0)

    def __truediv__(self, x: Any) -> Operator:
        return _algebra().divided(self, x)

    def __pow__(self, exponent: Any) -> Operator:
        return _algebra().power(self, exponent)

    def _adjoint(self) -> Operator:
        return self if self.symmetric else Adjoint(self)

    def _transpose(self) -> Operator:
        return self._adjoint()

    def _require_one_column(self, x: Any) -> None:
        shape = tuple(x.shape) if hasattr(x, "shape") else np.shape(x)
        if len(shape) == 2 and shape[1] != 1:
            raise ValueError(
                f"{type(self).__name__} multiplies one vector here; got shape {shape}. "
                "Use matmat (rmatmat for the adjoint) or @ for several columns."
            )

    def _multiply(self, x: Any, *, adjoint: bool = False, ndims: tuple[int, ...] = (1, 2)) -> Any:
        """Check `x`, apply the operator or its adjoint, and return the kind of array that came."""
        rows, length = self.shape[::-1] if adjoint else self.shape
        with plain_arithmetic(self.device):
            operand = as_tensor(
                x, length, ndims=ndims, dtype=self.torch_dtype, device=self.device, who=type(self).__name__
            )
            block = operand if operand.ndim == 2 else operand[:, None]
            if block.shape[1] == 0:
                out = block.new_zeros(rows, 0)
            else:
                out = self._apply_adjoint(block) if adjoint else self._apply(block)
            if out.shape != (rows, block.shape[1]) or out.dtype != self.torch_dtype:
                raise RuntimeError(
                    f"{type(self).__name__} computed {tuple(out.shape)} of {out.dtype}; its contract says "
                    f"{(rows, block.shape[1])} of {self.torch_dtype}. This is a defect of the operator: "
                    "report it."
                )
            out = out.reshape(rows, *operand.shape[1:])
            # Always a copy: what an operator returns may be its operand or its own storage.
            if isinstance(x, Tensor):
                return out.detach().clone(memory_format=torch.contiguous_format)
            result = to_numpy(out)
        return np.asmatrix(result) if isinstance(x, np.matrix) else result


class Adjoint(Operator):
    """The adjoint Aᵀ of an operator A.

    Parameters
    ----------
    operator : Operator, shape (m, n)
        A. The adjoint has shape (n, m).
    """

    def __init__(self, operator: Operator) -> None:
        super().__init__(operator.shape[::-1], operator.torch_dtype, operator.device)
        self.args = (operator,)

    def _apply(self, X: Tensor) -> Tensor:
        return self.args[0]._apply_adjoint(X)

    def _apply_adjoint(self, Y: Tensor) -> Tensor:
        return self.args[0]._apply(Y)

    def _adjoint(self) -> Operator:
        return self.args[0]


def _algebra() -> Any:
    # The compositions are operators themselves, so their module imports this one.
    from linop_hess.operators import algebra

    return algebra


def _refuse_scalar(x: Any) -> None:
    if is_scalar(x):
        raise ValueError(f"@ multiplies an operator with arrays and operators; got the scalar {x!r}. Use *.")
