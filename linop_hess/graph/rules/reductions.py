"""Operations along some axes, alike for all others: softmax, sums, norms, and the normalizations without their parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from linop_hess.autograd.backward_graph import normalize
from linop_hess.autograd.kinks.surrogates import surrogate
from linop_hess.graph.rules.operation import NOTHING, Operation, Placement, Rule, base_name, out_of_place
from linop_hess.graph.rules.primitive import ByRows, Rows
from linop_hess.lq.stages.base import Stage
from linop_hess.lq.stages.diagonal import DiagonalStage

aten = torch.ops.aten

# One output for each input, along one axis.
_ALONG_NAMES = ("_softmax", "_log_softmax", "_safe_softmax", "cumsum", "cumprod", "logcumsumexp")

# One output for all inputs along some axes.
_REDUCING = ("sum", "mean", "amax", "amin", "var", "std", "prod", "logsumexp", "linalg_vector_norm", "norm", "nansum")

_SUMS = ("sum", "mean", "cumsum", "nansum")


class Along(ByRows):
    """Rows along one axis that stays: `softmax`, `cumsum` and the like."""

    def knows(self, func: Any) -> bool:
        return base_name(func) in _ALONG_NAMES

    def rows(self, op: Operation) -> Rows | None:
        if op.tensors != [0] or out_of_place(op.func)._schema.is_mutable:
            return None
        func, x = out_of_place(op.func), op.flat[0]
        if x.ndim == 0:
            return None
        dim, rest = op.flat[1], op.flat[2:]

        def arranged(t: Tensor) -> Tensor:
            return t.movedim(dim, -1).reshape(-1, t.shape[dim])

        return Rows({0: arranged}, lambda t: func(t[0], -1, *rest), arranged, x.shape, base_name(op.func) in _SUMS)


class Reduction(ByRows):
    """Rows along the axes that are reduced."""

    def knows(self, func: Any) -> bool:
        return base_name(func) in _REDUCING

    def rows(self, op: Operation) -> Rows | None:
        name = base_name(op.func)
        if op.tensors != [0]:
            return None
        x = op.flat[0]
        dim = op.argument("dim")
        dims = [dim] if isinstance(dim, int) else list(dim) if dim else list(range(x.ndim))
        dims = sorted(d % x.ndim for d in dims) if x.ndim else []
        kept = [d for d in range(x.ndim) if d not in dims]
        d = max(1, torch.Size([x.shape[k] for k in dims]).numel())
        reduce = _reducer(op, name)

        def arranged(t: Tensor) -> Tensor:
            return t.permute(kept + dims).reshape(-1, d)

        shape = torch.Size([x.shape[k] for k in kept])
        return Rows({0: arranged}, lambda t: reduce(t[0]), lambda t: t.reshape(-1), shape, name in _SUMS)

    def smoothed(self, op: Operation, rows: Rows, sharpness: float) -> Rows:
        name, smooth = base_name(op.func), surrogate(op.func, sharpness)
        assert smooth is not None
        given = () if name in ("amax", "amin") else (op.argument("p" if name == "norm" else "ord"),)
        return replace(rows, function=lambda t: smooth(t[0], *given, 1), linear=False)


def _reducer(op: Operation, name: str) -> Callable[[Tensor], Tensor]:
    """The operation on (R, d), along d."""
    if name == "prod":
        return lambda t: torch.prod(t, 1)
    if name == "norm":
        order = op.argument("p")
        return lambda t: torch.linalg.vector_norm(t, 2.0 if order is None else float(order), 1)
    if name == "linalg_vector_norm":
        order = op.argument("ord")
        return lambda t: torch.linalg.vector_norm(t, order, 1)
    if name in ("var", "std"):
        correction = op.argument("correction")
        if correction is None:
            correction = 1 if op.argument("unbiased") in (None, True) else 0
        function = torch.var if name == "var" else torch.std
        return lambda t: function(t, 1, correction=correction)
    plain: dict[str, Any] = {
        "sum": torch.sum,
        "mean": torch.mean,
        "amax": torch.amax,
        "amin": torch.amin,
        "logsumexp": torch.logsumexp,
        "nansum": torch.nansum,
    }
    return lambda t: plain[name](t, 1)


class Normalization(ByRows):
    """Runs of a layer, group or RMS norm."""

    def knows(self, func: Any) -> bool:
        return func is normalize

    def rows(self, op: Operation) -> Rows | None:
        x, run, eps, *centred = op.flat

        def arranged(t: Tensor) -> Tensor:
            return t.reshape(-1, run)

        return Rows({0: arranged}, lambda t: normalize(t[0], run, eps, *centred), arranged, x.shape)


def standardize(x: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """(x − mean)/√(var + eps), with given statistics of each channel, the second axis."""
    shape = [1, -1] + [1] * (x.ndim - 2)
    return (x - mean.view(shape)) * (var.view(shape) + eps).rsqrt()


class Standardization(Rule):
    """`standardize` of a state: a diagonal map."""

    def knows(self, func: Any) -> bool:
        return func is standardize

    def controls(self, op: Operation) -> frozenset[int] | None:
        return frozenset() if op.active == (0,) else None

    def placement(self, op: Operation) -> Placement:
        return Placement(op.ordered(np.arange(op.roles.size)), NOTHING, op.order)

    def linearize(self, op: Operation) -> Stage:
        x = op.flat[0]
        shape = [1, -1] + [1] * (x.ndim - 2)
        slopes = [(flat[2].view(shape) + flat[3]).rsqrt().expand(x.shape).reshape(-1) for flat in op.flats]
        return DiagonalStage(op.in_order(torch.stack(slopes)))
