"""Compositions with operators of torch's namespace: run by test_namespace.py with SCIPY_ARRAY_API=1, which SciPy reads once."""

import pickle

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, aslinearoperator, gmres

from linop_hess.operators.namespace import InNamespace
from tests.operators.test_operator import matrix


def scipys_torch():
    return aslinearoperator(torch.eye(1))._xp


def foreign(dense: torch.Tensor) -> LinearOperator:
    return LinearOperator(
        tuple(dense.shape), matvec=lambda x: x @ dense.T, rmatvec=lambda x: x @ dense, matmat=lambda X: dense @ X,
        rmatmat=lambda X: dense.T @ X, dtype=dense.dtype, xp=scipys_torch(),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("wrap", [aslinearoperator, foreign])
def test_compositions_keep_torch(dtype, wrap):
    """From the left without a word, from the right by to_xp; vectors, blocks and adjoints of sums and products."""
    A, other = matrix(3, 4, dtype), matrix(3, 4, dtype, seed=1).matrix
    a, generator = A.matrix, torch.Generator().manual_seed(0)
    right, left = (torch.randn(n, 2, generator=generator, dtype=torch.float64).to(dtype) for n in (4, 3))
    B, C, D = wrap(other), wrap(right), wrap(left.T)
    for mix, expected in (
        (A + B, a + other),
        (A - B, a - other),
        (B + A.to_xp(torch), other + a),
        (B - A.to_xp(torch), other - a),
        (A @ C, a @ right),
        (A * C, a @ right),
        (D @ A.to_xp(torch), left.T @ a),
        (A.rdot(D), left.T @ a),
        (A.to_xp(torch).H @ D.H, a.T @ left),
        (2.0 * A.to_xp(torch), 2 * a),
        (A.to_xp(torch) @ C, a @ right),
        (sum([A, B]), a + other),
    ):
        assert isinstance(mix, LinearOperator) and mix.dtype == dtype and mix.shape == tuple(expected.shape)
        x, y = (torch.randn(n, 2, generator=generator, dtype=torch.float64).to(dtype) for n in expected.shape[::-1])
        for result, truth in (
            (mix.matvec(x[:, 0]), expected @ x[:, 0]),
            (mix.rmatvec(y[:, 0]), expected.T @ y[:, 0]),
            (mix.H.matvec(y[:, 0]), expected.T @ y[:, 0]),
            (mix.matmat(x), expected @ x),
            (mix.T.matmat(y), expected.T @ y),
            (mix @ x, expected @ x),
            (y[:, 0] @ mix, y[:, 0] @ expected),
        ):
            assert isinstance(result, torch.Tensor)
            torch.testing.assert_close(result, truth, rtol=0, atol=64 * torch.finfo(dtype).eps)


def test_a_view_multiplies_as_its_operator_does():
    A = matrix(3, 4)
    view, x = A.to_xp(torch), torch.arange(4.0, dtype=torch.float64)
    assert isinstance(view, InNamespace) and view.dtype == torch.float64 and view.args == (A,)
    assert isinstance(view.H, InNamespace) and view.T.args[0].args == (A,)
    assert torch.equal(view @ x, A @ x) and torch.equal(view(x), A @ x)
    assert torch.equal(x[:3] @ view, x[:3] @ A) and torch.equal(view.rdot(x[:3]), x[:3] @ A)
    assert view.matmat(torch.ones(2, 4, 5, dtype=torch.float64)).shape == (2, 3, 5)
    plain = A.to_xp(np)
    assert plain.dtype == np.float64 and isinstance(plain @ x.numpy(), np.ndarray)
    other = LinearOperator((4, 4), matvec=lambda v: 2 * v, matmat=lambda V: 2 * V, dtype=np.float64, xp=plain._xp)
    np.testing.assert_array_equal((A @ other) @ x.numpy(), 2 * (A @ x.numpy()))
    with pytest.raises(ValueError, match="NaN or Inf"):
        view @ torch.full((4,), torch.nan, dtype=torch.float64)


def test_pickled():
    view = pickle.loads(pickle.dumps(matrix(3, 4).to_xp(torch)))
    x = torch.ones(4, dtype=torch.float64)
    assert view._xp is scipys_torch() and torch.equal(view @ x, matrix(3, 4) @ x)


def test_arrays_of_numpy_too():
    A = matrix(4, 4)
    x, B = np.arange(4.0), np.eye(4)
    assert isinstance(A @ x, np.ndarray) and isinstance(A @ torch.from_numpy(x), torch.Tensor)
    np.testing.assert_allclose((A + aslinearoperator(B)) @ x, A.matrix.numpy() @ x + x, rtol=1e-14, atol=1e-14)
    solution, info = gmres(A + aslinearoperator(20 * B), x, rtol=1e-12)
    assert info == 0 and np.linalg.norm(A @ solution + 20 * solution - x) <= 1e-11 * np.linalg.norm(x)
