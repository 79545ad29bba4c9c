"""What a recording consists of."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from linop_hess.graph.recording.movement import Ids, Strided


@dataclass(slots=True)
class Node:
    """An operation that computed something that depends on a parameter.

    Attributes
    ----------
    func : torch._ops.OpOverload
    flat : list
        Its arguments, flattened; tensors as they were when it was called.
    spec : object
        How to unflatten them (see `torch.utils._pytree`).
    active : list of int
        Positions in `flat` of the tensors that depend on parameters.
    arguments : list of Strided or ndarray
        Their element ids.
    outputs : list of (int, Strided)
        The outputs that have a derivative: their place among all outputs, and their ids.
    path : str
        Path of the module that ran it.
    in_loss : bool
        Whether the loss function ran it, and not the model.
    operation : str
        What it is called where `func` is a function of ours.
    signature : hashable
        As `signature_of` tells it, kept; None: not asked for yet.
    """

    func: Any
    flat: list[Any]
    spec: Any
    active: list[int]
    arguments: list[Ids]
    outputs: list[tuple[int, Strided]]
    path: str
    in_loss: bool
    operation: str = ""
    signature: Any = field(default=None, init=False, compare=False)

    @property
    def name(self) -> str:
        """The operation, as ``"aten.addmm"``."""
        return self.operation or operation_name(self.func)

    @property
    def title(self) -> str:
        """The operation and where it is, for messages."""
        return f"{self.name} in module {self.path!r}" if self.path else f"{self.name}"

    def but(self, **changes: Any) -> Node:
        """A node of its own, with some parts changed."""
        return replace(self, **changes)

    def made(self) -> list[Any]:
        """Its arguments, before what they are is changed in place."""
        return self.flat


@cache
def operation_name(func: Any) -> str:
    """Name of an operation without its overload."""
    return str(func).rsplit(".", 1)[0]


@dataclass
class Trace:
    """All nodes of a run, in order.

    Attributes
    ----------
    nodes : list of Node
    parameters : int
        Number N of parameter entries; they have the ids 1..N.
    ids : int
        The largest id.
    """

    nodes: list[Node] = field(default_factory=list)
    parameters: int = 0
    ids: int = 0

    def dtypes(self) -> set[torch.dtype]:
        """Dtypes of all arguments that depend on parameters."""
        return {node.flat[i].dtype for node in self.nodes for i in node.active}


# What most arguments are that are no tensors, told without asking torch.
_NUMBERS = frozenset({int, float, bool, str, type(None)})


def signature_of(node: Node) -> Hashable:
    """What nodes of the same operation on arguments of the same shapes share, of which the same depend on parameters."""
    active, flat = node.active, node.flat
    parts: list[Hashable] = []
    for i, a in enumerate(flat):
        kind = type(a)
        if kind in _NUMBERS:
            parts.append((kind, a))
        elif isinstance(a, Tensor):
            parts.append(
                (a.shape, a.dtype, a.device, _pattern(node.arguments[active.index(i)]) if i in active else None)
            )
        else:
            parts.append(repr(a))
    # Where in its storage an argument begins is no matter, so that the same slice of every step of a sequence is one pattern.
    outputs = tuple((j, o.start - node.outputs[0][1].start, o.shape, o.stride, o.offset) for j, o in node.outputs)
    return node.func, node.in_loss, tuple(parts), outputs


def _pattern(ids: Ids) -> Hashable:
    return ids.stride if isinstance(ids, Strided) else "each"
