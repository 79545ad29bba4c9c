"""An operator as one of an array namespace, for compositions with SciPy's operators of that namespace."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

# As Any: the stubs some have installed for SciPy know no namespaces.
_ScipyOperator: Any = LinearOperator


class InNamespace(_ScipyOperator):
    """An operator as SciPy's operators of an array namespace are: its dtype and its arrays are those of the namespace.

    SciPy composes operators of one namespace only, from 1.18 on. Sums and products of this with others of the namespace are SciPy's;
    arrays are multiplied by the operator itself, so that tensors stay on their device.

    Parameters
    ----------
    operator : Operator, shape (m, n)
    xp : module
        The namespace: `torch`, `numpy`, or array_api_compat's of either, the same object as that of the operators to compose with.

    Raises
    ------
    NotImplementedError
        If SciPy is older than 1.18.
    TypeError
        If the arrays of `xp` are neither NumPy's nor torch's.
    """

    def __init__(self, operator: Any, xp: Any) -> None:
        kind = type(xp.empty(0)) if hasattr(xp, "empty") else type(xp)
        if kind not in (np.ndarray, Tensor):
            raise TypeError(
                f"expected the namespace of NumPy or torch, got {getattr(xp, '__name__', xp)!r}: convert arrays to one of them"
            )
        if not hasattr(operator, "_xp"):
            raise NotImplementedError(
                "expected SciPy 1.18 or later for array namespaces, got an earlier one: upgrade it"
            )
        super().__init__(operator.torch_dtype if kind is Tensor else operator.dtype, operator.shape, xp=xp)
        self.args = (operator,)

    def matvec(self, x: Any) -> Any:
        return self.args[0].matvec(x)

    def rmatvec(self, x: Any) -> Any:
        return self.args[0].rmatvec(x)

    def matmat(self, X: Any) -> Any:
        return self.args[0].matmat(X)

    def rmatmat(self, X: Any) -> Any:
        return self.args[0].rmatmat(X)

    # SciPy's own compositions call these four on their operands.
    _matvec = matvec
    _rmatvec = rmatvec
    _matmat = matmat
    _rmatmat = rmatmat

    def dot(self, x: Any) -> Any:
        return self.args[0].dot(x) if self._is_array(x) else super().dot(x)

    def rdot(self, x: Any) -> Any:
        return self.args[0].rdot(x) if self._is_array(x) else super().rdot(x)

    def _is_array(self, x: Any) -> bool:
        """Whether `x` is an array of the namespace; SciPy itself knows only NumPy's unless SCIPY_ARRAY_API is set."""
        return isinstance(x, Tensor if isinstance(self.dtype, torch.dtype) else np.ndarray) and x.ndim > 0

    def _adjoint(self) -> InNamespace:
        return InNamespace(self.args[0].H, self._xp)

    def _transpose(self) -> InNamespace:
        return self._adjoint()
