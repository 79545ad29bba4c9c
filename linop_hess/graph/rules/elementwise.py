"""Elementwise operations, and scale and shift by parameters among them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from linop_hess.autograd.backward_graph import scale_shift
from linop_hess.graph.rules.operation import (
    CONSTANT,
    CONTROL,
    NOTHING,
    Operation,
    Placement,
    Rule,
    base_name,
    out_of_place,
)
from linop_hess.graph.rules.primitive import ByRows, Rows, each_entry
from linop_hess.lq.stages.base import Stage
from linop_hess.lq.stages.injection import InitialStage
from linop_hess.lq.stages.scale_shift import Features, ScaleShiftStage

aten = torch.ops.aten

ELEMENTWISE = (
    "abs acos acosh add addcdiv addcmul angle asin asinh atan atan2 atanh celu clamp clamp_max clamp_min copysign cos cosh deg2rad digamma "
    "div elu erf erfc erfinv exp exp2 expm1 fmax fmin fmod frac gelu hardshrink hardsigmoid hardswish hardtanh hypot i0 lerp leaky_relu "
    "lgamma log log10 log1p log2 log_sigmoid_forward logaddexp logaddexp2 logit maximum minimum mish mul mvlgamma nan_to_num neg "
    "polygamma pow rad2deg reciprocal relu remainder rsqrt rsub selu sgn sigmoid sign silu sin sinc sinh softplus softshrink special_i1 "
    "special_ndtr special_log_ndtr special_erfcx special_xlog1py sqrt square sub tan tanh threshold trunc round floor ceil true_divide "
    "where xlogy sigmoid_backward tanh_backward threshold_backward gelu_backward silu_backward softplus_backward elu_backward "
    "hardtanh_backward leaky_relu_backward _prelu_kernel"
)
"""Operations whose every output entry depends on the entries of the arguments in its place alone."""

_LINEAR = frozenset(
    "add sub neg rsub deg2rad rad2deg relu leaky_relu threshold hardtanh abs sign hardsigmoid hardshrink softshrink clamp clamp_max "
    "clamp_min".split()
)


_NAMES = frozenset(ELEMENTWISE.split())


def is_elementwise(func: Any) -> bool:
    """Whether an operation is one of `ELEMENTWISE`, in place or not."""
    return base_name(func) in _NAMES


class Elementwise(ByRows):
    """Rows of one entry of each argument."""

    def knows(self, func: Any) -> bool:
        return is_elementwise(func)

    def rows(self, op: Operation) -> Rows | None:
        func = out_of_place(op.func)
        if func._schema.is_mutable or len(func._schema.returns) != 1:
            return None
        shape = np.broadcast_shapes(*(op.flat[i].shape for i in op.tensors))  # which is sooner told than by torch

        def spread(t: Tensor) -> Tensor:
            return t.expand(shape).reshape(-1)

        return Rows(
            {i: each_entry if op.flat[i].shape == shape else spread for i in op.tensors},
            lambda tensors: op.call(func, tensors)[0],
            each_entry,
            torch.Size(shape),
            base_name(func) in _LINEAR,
            len(op.active) == 1,
        )


class ScaleShift(Rule):
    """w ∘ z, z + b, or w ∘ z + b (as `scale_shift`), with w and b controls that are broadcast over z: never p × p.

    z may be of the state or a constant.
    """

    def knows(self, func: Any) -> bool:
        return func is scale_shift or out_of_place(func) in (aten.mul.Tensor, aten.add.Tensor)

    def _roles(self, op: Operation) -> tuple[int, int | None, int | None] | None:
        """Positions of z, w and b; None where the rule does not fit."""
        func = out_of_place(op.func)
        if func is scale_shift:
            return 0, 1 if isinstance(op.flat[1], Tensor) else None, 2 if isinstance(op.flat[2], Tensor) else None
        if len(op.tensors) != 2:
            return None
        if func is aten.add.Tensor and len(op.flat) > 2:  # alpha
            return None
        a, b = 0, 1
        if op.role(a) == CONTROL and op.role(b) != CONTROL:
            a, b = b, a
        return (a, b, None) if func is aten.mul.Tensor else (a, None, b)

    def controls(self, op: Operation) -> frozenset[int] | None:
        roles = self._roles(op)
        if roles is None:
            return None
        z, w, b = roles
        shape = op.flat[z].shape
        parts = [i for i in (w, b) if i is not None]
        if op.is_controlled(z) or any(op.role(i) not in (CONTROL, CONSTANT) for i in parts):
            return None
        taken = [i for i in parts if op.role(i) == CONTROL]
        if not taken or any(not op.are_distinct(i) for i in taken):
            return None
        if any(np.broadcast_shapes(shape, op.flat[i].shape) != shape for i in parts):
            return None
        if len(taken) == 2 and op.flat[taken[0]].shape != op.flat[taken[1]].shape:
            return None
        return frozenset(taken)

    def placement(self, op: Operation) -> Placement:
        roles = self._roles(op)
        assert roles is not None
        z, w, b = roles
        entries = np.arange(op.bounds[z].start, op.bounds[z].stop) if op.role(z) != CONSTANT else NOTHING
        read = op.ordered(entries) if entries.size else entries
        mine = [
            np.arange(op.bounds[i].start, op.bounds[i].stop) for i in (w, b) if i is not None and op.role(i) == CONTROL
        ]
        written = None if op.order is None else op.order
        return Placement(read, np.concatenate(mine), written)

    def linearize(self, op: Operation) -> Stage:
        roles = self._roles(op)
        assert roles is not None
        z, w, b = roles
        K, shape = op.count, op.flat[z].shape
        state = op.in_order(op.stacked(z).reshape(K, -1))
        ones = torch.ones_like(state)
        scale = ones if w is None else op.in_order(_spread(op, w, shape))
        controlled = next(i for i in (w, b) if i is not None and op.role(i) == CONTROL)
        like = op.flat[controlled]
        index = torch.arange(like.numel(), device=like.device).view(like.shape).expand(shape).reshape(1, -1)
        index = op.in_order(index)[0]
        stage = ScaleShiftStage(
            state,
            ones,
            scale,
            None,
            Features(index, like.numel()),
            w is not None and op.role(w) == CONTROL,
            b is not None and op.role(b) == CONTROL,
        )
        return InitialStage(stage) if op.role(z) == CONSTANT else stage


def _spread(op: Operation, position: int, shape: torch.Size) -> Tensor:
    """An argument of all nodes, broadcast to `shape`, as (K, entries)."""
    return torch.stack([flat[position].expand(shape).reshape(-1) for flat in op.flats])
