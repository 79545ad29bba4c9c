"""Derivatives of operations by double backward: whole ones, and those that act on many rows alike."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from linop_hess._memory import require
from linop_hess.autograd.differentiate import symmetric, twice_differentiable, vjps
from linop_hess.graph.rules.operation import CONTROL, NOTHING, STATE, Operation, Placement, Rule, out_of_place
from linop_hess.lq.stages.base import Stage
from linop_hess.lq.stages.dense import DenseStage
from linop_hess.lq.stages.diagonal import DiagonalStage


class Whole(Rule):
    """Any operation, by dense blocks: n_out + n_in + p backward passes for all K nodes together; memory (n_in + p)² each."""

    is_generic = True

    def knows(self, func: Any) -> bool:
        return True

    def controls(self, op: Operation) -> frozenset[int] | None:
        return frozenset(op.active) if _folding(op) is not None else frozenset()

    def placement(self, op: Operation) -> Placement:
        first = np.arange(op.roles.size) if (folding := _folding(op)) is None else folding[0]
        return Placement(first[op.roles[first] == STATE], first[op.roles[first] == CONTROL])

    def _function(self, op: Operation) -> Callable[[dict[int, Tensor]], Tensor]:
        func = out_of_place(op.func)

        def one(tensors: dict[int, Tensor]) -> Tensor:
            return torch.cat([y.reshape(-1) for y in op.call(func, tensors)])

        def all_of_them(tensors: dict[int, Tensor]) -> Tensor:
            if op.count == 1:
                return one({i: t[0] for i, t in tensors.items()})[None]
            try:
                return torch.vmap(one)(tensors)
            except RuntimeError:  # no batching rule
                return torch.stack([one({i: t[k] for i, t in tensors.items()}) for k in range(op.count)])

        return all_of_them

    def _recorded(self, op: Operation) -> tuple[list[Tensor], Tensor]:
        leaves = {i: in_double(op.stacked(i)).clone().requires_grad_() for i in op.active}
        tensors = {i: leaves[i] * 1 if i in leaves else in_double(op.stacked(i)) for i in op.tensors}
        return list(leaves.values()), self._function(op)(tensors)

    def linearize(self, op: Operation) -> Stage:
        slots, K = op.roles.size, op.count
        with twice_differentiable(op.title, op.flat[op.active[0]].device):
            leaves, y = self._recorded(op)
            o, item = y.shape[1], y.element_size()
            require(
                2.0 * item * K * (o * slots + slots**2),
                f"the derivatives of {op.title}, {o} outputs by {slots} inputs, dense",
            )
            units = torch.eye(o, dtype=y.dtype, device=y.device)[:, None].expand(o, K, o)
            rows = vjps(y, leaves, units)
        J = _folded(op, torch.cat([row.view(o, K, -1) for row in rows], 2)).transpose(0, 1)
        n, p = _parts(op)
        return DenseStage.plain(J[..., n].contiguous(), J[..., p].contiguous() if p.numel() else None, None, None, None)

    def curve(self, op: Operation, stage: Stage, beta: Tensor) -> Stage:
        K = op.count
        with twice_differentiable(op.title, beta.device):
            leaves, y = self._recorded(op)
            if not y.requires_grad:
                return stage
            grads = torch.autograd.grad(
                y, leaves, beta.to(y.dtype), create_graph=True, allow_unused=True, materialize_grads=True
            )
            first = torch.cat([grad.reshape(K, -1) for grad in grads], 1)
            if not first.requires_grad:
                return stage
            m = first.shape[1]
            units = torch.eye(m, dtype=y.dtype, device=y.device)[:, None].expand(m, K, m)
            rows = vjps(first, leaves, units)
        Q = _folded(op, torch.cat([row.view(m, K, -1) for row in rows], 2)).permute(1, 2, 0)
        Q = _folded(op, Q)
        Q = symmetric(Q, op.title, float(first.detach().abs().max()))
        n, p = _parts(op)
        A, B, C = Q[:, p][:, :, p], Q[:, p][:, :, n], Q[:, n][:, :, n]
        a, b, c = (block.contiguous() if bool(block.any()) else None for block in (A, B, C))
        return DenseStage.plain(stage.dense_F(), stage.dense_G() if p.numel() else None, a, b, c)


def in_double(t: Tensor) -> Tensor:
    """A constant in float64: derivatives of a float32 model are rounded once, when they are known."""
    return t.detach().double() if t.is_floating_point() else t


def _folding(op: Operation) -> tuple[np.ndarray, np.ndarray] | None:
    """A slot of each distinct element, and the place of each slot's element among them; None where it is not so in all nodes."""
    _, first, inverse = np.unique(op.ids[0], return_index=True, return_inverse=True)
    inverse = inverse.reshape(-1)
    return (first, inverse) if bool((op.ids[:, first][:, inverse] == op.ids).all()) else None


def _folded(op: Operation, M: Tensor) -> Tensor:
    """Add up the columns (the last axis) of slots that are the same element."""
    folding = _folding(op)
    if folding is None or folding[0].size == M.shape[-1]:
        return M if folding is None else M[..., torch.from_numpy(folding[0]).to(M.device)]
    out = M.new_zeros(*M.shape[:-1], folding[0].size)
    return out.index_add_(-1, torch.from_numpy(folding[1]).to(M.device), M)


