"""Kinks: how they are treated, and maxima of windows and rows, which have a curvature only where surrogates give them one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_unflatten

from linop_hess._validate import Differentiation, Nonsmooth
from linop_hess.autograd.finite import checked_differentiation
from linop_hess.autograd.kinks.surrogates import checked_sharpness, is_kinked, surrogate
from linop_hess.autograd.kinks.windows import adaptive_windows, pooling_windows
from linop_hess.graph.rules.operation import Operation, base_name
from linop_hess.graph.rules.primitive import ByRows, Rows

aten = torch.ops.aten


@dataclass(frozen=True)
class SecondDerivatives:
    """Where second derivatives come from that autograd does not have, or that kinks hide.

    Attributes
    ----------
    nonsmooth : {"generalized", "smooth", "error"}
    sharpness : float or None
        That of the surrogates; None: there are none.
    finite : bool
        Whether an operation without second derivatives may have differences of its first ones.
    """

    nonsmooth: Nonsmooth = "generalized"
    sharpness: float | None = None
    finite: bool = False

    @classmethod
    def of(cls, nonsmooth: Nonsmooth, sharpness: float | None, differentiation: Differentiation) -> SecondDerivatives:
        """Check what a user asks for.

        Raises
        ------
        ValueError
            If a word is unknown, `sharpness` is given without surrogates or is not positive and finite, or differences are asked
            for together with surrogates.
        TypeError
            If `sharpness` is no real number.
        """
        sharpness = checked_sharpness(nonsmooth, sharpness)
        return cls(nonsmooth, sharpness, checked_differentiation(differentiation, nonsmooth))

    def smoothed(self, op: Operation) -> Operation:
        """An operation, with the surrogate's sharpness where it has a kink and surrogates are asked for."""
        return replace(op, sharpness=self.sharpness) if self.smooths(op.func, op.flat, op.spec) else op

    def smooths(self, func: Any, flat: Sequence[Any], spec: Any) -> bool:
        """Whether an operation of some flattened arguments has its second derivatives from a surrogate."""
        if self.sharpness is None or not base_name(func) or surrogate(func, self.sharpness) is None:
            return False
        args, kwargs = tree_unflatten(list(flat), spec) if spec is not None else (flat, {})
        return is_kinked(func, *args, **kwargs)


_POOLS = {
    "max_pool2d_with_indices": 2,
    "max_pool3d_with_indices": 3,
    "adaptive_max_pool2d": 2,
    "adaptive_max_pool3d": 3,
}
_MAXIMA = {aten.max.dim: aten.amax, aten.min.dim: aten.amin}


class Pooling(ByRows):
    """Maxima over windows of images: a row is a window; what it has of padding is read from anywhere, without weight."""

    def knows(self, func: Any) -> bool:
        return base_name(func) in _POOLS

    def rows(self, op: Operation) -> Rows | None:
        if op.outputs != (0,):
            return None
        x, windows = op.flat[0], _windows(op)
        lead, image = x.shape[: x.ndim - len(windows)], x.shape[x.ndim - len(windows) :]
        places = _places(windows, image)

        def arranged(t: Tensor) -> Tensor:
            index = places.to(t.device)
            rows = t.reshape(lead.numel(), image.numel())[:, index.clamp(min=0)]
            if t.is_floating_point():
                rows = rows.masked_fill(index < 0, -torch.inf)
            return rows.flatten(0, 1)

        shape = torch.Size([*lead, *(each.shape[0] for each in windows)])
        # Of equals the first, as in pooling.
        return Rows({0: arranged}, lambda t: t[0].max(1)[0], lambda t: t.reshape(-1), shape, linear=True)

    def smoothed(self, op: Operation, rows: Rows, sharpness: float) -> Rows:
        return _smooth_extremum(rows, aten.amax, sharpness)


def _windows(op: Operation) -> list[Tensor]:
    name = base_name(op.func)
    sizes = op.flat[0].shape[op.flat[0].ndim - _POOLS[name] :]
    if name.startswith("adaptive"):
        return adaptive_windows(sizes, op.argument("output_size"))
    shape = (op.argument(key, ()) for key in ("kernel_size", "stride"))
    spread = (op.argument(key) for key in ("padding", "dilation", "ceil_mode"))
    return pooling_windows(sizes, *shape, *spread)


def _places(windows: list[Tensor], sizes: torch.Size) -> Tensor:
    """Place in an image of each entry of each window, (windows, entries), −1 for padding."""
    rank = len(windows)
    places = torch.zeros([1] * (2 * rank), dtype=torch.int64, device="cpu")
    inside = torch.ones([1] * (2 * rank), dtype=torch.bool, device="cpu")
    for d, (each, size) in enumerate(zip(windows, sizes, strict=True)):
        shape = [1] * (2 * rank)
        shape[d], shape[rank + d] = each.shape
        places, inside = places * size + each.view(shape), inside & (each.view(shape) >= 0)
    count = torch.Size([each.shape[0] for each in windows]).numel()
    return torch.where(inside, places, -1).reshape(count, -1)


class Extremum(ByRows):
    """`max` and `min` along an axis: a row is what lies along it."""

    def knows(self, func: Any) -> bool:
        return func in _MAXIMA

    def rows(self, op: Operation) -> Rows | None:
        x, dim = op.flat[0], op.argument("dim")
        if op.outputs != (0,) or not x.ndim:
            return None
        func = op.func

        def arranged(t: Tensor) -> Tensor:
            return t.movedim(dim, -1).reshape(-1, t.shape[dim])

        kept = torch.Size(size for d, size in enumerate(x.shape) if d != dim % x.ndim)
        return Rows({0: arranged}, lambda t: func(t[0], 1)[0], lambda t: t.reshape(-1), kept, linear=True)

    def smoothed(self, op: Operation, rows: Rows, sharpness: float) -> Rows:
        return _smooth_extremum(rows, _MAXIMA[op.func], sharpness)


def _smooth_extremum(rows: Rows, func: Any, sharpness: float) -> Rows:
    """Rows of which the surrogate of `amax` or `amin` is taken."""
    smooth = surrogate(func, sharpness)
    assert smooth is not None
    return replace(rows, function=lambda t: smooth(t[0], 1), linear=False)
