"""Stacks of arrays."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from linop_hess.lq import stacked
from linop_hess.lq.stacked import Stacked, neighbours, parts


@dataclass(frozen=True)
class Inner(Stacked):
    index: Tensor
    values: Tensor


@dataclass(frozen=True)
class Outer(Stacked):
    name: str
    nothing: Tensor | None
    inner: Inner
    weights: Tensor


def outer():
    inner = Inner(torch.arange(3)[:, None], torch.arange(6.0).view(3, 2))
    return Outer("a", None, inner, torch.ones(3, 4))


def test_count_dtype_and_device_come_from_the_first_arrays():
    stack = outer()
    assert (stack.count, stack.dtype, stack.device.type) == (3, torch.float32, "cpu")
    assert stack.nbytes == 3 * 8 + 6 * 4 + 12 * 4


def test_slices_are_views_and_indices_copies():
    stack = outer()
    assert stack.at(1).inner.values.data_ptr() == stack.inner.values[1].data_ptr()
    assert stack.at(1).count == 1 and stack.at(1).name == "a"
    assert stack.take(np.array([2, 0])).inner.index.flatten().tolist() == [2, 0]


def test_only_floating_arrays_are_cast():
    cast = outer().to(torch.float64)
    assert cast.dtype == torch.float64 and cast.inner.index.dtype == torch.int64


def test_first_not_finite():
    stack = outer()
    assert stack.first_not_finite() is None
    stack.weights[2, 1] = torch.nan
    assert stack.first_not_finite() == 2
    stack.inner.values[1, 0] = torch.inf
    assert stack.first_not_finite() == 1


def test_large_numbers_are_finite_though_their_sum_is_not():
    stack = outer()
    stack.weights[:2] = torch.finfo(stack.weights.dtype).max
    assert not torch.isfinite(stack.weights.sum()) and stack.first_not_finite() is None
    stack.inner.values[1, 0] = torch.inf
    stack.inner.values[0, 0] = -torch.inf
    assert stack.first_not_finite() == 0
    assert stack.first_not_finite({id(stack.inner.values)}) is None


def test_parts(monkeypatch):
    monkeypatch.setattr(stacked, "_AT_A_TIME", 100)
    assert parts(5, 40) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert parts(2, 0) == [slice(0, 2)] and parts(2, 1000) == [slice(0, 1), slice(1, 2)] and parts(0, 1) == []


def test_neighbours():
    assert neighbours(np.array([3, 4, 5])) == slice(3, 6) and neighbours(np.array([2])) == slice(2, 3)
    at = np.array([1, 3])
    assert neighbours(at) is at
