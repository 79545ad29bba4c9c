"""Derivatives of operations by double backward: whole ones, and those that act on many rows alike."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from linop_hess import _memory
from linop_hess.autograd.differentiate import differentiate, symmetric, twice_differentiable, vjps
from linop_hess.autograd.finite import finite_difference_hessian
from linop_hess.autograd.kinks.surrogates import surrogate
from linop_hess.errors import UnsupportedModelError
from linop_hess.graph.rules.operation import CONTROL, NOTHING, STATE, Operation, Placement, Rule, is_aten, out_of_place
from linop_hess.lq.accuracy import CANCELLED
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

    def _function(self, op: Operation, func: Callable[..., Any]) -> Callable[[dict[int, Tensor]], Tensor]:
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

    def _run(self, op: Operation, func: Callable[..., Any]) -> _Run:
        function = self._function(op, func)
        constants = {i: in_double(op.stacked(i)) for i in op.tensors if i not in op.active}
        points = {i: in_double(op.stacked(i)) for i in op.active}
        return _Run(op.title, points, lambda leaves: function({**leaves, **constants}), not is_aten(op.func))

    def linearize(self, op: Operation) -> Stage:
        slots, K = op.roles.size, op.count
        run = self._run(op, out_of_place(op.func))
        with run.differentiably():
            leaves, y = run.recorded()
            o, item = y.shape[1], y.element_size()
            nbytes = 2.0 * item * K * (o * slots + slots**2)
            _memory.require_on(y.device, nbytes, f"the derivatives of {op.title}, {o} outputs by {slots} inputs, dense")
            units = torch.eye(o, dtype=y.dtype, device=y.device)[:, None].expand(o, K, o)
            rows = vjps(y, leaves, units)
        J = _folded(op, torch.cat([row.view(o, K, -1) for row in rows], 2)).transpose(0, 1)
        n, p = _parts(op)
        return DenseStage.plain(J[..., n].contiguous(), J[..., p].contiguous() if p.numel() else None, None, None, None)

    def _curved_run(self, op: Operation) -> _Run:
        smooth = None if op.sharpness is None else surrogate(op.func, op.sharpness)
        return self._run(op, out_of_place(op.func) if smooth is None else smooth)

    def curve(self, op: Operation, stage: Stage, beta: Tensor) -> Stage:
        Q = self._curved_run(op).curvature(beta, op.by_differences)
        if Q is None:
            return stage
        Q = _folded(op, _folded(op, Q).mT)
        n, p = _parts(op)
        A, B, C = Q[:, p][:, :, p], Q[:, p][:, :, n], Q[:, n][:, :, n]
        a, b, c = (block.contiguous() if bool(block.any()) else None for block in (A, B, C))
        return DenseStage.plain(stage.dense_F(), stage.dense_G() if p.numel() else None, a, b, c)

    def is_twice_differentiable(self, op: Operation) -> bool:
        return self._curved_run(op).is_twice_differentiable(checked=not is_aten(op.func))


@dataclass(frozen=True)
class _Run:
    """A function of many points at once, each with its own outputs, to be differentiated.

    Attributes
    ----------
    title : str
        What it is, for messages.
    points : dict of int to Tensor
        By position the arguments to differentiate by, each (R, *shape).
    function : callable
        Takes tensors in their place to outputs (R, o).
    in_primitives : bool
        Whether it may call functions of torch's that must be written in others: of torch's own operations a recording has none such.
    """

    title: str
    points: dict[int, Tensor]
    function: Callable[[dict[int, Tensor]], Tensor]
    in_primitives: bool = True

    def differentiably(self) -> AbstractContextManager[None]:
        """Record graphs that can be differentiated twice."""
        device = next(iter(self.points.values())).device
        return twice_differentiable(self.title, device, in_primitives=self.in_primitives)

    def recorded(self, at: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
        """Leaves and the outputs (R, o); at other points (R, m) if they are given."""
        points = list(self.points.values())
        if at is not None:
            sizes = [point[0].numel() for point in points]
            points = [part.reshape(point.shape) for part, point in zip(at.split(sizes, 1), points, strict=True)]
        leaves = [point.detach().clone().requires_grad_() for point in points]
        y = self.function({i: leaf * 1 for i, leaf in zip(self.points, leaves, strict=True)})
        return leaves, y.reshape(y.shape[0], -1)

    def slopes(self, beta: Tensor, at: Tensor | None = None, create_graph: bool = False) -> tuple[list[Tensor], Tensor]:
        """Leaves and ∇f(z)ᵀb, (R, m), zero where no output depends on them."""
        leaves, y = self.recorded(at)
        if not y.requires_grad:
            return leaves, torch.cat([torch.zeros_like(leaf).reshape(len(leaf), -1) for leaf in leaves], 1)
        seeds = beta.reshape(y.shape).to(y.dtype)
        grads = torch.autograd.grad(
            y, leaves, seeds, create_graph=create_graph, allow_unused=True, materialize_grads=True
        )
        return leaves, torch.cat([grad.reshape(y.shape[0], -1) for grad in grads], 1)

    def curvature(self, beta: Tensor, by_differences: bool = False) -> Tensor | None:
        """Σ_i b_i ∇²f_i, (R, m, m), exactly symmetric; None where it is zero.

        Raises
        ------
        UnsupportedModelError
            If there is none, or differences do not converge.
        ArithmeticError
            If autograd's is not symmetric.
        """
        if by_differences:
            return self._differenced(beta)
        with self.differentiably():
            leaves, first = self.slopes(beta, create_graph=True)
            if not first.requires_grad:
                return None
            R, m = first.shape
            units = torch.eye(m, dtype=first.dtype, device=first.device)[:, None].expand(m, R, m)
            Q = torch.cat([row.view(m, R, -1) for row in vjps(first, leaves, units)], 2).transpose(0, 1)
        # symmetric() allows √eps of the size it is given: CANCELLED·eps of the adjoints in all.
        summed = CANCELLED * torch.finfo(first.dtype).eps ** 0.5 * float(beta.abs().max())
        Q = symmetric(Q.contiguous(), self.title, max(float(first.detach().abs().max()), summed))
        return Q if bool(Q.any()) else None

    @property
    def _origin(self) -> Tensor:
        return torch.cat([point.detach().reshape(len(point), -1) for point in self.points.values()], 1)

    def _differenced(self, beta: Tensor) -> Tensor:
        try:
            with self.differentiably():
                return finite_difference_hessian(lambda z: self.slopes(beta, z)[1].detach(), self._origin)
        except ArithmeticError as error:
            raise UnsupportedModelError(f"in {self.title}: {error}") from error

    def is_twice_differentiable(self, checked: bool = False) -> bool:
        """Whether autograd has second derivatives; with `checked`, and they are those that differences show."""
        origin = self._origin
        generator = torch.Generator().manual_seed(0)
        try:
            with self.differentiably():
                shape = self.recorded()[1].shape
                beta, v = (
                    torch.randn(s, generator=generator, dtype=torch.float64, device="cpu").to(origin)
                    for s in (shape, origin.shape)
                )
                leaves, first = self.slopes(beta, create_graph=True)
                curved = torch.zeros_like(origin)
                if first.requires_grad:
                    parts = torch.autograd.grad(first, leaves, v, allow_unused=True, materialize_grads=True)
                    curved = torch.cat([part.reshape(len(part), -1) for part in parts], 1)
                if not checked:
                    return True
                step = torch.finfo(origin.dtype).eps ** (1 / 3)
                up, down = (self.slopes(beta, origin + sign * step * v)[1].detach() for sign in (1, -1))
        except UnsupportedModelError:
            return False
        gap = (curved - (up - down) / (2 * step)).abs().max()
        return bool(gap <= step * (curved.abs().max() + up.abs().max()))


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
    entrywise : bool
        Whether a row is a function of one number alone.
    """

    arranged: dict[int, Callable[[Tensor], Tensor]]
    function: Callable[[dict[int, Tensor]], Tensor]
    output: Callable[[Tensor], Tensor]
    shape: torch.Size
    linear: bool = False
    entrywise: bool = False


