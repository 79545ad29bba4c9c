import numpy as np
import pytest
import torch
from scipy.sparse.linalg import aslinearoperator, cg, eigsh, gmres, minres
from torch import Tensor

from linop_hess import _memory
from linop_hess.operators import (
    Adjoint,
    Identity,
    Operator,
    Permutation,
    Product,
    Scaled,
    Sum,
    damped,
    to_dense,
)
from tests.operators.conformance import check_operator

DTYPES = [torch.float32, torch.float64]


class Matrix(Operator):
    """A dense matrix, of which everything is known."""

    def __init__(self, matrix: Tensor, symmetric: bool = False) -> None:
        super().__init__(tuple(matrix.shape), matrix.dtype, matrix.device)
        self.matrix = matrix
        self.symmetric = symmetric

    def _apply(self, X: Tensor) -> Tensor:
        return self.matrix @ X

    def _apply_adjoint(self, Y: Tensor) -> Tensor:
        return self.matrix.T @ Y


class Careless(Operator):
    """Returns a view of its operand, or its own storage."""

    def __init__(self, size: int) -> None:
        super().__init__((size, size), torch.float64)
        self.stored = torch.ones(size, 1, dtype=torch.float64)

    def _apply(self, X: Tensor) -> Tensor:
        return self.stored

    def _apply_adjoint(self, Y: Tensor) -> Tensor:
        return Y


def matrix(rows: int, columns: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Matrix:
    generator = torch.Generator().manual_seed(seed)
    return Matrix(torch.randn(rows, columns, generator=generator, dtype=torch.float64).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (3, 7), (7, 3), (1, 5)])
def test_operator_and_adjoint_conform(shape, dtype):
    A = matrix(*shape, dtype)
    check_operator(A, A.matrix.numpy())
    check_operator(A.H, A.matrix.numpy().T)


@pytest.mark.parametrize("dtype", DTYPES)
def test_compositions_conform(dtype):
    A, B, C = matrix(3, 5, dtype), matrix(3, 5, dtype, seed=1), matrix(5, 3, dtype, seed=2)
    a, b, c = (M.matrix.double().numpy() for M in (A, B, C))
    check_operator(Sum(A, B), a + b)
    check_operator(Product(A, C, B), a @ c @ b)
    check_operator(Scaled(A, -2.5), -2.5 * a)
    check_operator(Product(A, C) ** 3, np.linalg.matrix_power(a @ c, 3), rtol=1e4 * np.finfo(A.dtype).eps)
    check_operator((A + 2 * B).H @ (A - B / 4), (a + 2 * b).T @ (a - b / 4))


@pytest.mark.parametrize("dtype", DTYPES)
def test_identity_and_permutation_conform(dtype):
    check_operator(Identity(4, dtype), np.eye(4))
    index = [2, 0, 3, 1]
    check_operator(Permutation(index, dtype), np.eye(4)[index])
    check_operator(Permutation(torch.tensor(index), dtype).T, np.eye(4)[index].T)


def test_symmetry_is_claimed_only_where_it_holds():
    S = Matrix(torch.eye(3, dtype=torch.float64), symmetric=True)
    A = matrix(3, 3)
    assert (S + S).symmetric and (2 * S).symmetric and (S**2).symmetric and damped(S, 1).symmetric
    T = Matrix(torch.ones(3, 3, dtype=torch.float64), symmetric=True)
    assert (S @ S).symmetric and (S @ T @ S).symmetric and not (S @ T).symmetric
    assert not (S + A).symmetric and not (A @ S @ A).symmetric and not (2 * A).symmetric and not (A**2).symmetric


def test_nested_compositions_are_flat():
    A = matrix(3, 3)
    assert len((A + A + A + A).args) == 4
    assert len((A @ (A @ A) @ A).args) == 4
    scaled = 2 * (3 * (-A))
    assert scaled.args[0] is A and scaled.args[1] == -6
    assert isinstance(A.H, Adjoint) and (A.H).args == (A,)


def test_results_never_alias_operand_or_storage():
    op = Careless(3)
    x = np.ones((3, 1))
    out = op @ x
    out[:] = 5
    assert torch.equal(op.stored, torch.ones(3, 1, dtype=torch.float64))
    back = op.T @ x
    back[:] = 5
    np.testing.assert_array_equal(x, 1)
    t = torch.ones(3, dtype=torch.float64)
    (op.T @ t).fill_(5)
    assert torch.equal(t, torch.ones(3, dtype=torch.float64))


