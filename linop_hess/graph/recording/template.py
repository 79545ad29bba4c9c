"""Calls that are recorded as one like them was: nodes whose parts are made where they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, overload

import torch
from torch import Tensor

from linop_hess.autograd.untouched import Memory
from linop_hess.graph.recording.movement import Strided
from linop_hess.graph.recording.node import Node


@dataclass(slots=True)
class View:
    """A view of an operand, `offset` counted from where that begins."""

    operand: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    is_whole: bool = False
    is_transposed: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """The view, detached."""
        tensor = tensor.detach()
        if self.is_whole:
            return tensor
        if self.is_transposed:
            return tensor.t()
        return tensor.as_strided(self.shape, self.stride, tensor.storage_offset() + self.offset)

    def of_all(self, tensors: list[Tensor]) -> Tensor:
        """The views of some tensors, stacked, in memory of its own, which may lie in another order."""
        if self.is_whole or self.is_transposed:
            with torch.no_grad():
                stacked = torch.stack(tensors)
            return stacked if self.is_whole else stacked.mT
        return torch.stack([self.of(tensor) for tensor in tensors])

    def ids(self, first: int) -> Strided:
        """Its element ids, from the first of the operand's."""
        return Strided(first + self.offset, self.shape, self.stride, 0)


@dataclass(slots=True)
class Pattern:
    """What nodes have in common that are the same operation on tensors of the same shapes and strides.

    Attributes
    ----------
    node : Node
        Without tensors and ids of arguments; starts of its outputs count from the last id before.
    tensors : dict of int to View
        By its place in `node.flat` each tensor there.
    """

    node: Node
    tensors: dict[int, View]


@dataclass(slots=True)
class Template:
    """What a call is recorded as.

    Attributes
    ----------
    pattern : Pattern or None
        None: the result is a view of an argument.
    constants : list of int
        The operands that depend on no parameter.
    ids : int
        How many ids are new.
    result : Strided or View
        The result in terms of new ids, or of an operand.
    layout : int
        Of the result, as its maker numbers layouts.
    dtype : torch.dtype
        Of the result.
    """

    pattern: Pattern | None
    constants: list[int]
    ids: int
    result: Strided | View
    layout: int
    dtype: torch.dtype

    def repeated(self, before: int, path: str, operands: list[Tensor], ids: list[int], memory: Memory) -> Repeat:
        """A call like it, whose ids follow `before`; of constants that are not of the run it has copies."""
        assert self.pattern is not None
        for j in self.constants:
            operands[j] = memory.kept(operands[j].detach(), operands[j])
        return Repeat(self.pattern, operands, ids, before, path)


class Repeat(Node):
    """A node by a pattern; its arguments and ids are made when they are asked for, which must be before what they are is changed in place.

    Parameters
    ----------
    pattern : Pattern
    operands : list of Tensor
    ids : list of int
        The first element id of each; 0 of constants.
    before : int
        The last id before.
    path : str
        Path of the module that ran it.
    """

    __slots__ = ("before", "ids", "is_made", "operands", "pattern")

    def __init__(self, pattern: Pattern, operands: list[Tensor], ids: list[int], before: int, path: str) -> None:
        like = pattern.node
        self.pattern, self.operands, self.ids, self.before, self.path = pattern, operands, ids, before, path
        self.func, self.spec, self.active, self.in_loss = like.func, like.spec, like.active, like.in_loss
        self.operation, self.signature, self.is_made = like.operation, like.signature, False

    def __getattr__(self, name: str) -> Any:
        made: Any
        like, tensors = self.pattern.node, self.pattern.tensors
        if name == "flat":
            made = like.flat.copy()
            for i, view in tensors.items():
                made[i] = view.of(self.operands[view.operand])
        elif name == "arguments":
            views = [tensors[i] for i in self.active]
            made = [view.ids(self.ids[view.operand]) for view in views]
        elif name == "outputs":
            made = [(j, replace(o, start=self.before + o.start)) for j, o in like.outputs]
        else:
            raise AttributeError(f"a node has no {name!r}")
        setattr(self, name, made)
        return made

    def but(self, **changes: Any) -> Node:
        """A node of its own, with some parts changed."""
        given = {of.name: getattr(self, of.name) for of in fields(Node) if of.init}
        return Node(**{**given, **changes})

    def made(self) -> list[Any]:
        """Its arguments, before what they are is changed in place."""
        self.is_made = True
        return self.flat


def repeats_of(nodes: Sequence[Node]) -> list[Repeat]:
    """Nodes as repeats of one pattern; none where they are not, or arguments of some were made while others could change."""
    first = nodes[0] if nodes else None
    if not isinstance(first, Repeat):
        return []
    pattern = first.pattern
    repeats = [node for node in nodes if isinstance(node, Repeat) and node.pattern is pattern and not node.is_made]
    return repeats if len(repeats) == len(nodes) else []


class Flats(Sequence[list[Any]]):
    """The arguments of nodes of one signature, each made when it is asked for."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self._nodes = nodes

    def __len__(self) -> int:
        return len(self._nodes)

    @overload
    def __getitem__(self, k: int) -> list[Any]: ...
    @overload
    def __getitem__(self, k: slice) -> Flats: ...
    def __getitem__(self, k: int | slice) -> list[Any] | Flats:
        return Flats(self._nodes[k]) if isinstance(k, slice) else self._nodes[k].flat

    def stacked(self, position: int) -> Tensor:
        """The tensors there, (K, *shape), in memory of their own."""
        repeats = repeats_of(self._nodes)
        if not repeats:
            return torch.stack([node.flat[position] for node in self._nodes])
        view = repeats[0].pattern.tensors[position]
        return view.of_all([node.operands[view.operand] for node in repeats])
