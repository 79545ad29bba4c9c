"""Nodes of one signature as one operation, and the rule that each gets."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from linop_hess.errors import UnsupportedModelError
from linop_hess.graph.liveness import uses
from linop_hess.graph.recording.movement import Ids, Strided, Views
from linop_hess.graph.recording.node import Node, signature_of
from linop_hess.graph.recording.template import Flats, Repeat, repeats_of
from linop_hess.graph.rules.elementwise import Elementwise, ScaleShift
from linop_hess.graph.rules.nonsmooth import Extremum, Pooling, SecondDerivatives
from linop_hess.graph.rules.operation import CONSTANT, CONTROL, STATE, Operation, Placement, Rule, is_aten
from linop_hess.graph.rules.primitive import Whole
from linop_hess.graph.rules.products import Affine, BatchedProduct, Convolution
from linop_hess.graph.rules.reductions import Along, Normalization, Reduction, Standardization

RULES: tuple[Rule, ...] = (
    Affine(),
    Convolution(),
    ScaleShift(),
    BatchedProduct(),
    Elementwise(),
    Along(),
    Reduction(),
    Normalization(),
    Standardization(),
    Pooling(),
    Extremum(),
    Whole(),
)
"""In the order in which they are asked; the last takes all."""


@dataclass(frozen=True)
class Group:
    """An operation, where its nodes are, and its rule.

    Attributes
    ----------
    op : Operation
    nodes : ndarray of int, shape (K,)
        Positions of its nodes among all, ascending.
    rule : Rule
    outputs : ndarray of int, shape (K, o)
        Element ids of the outputs, one after the other, each row-major.
    in_loss : bool
        Whether the loss function ran it.
    paths : tuple of str
        Module paths of the nodes.
    name : str
        Name of the operation, and whether its second derivatives are differences.
    """

    op: Operation
    nodes: np.ndarray
    rule: Rule
    outputs: np.ndarray
    in_loss: bool
    paths: tuple[str, ...]
    name: str

    @cached_property
    def placement(self) -> Placement:
        """What its stages read, control and write."""
        return self.rule.placement(self.op)

    @property
    def written(self) -> np.ndarray:
        """Element ids of what its stages write, (K, n_out)."""
        written = self.placement.written
        return self.outputs if written is None else self.outputs[:, written]

    def in_order(self, parts: np.ndarray) -> Group:
        """The group with the equal parts of its operation in another order."""
        return replace(self, op=replace(self.op, order=parts))

    def without_arguments(self) -> Group:
        """The group without the numbers of its nodes, which `with_arguments` gives it again, or others, and without its outputs."""
        return replace(self.with_arguments([]), outputs=self.outputs[:0].copy())

    def with_arguments(self, flats: Sequence[list[Any]]) -> Group:
        """The group of nodes that are like its own, with their arguments."""
        return replace(self, op=replace(self.op, flats=flats))


@dataclass(frozen=True)
class Alike:
    """Nodes of one signature: the same operation on arguments of the same shapes, of which the same depend on parameters.

    Attributes
    ----------
    signature : hashable
    members : ndarray of int, shape (K,)
        Their positions among all nodes, ascending.
    nodes : list of Node
    """

    signature: Hashable
    members: np.ndarray
    nodes: list[Node]

    @cached_property
    def _repeats(self) -> list[Repeat]:
        return repeats_of(self.nodes)

    @cached_property
    def read(self) -> list[Views | np.ndarray]:
        """Each argument that depends on parameters: where its elements lie, or their ids, (K, entries)."""
        active = self.nodes[0].active
        if not self._repeats:
            return [_together([node.arguments[j] for node in self.nodes]) for j in range(len(active))]
        views = [self._repeats[0].pattern.tensors[i] for i in active]
        starts = [np.array([node.ids[view.operand] for node in self._repeats]) + view.offset for view in views]
        return [Views(start, view.shape, view.stride) for start, view in zip(starts, views, strict=True)]

    @cached_property
    def written(self) -> list[Views]:
        """Where the elements of each output lie."""
        if self._repeats:
            before = np.array([node.before for node in self._repeats])
            like = [output for _, output in self._repeats[0].pattern.node.outputs]
            return [Views(before + (o.start + o.offset), o.shape, o.stride) for o in like]
        outputs = zip(*([output for _, output in node.outputs] for node in self.nodes), strict=True)
        return [Views(_starts(each), each[0].shape, each[0].stride) for each in outputs]

    @cached_property
    def arguments(self) -> list[np.ndarray]:
        """Element ids of each argument that depends on parameters, (K, entries)."""
        return [argument.ids() if isinstance(argument, Views) else argument for argument in self.read]

    @cached_property
    def outputs(self) -> list[np.ndarray]:
        """Element ids of each output, (K, entries)."""
        return [output.ids() for output in self.written]

    def of(self, chosen: np.ndarray) -> Alike:
        """Some of the nodes."""
        return Alike(self.signature, self.members[chosen], [self.nodes[k] for k in np.flatnonzero(chosen).tolist()])

    def print(self) -> Footprint:
        """All of the nodes but their numbers, apart from constants that are no floats: these may say what is moved where."""
        first = self.nodes[0]
        read = [argument.starts if isinstance(argument, Views) else argument for argument in self.read]
        written = [output.starts for output in self.written]
        names = [(node.path, node.operation, node.spec) for node in self.nodes]
        fixed = [i for i, a in enumerate(first.flat) if isinstance(a, Tensor) and not a.is_floating_point()]
        constants = [node.flat[i] for i in fixed if i not in first.active for node in self.nodes]
        return Footprint(self.signature, names, [self.members, *written, *read], constants)


@dataclass(frozen=True)
class Footprint:
    """What nodes of one signature do, apart from numbers."""

    signature: Hashable
    names: list[tuple[Any, ...]]
    places: list[np.ndarray]
    constants: list[Tensor]

    def equals(self, other: Footprint) -> bool:
        """Whether others do the same."""
        return (
            self.signature == other.signature
            and self.names == other.names
            and len(self.places) == len(other.places)
            and all(map(np.array_equal, self.places, other.places))
            and all(map(torch.equal, self.constants, other.constants))
        )


def alike(nodes: Sequence[Node]) -> list[Alike]:
    """Nodes by their signatures, in the order of the first of each."""
    found: dict[Hashable, list[int]] = {}
    same: dict[int, list[int]] = {}  # by the `id` of a signature, which is sooner told than what it equals
    for k, node in enumerate(nodes):
        if node.signature is None:
            node.signature = signature_of(node)
        mine = same.get(id(node.signature))
        if mine is None:
            same[id(node.signature)] = mine = found.setdefault(node.signature, [])
        mine.append(k)
    return [Alike(signature, np.array(mine), [nodes[k] for k in mine]) for signature, mine in found.items()]


# Rounds of leaving out nodes that nothing reads; after a loss that is taken as a whole there are few.
_ROUNDS = 4


def needed_of(sets: Sequence[Alike], needed: np.ndarray, ids: int) -> list[Alike] | None:
    """The nodes that some needed element depends on, told of all at once; None where that would take many rounds: see `live_nodes`."""
    left = list(sets)
    for _ in range(_ROUNDS):
        read = np.zeros(ids + 1, dtype=bool)
        read[needed] = True
        for one in left:
            for argument in one.arguments:
                read[argument] = True
        kept = [np.any(np.concatenate([read[output] for output in one.outputs], 1), axis=1) for one in left]
        if all(bool(mine.all()) for mine in kept):
            return left
        left = [one if mine.all() else one.of(mine) for one, mine in zip(left, kept, strict=True) if mine.any()]
    return None


def live_nodes(nodes: Sequence[Node], needed: np.ndarray, ids: int) -> list[Node]:
    """The nodes that some needed element depends on, in order.

    Parameters
    ----------
    nodes : sequence of Node
    needed : ndarray of int
        Elements.
    ids : int
        The largest element.
    """
    maker = np.full(ids + 1, -1, dtype=np.int64)
    for k, node in enumerate(nodes):
        for _, output in node.outputs:
            maker[output.start : output.start + _extent(output)] = k
    keep = np.zeros(len(nodes), dtype=bool)
    keep[(first := np.unique(maker[needed]))[first >= 0]] = True
    for k in range(len(nodes) - 1, -1, -1):
        if keep[k]:
            for argument in nodes[k].arguments:
                if isinstance(argument, Strided):
                    if (one := maker[argument.start + argument.offset]) >= 0:
                        keep[one] = True
                else:
                    keep[(some := np.unique(maker[argument]))[some >= 0]] = True
    return [node for node, kept in zip(nodes, keep, strict=True) if kept]


def _extent(output: Strided) -> int:
    return output.offset + 1 + sum((size - 1) * step for size, step in zip(output.shape, output.stride, strict=True))


def grouped(sets: Sequence[Alike], parameters: int, target: np.ndarray, second: SecondDerivatives) -> list[Group]:
    """Group nodes by signature and by the roles of what they read, and choose a rule for each group.

    Parameters
    ----------
    sets : sequence of Alike
        All nodes.
    parameters : int
        Number of parameter entries N.
    target : ndarray of int
        Elements that the objective reads besides.
    second : SecondDerivatives
        Where they come from.
    target : ndarray of int, optional
        Elements that are read after all nodes, which is a use of those that are parameters.

    Raises
    ------
    UnsupportedModelError
        If an operation of another library has no second derivative that is right, and differences are not allowed.
    """
    slots = [np.concatenate(one.arguments, 1) for one in sets]
    reads = [_distinct(argument) for one in sets for argument in one.read]
    count = uses(parameters, [*reads, np.unique(target)])
    groups: list[Group] = []
    for one, ids in zip(sets, slots, strict=True):
        is_parameter = (ids > 0) & (ids <= parameters)
        once = is_parameter & (count[np.where(is_parameter, ids, 0)] == 1)
        roles = np.where(ids == 0, CONSTANT, np.where(once, CONTROL, STATE))
        kinds, kind_of = _distinct_rows(roles)
        for kind, row in enumerate(kinds):
            groups.append(group_of(one if len(kinds) == 1 else one.of(kind_of == kind), row, second))
    return groups


def group_of(one: Alike, roles: np.ndarray, second: SecondDerivatives) -> Group:
    """The group of nodes whose slots have the same roles, by the rule for it.

    Raises
    ------
    UnsupportedModelError
        If an operation of another library has no second derivative that is right, and differences are not allowed.
    """
    first = one.nodes[0]
    runs = [
        i for i, argument in zip(first.active, one.read, strict=True) if isinstance(argument, Views) and argument.is_run
    ]
    op = Operation(
        first.func,
        Flats(one.nodes),
        first.spec,
        tuple(first.active),
        tuple(j for j, _ in first.outputs),
        np.concatenate(one.arguments, 1),
        roles,
        first.title,
        frozenset(runs),
    )
    op, rule = _ruled(op)
    op = _differentiated(op, rule, second)
    return Group(
        op,
        one.members,
        rule,
        np.concatenate(one.outputs, 1),
        first.in_loss,
        tuple(node.path for node in one.nodes),
        f"{first.name} (by differences)" if op.by_differences else first.name,
    )


def _ruled(op: Operation) -> tuple[Operation, Rule]:
    """The operation with the roles that its rule gives it."""
    for rule in RULES:
        taken = rule.controls(op) if rule.knows(op.func) else None
        if taken is not None:
            of_state = [bound for i, bound in op.bounds.items() if i not in taken and op.is_controlled(i)]
            if not of_state:
                return op, rule
            roles = op.roles.copy()
            for bound in of_state:
                roles[bound] = np.where(roles[bound] == CONTROL, STATE, roles[bound])
            return replace(op, roles=roles), rule
    raise AssertionError("the last rule takes every operation")


def _differentiated(op: Operation, rule: Rule, second: SecondDerivatives) -> Operation:
    """The operation, told where its second derivatives come from."""
    op = second.smoothed(op)
    if (is_aten(op.func) and not second.finite) or rule.is_twice_differentiable(op):
        return op
    if not second.finite:
        raise UnsupportedModelError(
            f"expected operations with a second derivative, got {op.title}, whose backward pass has none or a wrong one: pass "
            'differentiation="finite" for differences of its first derivatives, or write it in plain torch operations'
        )
    return replace(op, by_differences=True)


def _distinct_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct rows of a matrix, and which of them each row is."""
    if bool((rows == rows[:1]).all()):
        return rows[:1], np.zeros(len(rows), dtype=np.int64)
    kinds, kind_of = np.unique(rows, axis=0, return_inverse=True)
    return kinds, kind_of.reshape(-1)


def _together(ids: Sequence[Ids]) -> Views | np.ndarray:
    """Ids of one argument of K nodes, of one pattern."""
    first = ids[0]
    if isinstance(first, Strided):
        return Views(_starts([one for one in ids if isinstance(one, Strided)]), first.shape, first.stride)
    return np.stack([one for one in ids if isinstance(one, np.ndarray)])


def _starts(ids: Sequence[Strided]) -> np.ndarray:
    return np.array([one.start + one.offset for one in ids])


def _distinct(argument: Views | np.ndarray) -> Views | np.ndarray:
    """The elements that each node reads, along the first axis, none twice; 0 stands for what is not counted."""
    if isinstance(argument, Views):
        if argument.is_run:
            return argument
        argument = argument.ids()
    if bool((argument[:, 1:] > argument[:, :-1]).all()):
        return argument
    mine = np.sort(argument, axis=1)
    mine[:, 1:][mine[:, 1:] == mine[:, :-1]] = 0
    return mine
