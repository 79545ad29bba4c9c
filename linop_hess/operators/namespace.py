"""An operator as one of an array namespace, for compositions with SciPy's operators of that namespace."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from torch import Tensor


class InNamespace(LinearOperator):
    """An operator as SciPy's operators of an array namespace are: its dtype and its arrays are those of the namespace.

    SciPy composes operators of one namespace only, from 1.18 on. Sums and products of this with others of the namespace are SciPy's;
    arrays are multiplied by the operator itself, so that tensors stay on their device.

    Parameters
    ----------
    operator : Operator, shape (m, n)
    xp : module
        The namespace: `torch`, `numpy`, or that of the operators to compose with (array_api_compat's of either).

    Raises
    ------
    NotImplementedError
        If SciPy is older than 1.18.
    TypeError
        If the arrays of `xp` are neither NumPy's nor torch's.
    RuntimeError
        If `xp` is `torch` and SciPy's switch for arrays of other libraries is off.
    """

    def __init__(self, operator: Any, xp: Any) -> None:
        kind = _kind(xp)
        if not hasattr(operator, "_xp"):
            raise NotImplementedError(
                "expected SciPy 1.18 or later for array namespaces, got an earlier one: upgrade it"
            )
        xp = _scipys(xp, kind)
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


def _kind(xp: Any) -> type:
    """Type of the arrays of a namespace."""
    kind = type(xp.empty(0)) if hasattr(xp, "empty") else None
    if kind is np.ndarray or kind is Tensor:
        return kind
    raise TypeError(
        f"expected the namespace of NumPy or torch, got {getattr(xp, '__name__', xp)!r}: convert arrays to one of them"
    )


def _scipys(xp: Any, kind: type) -> Any:
    """SciPy's own namespace for a library; any other namespace as it is."""
    if xp is not np and xp is not torch:
        return xp
    try:
        own = aslinearoperator(xp.empty((1, 1)))._xp
    except TypeError:  # tensors are no arrays to it
        own = np
    if _kind(own) is not kind:
        raise RuntimeError(
            "expected SCIPY_ARRAY_API=1 in the environment for operators of torch, got it unset: set it before SciPy is "
            "imported"
        )
    return own