def test_a_product_of_the_wrong_shape_is_a_defect_of_the_operator():
    with pytest.raises(RuntimeError, match="contract"):
        Careless(3) @ np.ones((3, 2))


def test_damping_shifts_and_is_checked():
    A = matrix(3, 3)
    np.testing.assert_allclose(to_dense(damped(A, -0.5)), A.matrix.numpy() - 0.5 * np.eye(3))
    with pytest.raises(ValueError, match="finite"):
        damped(A, float("nan"))
    with pytest.raises(TypeError, match="real"):
        damped(A, 1j)
    with pytest.raises(TypeError):
        damped(A, "1")
    with pytest.raises(ValueError, match="shapes"):
        damped(matrix(3, 4), 1.0)


def test_operands_must_match():
    with pytest.raises(ValueError, match=r"\(3, 4\) and \(4, 3\)"):
        matrix(3, 4) + matrix(4, 3)
    with pytest.raises(ValueError, match=r"\(3, 4\) and \(3, 4\)"):
        matrix(3, 4) @ matrix(3, 4)
    with pytest.raises(TypeError, match="float32"):
        matrix(3, 3) + matrix(3, 3, torch.float32)
    with pytest.raises(ValueError, match="meta"):
        matrix(3, 3) @ Identity(3, device="meta")
    with pytest.raises(TypeError):
        matrix(3, 3) + np.eye(3)
    with pytest.raises(TypeError):
        matrix(3, 3) - 1.0
    with pytest.raises(TypeError, match="bfloat16"):
        Identity(3, torch.bfloat16)


def test_powers_are_whole_and_not_negative():
    A = matrix(3, 3)
    with pytest.raises(ValueError, match="inverse"):
        A**-1
    with pytest.raises(ValueError, match="integer"):
        A**0.5
    with pytest.raises(TypeError):
        A ** [1]
    with pytest.raises(ValueError, match="square"):
        matrix(3, 4) ** 2
    assert len(((A @ A) ** 2 @ A).args) == 5
    assert isinstance(A**0, Identity) and (A**0).shape == A.shape and (A**1).args == (A,)


@pytest.mark.parametrize("bad", [[0, 0, 1], [1, 2, 3], [[0, 1]], [-1, 0, 1]])
def test_a_permutation_has_each_index_once(bad):
    with pytest.raises(ValueError, match="once"):
        Permutation(bad)


def test_a_permutation_needs_integers():
    with pytest.raises(TypeError, match="integer"):
        Permutation([0.0, 1.0])


def test_overflow_on_casting_is_an_error():
    with pytest.raises(ValueError, match="Inf in|NaN or Inf"):
        Identity(2, torch.float32) @ np.array([1.0, 1e300])
    with pytest.raises(ValueError, match="finite"):
        1e300 * Identity(2, torch.float32)
    # A sum that overflows is not a vector that does.
    huge = np.full(3, np.finfo(float).max)
    np.testing.assert_array_equal(Identity(3) @ huge, huge)


@pytest.mark.parametrize("solver", [cg, minres, gmres])
def test_scipys_solvers_take_operators(solver):
    root = matrix(6, 6).matrix
    A = Matrix(root @ root.T + torch.eye(6, dtype=torch.float64), symmetric=True)
    b = np.arange(6)
    x, info = solver(A, b, M=Identity(6), maxiter=100)
    assert info == 0
    assert np.linalg.norm(A @ x - b) <= 1e-4 * np.linalg.norm(b)


def test_scipys_eigensolver_takes_operators():
    root = matrix(12, 12).matrix
    A = Matrix(root + root.T, symmetric=True)
    values = eigsh(A, k=2, which="LA", return_eigenvectors=False)
    np.testing.assert_allclose(np.sort(values), np.linalg.eigvalsh(A.matrix.numpy())[-2:])


def test_to_dense_of_scipys_operators():
    dense = np.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(to_dense(aslinearoperator(dense)), dense)
    np.testing.assert_array_equal(to_dense(aslinearoperator(1j * dense), chunk=1), 1j * dense)
    with pytest.raises(TypeError, match="LinearOperator"):
        to_dense("no operator")
    with pytest.raises(ValueError, match="chunk"):
        to_dense(Identity(2), chunk=0)


def test_to_dense_refuses_before_allocating():
    with pytest.raises(MemoryError, match="(?i)[0-9] [GT]iB"):
        to_dense(Identity(10**7))
    assert _memory.available_bytes() > 2**20
