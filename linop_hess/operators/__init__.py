"""Linear operators over torch that keep SciPy's contract."""

from linop_hess.operators.block import Block
from linop_hess.operators.dense import to_dense
from linop_hess.operators.operator import Adjoint, Identity, Operator, Product, Scaled, Sum, damped
from linop_hess.operators.parameters import ParameterTable
from linop_hess.operators.permutation import Permutation

__all__ = [
    "Adjoint",
    "Block",
    "Identity",
    "Operator",
    "ParameterTable",
    "Permutation",
    "Product",
    "Scaled",
    "Sum",
    "damped",
    "to_dense",
]
