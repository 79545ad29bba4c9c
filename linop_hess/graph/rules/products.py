"""Matrix products and convolutions with parameters: affine stages, which never form p × p; products of two states, by rows."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from linop_hess.graph.rules.convolution import patch_sources
from linop_hess.graph.rules.operation import CONSTANT, CONTROL, NOTHING, Operation, Placement, Rule
from linop_hess.graph.rules.primitive import ByRows, Rows
from linop_hess.lq.stages.affine import AffineStage
from linop_hess.lq.stages.base import Stage
from linop_hess.lq.stages.convolution import Arrangement, ConvolutionStage
from linop_hess.lq.stages.injection import InitialStage

aten = torch.ops.aten


@dataclass(frozen=True)
class _Form:
    """y_b = W z_b + w₀: where W, the rows and w₀ are among the arguments, and whether each stands transposed."""

    weight: int
    rows: int
    bias: int | None
    weight_transposed: bool  # the argument is Wᵀ
    rows_transposed: bool  # the argument has the rows as columns, and so has the output


class Affine(Rule):
    """`mm`, `addmm`, `mv` and `addmv` with a weight that is a parameter or constant."""

    def knows(self, func: Any) -> bool:
        return func in (aten.addmm.default, aten.mm.default, aten.mv.default, aten.addmv.default)

    def _form(self, op: Operation) -> _Form | None:
        if op.func is aten.addmm.default:
            if len(op.flat) > 3:  # beta or alpha
                return None
            forms = [_Form(2, 1, 0, True, False)]
        elif op.func is aten.mm.default:
            forms = [_Form(1, 0, None, True, False), _Form(0, 1, None, False, True)]
        elif op.func is aten.mv.default:
            forms = [_Form(0, 1, None, False, True)]
        elif op.func is aten.addmv.default and len(op.flat) == 3:
            forms = [_Form(1, 2, 0, False, True)]
        else:
            return None
        return next((form for form in forms if self._fits(op, form)), None)

    def _fits(self, op: Operation, form: _Form) -> bool:
        weight = op.role(form.weight)
        if weight not in (CONTROL, CONSTANT) or op.is_controlled(form.rows):
            return False
        if weight == CONTROL and not op.are_distinct(form.weight):
            return False
        if form.bias is None:
            return True
        bias = op.role(form.bias)
        if bias == CONSTANT:
            return True
        outputs = op.flat[form.weight].shape[1 if form.weight_transposed else 0]
        return bias == CONTROL and op.flat[form.bias].shape == (outputs,) and op.are_distinct(form.bias)

    def controls(self, op: Operation) -> frozenset[int] | None:
        form = self._form(op)
        if form is None:
            return None
        parts = (form.weight, form.bias)
        return frozenset(i for i in parts if i is not None and op.role(i) == CONTROL)

    def placement(self, op: Operation) -> Placement:
        form = self._of(op)
        rows, (outputs, inputs) = op.flat[form.rows], self._sizes(op, form)
        read = NOTHING
        if op.role(form.rows) != CONSTANT:
            read = op.ordered(_slots(op, form.rows, form.rows_transposed).reshape(-1, inputs))
        controls = [NOTHING]
        if op.role(form.weight) == CONTROL:
            controls.append(_slots(op, form.weight, form.weight_transposed))
        if form.bias is not None and op.role(form.bias) == CONTROL:
            controls.append(_slots(op, form.bias, False))
        count = rows.numel() // max(inputs, 1)
        written = None
        if form.rows_transposed and rows.ndim == 2:
            written = op.ordered(np.arange(outputs * count).reshape(outputs, count).T)
        elif op.order is not None:
            written = op.ordered(np.arange(outputs * count).reshape(count, outputs))
        return Placement(read, np.concatenate(controls), written)

    def _of(self, op: Operation) -> _Form:
        form = self._form(op)
        assert form is not None
        return form

    @staticmethod
    def _sizes(op: Operation, form: _Form) -> tuple[int, int]:
        """Outputs and inputs of a row."""
        outputs, inputs = op.flat[form.weight].shape[::-1] if form.weight_transposed else op.flat[form.weight].shape
        return outputs, inputs

    def linearize(self, op: Operation) -> Stage:
        form, K = self._of(op), op.count
        W = op.stacked(form.weight)
        W = W.mT if form.weight_transposed else W
        rows = op.stacked(form.rows)
        if rows.ndim == 2:  # a vector
            rows = rows[:, None]
        elif form.rows_transposed:
            rows = rows.mT
        bias = form.bias is not None and op.role(form.bias) == CONTROL
        stage = AffineStage(W.contiguous(), op.in_order(rows).contiguous(), None, op.role(form.weight) == CONTROL, bias)
        assert K == stage.count
        return InitialStage(stage) if op.role(form.rows) == CONSTANT else stage


def _slots(op: Operation, position: int, transposed: bool) -> np.ndarray:
    """Slots of a matrix or vector in row-major order, of its transpose if told."""
    bound = op.bounds[position]
    index = np.arange(bound.start, bound.stop).reshape(op.flat[position].shape)
    return (index.T if transposed else index).reshape(-1)


class Convolution(Rule):
    """`convolution` with one group and a kernel that is a parameter or constant."""

    def knows(self, func: Any) -> bool:
        return func is aten.convolution.default

    def _fits(self, op: Operation) -> bool:
        transposed, groups = op.argument("transposed"), op.argument("groups")
        input, weight, bias = (op.argument(name) for name in ("input", "weight", "bias"))
        if transposed or groups != 1 or input.ndim != weight.ndim:
            return False
        if op.is_controlled(0) or op.role(1) not in (CONTROL, CONSTANT):
            return False
        parts = [1] + ([2] if isinstance(bias, Tensor) else [])
        return all(op.role(i) in (CONTROL, CONSTANT) and (op.role(i) == CONSTANT or op.are_distinct(i)) for i in parts)

    def controls(self, op: Operation) -> frozenset[int] | None:
        if not self._fits(op):
            return None
        return frozenset(i for i in (1, 2) if isinstance(op.flat[i], Tensor) and op.role(i) == CONTROL)

    def placement(self, op: Operation) -> Placement:
        read = _slots(op, 0, False) if op.role(0) != CONSTANT else NOTHING
        mine = [_slots(op, i, False) for i in (1, 2) if isinstance(op.flat[i], Tensor) and op.role(i) == CONTROL]
        return Placement(read, np.concatenate([NOTHING, *mine]))

    def linearize(self, op: Operation) -> Stage:
        weight, K = op.flat[1], op.count
        padding = op.argument("padding")
        geometry = SimpleNamespace(
            weight=weight,
            padding_mode="zeros",
            _reversed_padding_repeated_twice=[amount for amount in reversed(padding) for _ in range(2)],
            dilation=op.argument("dilation"),
            kernel_size=weight.shape[2:],
            stride=op.argument("stride"),
        )
        input = op.stacked(0)
        shape = input.shape[2:]
        gather = patch_sources(geometry, shape)
        samples = input.shape[1]
        arrangement = Arrangement(samples, shape.numel(), gather.reshape(-1), gather.shape[0], weight.shape[0])
        rows = arrangement.unfold(input.reshape(K, -1, 1)).reshape(K, samples * gather.shape[0], -1)
        bias = isinstance(op.flat[2], Tensor) and op.role(2) == CONTROL
        stage = ConvolutionStage(op.stacked(1).flatten(2), rows, None, op.role(1) == CONTROL, bias, arrangement)
        return InitialStage(stage) if op.role(0) == CONSTANT else stage


class BatchedProduct(ByRows):
    """`bmm`: a row is one product of matrices."""

    def knows(self, func: Any) -> bool:
        return func is aten.bmm.default

    def rows(self, op: Operation) -> Rows | None:
        a, b = op.flat[:2]

        def function(tensors: dict[int, Tensor]) -> Tensor:
            return torch.bmm(tensors[0], tensors[1])

        def same(t: Tensor) -> Tensor:
            return t

        linear = len(op.active) == 1
        return Rows({0: same, 1: same}, function, same, torch.Size((a.shape[0], a.shape[1], b.shape[2])), linear)
