"""From grouped operations to stages on live sets: events, wirings, stacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from linop_hess.graph.grouping import Group
from linop_hess.graph.liveness import LiveCuts, LiveSets, live_sets
from linop_hess.graph.rules.operation import CONTROL, STATE
from linop_hess.lq.wiring import Wiring

INJECTION, IDLE, OBJECTIVE = -1, -2, -3
"""In place of a group's number: what brings shared parameters into the state, what nothing reads, and the loss."""


@dataclass(frozen=True)
class Stack:
    """Events of one group whose wiring is the same: they become a stack of stages.

    Attributes
    ----------
    group : int
        Number of the group, or one of `INJECTION`, `IDLE` and `OBJECTIVE`.
    members : ndarray of int
        Their positions in the group.
    events : ndarray of int
        When they happen, ascending.
    wiring : Wiring or None
        None: the whole state is read, and what is computed is the whole state after.
    controls : ndarray of int, shape (K, p)
        Element ids of their controls.
    """

    group: int
    members: np.ndarray
    events: np.ndarray
    wiring: Wiring | None
    controls: np.ndarray


@dataclass(frozen=True)
class Schedule:
    """All events of a network in order, as stacks.

    Attributes
    ----------
    stacks : list of Stack
    live : LiveSets
        The states; event e leaves the e-th.
    cuts : LiveCuts
        The same as a table.
    """

    stacks: list[Stack]
    live: LiveSets
    cuts: LiveCuts


def order_of(stacks: Sequence[Stack]) -> np.ndarray:
    """For each event its stack and its position there, shape (T, 2)."""
    order = np.zeros((sum(stack.events.size for stack in stacks), 2), dtype=np.int64)
    for b, stack in enumerate(stacks):
        order[stack.events, 0] = b
        order[stack.events, 1] = np.arange(stack.events.size)
    return order


def places_of(stacks: Sequence[Stack], order: np.ndarray) -> np.ndarray:
    """Where each control lies in flat vectors, in the order of the chain; `order` as `order_of` gives it."""
    controls = [stacks[b].controls[k] for b, k in order.tolist()]
    return np.concatenate([np.zeros(0, dtype=np.int64), *controls]).astype(np.int64) - 1


def run_by_loss(stacks: Sequence[Stack], groups: Sequence[Group]) -> frozenset[int]:
    """The stacks whose curvature Gauss-Newton keeps: all that the loss runs; an objective keeps its own."""
    return frozenset(b for b, stack in enumerate(stacks) if stack.group >= 0 and groups[stack.group].in_loss)


CutsOf = Callable[[np.ndarray, np.ndarray, np.ndarray], LiveCuts]
"""Makes a table of cuts from what each event is (group and position there, (T, 2)), and when elements are made and read last."""


def schedule(
    groups: list[Group],
    parameters: int,
    ids: int,
    target: np.ndarray,
    rank: np.ndarray,
    has_objective: bool,
    cuts_of: CutsOf,
) -> Schedule:
    """Lay out a network as a chain of events on live sets.

    Parameters
    ----------
    groups : list of Group
    parameters : int
        N.
    ids : int
        The largest element id.
    target : ndarray of int
        The elements that the loss reads, in its order; without an objective the loss itself.
    rank : ndarray of int, shape (ids + 2,)
        In which order elements stand in a state.
    has_objective : bool
        Whether the loss is one last stage that reads `target`.
    cuts_of : callable
        See `CutsOf`.

    Raises
    ------
    MemoryError
        If the live sets do not fit into memory, with the widest of them; nothing has been allocated.
    """
    nodes = sum(group.nodes.size for group in groups)
    # Time 2k + 1 is node k; 2k, just before it, brings in the shared parameters that it is the first to read.
    end = 2 * nodes + 1
    last = np.full(ids + 2, -1, dtype=np.int64)
    first = np.full(parameters + 1, end, dtype=np.int64)
    birth = np.zeros(ids + 2, dtype=np.int64)
    seen = np.zeros(parameters + 1, dtype=bool)
    for group in groups:
        time = np.broadcast_to(2 * group.nodes[:, None] + 1, group.op.ids.shape)
        states = group.op.roles == STATE
        _latest(last, group.op.ids[:, states], time[:, states])
        read = group.op.ids[:, states]
        shared = (read > 0) & (read <= parameters)
        np.minimum.at(first, read[shared], time[:, states][shared] - 1)
        seen[group.op.ids[:, group.op.roles == CONTROL].reshape(-1)] = True
        birth[group.outputs] = (2 * group.nodes + 1)[:, None]
    last[0] = -1
    if has_objective:
        read = target[target > 0]
        last[read] = end
        shared_targets = read[read <= parameters]
        first[shared_targets] = np.minimum(first[shared_targets], end - 1)
    else:
        last[target] = end + 2  # the state after the last event
    injected = np.flatnonzero(first < end)
    injected = injected[injected > 0]
    birth[injected] = first[injected]
    seen[injected] = True
    idle = np.flatnonzero(~seen[1:]) + 1
    ends = np.array([end] * has_objective + [-1] * bool(idle.size), dtype=np.int64)
    times = np.unique(np.concatenate([first[injected], np.arange(1, 2 * nodes, 2), ends]))

    events_before = np.searchsorted(times, np.arange(-1, end + 3))  # by time, the first −1

    def event_of(time: np.ndarray) -> np.ndarray:
        return np.asarray(events_before[time + 1])

    used = last >= 0
    last[used] = event_of(last[used])
    birth = event_of(birth)
    if has_objective:
        birth[ids + 1], last[ids + 1] = times.size - 1, times.size  # the loss
    what = np.full((times.size, 2), (INJECTION, 0), dtype=np.int64)
    for g, group in enumerate(groups):
        what[event_of(2 * group.nodes + 1)] = np.column_stack(
            [np.full(group.nodes.size, g), np.arange(group.nodes.size)]
        )
    if idle.size:
        what[0, 0] = IDLE
    if has_objective:
        what[-1, 0] = OBJECTIVE
    cuts = cuts_of(what, birth, last)
    with cuts.told():
        live = live_sets(birth, last, times.size, rank)
    events = _Events(live, ids + 1)
    if idle.size:
        events.add(IDLE, _NONE, np.zeros(1, dtype=np.int64), _NONE, idle[None])
    for of_size, when in _injections(injected, event_of(first[injected])):
        events.add(INJECTION, np.zeros((when.size, 0), dtype=np.int64), when, of_size, of_size)
    for g, group in enumerate(groups):
        placement, read = group.placement, group.op.ids
        events.add(
            g, read[:, placement.read], event_of(2 * group.nodes + 1), group.written, read[:, placement.controls]
        )
    if has_objective:
        events.add(OBJECTIVE, target[None], np.array([times.size - 1]), np.array([[ids + 1]]), _NONE)
    return Schedule(events.stacks(), live, cuts)


