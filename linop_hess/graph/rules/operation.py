"""Recorded operations as stages: what a rule must tell.

K nodes of one signature are one `Operation`: they are differentiated together, as one stack of stages.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_unflatten

from linop_hess.graph.recording.template import Flats
from linop_hess.lq.stages.base import Stage

CONSTANT, STATE, CONTROL = 0, 1, 2
"""What an entry of an argument is: a number, an entry of the state, or a parameter that only this operation uses."""


@dataclass(frozen=True)
class Operation:
    """K nodes that carry out the same operation on arguments of the same shapes, whose entries play the same roles.

    The entries of the active arguments, one argument after the other, each row-major, are the *slots* of a node.

    Attributes
    ----------
    func : callable
        The operation, a `torch._ops.OpOverload` or a function of ours.
    flats : sequence of list
        The flattened arguments of each node.
    spec : object or None
        How to unflatten them; None: they are the positional ones.
    active : tuple of int
        Positions of the arguments that depend on parameters.
    outputs : tuple of int
        Places of the differentiable outputs among all.
    ids : ndarray of int, shape (K, m)
        Element id of each slot.
    roles : ndarray of int, shape (m,)
        `CONSTANT`, `STATE` or `CONTROL`, of each slot.
    title : str
        The first node, for messages.
    distinct : frozenset of int
        Positions of some arguments in which, it is known, no element occurs twice, of any node.
    order : ndarray of int or None
        In which order a rule is to take the equal parts that it finds; None: as they come. Kinds that have none ignore it.
    sharpness : float or None
        That of the surrogate whose second derivatives are taken in place of those of `func`; None: `func`'s own.
    by_differences : bool
        Whether second derivatives are differences of first ones, as autograd has none.
    """

    func: Any
    flats: Sequence[list[Any]]
    spec: Any
    active: tuple[int, ...]
    outputs: tuple[int, ...]
    ids: np.ndarray
    roles: np.ndarray
    title: str
    distinct: frozenset[int] = frozenset()
    order: np.ndarray | None = None
    sharpness: float | None = None
    by_differences: bool = False

    @property
    def count(self) -> int:
        """K."""
        return len(self.flats)

    @property
    def flat(self) -> list[Any]:
        """The arguments of the first node."""
        return self.flats[0]

    @cached_property
    def bounds(self) -> dict[int, slice]:
        """The slots of each active argument."""
        edges = np.cumsum([0, *(self.flat[i].numel() for i in self.active)])
        return {i: slice(int(a), int(b)) for i, a, b in zip(self.active, edges[:-1], edges[1:], strict=True)}

    def ordered(self, parts: np.ndarray) -> np.ndarray:
        """Entries of parts, the first axis, in `order`, flat."""
        return (parts if self.order is None else parts[self.order]).reshape(-1)

    def in_order(self, parts: Tensor) -> Tensor:
        """The same for the second axis of arrays of all nodes, (K, R, …)."""
        return parts if self.order is None else parts[:, torch.from_numpy(self.order).to(parts.device)]

    def role(self, position: int) -> int:
        """The role of all entries of an argument, −1 where they differ; numbers and tensors that are not active are constant."""
        return self._role_of.get(position, CONSTANT)

    @cached_property
    def _role_of(self) -> dict[int, int]:
        """The role of each active argument."""
        of = {i: self.roles[bound] for i, bound in self.bounds.items()}
        return {i: int(roles[0]) if bool((roles == roles[0]).all()) else -1 for i, roles in of.items()}

    def is_controlled(self, position: int) -> bool:
        """Whether some entry of an argument is a control."""
        role = self.role(position)
        return role == CONTROL or role < 0 and bool((self.roles[self.bounds[position]] == CONTROL).any())

    def are_distinct(self, position: int) -> bool:
        """Whether no element occurs twice in an argument of any node."""
        if position in self.distinct:
            return True
        ids, shape = self.ids[:, self.bounds[position]], self.flat[position].shape
        if _ascend(ids) or _ascend(
            ids.reshape(-1, *shape).T.reshape(ids.shape[1], -1).T
        ):  # as weights do, transposed or not
            return True
        ids = np.sort(ids, axis=1)
        return bool((ids[:, 1:] != ids[:, :-1]).all())

    def stacked(self, position: int) -> Tensor:
        """The argument of all nodes, shape (K, *shape), in memory of its own: what a model was given may change later."""
        if self.count == 1:
            return self.flat[position][None].clone()
        if isinstance(self.flats, Flats):
            return self.flats.stacked(position)
        return torch.stack([flat[position] for flat in self.flats])

    @cached_property
    def tensors(self) -> list[int]:
        """Positions of all tensor arguments."""
        return [i for i, a in enumerate(self.flat) if isinstance(a, Tensor)]

    def call(self, func: Callable[..., Any], tensors: dict[int, Tensor]) -> list[Tensor]:
        """Carry out `func` with the first node's arguments but for `tensors`; give the differentiable outputs."""
        flat = list(self.flat)
        for i, tensor in tensors.items():
            flat[i] = tensor
        args, kwargs = tree_unflatten(flat, self.spec) if self.spec is not None else (flat, {})
        results = func(*args, **kwargs)
        results = results if isinstance(results, (tuple, list)) else (results,)
        return [results[j] for j in self.outputs]

    def argument(self, name: str, default: Any = None) -> Any:
        """An argument of the first node by its name in the operation's schema."""
        args, kwargs = tree_unflatten(self.flat, self.spec) if self.spec is not None else (self.flat, {})
        if name in kwargs:
            return kwargs[name]
        for k, argument in enumerate(self.func._schema.arguments):
            if argument.name == name:
                return args[k] if k < len(args) else (argument.default_value if default is None else default)
        return default