def _of_entries(z: Tensor, y: Tensor, twice: bool) -> tuple[Tensor, Tensor | None]:
    """First and second derivatives of functions of one number each; None where the second are zero, or not asked for."""
    (first,) = differentiate([y.sum()], [z], create_graph=twice)
    if first is None:
        return torch.zeros_like(z), None
    (second,) = differentiate([first.sum()], [z]) if twice else (None,)
    return first.detach(), None if second is None or not bool(second.any()) else second


def each_entry(t: Tensor) -> Tensor:
    """Each entry as a row."""
    return t.reshape(-1)


def _arranged(function: Callable[[Tensor], Tensor], stacked: Tensor) -> Tensor:
    """What `Rows.arranged` makes of each of K tensors."""
    if function is each_entry:
        return stacked.reshape(len(stacked), -1)
    return function(stacked[0])[None] if len(stacked) == 1 else torch.vmap(function)(stacked)


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
            index = torch.arange(bound.start, bound.stop, device="cpu").view(op.flat[i].shape)
            arranged = rows.arranged[i](index)
            parts.append(arranged.reshape(arranged.shape[0], -1).numpy())
        return np.concatenate(parts, 1)

    def placement(self, op: Operation) -> Placement:
        rows = self._of(op)
        outputs = rows.output(torch.arange(rows.shape.numel(), device="cpu").view(rows.shape))
        written = op.ordered(outputs.reshape(outputs.shape[0], -1).numpy())
        in_order = bool((written == np.arange(written.size)).all())
        return Placement(op.ordered(self._reads(op, rows)), NOTHING, None if in_order else written)

    def _of(self, op: Operation) -> Rows:
        rows = self.rows(op)
        assert rows is not None
        return rows

    def _run(self, op: Operation, rows: Rows) -> _Run:
        """The rows of all nodes, (K·R, *local)."""
        tensors = {}
        for i in op.tensors:
            arranged = op.in_order(_arranged(rows.arranged[i], in_double(op.stacked(i))))
            tensors[i] = arranged.reshape(-1, *arranged.shape[2:])
        points = {i: tensors.pop(i) for i in op.active}
        return _Run(op.title, points, lambda leaves: rows.function({**leaves, **tensors}), not is_aten(op.func))

    def linearize(self, op: Operation) -> Stage:
        rows, K = self._of(op), op.count
        run = self._run(op, rows)
        with run.differentiably():
            leaves, y = run.recorded()
            R, o = y.shape[0] // K, y.shape[1]
            d = sum(leaf[0].numel() for leaf in leaves)
            entries = y.shape[0] * d * (o if rows.linear else max(d, o))
            nbytes = 2.0 * y.element_size() * entries
            _memory.require_on(y.device, nbytes, f"the derivatives of {op.title}")
            if rows.entrywise:
                first, second = _of_entries(leaves[0], y, self._bends_itself(op, rows))
                return DiagonalStage(first.reshape(K, R), second=None if second is None else second.reshape(K, R))
            units = torch.eye(o, dtype=y.dtype, device=y.device)[:, None].expand(o, K * R, o)
            J = torch.cat([row.view(o, K * R, -1) for row in vjps(y, leaves, units)], 2).transpose(0, 1)
        if o == 1 and d == 1:
            return DiagonalStage(J.reshape(K, R))
        return DenseStage(J.reshape(K, R, o, d).contiguous(), samples=R)

    @staticmethod
    def _bends_itself(op: Operation, rows: Rows) -> bool:
        """Whether there are second derivatives, and they are those of the operation itself by autograd."""
        return not (rows.linear or op.by_differences or op.sharpness is not None)

    def smoothed(self, op: Operation, rows: Rows, sharpness: float) -> Rows:
        """The rows of the surrogate of an operation that has one."""
        smooth = surrogate(op.func, sharpness)
        assert smooth is not None
        return replace(rows, function=lambda tensors: op.call(smooth, tensors)[0], linear=False)

    def _curved_rows(self, op: Operation) -> Rows:
        rows = self._of(op)
        return rows if op.sharpness is None else self.smoothed(op, rows, op.sharpness)

    def curve(self, op: Operation, stage: Stage, beta: Tensor) -> Stage:
        rows, K = self._curved_rows(op), op.count
        if rows.entrywise and self._bends_itself(op, rows):
            return replace(cast(Any, stage.with_adjoint(beta)), second=None)
        Q = None if rows.linear else self._run(op, rows).curvature(beta, op.by_differences)
        if Q is None:
            return stage
        d, curved = Q.shape[-1], cast(Any, stage)
        is_diagonal = d == 1 and beta.numel() == Q.shape[0]
        return replace(curved, c=Q.reshape(K, -1) if is_diagonal else Q.reshape(K, stage.samples, d, d))

    def is_twice_differentiable(self, op: Operation) -> bool:
        rows = self._curved_rows(op)
        return rows.linear or self._run(op, rows).is_twice_differentiable()
