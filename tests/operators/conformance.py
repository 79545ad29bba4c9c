"""What every operator of the package must do: one suite, called by each operator's own test."""

from __future__ import annotations

import pickle
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import scipy
import torch
from scipy.sparse import csr_array
from scipy.sparse.linalg import LinearOperator, aslinearoperator

from linop_hess.operators import Adjoint, Identity, Operator, to_dense

SCIPY = tuple(int(part) for part in scipy.__version__.split(".")[:2])


def check_operator(
    op: Operator,
    dense: np.ndarray | None = None,
    *,
    rtol: float | None = None,
    pickles: bool = True,
    products_only: bool = False,
) -> None:
    """Run the whole suite on one operator.

    Parameters
    ----------
    op : Operator, shape (m, n)
    dense : numpy.ndarray, shape (m, n), optional
        The operator's matrix, from elsewhere. Without one only consistency is checked.
    rtol : float, optional
        Bound on the entries' error relative to the largest; 1e3 units of rounding by default.
    pickles : bool, optional
        False for an operator that holds something Python cannot pickle, such as a lambda.
    products_only : bool, optional
        True for an operator of a class that another case checks as a whole: what depends on its numbers, and not what its class says to
        batches, foreign operators and bad input.
    """
    rtol = 1e3 * np.finfo(op.dtype).eps if rtol is None else rtol
    matrix = np.column_stack([op.matvec(column) for column in np.eye(op.shape[1])])
    assert matrix.shape == op.shape and matrix.dtype == op.dtype
    if dense is not None:
        assert dense.shape == op.shape
        np.testing.assert_allclose(matrix, dense, rtol=0, atol=rtol * max(np.abs(dense).max(), 1e-300))
    check_adjoint(op, matrix)
    check_blocks(op, matrix, rtol)
    if products_only:
        return
    check_batches(op, matrix, rtol)
    check_probes(op, matrix, rtol)
    check_results_are_fresh(op)
    check_torch(op, matrix, rtol)
    check_algebra(op, matrix, rtol)
    check_foreign_operators(op, matrix, rtol)
    check_bad_input(op)
    assert aslinearoperator(op) is op
    if pickles:
        x = _probe(op, op.shape[1])
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(op)) @ x, op @ x)


def check_adjoint(op: Operator, matrix: np.ndarray) -> None:
    """⟨y, Ax⟩ = ⟨Aᵀy, x⟩ to the rounding of the dtype, and the adjoint's adjoint is the operator."""
    rows, columns = op.shape
    bound = 100 * np.finfo(op.dtype).eps * np.sqrt(max(rows, columns)) * np.linalg.norm(matrix)
    for seed in range(3):
        x, y = _probe(op, columns, seed=seed), _probe(op, rows, seed=seed + 10)
        left, right = np.dot(y, op.matvec(x)), np.dot(op.rmatvec(y), x)
        assert abs(left - right) <= bound * np.linalg.norm(x) * np.linalg.norm(y)
    assert op.H.shape == op.T.shape == (columns, rows)
    assert op.H.dtype == op.dtype and isinstance(op.H, Operator)
    assert (op.H.H is op and op.T.T is op) or isinstance(op, Adjoint)
    if op.symmetric:
        assert op.H is op and op.T is op
    y = _probe(op, rows)
    np.testing.assert_array_equal(op.H.matvec(y), op.rmatvec(y))
    np.testing.assert_array_equal(op.T @ y, op.rmatvec(y))


def check_blocks(op: Operator, matrix: np.ndarray, rtol: float) -> None:
    """Products with blocks are those with their columns, from both sides."""
    close = _closeness(matrix, rtol)
    rows, columns = op.shape
    X, Y = _probe(op, columns, 3), _probe(op, rows, 3)
    close(op.matmat(X), np.column_stack([op.matvec(x) for x in X.T]))
    close(op.rmatmat(Y), np.column_stack([op.rmatvec(y) for y in Y.T]))
    close(op @ X, matrix @ X)
    close(op.T @ Y, matrix.T @ Y)
    close(Y.T @ op, Y.T @ matrix)
    close(Y[:, 0] @ op, Y[:, 0] @ matrix)
    close(to_dense(op, chunk=2), matrix)
    assert op.matmat(X[:, :0]).shape == (rows, 0)