@dataclass(frozen=True)
class Placement:
    """What a stage's state, controls and outputs are.

    Attributes
    ----------
    read : ndarray of int
        Slot of each entry of the state that the stage reads.
    controls : ndarray of int
        Slot of each control.
    written : ndarray of int or None
        Entry of the node's outputs (one after the other, row-major) that each output of the stage is; None: in that order.
    """

    read: np.ndarray
    controls: np.ndarray
    written: np.ndarray | None = None


NOTHING = np.zeros(0, dtype=np.int64)


class Rule(ABC):
    """How operations of a family become stages."""

    is_generic: bool = False
    """Whether the second derivatives are torch's of an operation that nobody looked at."""

    @abstractmethod
    def knows(self, func: Any) -> bool:
        """Whether an operation is one of the family."""

    @abstractmethod
    def controls(self, op: Operation) -> frozenset[int] | None:
        """Positions of the arguments that may be controls; None where the rule does not fit.

        An argument that is not among them becomes part of the state where it has the role `CONTROL`.
        """

    @abstractmethod
    def placement(self, op: Operation) -> Placement:
        """What the stages read, control and write."""

    @abstractmethod
    def linearize(self, op: Operation) -> Stage:
        """Stages with F and G; curvature may be left out."""

    def curve(self, op: Operation, stage: Stage, beta: Tensor) -> Stage:
        """The same stages with A, B and C for adjoints `beta` of their outputs, shape (K, n_out)."""
        return stage.with_adjoint(beta)

    def is_twice_differentiable(self, op: Operation) -> bool:
        """Whether autograd has the second derivatives that `curve` needs."""
        return True


def out_of_place(func: Any) -> Any:
    """The operation that computes what one in place does, without writing."""
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.name.endswith("_") or schema.name.endswith("__"):
        return func
    packet = getattr(torch.ops.aten, schema.name.split("::")[1][:-1], None)
    if packet is None:
        return func
    # By what it takes: pow_.Scalar is pow.Tensor_Scalar, and pow.Scalar another operation.
    taken = [str(a.type) for a in schema.arguments]
    own = getattr(packet, func._overloadname, None)
    others = (getattr(packet, name) for name in packet.overloads())
    for other in [own, *others] if own is not None else others:
        if [str(a.type) for a in other._schema.arguments] == taken and not other._schema.is_mutable:
            return other
    return func if own is None else own


def is_aten(func: Any) -> bool:
    """Whether an operation is one of torch's own, or a function of ours made of these."""
    schema = getattr(func, "_schema", None)
    return schema is None or schema.name.startswith("aten::")


def base_name(func: Any) -> str:
    """Name of an ATen operation without its overload and the mark of one in place; empty for functions of ours."""
    schema = getattr(func, "_schema", None)
    return "" if schema is None else schema.name.removeprefix("aten::").rstrip("_")


@cache
def argument_names(func: Any) -> tuple[str, ...]:
    """The names in an operation's schema."""
    return tuple(a.name for a in func._schema.arguments)


def _ascend(ids: np.ndarray) -> bool:
    """Whether the entries of each row grow from one to the next."""
    return bool((ids[:, 1:] > ids[:, :-1]).all())


def named_arguments(func: Any, flat: Sequence[Any], spec: Any) -> dict[str, Any]:
    """The flattened arguments of an operation by their names in its schema, those that were given."""
    args, kwargs = tree_unflatten(list(flat), spec) if spec is not None else (flat, {})
    return {**dict(zip(argument_names(func), args, strict=False)), **kwargs}
