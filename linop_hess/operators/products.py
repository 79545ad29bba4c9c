"""Products of an operator with arrays: SciPy's contract over torch, vectors, blocks and batches of both."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Protocol, Self, overload

import numpy as np
import scipy
import torch
from numpy.typing import ArrayLike
from scipy.sparse import issparse
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from linop_hess._validate import NUMPY_DTYPES, require_dtype
from linop_hess.operators.convert import plain_arithmetic, to_numpy
from linop_hess.operators.namespace import InNamespace
from linop_hess.operators.operand import Fold, as_operand

_SCIPY = tuple(int(part) for part in scipy.__version__.split(".")[:2])
# What SciPy says of a matvec with (n, 1): nothing, from 1.18 on a FutureWarning, from 1.20 on an error.
_COLUMNS_WARN, _COLUMNS_END = (1, 18), (1, 20)


class Foreign(Protocol):
    """Another operator of SciPy's, for type checkers."""

    def matvec(self, x: Any) -> Any: ...
    def rmatvec(self, x: Any) -> Any: ...


class Products(LinearOperator):
    """What multiplies arrays: subclasses give `_apply` and `_apply_adjoint` on column blocks; see `Operator`."""

    symmetric: bool = False
    fresh: bool = False
    shape: tuple[int, int]
    dtype: np.dtype
    torch_dtype: torch.dtype
    device: torch.device

    if (
        TYPE_CHECKING
    ):  # the stubs of SciPy give LinearOperator a __new__, which some checkers take for that of subclasses too

        def __new__(cls, *args: Any, **kwargs: Any) -> Self: ...

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        require_dtype(dtype, type(self).__name__)
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

    @overload
    def matvec(self, x: Tensor) -> Tensor: ...
    @overload
    def matvec(self, x: ArrayLike) -> np.ndarray: ...
    def matvec(self, x: Any) -> Any:
        """Return A x.

        Parameters
        ----------
        x : array_like or torch.Tensor, shape (columns,) or (..., columns)
            A vector, or a batch with one vector a row. A column, shape (columns, 1), gives a column: with SciPy 1.18 and 1.19 after a
            `FutureWarning`, as SciPy's own operators do, and from 1.20 on no more.

        Returns
        -------
        numpy.ndarray or torch.Tensor, shape (rows,) or (..., rows)

        Warns
        -----
        FutureWarning
            If `x` is a column, by the schedule of SciPy.

        Raises
        ------
        ValueError
            Wrong shape, NaN or Inf, a tensor on another device.
        TypeError
            Complex, sparse or non-numeric input, a tensor of another floating dtype.
        """
        return self._multiply(x, self._vectors(x, "matvec"))

    @overload
    def rmatvec(self, x: Tensor) -> Tensor: ...
    @overload
    def rmatvec(self, x: ArrayLike) -> np.ndarray: ...
    def rmatvec(self, x: Any) -> Any:
        """Return Aᵀ x; as `matvec` with rows and columns exchanged."""
        return self._multiply(x, self._vectors(x, "rmatvec"), adjoint=True)

    @overload
    def matmat(self, X: Tensor) -> Tensor: ...
    @overload
    def matmat(self, X: ArrayLike) -> np.ndarray: ...
    def matmat(self, X: Any) -> Any:
        """Return A X for X of shape (columns, k), or of each X of a batch (..., columns, k); errors as in `matvec`."""
        return self._multiply(X, Fold.MATRICES)

    @overload
    def rmatmat(self, X: Tensor) -> Tensor: ...
    @overload
    def rmatmat(self, X: ArrayLike) -> np.ndarray: ...
    def rmatmat(self, X: Any) -> Any:
        """Return Aᵀ X for X of shape (rows, k), or of each X of a batch (..., rows, k); errors as in `matvec`."""
        return self._multiply(X, Fold.MATRICES, adjoint=True)

    # SciPy's own compositions call these four on their operands.
    _matvec = matvec
    _rmatvec = rmatvec
    _matmat = matmat
    _rmatmat = rmatmat

    def to_xp(self, xp: Any) -> InNamespace:
        """Return this operator as one of an array namespace, so that SciPy's operators of that namespace compose with it.

        Needed only right of another operator, as in ``other @ op.to_xp(torch)``; left of it ``op @ other`` knows by itself. SciPy takes
        arrays of torch with the environment variable ``SCIPY_ARRAY_API=1``.

        Parameters
        ----------
        xp : module
            The namespace of the other operator, such as `torch`.

        Returns
        -------
        InNamespace
            Of the same shape, and of the dtype in that namespace.

        Raises
        ------
        NotImplementedError
            If SciPy is older than 1.18.
        TypeError
            If the arrays of `xp` are neither NumPy's nor torch's.
        RuntimeError
            If `xp` is `torch` and that variable is not set.
        """
        return InNamespace(self, xp)

    def _beside(self, other: Any) -> Any:
        """Return this operator in the namespace of one of SciPy's."""
        xp = getattr(other, "_xp", None)
        return self if xp is None or xp == self._xp else InNamespace(self, xp)

    def _times(self, x: Any) -> Any:
        """Return A x for a vector, a block, or a batch of blocks."""
        return self._multiply(x, Fold.EITHER)

    def _times_from_left(self, x: Any) -> Any:
        """Return x A for a vector, a block of rows, or a batch of such blocks."""
        if not isinstance(x, Tensor) and not issparse(x):
            x = np.asanyarray(x)
        if issparse(x) or x.ndim < 2:
            return self._multiply(x, Fold.EITHER, adjoint=True)
        if x.shape[-1] != self.shape[0]:
            raise ValueError(
                f"Dimension mismatch: expected an operand of shape ({self.shape[0]},) or (..., k, {self.shape[0]}) left of "
                f"{type(self).__name__}, got {tuple(x.shape)}: pass a flat vector, or a matrix with one vector a row"
            )
        return self._multiply(x.swapaxes(-1, -2), Fold.MATRICES, adjoint=True).swapaxes(-1, -2)

    def _vectors(self, x: Any, name: str) -> Fold:
        """How matvec or rmatvec reads `x`: a batch of rows, or one column, which SciPy takes leave of."""
        length = self.shape[0] if name == "rmatvec" else self.shape[1]
        shape = tuple(x.shape) if hasattr(x, "shape") else np.shape(x)
        if shape != (length, 1) or _SCIPY >= _COLUMNS_END:
            return Fold.VECTORS
        if _SCIPY >= _COLUMNS_WARN and not isinstance(x, np.matrix) and not issparse(x):
            warnings.warn(
                f"Calling `{name}` on 'column vectors' of shape `({length}, 1)` was deprecated in SciPy 1.18.0 and will no "
                f"longer be possible in SciPy 1.20.0. Please call `{name.replace('vec', 'mat')}` instead for identical behaviour.",
                FutureWarning,
                stacklevel=3,
            )
        return Fold.MATRICES

    def _multiply(self, x: Any, fold: Fold, *, adjoint: bool = False) -> Any:
        """Check `x`, apply the operator or its adjoint, and return the kind of array that came."""
        rows, length = self.shape[::-1] if adjoint else self.shape
        with plain_arithmetic(self.device):
            operand = as_operand(
                x, length, fold=fold, dtype=self.torch_dtype, device=self.device, who=type(self).__name__
            )
            block = operand.block
            if block.shape[1] == 0:
                out = block.new_zeros(rows, 0)
            else:
                out = self._apply_adjoint(block) if adjoint else self._apply(block)
            if out.shape != (rows, block.shape[1]) or out.dtype != self.torch_dtype:
                raise RuntimeError(
                    f"expected {type(self).__name__} to compute {(rows, block.shape[1])} of {self.torch_dtype}, its "
                    f"contract, got {tuple(out.shape)} of {out.dtype}: report this defect of the operator"
                )
            out = operand.unfold(out)
            # A copy, unless known to be needless: what an operator returns may be its operand or its own storage.
            if isinstance(x, Tensor):
                out = out.detach()
                return out.contiguous() if self.fresh else out.clone(memory_format=torch.contiguous_format)
            result = to_numpy(out, fresh=self.fresh)
        return np.asmatrix(result) if isinstance(x, np.matrix) else result