def check_batches(op: Operator, matrix: np.ndarray, rtol: float) -> None:
    """Batches of vectors and of matrices are multiplied one by one, as NumPy's matmul does, for arrays and tensors."""
    close = _closeness(matrix, rtol)
    rows, columns = op.shape
    rng = np.random.default_rng(8)
    for batch in ((2,), (2, 3), (1, 1, 2), (0,), (2, 0)):
        x, y = (rng.standard_normal((*batch, n)).astype(op.dtype) for n in (columns, rows))
        if x.shape == (columns, 1) or y.shape == (rows, 1):
            continue  # a column of its own, not a batch
        X, Y = (rng.standard_normal((*batch, n, 4)).astype(op.dtype) for n in (columns, rows))
        Yt = np.swapaxes(Y, -1, -2)
        for product, operand, expected in (
            (op.matvec, x, x @ matrix.T),
            (op.rmatvec, y, y @ matrix),
            (op.matmat, X, matrix @ X),
            (op.rmatmat, Y, matrix.T @ Y),
            (op.dot, X, matrix @ X),
            (op.__matmul__, X[..., :0], matrix @ X[..., :0]),
            (op.rdot, Yt, Yt @ matrix),
            (lambda Z: Z @ op, Yt, Yt @ matrix),
        ):
            result, tensor = product(operand), product(torch.as_tensor(operand.copy(), device=op.device))
            assert isinstance(result, np.ndarray) and isinstance(tensor, torch.Tensor)
            for found in (result, tensor.cpu().numpy()):
                assert found.shape == expected.shape and found.dtype == op.dtype
                close(found, expected)


def check_probes(op: Operator, matrix: np.ndarray, rtol: float) -> None:
    """Columns, integers, lists, other precisions and awkward memory layouts all are vectors."""
    close = _closeness(matrix, rtol)
    rows, columns = op.shape
    whole = np.arange(columns) % 5 - 2
    expected = matrix @ whole
    for probe in (
        whole,
        whole.tolist(),
        whole.astype(np.int8),
        whole.astype(np.float32),
        whole.astype(float),
    ):
        close(op @ probe, expected)
    with columns_warning():
        assert op.matvec(whole[:, None]).shape == (rows, 1)
    with columns_warning("rmatvec"):
        assert op.rmatvec(np.ones((rows, 1))).shape == (columns, 1)
    assert op.matmat(whole[:, None]).shape == (rows, 1)
    close((op @ whole[:, None])[:, 0], expected)
    close(op.matvec(whole[::-1][::-1]), expected)
    close(op.matvec(np.repeat(whole.astype(op.dtype), 2)[::2]), expected)
    frozen = whole.astype(op.dtype)
    frozen.flags.writeable = False
    close(op.matvec(frozen), expected)
    close(op.matmat(np.asfortranarray(np.stack([whole, whole], axis=1)))[:, 1], expected)
    for result in (op @ whole, op(whole), op.dot(whole), op * whole):
        assert type(result) is np.ndarray and result.shape == (rows,) and result.dtype == op.dtype
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        for result in (op @ np.asmatrix(whole).T, op.matvec(np.asmatrix(whole).T)):
            assert isinstance(result, np.matrix) and result.shape == (rows, 1)


def check_results_are_fresh(op: Operator) -> None:
    """A result is the caller's own: writing into it changes neither the operand nor the operator."""
    for product, length in ((op.matvec, op.shape[1]), (op.rmatvec, op.shape[0])):
        x = _probe(op, length)
        kept = x.copy()
        first = product(x)
        assert first.flags.writeable and not np.shares_memory(first, x)
        reference = first.copy()
        first[:] = 7
        np.testing.assert_array_equal(x, kept)
        second = product(x)
        np.testing.assert_array_equal(second, reference)
        assert not np.shares_memory(first, second) and (first == 7).all()


