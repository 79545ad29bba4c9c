"""SciPy's own test of its operators, run on ours, where the installed SciPy ships it.

The source is read and rewritten, so that each release is tested with its own assertions: what is complex there is real here (2j becomes
2.0), the classes of its compositions are ours, and operators that are batches themselves are left out. Results are of the operator's
dtype, so dtypes are compared where a floating one is expected.
"""

from __future__ import annotations

import ast
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import issparse
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from torch import Tensor

from linop_hess.operators import Identity, Operator, Product, Scaled, Sum

MODULE = "scipy.sparse.linalg.tests.test_interface"

# Tests of how SciPy's own classes are made: by subclassing, from a function without a dtype, from a sparse matrix, garbage of a class.
OF_SCIPYS_CLASSES = {
    "test_inheritance",
    "test_no_double_init",
    "test_determine_lo_dtype_from_matvec",
    "test_determine_lo_dtype_for_int",
    "test_sparse_matmat_exception",
    "test_MatrixLinearOperator_refcycle",
    "test_subclass_matmat",
    "test_aslinearop_sparse",
    "test_transpose_multiplication",
    "test_xp",
}


# Operators that are no batches themselves, and made of a matrix: the functions given elsewhere in `test_batch` want to see batches.
KEPT = {"batch_shape": "[()]", "batch_A": "[()]", "operator_definition": "['aslinearoperator']"}


class Real(ast.NodeTransformer):
    """The source with real numbers, without what is about other array libraries and about batches of operators."""

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        if isinstance(node.value, complex):
            return ast.copy_location(ast.Constant(node.value.imag), node)
        return ast.copy_location(
            ast.Constant(
                {"complex128": "float64", "complex64": "float32", "int32": "float32"}.get(node.value, node.value)
            ),
            node,
        )

    def visit_Attribute(self, node: ast.Attribute) -> Any:
        self.generic_visit(node)
        node.attr = {"complex128": "float64", "complex64": "float32", "int32": "float32"}.get(node.attr, node.attr)
        return node

    def visit_FunctionDef(self, node: Any) -> Any:
        kept = []
        for decorator in node.decorator_list:
            words = ast.unparse(decorator)
            if "xp_backends" in words or "thread" in words:
                continue
            for name, values in KEPT.items():
                if words.startswith(f"pytest.mark.parametrize('{name}'"):
                    decorator.args[1] = ast.parse(values, mode="eval").body
            kept.append(decorator)
        node.decorator_list = kept
        self.generic_visit(node)
        return node

    visit_ClassDef = visit_FunctionDef

    def visit_Assign(self, node: ast.Assign) -> Any:
        self.generic_visit(node)
        return None if ast.unparse(node).startswith("pytestmark") else node


class Callables(Operator):
    """An operator of functions of NumPy arrays, as SciPy's `LinearOperator(shape, matvec, ...)`."""

    def __init__(self, shape, matvec, rmatvec=None, matmat=None, dtype=None, rmatmat=None, xp=None) -> None:
        super().__init__(shape, torch.float32 if dtype == np.float32 else torch.float64)
        self.args = ()
        self.forward, self.backward = (matmat, matvec), (rmatmat, rmatvec)

    def _by(self, functions, X: Tensor) -> Tensor:
        block, vector = functions
        if block is None and vector is None:
            raise NotImplementedError("no adjoint was given")
        x = X.numpy()
        y = np.stack([vector(one) for one in x.T], axis=1) if block is None else block(x)
        return torch.from_numpy(np.ascontiguousarray(y, dtype=self.dtype))

    def _apply(self, X: Tensor) -> Tensor:
        return self._by(self.forward, X)

    def _apply_adjoint(self, Y: Tensor) -> Tensor:
        return self._by(self.backward, Y)


class MadeHere(LinearOperator):
    """Stands for SciPy's class: called it makes ours, its subclasses are SciPy's."""

    def __new__(cls, *args, **kwargs):
        return Callables(*args, **kwargs) if cls is MadeHere else super().__new__(cls)


def ours(M: Any) -> Operator:
    """One of our operators for a matrix, or for one of SciPy's operators."""
    if isinstance(M, Operator):
        return M
    if not isinstance(M, LinearOperator):
        M = np.asarray(M.toarray() if issparse(M) else M)
        M = aslinearoperator(M.astype(np.result_type(M.dtype, np.float32)))
    return Callables(M.shape, None, matmat=M.matmat, rmatmat=M.rmatmat, dtype=M.dtype)


def assert_equal_values(actual: Any, expected: Any, **tolerances: float) -> None:
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    if expected.dtype.kind == "f":
        assert actual.dtype == expected.dtype
    np.testing.assert_allclose(actual, expected, **{"rtol": 4 * np.finfo(actual.dtype).eps, **tolerances})


INTERFACE = SimpleNamespace(
    LinearOperator=MadeHere,
    aslinearoperator=ours,
    IdentityOperator=lambda shape, dtype=None, xp=None: Identity(shape[0]),
    _ScaledLinearOperator=Scaled,
    _SumLinearOperator=Sum,
    _ProductLinearOperator=Product,
    _PowerLinearOperator=Product,
    MatrixLinearOperator=None,
)


def scipys_tests() -> dict[str, Any]:
    """The tests of the installed SciPy, rewritten, by name; empty where it ships none."""
    spec = find_spec(MODULE) if find_spec(MODULE.rpartition(".")[0]) else None
    if spec is None or spec.origin is None:
        return {}
    source = Path(spec.origin)
    tree = ast.fix_missing_locations(Real().visit(ast.parse(source.read_text(encoding="utf-8"))))
    module = ModuleType("scipys_test_interface")
    sys.modules[module.__name__] = module  # its functions are pickled by name
    exec(compile(tree, str(source), "exec"), module.__dict__)
    module.__dict__.update(
        interface=INTERFACE, xp_assert_equal=assert_equal_values, xp_assert_close=assert_equal_values
    )
    found = {name: value for name, value in vars(module).items() if name.startswith(("test_", "Test"))}
    for name in OF_SCIPYS_CLASSES:
        found.pop(name, None)
        for kind in found.values():
            if isinstance(kind, type) and name in vars(kind):
                delattr(kind, name)
    return found


TESTS = scipys_tests()
globals().update(TESTS)


@pytest.fixture
def xp() -> Any:
    """NumPy as SciPy knows it."""
    return getattr(aslinearoperator(np.eye(1)), "_xp", np)


def test_scipys_tests_are_there() -> None:
    if not TESTS:
        pytest.skip(f"the installed SciPy ships no {MODULE}")
    assert {"TestLinearOperator", "TestAsLinearOperator"} <= TESTS.keys() and len(TESTS) >= 8