_NONE = np.zeros((1, 0), dtype=np.int64)


def _latest(last: np.ndarray, ids: np.ndarray, time: np.ndarray) -> None:
    np.maximum.at(last, ids.reshape(-1), time.reshape(-1))


def _injections(ids: np.ndarray, events: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Parameters by when they are brought into the state: for each number p of them at once, (K, p) ids and K events."""
    order = np.argsort(events, kind="stable")
    distinct, begins, counts = np.unique(events[order], return_index=True, return_counts=True)
    for size in np.unique(counts):
        mine = np.flatnonzero(counts == size)
        yield ids[order][begins[mine][:, None] + np.arange(size)], distinct[mine]


@dataclass(frozen=True)
class _Kind:
    """Events added together: where they read, what they compute and control."""

    group: int
    at: np.ndarray  # (K, r) positions in the state before
    events: np.ndarray
    outputs: int
    controls: np.ndarray


class _Events:
    """All events, to be stacked by kind and wiring."""

    def __init__(self, live: LiveSets, ids: int) -> None:
        self._live = live
        self._kinds: list[_Kind] = []
        # Of each element among the outputs of the stage that computes it.
        self._place = np.zeros(ids + 1, dtype=np.int64)

    def add(self, group: int, read: np.ndarray, events: np.ndarray, outputs: np.ndarray, controls: np.ndarray) -> None:
        """Add K events with elements that are read (K, r), computed (K, o), and controlled (K, p)."""
        at = read
        if read.size:
            before = np.broadcast_to(np.maximum(events - 1, 0)[:, None], read.shape)
            at = self._live.positions(before, read)
        self._place[outputs] = np.arange(outputs.shape[1])
        self._kinds.append(_Kind(group, np.ascontiguousarray(at), events, outputs.shape[1], controls))

    def stacks(self) -> list[Stack]:
        """Events of one kind and wiring together."""
        live = self._live
        source = np.where(live.is_new, -1 - self._place[live.ids], live.before)
        widths = np.concatenate([[0], live.widths])  # before the first event there is no state
        out = []
        for kind in self._kinds:
            found: list[np.ndarray] = []
            before, after = widths[kind.events], widths[kind.events + 1]
            sizes = before * (int(after.max(initial=0)) + 1) + after
            for size in np.unique(sizes):
                mine = np.flatnonzero(sizes == size)
                sources = source[live.starts[kind.events[mine]][:, None] + np.arange(after[mine[0]])]
                found += [mine[part] for part in _alike_rows(np.concatenate([kind.at[mine], sources], 1))]
            for which in sorted(found, key=lambda members: int(members[0])):
                first = int(which[0])
                event = int(kind.events[first])
                wiring = _wiring(
                    int(widths[event]),
                    kind.at[first],
                    source[live.starts[event] : live.starts[event + 1]],
                    kind.outputs,
                )
                out.append(Stack(kind.group, which, kind.events[which], wiring, kind.controls[which]))
        return out


def _alike_rows(rows: np.ndarray) -> list[np.ndarray]:
    """The numbers of the rows of a matrix that are equal, ascending."""
    if bool((rows == rows[:1]).all()):
        return [np.arange(len(rows))]
    keys = rows @ np.random.default_rng(0).integers(1, 2**62, rows.shape[1])  # modulo 2^64
    _, first, of = np.unique(keys, return_index=True, return_inverse=True)
    if not np.array_equal(rows, rows[first[of]]):
        of = np.unique(rows, axis=0, return_inverse=True)[1].reshape(-1)
    order = np.argsort(of, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(of[order])) + 1)


def _wiring(n_in: int, read: np.ndarray, source: np.ndarray, outputs: int) -> Wiring | None:
    """The wiring, `source` giving for each entry of the state after its place before, or −1 − its place among the outputs."""
    kept, put = np.flatnonzero(source >= 0), np.flatnonzero(source < 0)
    from_outputs = -1 - source[put]
    if not kept.size and np.array_equal(read, np.arange(n_in)) and np.array_equal(from_outputs, np.arange(outputs)):
        return None
    indices = (read, source[kept], kept, from_outputs, put)
    return Wiring(n_in, source.size, outputs, *(torch.from_numpy(i.astype(np.int64)) for i in indices))