def check_torch(op: Operator, matrix: np.ndarray, rtol: float) -> None:
    """Tensors give tensors, on the operator's device, unknown to autograd."""
    close = _closeness(matrix, rtol)
    rows, columns = op.shape
    X, Y = (torch.as_tensor(_probe(op, n, 3), device=op.device) for n in (columns, rows))
    X.requires_grad_()
    kept = X.detach().clone()
    for result, expected in (
        (op @ X, matrix @ kept.cpu().numpy()),
        (op @ X[:, 0], matrix @ kept[:, 0].cpu().numpy()),
        (op(X[:, 0]), matrix @ kept[:, 0].cpu().numpy()),
        (op.matmat(X[:, :1]), matrix @ kept[:, :1].cpu().numpy()),
        (op.dot(X), matrix @ kept.cpu().numpy()),
        (op.matmat(X), matrix @ kept.cpu().numpy()),
        (op.rmatvec(Y[:, 0]), matrix.T @ Y[:, 0].cpu().numpy()),
        (op.rmatmat(Y), matrix.T @ Y.cpu().numpy()),
        (op.T @ Y, matrix.T @ Y.cpu().numpy()),
        (Y[:, 0] @ op, Y[:, 0].cpu().numpy() @ matrix),
        (Y.T @ op, Y.T.cpu().numpy() @ matrix),
        (op.rdot(Y[:, 0]), Y[:, 0].cpu().numpy() @ matrix),
        (op.rdot(Y.T), Y.T.cpu().numpy() @ matrix),
    ):
        assert isinstance(result, torch.Tensor) and not result.requires_grad
        assert result.dtype == op.torch_dtype and result.device == op.device
        close(result.cpu().numpy(), expected)
    with columns_warning():
        assert isinstance(op.matvec(X[:, :1]), torch.Tensor)
    first = op @ X[:, 0]
    reference = first.clone()
    first.fill_(7)
    assert torch.equal(X, kept) and torch.equal(op @ X[:, 0], reference)
    integers = torch.arange(columns, device=op.device) % 5 - 2
    close((op @ integers).cpu().numpy(), matrix @ integers.cpu().numpy())
    with torch.enable_grad():
        assert not (op @ X).requires_grad


def check_algebra(op: Operator, matrix: np.ndarray, rtol: float) -> None:
    """Compositions of operators are operators of the package, and take and give what those do."""
    rows, columns = op.shape
    compositions = [
        (op + op, 2 * matrix),
        (op - 3 * op, -2 * matrix),
        (2 * op, 2 * matrix),
        (op * np.float64(0.5), matrix / 2),
        (np.float32(0.5) * op, matrix / 2),
        (torch.tensor(2.0) * op, 2 * matrix),
        (op / 4, matrix / 4),
        (-op, -matrix),
        (op @ op.T, matrix @ matrix.T),
        (op.T @ op, matrix.T @ matrix),
        (op.T @ (op + op) @ op.T, 2 * matrix.T @ matrix @ matrix.T),
        ((op @ op.T) ** 2, np.linalg.matrix_power(matrix @ matrix.T, 2)),
        ((op @ op.T) ** 0, np.eye(rows)),
    ]
    for composition, expected in compositions:
        assert isinstance(composition, Operator)
        assert composition.dtype == op.dtype and composition.shape == expected.shape
        close = _closeness(expected, 10 * rtol)
        x = _probe(op, composition.shape[1])
        y = _probe(op, composition.shape[0])
        close(composition @ x, expected @ x)
        close(composition.T @ y, expected.T @ y)
        tensor = composition @ torch.as_tensor(x, device=op.device)
        assert isinstance(tensor, torch.Tensor)
        close(tensor.cpu().numpy(), expected @ x)
    with pytest.raises(ValueError, match="shape"):
        op @ Identity(columns + 1, op.torch_dtype, op.device)
    with pytest.raises(ValueError, match="shape"):
        op + Identity(max(rows, columns) + 1, op.torch_dtype, op.device)
    with pytest.raises(TypeError, match="real"):
        2j * op
    for factor in (np.nan, np.inf):
        with pytest.raises(ValueError, match="finite"):
            factor * op
    with pytest.raises(ValueError, match="zero"):
        op / 0
    with pytest.raises(ValueError, match="Can only divide a linear operator by a scalar"):
        op / np.ones(2)
    for total, times in ((sum([op]), 1), (sum([op, op, op]), 3), (0 + op, 1)):
        assert isinstance(total, Operator)
        _closeness(times * matrix, 10 * rtol)(to_dense(total), times * matrix)
    for other in (1, 0.5, np.zeros(2), None):
        with pytest.raises(TypeError):
            other + op
    with pytest.raises(ValueError, match="scalar"):
        op @ 2.0


