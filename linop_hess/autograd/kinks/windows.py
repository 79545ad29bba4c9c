"""Which places each window of a max-pooling takes, a dimension at a time: -1 stands for padding."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def pooling_windows(
    sizes: Sequence[int],
    kernel_size: Sequence[int] | int,
    stride: Sequence[int] | int = (),
    padding: Sequence[int] | int = 0,
    dilation: Sequence[int] | int = 1,
    ceil_mode: bool = False,
) -> list[Tensor]:
    """Return for each dimension the places (out, k) of the windows of `torch.nn.functional.max_pool2d` and its kin.

    Parameters
    ----------
    sizes : sequence of int
        Of the input, a number a dimension that is pooled.
    kernel_size, stride, padding, dilation : int or sequence of int
        As in torch: one number is that of all dimensions, and no stride is the kernel's size.
    ceil_mode : bool
        Whether a window may end beyond the input.

    Returns
    -------
    list of Tensor, shape (out, k)
        Places from 0 to size − 1, or −1 where the window meets padding.
    """
    rank = len(sizes)
    kernels = _each(kernel_size, rank)
    strides = kernels if not isinstance(stride, int) and not len(stride) else _each(stride, rank)
    numbers = zip(sizes, kernels, strides, _each(padding, rank), _each(dilation, rank), strict=True)
    return [_windows(*five, ceil_mode) for five in numbers]


def adaptive_windows(sizes: Sequence[int], output_size: Sequence[int]) -> list[Tensor]:
    """Return for each dimension the places (out, k) of the windows of adaptive pooling.

    Parameters
    ----------
    sizes, output_size : sequence of int
        Of input and output, a number a dimension.

    Returns
    -------
    list of Tensor, shape (out, k)
        Windows of unequal lengths are filled up with −1.
    """
    found = []
    for size, out in zip(sizes, output_size, strict=True):
        starts = _count(out) * size // out
        ends = -(-(_count(out) + 1) * size // out)  # rounded up
        places = starts[:, None] + _count(int((ends - starts).max()))
        found.append(torch.where(places < ends[:, None], places, -1))
    return found


def _windows(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> Tensor:
    steps = (size + 2 * padding - dilation * (kernel - 1) - 1) / stride
    out = (math.ceil(steps) if ceil_mode else math.floor(steps)) + 1
    if ceil_mode and (out - 1) * stride >= size + padding:
        out -= 1  # the last window begins in the input or the padding before it
    places = _count(out)[:, None] * stride - padding + _count(kernel) * dilation
    return torch.where((places >= 0) & (places < size), places, -1)


def _count(stop: int) -> Tensor:
    return torch.arange(stop, device="cpu")


def _each(value: Sequence[int] | int, rank: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values
