"""Right-hand sides, checked and scaled."""

import numpy as np
import pytest
import torch

from linop_hess import lq
from linop_hess.lq.solve.right_hand_side import checked, times_power_of_two, to_size_one
from tests.lq.problems import random_blocks

PROBLEM = random_blocks([2, 3, 2], [3, 4], seed=61, with_A="all").problem()
SINGLE = PROBLEM.to(torch.float32)
RANGE = {torch.float64: (5e-324, 1.7e308), torch.float32: (1e-45, 3e38)}


@pytest.mark.parametrize("kind", [np.asarray, list, torch.tensor, lambda g: np.asarray(g, dtype=np.float32), np.int64])
@pytest.mark.parametrize("columns", [(), (1,), (3,)])
def test_what_works(kind, columns):
    g = kind(np.random.default_rng(0).integers(-5, 5, (7, *columns)).astype(float))
    solver = lq.Solver(PROBLEM, 0.3)
    expected = solver.solve(torch.as_tensor(np.asarray(g), dtype=torch.float64).reshape(7, -1)).x
    found = solver.solve(g).x
    assert isinstance(found, torch.Tensor) and tuple(found.shape) == (7, *columns)
    assert torch.equal(found.reshape(7, -1), expected)


@pytest.mark.parametrize(
    ("g", "error", "words"),
    [
        (torch.ones(6), TypeError, "float64 tensor as right-hand side, got torch.float32"),
        (torch.ones(7, dtype=torch.float16), TypeError, "float16"),
        (torch.ones(7, dtype=torch.complex128), TypeError, "complex"),
        (torch.ones(7).double().to_sparse(), TypeError, "dense"),
        (torch.ones(7).double().to("meta"), ValueError, "on cpu, got one on meta"),
        (np.ones(7) * 1j, TypeError, "real numbers"),
        (np.array(["a"] * 7), TypeError, "real numbers"),
        ([[1.0], [2.0, 3.0]], TypeError, "real numbers"),
        (None, TypeError, "real numbers"),
        (np.ma.masked_array(np.ones(7), False), TypeError, "MaskedArray"),
        (np.ones(6), ValueError, r"shape \(7,\) or \(7, k\), got shape \(6,\)"),
        (np.ones((1, 7)), ValueError, r"got shape \(1, 7\)"),
        (np.ones((7, 1, 1)), ValueError, "shape"),
        (1.0, ValueError, r"got shape \(\)"),
        (np.r_[np.ones(6), np.nan], ValueError, "1 NaN or Inf in 7"),
        (torch.full((7, 2), torch.inf).double(), ValueError, "14 NaN or Inf in 14"),
    ],
)
def test_what_does_not(g, error, words):
    for call in (lq.Solver(PROBLEM, 0.3).solve, lq.Inverse(PROBLEM, 0.3).solve):
        with pytest.raises(error, match=words):
            call(g)


def test_too_large_for_single_precision():
    with pytest.raises(ValueError, match=r"finite numbers in torch.float32, got 7"):
        checked(np.full(7, 1e39), SINGLE)


@pytest.mark.parametrize("dtype", RANGE, ids=str)
def test_scaling_rounds_nothing(dtype):
    small, large = RANGE[dtype]
    g = torch.tensor([[small, 0.0, large, 1e-3, 30 * small], [3 * small, 0.0, 1.0, -7.0, 0.0]], dtype=dtype)
    columns, exponents = to_size_one(g)
    sizes = columns.abs().amax(0)
    assert bool(((sizes >= 0.5) & (sizes < 1.0))[[0, 2, 3, 4]].all()) and sizes[1] == 0
    assert torch.equal(times_power_of_two(columns, exponents), g)


@pytest.mark.parametrize("dtype", RANGE, ids=str)
@pytest.mark.parametrize("method", ["banded", "riccati", "dense"])
def test_columns_of_any_size_in_one_block(method, dtype):
    """Each is what it is by itself in size one, rounded once: to the smallest normal number where it underflows."""
    problem = PROBLEM.to(dtype)
    small, large = RANGE[dtype]
    inverse = lq.Inverse(problem, 30.0, method)
    unit = torch.from_numpy(np.random.default_rng(1).standard_normal((7, 6)) / 4).to(dtype)
    sizes = torch.tensor([1.0, 40 * small, 0.0, large, large**-0.5, small * 2**30], dtype=dtype)
    g = unit * sizes
    positive = inverse.positive()
    for product in (lambda v: inverse.solve(v).x, positive):
        found = product(g).double().numpy()
        of_one = product(to_size_one(g)[0]).double().numpy()
        expected = np.ldexp(of_one, to_size_one(g)[1])
        tiny, eps = torch.finfo(dtype).tiny, torch.finfo(dtype).eps
        assert np.all(np.abs(found - expected) <= np.maximum(tiny * eps, eps * np.abs(expected)))
        assert not found[:, 2].any() and found[:, 5].any()
    dense = problem.to(torch.float64).hessian_product(torch.eye(7).double()).numpy() + 30.0 * np.eye(7)
    truth = np.linalg.solve(dense, g.double().numpy()[:, [0, 3, 4]] / sizes.double().numpy()[[0, 3, 4]])
    found = inverse.solve(g).x[:, [0, 3, 4]].double().numpy() / sizes.double().numpy()[[0, 3, 4]]
    assert np.abs(found - truth).max() <= 100 * eps * np.abs(truth).max()


@pytest.mark.parametrize("dtype", RANGE, ids=str)
def test_what_overflows_is_told(dtype):
    problem = PROBLEM.to(dtype)
    inverse = lq.Inverse(problem, 1e-3)
    g = torch.zeros(7, 2, dtype=dtype)
    g[:, 0], g[:, 1] = RANGE[dtype][1], 1.0
    with pytest.raises(OverflowError, match="exceeds the range"):
        inverse.solve(g)
    with pytest.raises(OverflowError, match="exceeds the range"):
        inverse.positive()(g)