def check_foreign_operators(op: Operator, matrix: np.ndarray, rtol: float) -> None:
    """Mixed with SciPy's operators, SciPy's compositions come out and are right."""
    rows, columns = op.shape
    rng = np.random.default_rng(5)
    same = rng.standard_normal((rows, columns)).astype(op.dtype)
    right = rng.standard_normal((columns, 2)).astype(op.dtype)
    left = rng.standard_normal((2, rows)).astype(op.dtype)
    foreign = aslinearoperator(same)
    for mix, expected in (
        (op + foreign, matrix + same),
        (foreign + op, matrix + same),
        (op - foreign, matrix - same),
        (foreign - op, same - matrix),
        (op @ aslinearoperator(right), matrix @ right),
        (aslinearoperator(left) @ op, left @ matrix),
        (op @ aslinearoperator(csr_array(right)), matrix @ right),
        (2 * (op + foreign), 2 * (matrix + same)),
    ):
        assert isinstance(mix, LinearOperator)
        close = _closeness(np.abs(expected) + np.abs(matrix).max(), 10 * rtol)
        x, y = _probe(op, mix.shape[1]), _probe(op, mix.shape[0])
        close(mix @ x, expected @ x)
        close(mix.H @ y, expected.T @ y)
        close(mix.T @ y, expected.T @ y)
        close(to_dense(mix), expected)


def check_bad_input(op: Operator) -> None:
    """Nothing that is not a finite real vector of the right length gets through, and the message says why."""
    for product, n in ((op.matvec, op.shape[1]), (op.rmatvec, op.shape[0])):
        good = np.ones(n, dtype=op.dtype)
        for bad in (np.ones(n + 1), np.ones((2, n + 1)), np.ones((n, n + 1)), np.ones((n, 1, n + 1)), 1.0):
            with pytest.raises(ValueError, match="^Dimension mismatch: .*shape"):
                product(bad)
        for bad in (good * 1j, good.astype(str), good.astype(object), csr_array(good[:, None])):
            with pytest.raises(TypeError):
                product(bad)
        with pytest.raises(TypeError, match="mask"):
            product(np.ma.masked_array(good))
        for value in (np.nan, np.inf):
            spoiled = good.copy()
            spoiled[n // 2] = value
            with pytest.raises(ValueError, match="NaN or Inf"):
                product(spoiled)
            with pytest.raises(ValueError, match="NaN or Inf"):
                product(torch.as_tensor(spoiled, device=op.device))
        other = torch.float32 if op.torch_dtype == torch.float64 else torch.float64
        for dtype in (other, torch.float16, torch.complex64):
            with pytest.raises(TypeError, match="torch"):
                product(torch.ones(n, dtype=dtype, device=op.device))
        with pytest.raises(ValueError, match="device|is on"):
            product(torch.ones(n, dtype=op.torch_dtype, device="meta"))
        with pytest.raises(TypeError, match="to_dense"):
            product(torch.ones(n, 2, dtype=op.torch_dtype, device=op.device).to_sparse())
    for product in (lambda x: op @ x, lambda x: x.swapaxes(-1, -2) @ op.T):
        with pytest.raises(ValueError, match="^Dimension mismatch: .*shape"):
            product(np.ones((1, op.shape[1] + 1, 2)))
    with pytest.raises(ValueError, match="^Expected at least 2-d"):
        op.matmat(np.ones(op.shape[1]))
    with pytest.raises(TypeError, match="aslinearoperator"):
        op @ csr_array(np.eye(op.shape[1]))
    with pytest.raises(TypeError, match="aslinearoperator"):
        csr_array(np.eye(op.shape[0])) @ op


def columns_warning(name: str = "matvec"):
    """What SciPy says of a column passed to matvec: nothing before 1.18."""
    if SCIPY < (1, 18):
        return nullcontext()
    return pytest.warns(FutureWarning, match=f"Calling `{name}` on 'column vectors' of shape")


def _probe(op: Operator, n: int, k: int | None = None, seed: int = 0) -> np.ndarray:
    shape = n if k is None else (n, k)
    return np.random.default_rng(seed).standard_normal(shape).astype(op.dtype)


def _closeness(matrix: np.ndarray, rtol: float):
    """Return an assertion that two arrays agree to the rounding of products with `matrix`."""
    atol = rtol * max(np.linalg.norm(matrix), 1e-300) * np.sqrt(max(matrix.shape))

    def close(actual, expected):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)

    return close
