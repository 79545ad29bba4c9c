"""Linear operators over torch that keep SciPy's contract."""

from linop_hess.operators.algebra import Power, Product, Scaled, Sum, damped
from linop_hess.operators.base import Adjoint, Operator
from linop_hess.operators.dense import to_dense
from linop_hess.operators.permutation import Identity, Permutation

__all__ = [
    "Adjoint",
    "Identity",
    "Operator",
    "Permutation",
    "Power",
    "Product",
    "Scaled",
    "Sum",
    "damped",
    "to_dense",
]
