"""Runs that are plain chains: each operation reads what the one before computed, all of it and nothing else but parameters of its own.

As most networks are that have no branches. Then a state is what the last operation computed, in its order, and there is nothing to sort: no
list of what is live, no wiring. Whether a run is such a chain is told from where tensors begin, whatever their sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from linop_hess.graph.grouping import Alike, Group, group_of
from linop_hess.graph.recording.movement import Views
from linop_hess.graph.rules.nonsmooth import SecondDerivatives
from linop_hess.graph.rules.operation import CONTROL, STATE
from linop_hess.graph.wiring import OBJECTIVE, Stack
from linop_hess.lq.stages.base import Stage

_NOTHING, _UNUSUAL = 0, -1
"""In place of where a state begins: an operation that reads none, and one that no chain has."""


@dataclass(frozen=True)
class ChainGroups:
    """The operations of a chain.

    Attributes
    ----------
    groups : list of Group
    nodes : int
        How many there are.
    """

    groups: list[Group]
    nodes: int

    @property
    def widths(self) -> np.ndarray:
        """Size of the state after each."""
        widths = np.zeros(self.nodes, dtype=np.int64)
        for group in self.groups:
            widths[group.nodes] = group.outputs.shape[1]
        return widths

    def falls_into(self, samples: int, makers: Sequence[Stage]) -> bool:
        """Whether stages treat samples, which lie one after the other, each by itself."""
        return all(maker.samples % samples == 0 for maker in makers)

    def stacks(self, has_objective: bool) -> list[Stack]:
        """The stages, one after the other."""
        stacks = [
            Stack(
                g, np.arange(group.nodes.size), group.nodes, None, group.op.ids.take(group.placement.controls, axis=1)
            )
            for g, group in enumerate(self.groups)
        ]
        if has_objective:
            last = np.array([self.nodes])
            stacks.append(Stack(OBJECTIVE, np.zeros(1, dtype=np.int64), last, None, np.zeros((1, 0), dtype=np.int64)))
        return stacks

    def places(self) -> list[np.ndarray]:
        """Where in all states, one after the other, that stands which each group writes, (K, n_out)."""
        starts = np.cumsum(self.widths) - self.widths
        return [starts[group.nodes][:, None] + np.arange(group.outputs.shape[1]) for group in self.groups]


def chain_of(
    sets: Sequence[Alike], parameters: int, target: np.ndarray, second: SecondDerivatives
) -> ChainGroups | None:
    """The operations that lead to `target`, where they are a chain in which each parameter is used once; None where they are not.

    Parameters
    ----------
    sets : sequence of Alike
        All nodes; what follows those of the chain does not count.
    parameters : int
        Number of parameter entries N.
    target : ndarray of int
        The elements that are read after the chain, in their order.
    second : SecondDerivatives

    Raises
    ------
    UnsupportedModelError
        If an operation of another library has no second derivative that is right, and differences are not allowed.
    """
    count = sum(one.members.size for one in sets)
    states, begins, sizes = np.full(count, _UNUSUAL), np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
    for one in sets:
        if len(one.written) == 1 and one.written[0].is_consecutive:
            begins[one.members], sizes[one.members] = one.written[0].starts, one.written[0].size
            states[one.members] = _state_read(one, parameters)
    ends = np.flatnonzero(begins == target[0]) if target.size and target[0] > 0 else _NONE
    if not ends.size or not np.array_equal(target, np.arange(target[0], target[0] + sizes[ends[0]])):
        return None
    nodes = int(ends[0]) + 1
    if states[0] != _NOTHING or not np.array_equal(states[1:nodes], begins[: nodes - 1]):
        return None
    kept = [one if one.members[-1] < nodes else one.of(one.members < nodes) for one in sets if one.members[0] < nodes]
    if not _are_used_once(kept, parameters):
        return None
    groups = []
    for one in kept:
        if not _reads_all(one, parameters, sizes):
            return None
        given = [np.full(v.size, CONTROL if _is_of_parameters(v, parameters) else STATE) for v in one.read]
        roles = np.concatenate(given)
        group = group_of(one, roles, second)
        if not (np.array_equal(group.op.roles, roles) and _keeps_order(group)):
            return None
        groups.append(group)
    return ChainGroups(groups, nodes)


_NONE = np.zeros(0, dtype=np.int64)


def _state_read(one: Alike, parameters: int) -> np.ndarray | int:
    """Where that begins which each of some nodes reads of the state; `_NOTHING` where they read parameters alone."""
    found: np.ndarray | int = _NOTHING
    for argument in one.read:
        if not isinstance(argument, Views) or not argument.is_run:
            return _UNUSUAL
        of_parameters = argument.starts <= parameters
        if of_parameters.all():
            continue
        if of_parameters.any() or not isinstance(found, int) or not argument.is_consecutive:
            return _UNUSUAL
        found = argument.starts
    return found


def _is_of_parameters(argument: Views | np.ndarray, parameters: int) -> bool:
    return isinstance(argument, Views) and int(argument.starts[0]) <= parameters


def _reads_all(one: Alike, parameters: int, sizes: np.ndarray) -> bool:
    """Whether nodes read all that the one before wrote, which begins where they begin to read."""
    states = [argument for argument in one.read if not _is_of_parameters(argument, parameters)]
    return all(isinstance(state, Views) and bool((sizes[one.members - 1] == state.size).all()) for state in states)


def _are_used_once(sets: Sequence[Alike], parameters: int) -> bool:
    """Whether arguments are each parameter entry once."""
    views = [v for one in sets for v in one.read if isinstance(v, Views) and _is_of_parameters(v, parameters)]
    starts = np.concatenate([_NONE, *(v.starts for v in views)])
    sizes = np.concatenate([_NONE, *(np.full(v.starts.size, v.size) for v in views)])
    order = np.argsort(starts, kind="stable")
    return np.array_equal(np.append(starts[order], parameters + 1), np.cumsum(np.concatenate([[1], sizes[order]])))


def _keeps_order(group: Group) -> bool:
    """Whether stages read all slots, and have their states in the order of the elements."""
    placement, roles = group.placement, group.op.roles
    in_order = placement.written is None or np.array_equal(placement.written, np.arange(placement.written.size))
    return (
        in_order
        and placement.read.size + placement.controls.size == roles.size
        and np.array_equal(placement.read, np.flatnonzero(roles == STATE))
    )