def _parts(op: Operation) -> tuple[Tensor, Tensor]:
    """Columns, after folding, of the state and of the controls."""
    roles = op.roles if (folding := _folding(op)) is None else op.roles[folding[0]]
    return torch.from_numpy(np.flatnonzero(roles == STATE)), torch.from_numpy(np.flatnonzero(roles == CONTROL))


@dataclass(frozen=True)
class Rows:
    """An operation as R small ones that are alike.

    Attributes
    ----------
    arranged : dict of int to callable
        For each tensor argument by position: takes it, of its own shape, to (R, *local).
    function : callable
        Takes the arguments by position, each (any, *local), to (any, *local output).
    output : callable
        Takes the output, of its own shape, to (R, *local output).
    shape : torch.Size
        Shape of the output.
    linear : bool
        Whether it has no second derivative.
    """

    arranged: dict[int, Callable[[Tensor], Tensor]]
    function: Callable[[dict[int, Tensor]], Tensor]
    output: Callable[[Tensor], Tensor]
    shape: torch.Size
    linear: bool = False


class ByRows(Rule):
    """Operations that act on rows of their arguments alike, by double backward through all rows of all nodes at once."""

    @abstractmethod
    def rows(self, op: Operation) -> Rows | None:
        """How an operation falls into rows; None where the rule does not fit."""

    def controls(self, op: Operation) -> frozenset[int] | None:
        return None if len(op.outputs) != 1 or self.rows(op) is None else frozenset()

    def _reads(self, op: Operation, rows: Rows) -> np.ndarray:
        """Slot of each entry that a row reads, (R, d)."""
        parts = []
        for i in op.active:
            bound = op.bounds[i]
            index = torch.arange(bound.start, bound.stop).view(op.flat[i].shape)
            arranged = rows.arranged[i](index)
            parts.append(arranged.reshape(arranged.shape[0], -1).numpy())
        return np.concatenate(parts, 1)

    def placement(self, op: Operation) -> Placement:
        rows = self._of(op)
        written = rows.output(torch.arange(rows.shape.numel()).view(rows.shape)).reshape(-1).numpy()
        in_order = bool((written == np.arange(written.size)).all())
        return Placement(self._reads(op, rows).reshape(-1), NOTHING, None if in_order else written)

    def _of(self, op: Operation) -> Rows:
        rows = self.rows(op)
        assert rows is not None
        return rows

    def _recorded(self, op: Operation, rows: Rows) -> tuple[list[Tensor], Tensor]:
        """Leaves, each (K·R, *local), and the output (K·R, o)."""
        tensors = {}
        for i in op.tensors:
            arranged = torch.vmap(rows.arranged[i])(in_double(op.stacked(i)))
            tensors[i] = arranged.reshape(-1, *arranged.shape[2:])
        leaves = [tensors[i].clone().requires_grad_() for i in op.active]
        for i, leaf in zip(op.active, leaves, strict=True):
            tensors[i] = leaf * 1
        y = rows.function(tensors)
        return leaves, y.reshape(y.shape[0], -1)

    def linearize(self, op: Operation) -> Stage:
        rows, K = self._of(op), op.count
        with twice_differentiable(op.title, op.flat[op.active[0]].device):
            leaves, y = self._recorded(op, rows)
            R, o = y.shape[0] // K, y.shape[1]
            d = sum(leaf[0].numel() for leaf in leaves)
            require(2.0 * y.element_size() * y.shape[0] * d * max(d, o), f"the derivatives of {op.title}")
            units = torch.eye(o, dtype=y.dtype, device=y.device)[:, None].expand(o, K * R, o)
            J = torch.cat([row.view(o, K * R, -1) for row in vjps(y, leaves, units)], 2).transpose(0, 1)
        if o == 1 and d == 1:
            return DiagonalStage(J.reshape(K, R))
        return DenseStage(J.reshape(K, R, o, d).contiguous(), samples=R)

    def curve(self, op: Operation, stage: Stage, beta: Tensor) -> Stage:
        rows, K = self._of(op), op.count
        if rows.linear:
            return stage
        with twice_differentiable(op.title, beta.device):
            leaves, y = self._recorded(op, rows)
            if not y.requires_grad:
                return stage
            grads = torch.autograd.grad(
                y,
                leaves,
                beta.reshape(y.shape).to(y.dtype),
                create_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            first = torch.cat([grad.reshape(y.shape[0], -1) for grad in grads], 1)
            if not first.requires_grad:
                return stage
            d = first.shape[1]
            units = torch.eye(d, dtype=y.dtype, device=y.device)[:, None].expand(d, *first.shape)
            Q = torch.cat([row.view(d, first.shape[0], -1) for row in vjps(first, leaves, units)], 2).transpose(0, 1)
        Q = symmetric(Q.contiguous(), op.title, float(first.detach().abs().max()))
        if not bool(Q.any()):
            return stage
        is_diagonal = y.shape[1] == d == 1
        curved: Any = stage
        return replace(curved, c=Q.reshape(K, -1) if is_diagonal else Q.reshape(K, stage.samples, d, d))
