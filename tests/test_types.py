"""What type checkers are told is true: each line is checked by mypy and run."""

from typing import Any, assert_type

import numpy as np
import pytest
import torch
from torch import Tensor

import linop_hess as lh
from linop_hess.operators import Identity, Operator


def linearized() -> lh.Linearization:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1)).double()
        x, y = torch.randn(5, 2).double(), torch.randn(5, 1).double()
    return lh.linearize(model, torch.nn.functional.mse_loss, x, y)


def test_tensors_give_tensors():
    lin = linearized()
    inverse, t, T = lin.inverse(0.1, method="riccati"), torch.ones(13).double(), torch.ones(13, 2).double()
    for result in (
        assert_type(inverse @ t, Tensor),
        assert_type(inverse(t), Tensor),
        assert_type(inverse.dot(T), Tensor),
        assert_type(inverse * T, Tensor),
        assert_type(inverse.rdot(t), Tensor),
        assert_type(inverse.matvec(t), Tensor),
        assert_type(inverse.rmatvec(t), Tensor),
        assert_type(inverse.matmat(T), Tensor),
        assert_type(inverse.rmatmat(T), Tensor),
        assert_type(inverse.solve(t).x, Tensor),
        assert_type(lin.H.T @ t, Tensor),
        assert_type(lin.H.damped(0.1) @ t, Tensor),
    ):
        assert isinstance(result, Tensor)


def test_arrays_and_lists_give_arrays():
    lin = linearized()
    inverse, g, G = lin.inverse(0.1), np.ones(13), np.ones((13, 2))
    for result in (
        assert_type(inverse @ g, np.ndarray),
        assert_type(inverse @ ([1.0] * 13), np.ndarray),
        assert_type(inverse(G), np.ndarray),
        assert_type(inverse.rdot(g), np.ndarray),
        assert_type(inverse.matvec(g), np.ndarray),
        assert_type(inverse.matvec([1.0] * 13), np.ndarray),
        assert_type(inverse.matmat(G), np.ndarray),
        assert_type(inverse.solve(g).x, np.ndarray),
        assert_type(inverse.solve([1.0] * 13).x, np.ndarray),
        assert_type(lin.H.H @ g, np.ndarray),
    ):
        assert isinstance(result, np.ndarray)


def test_what_takes_no_array_gives_what_is_asked_for():
    lin = linearized()
    inverse = lin.inverse(10.0)
    pairs = [
        (assert_type(lin.gradient, np.ndarray), assert_type(lin.gradient_tensor, Tensor)),
        (assert_type(lin.sample_gradients(), np.ndarray), assert_type(lin.sample_gradients(to="torch"), Tensor)),
        (assert_type(inverse.diagonal(), np.ndarray), assert_type(inverse.diagonal(to="torch"), Tensor)),
        (assert_type(lh.to_dense(lin.H), np.ndarray), assert_type(lh.to_dense(lin.H, to="torch"), Tensor)),
        (
            assert_type(inverse.sample(2, torch.Generator().manual_seed(0)), np.ndarray),
            assert_type(inverse.sample(2, torch.Generator().manual_seed(0), to="torch"), Tensor),
        ),
        (
            assert_type(inverse.block_diagonal(), dict[str, np.ndarray])["0"],
            assert_type(inverse.block_diagonal(to="torch"), dict[str, Tensor])["0"],
        ),
    ]
    for array, tensor in pairs:
        assert isinstance(array, np.ndarray) and isinstance(tensor, Tensor)
        assert tensor.dtype == torch.float64 and np.array_equal(array, tensor.numpy())
        array[...], tensor[...] = 0.0, 0.0  # of their own memory
    again = [lin.gradient, lin.gradient_tensor, inverse.diagonal(), inverse.diagonal(to="torch")]
    assert all(np.asarray(a).any() for a in again)
    assert inverse.sample(0, to="torch").shape == (13, 0)
    methods: list[Any] = [inverse.diagonal, inverse.block_diagonal, inverse.sample, lin.sample_gradients]
    for method in methods:
        with pytest.raises(ValueError, match='expected to="numpy" or to="torch", got \'jax\''):
            method(to="jax")


def test_operators_give_operators():
    lin = linearized()
    for result in (
        assert_type(lin.H @ lin.H, Operator),
        assert_type(lin.H + Identity(13), Operator),
        assert_type(lin.H - lin.H, Operator),
        assert_type(lin.H * 2.0, Operator),
        assert_type(lin.H / 2.0, Operator),
        assert_type(-lin.H, Operator),
        assert_type(lin.H**2, Operator),
        assert_type(lin.H.T, Operator),
        assert_type(lin.M.H, Operator),
    ):
        assert isinstance(result, Operator)


def test_choices_are_named():
    """What is none of them is seen by a type checker: were it not, these remarks would be unused, which is an error too."""
    lin = linearized()
    with pytest.raises(ValueError, match="solver"):
        lh.krylov.run("gmress", np.eye(2), np.ones(2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="method"):
        lin.inverse(0.1, method="riccatti")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="which"):
        lh.spectrum.eigsh(lin, 2, which="LR")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nonsmooth"):
        lh.Hessian(torch.nn.Linear(1, 1), torch.nn.functional.mse_loss, [], nonsmooth="exact")  # type: ignore[arg-type]
