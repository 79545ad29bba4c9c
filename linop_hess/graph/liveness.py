"""Live sets: what of the values computed so far is read again later.

The state of a chain after an event is the set of elements that are live there. Everything here runs over whole arrays of elements, with
no loop over the nodes of a network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from linop_hess._memory import require
from linop_hess.graph.recording.movement import Views
from linop_hess.tables import Cuts, Shared


class LiveCuts(Cuts):
    """The states of a recorded network, told from when each element is made and read last.

    Parameters
    ----------
    labels : sequence
        Of each event, as strings its name.
    birth, last : ndarray of int, shape (M + 1,)
        As of `live_sets`.
    parameters : dict of str to int
        Names of the parameters with their numbers of entries; they are the elements from 1 on, one after the other.
    itemsize : int
        Bytes of a number.
    """

    def __init__(
        self, labels: Sequence[object], birth: np.ndarray, last: np.ndarray, parameters: dict[str, int], itemsize: int
    ) -> None:
        chosen = last > birth
        begins, ends = (np.bincount(of[chosen], minlength=len(labels) + 1) for of in (birth, last))
        super().__init__(labels, np.cumsum(begins - ends)[: len(labels)], itemsize)
        self._birth, self._last = birth.astype(np.int32), last.astype(np.int32)
        self._names = tuple(parameters)
        self._edges = np.cumsum([1, *parameters.values()])

    def recipe(self) -> dict[str, Any]:
        """The arguments that make these cuts again, by name."""
        parameters = dict(zip(self._names, np.diff(self._edges).tolist(), strict=True))
        of = {"birth": self._birth, "last": self._last}
        return {"labels": self.labels, **of, "parameters": parameters, "itemsize": self.itemsize}

    def _parameters(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """The parameters among some elements, by name."""
        of = np.searchsorted(self._edges, ids[ids < self._edges[-1]], "right") - 1
        return {self._names[i]: ids[: of.size][of == i] for i in np.unique(of).tolist()}

    def holders(self, l: int) -> dict[str, int]:
        """What is live after stage l, by the operation that made it, or the parameter that it is."""
        live = np.flatnonzero((self._birth <= l) & (self._last > l))
        found = {f"parameter {name}": ids.size for name, ids in self._parameters(live).items()}
        makers, counts = np.unique(self._birth[live[live >= self._edges[-1]]], return_counts=True)
        for event, count in zip(makers.tolist(), counts.tolist(), strict=True):
            name = self.label(event)
            found[name] = found.get(name, 0) + count
        return found

    def shared(self) -> list[Shared]:
        """The parameters that are part of the state."""
        live = np.flatnonzero(self._last[: self._edges[-1]] > self._birth[: self._edges[-1]])
        return [
            Shared(name, ids.size, int(self._birth[ids].min()), int(self._last[ids].max()) - 1)
            for name, ids in self._parameters(live).items()
        ]


@dataclass(frozen=True)
class LiveSets:
    """The live elements after each event, in order.

    Attributes
    ----------
    starts : ndarray of int, shape (T + 1,)
        Where the live set of each event begins in `ids`.
    ids : ndarray of int
        Elements, in ascending order of `rank` within each live set.
    event : ndarray of int
        The event of each entry of `ids`.
    is_new : ndarray of bool
        Whether the entry was computed (or injected) by that very event.
    before : ndarray of int
        Its position in the live set of the event before; −1 where it is new.
    """

    starts: np.ndarray
    ids: np.ndarray
    event: np.ndarray
    is_new: np.ndarray
    before: np.ndarray
    _keys: np.ndarray
    _rank: np.ndarray

    @property
    def widths(self) -> np.ndarray:
        """Size of each live set, shape (T,)."""
        return np.diff(self.starts)

    def positions(self, event: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Positions of elements in the live sets of some events, both of shape (K, …); −1 for the element 0."""
        return _positions(self._keys, self.starts, self._rank, event, ids)


def live_sets(birth: np.ndarray, last: np.ndarray, events: int, rank: np.ndarray) -> LiveSets:
    """Collect the live sets of events 0..events−1.

    Parameters
    ----------
    birth, last : ndarray of int, shape (M + 1,)
        For each element the event that makes it and the last that reads it; it is live from birth to just before last. −1 in `last`:
        it never is.
    events : int
        T.
    rank : ndarray of int, shape (M + 1,)
        A permutation: in which order elements stand in a state.

    Raises
    ------
    MemoryError
        If the sets do not fit into memory.
    """
    chosen = np.flatnonzero(last > birth)
    chosen = chosen[np.argsort(rank[chosen], kind="stable")]
    counts = last[chosen] - birth[chosen]
    total = int(counts.sum())
    require(64.0 * total, f"the list of what is live after each of {events} operations, {total} entries,")
    ids = np.repeat(chosen, counts)  # each with its events one after the other
    begins = np.cumsum(counts) - counts
    event = np.arange(total) - np.repeat(begins - birth[chosen], counts)
    # By event, in the order of rank as they are; numbers of two bytes are sorted in linear time.
    order = np.argsort(event.astype(np.uint16) if events < 2**16 else event, kind="stable")
    ids, event = ids[order], event[order]
    starts = np.concatenate([[0], np.cumsum(np.bincount(event, minlength=events))])
    is_new = birth[ids] == event
    place = np.empty(total, dtype=np.int64)
    place[order] = np.arange(total)
    before = np.full(total, -1, dtype=np.int64)
    old = np.flatnonzero(~is_new)
    before[old] = place[order[old] - 1] - starts[event[old] - 1]
    return LiveSets(starts, ids, event, is_new, before, event * rank.size + rank[ids], rank)


def _positions(
    keys: np.ndarray, starts: np.ndarray, rank: np.ndarray, event: np.ndarray, ids: np.ndarray
) -> np.ndarray:
    at = np.searchsorted(keys, event * rank.size + rank[ids]) - starts[event]
    return np.where(ids > 0, at, -1)


def uses(parameters: int, reads: Sequence[np.ndarray | Views]) -> np.ndarray:
    """How many arguments of operations read each parameter entry, shape (N + 1,).

    Parameters
    ----------
    parameters : int
        N.
    reads : sequence of ndarray of int, or Views
        For each argument (of each of K nodes, along the first axis) the elements it reads, none twice; views are runs.
    """
    steps = np.zeros(parameters + 2, dtype=np.int64)
    for run in reads:
        if isinstance(run, Views):
            starts = run.starts[run.starts <= parameters]
            np.add.at(steps, starts, 1)
            np.add.at(steps, np.minimum(starts + run.size, parameters + 1), -1)
    counts = np.cumsum(steps[:-1])
    for ids in reads:
        if isinstance(ids, Views):
            continue
        flat = ids.reshape(-1)
        flat = flat[(flat > 0) & (flat <= parameters)]
        if flat.size:
            counts += np.bincount(flat, minlength=parameters + 1)
    return counts
