"""Linear operators over torch that keep SciPy's contract."""

from linop_hess.operators.dense import to_dense
from linop_hess.operators.operator import Adjoint, Identity, Operator, Product, Scaled, Sum, damped
from linop_hess.operators.permutation import Permutation

__all__ = [
    "Adjoint",
    "Identity",
    "Operator",
    "Permutation",
    "Product",
    "Scaled",
    "Sum",
    "damped",
    "to_dense",
]
