"""Where the stages of a chain lie in flat vectors, stack by stack.

Stages of one shape are computed together, as arrays with a leading stage axis. Their pieces of a flat vector
start at arbitrary places; most often those are evenly spaced, and then a strided view serves without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class Slots:
    """K equally long, disjoint pieces of a flat vector.

    Parameters
    ----------
    starts : ndarray, shape (K,)
        First index of each piece, ascending unless there is an `index`.
    size : int
        Length of every piece.
    index : ndarray, shape (K, size), optional
        Flat index of every entry; by default those of a piece are neighbours.

    Attributes
    ----------
    count : int
        Number of pieces K.
    """

    def __init__(self, starts: np.ndarray, size: int, index: np.ndarray | None = None) -> None:
        self.starts = np.asarray(starts, dtype=np.int64)
        self.size = int(size)
        self.count = int(self.starts.size)
        self._of = index
        self._begin = int(self.starts[0]) if self.count else 0
        step = _spacing(self.starts, max(self.size, 1))
        along = 1 if index is None else _spacing(index[0], 1) if index.size else 1
        even = index is None or (
            along is not None and bool((index == self.starts[:, None] + along * np.arange(self.size)).all())
        )
        # A view where pieces, and the entries of each, are evenly spaced, and ascend.
        self._steps = (step, along) if even and step is not None and along is not None else None
        self._index: Tensor | None = None

    @classmethod
    def at(cls, index: np.ndarray) -> Slots:
        """Slots whose entries lie anywhere: `index` of shape (K, size), no two alike."""
        count, size = index.shape
        if not size:
            return cls(np.zeros(count, dtype=np.int64), 0)
        contiguous = bool((np.diff(index, axis=1) == 1).all())
        return cls(index[:, 0], size, None if contiguous and _ascends(index[:, 0]) else index)

    def take(self, which: slice | np.ndarray) -> Slots:
        """Return the slots of a subset of the pieces."""
        return Slots(self.starts[which], self.size, None if self._of is None else self._of[which])

    def index(self, device: torch.device) -> Tensor:
        """Flat indices of all pieces, shape (K · size,)."""
        if self._index is None or self._index.device != device:
            flat = self.starts[:, None] + np.arange(self.size) if self._of is None else self._of
            self._index = torch.from_numpy(np.ascontiguousarray(flat).ravel()).to(device)
        return self._index

    def _view(self, flat: Tensor) -> Tensor | None:
        if self._steps is None or self.count == 0:
            return None
        (step, along), (row, column) = self._steps, flat.stride()
        return flat.as_strided(
            (self.count, self.size, flat.shape[1]),
            (step * row, along * row, column),
            flat.storage_offset() + self._begin * row,
        )

    def gather(self, flat: Tensor) -> Tensor:
        """Read the pieces of `flat`, shape (T, k), as (K, size, k); a view where the spacing is even."""
        view = self._view(flat)
        if view is not None:
            return view
        return flat[self.index(flat.device)].view(self.count, self.size, flat.shape[1])

    def put(self, flat: Tensor, values: Tensor) -> None:
        """Write `values`, shape (K, size, k), into the pieces of `flat`."""
        view = self._view(flat)
        if view is not None:
            view.copy_(values)
        elif self.count:
            flat[self.index(flat.device)] = values.reshape(self.count * self.size, flat.shape[1])

    def add(self, flat: Tensor, values: Tensor) -> None:
        """Add `values`, shape (K, size, k), to the pieces of `flat`."""
        view = self._view(flat)
        if view is not None:
            view.add_(values)
        elif self.count:
            flat.index_add_(0, self.index(flat.device), values.reshape(self.count * self.size, flat.shape[1]))


class Sized(Protocol):
    """What a layout needs to know of a stack of stages."""

    @property
    def n_in(self) -> int: ...
    @property
    def n_out(self) -> int: ...
    @property
    def p(self) -> int: ...


def sizes_of(stacks: Sequence[Sized]) -> list[tuple[int, int, int]]:
    """Sizes of the stages of each stack: state before, state after, controls."""
    return [(int(stack.n_in), int(stack.n_out), int(stack.p)) for stack in stacks]


class Layout:
    """Sizes and places of the controls and states of a chain.

    Parameters
    ----------
    stacks : sequence
        Stacks of same-shaped stages.
    order : array_like of int, shape (L, 2)
        For each stage of the chain, its stack and its position there; positions of a stack ascend along the chain.
    places : array_like of int, shape (N,), optional
        Where each control lies in a flat vector, in the order of the chain: stage by stage, and of each in its own order. By default
        flat vectors are in that order.

    Attributes
    ----------
    places : ndarray of int, shape (N,), or None
        None: flat vectors are in the order of the chain.
    n_in, n_out, p : ndarray of int, shape (L,)
        Sizes of the state before and after each stage, and of its controls.
    x_offsets, in_offsets, out_offsets : ndarray of int, shape (L + 1,)
        Where controls (N in all), states before (z_0..z_{L−1}) and states after (z_1..z_L) begin, in the order of the chain.
    x_slots, in_slots, out_slots : list of Slots
        The same by stack.
    first : int
        The first stage with controls: before it no state moves.
    sizes : list of (int, int, int)
        Of the stages of each stack: state before, state after, controls.

    Raises
    ------
    ValueError
        If `places` is not a permutation of 0..N − 1.
    """

    def __init__(self, stacks: Sequence[Sized], order: np.ndarray, places: np.ndarray | None = None) -> None:
        self.order = np.asarray(order, dtype=np.int64).reshape(-1, 2)
        self.sizes = sizes_of(stacks)
        of = self.order[:, 0]
        self.n_in, self.n_out, self.p = np.array(self.sizes, dtype=np.int64).reshape(-1, 3)[of].T.copy()
        self.x_offsets, self.in_offsets, self.out_offsets = map(_offsets, (self.p, self.n_in, self.n_out))
        members = [np.flatnonzero(of == b) for b in range(len(stacks))]
        self.places = _permutation(places, self.size)
        self.x_slots = [self._x_slots(self.x_offsets[m], s.p) for m, s in zip(members, stacks, strict=True)]
        self.in_slots = [Slots(self.in_offsets[m], s.n_in) for m, s in zip(members, stacks, strict=True)]
        self.out_slots = [Slots(self.out_offsets[m], s.n_out) for m, s in zip(members, stacks, strict=True)]
        with_controls = np.flatnonzero(self.p)
        self.first = int(with_controls[0]) if with_controls.size else self.length

    @property
    def length(self) -> int:
        """Number of stages L."""
        return self.order.shape[0]

    @property
    def size(self) -> int:
        """Number of controls N = Σ p_l."""
        return int(self.x_offsets[-1])

    @property
    def size_in(self) -> int:
        """Σ n_0..n_{L−1}."""
        return int(self.in_offsets[-1])

    @property
    def size_out(self) -> int:
        """Σ n_1..n_L."""
        return int(self.out_offsets[-1])

    def _x_slots(self, starts: np.ndarray, size: int) -> Slots:
        if self.places is None:
            return Slots(starts, size)
        return Slots.at(self.places[starts[:, None] + np.arange(size)])

    def controls(self, l: int) -> np.ndarray:
        """Where the controls of stage l lie in a flat vector, in the order of the stage, shape (p_l,)."""
        own = np.arange(self.x_offsets[l], self.x_offsets[l + 1])
        return own if self.places is None else self.places[own]

    def in_chain_order(self, flat: Tensor) -> Tensor:
        """Rows of `flat`, one a control, in the order of the chain; itself where they are."""
        return flat if self.places is None else flat[torch.from_numpy(self.places).to(flat.device)]

    def in_flat_order(self, chain: Tensor) -> Tensor:
        """The inverse of `in_chain_order`."""
        return chain if self.places is None else chain[torch.from_numpy(np.argsort(self.places)).to(chain.device)]

    def shift(self, y: Tensor) -> Tensor:
        """P: (z_1..z_L) to (z_0..z_{L−1}) with z_0 = 0."""
        out = y.new_zeros(self.size_in, y.shape[1])
        out[self.n_in[0] :] = y[: self.size_out - self.n_out[-1]]
        return out

    def shift_adjoint(self, d: Tensor) -> Tensor:
        """Pᵀ: (z_0..z_{L−1}) to (z_1..z_L) with z_L = 0."""
        out = d.new_zeros(self.size_out, d.shape[1])
        out[: self.size_out - self.n_out[-1]] = d[self.n_in[0] :]
        return out

    def after_first(self) -> list[tuple[int, np.ndarray]]:
        """(stack, positions in it) of all stages but the first."""
        rest = self.order[1:]
        return [(int(b), rest[rest[:, 0] == b, 1]) for b in np.unique(rest[:, 0])]


def _offsets(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def _spacing(starts: np.ndarray, of_one: int) -> int | None:
    """The distance of neighbours, not negative, where it is the same for all, `of_one` where there are none; else None."""
    steps = np.diff(starts)
    if not steps.size:
        return of_one
    return int(steps[0]) if steps[0] >= 0 and bool((steps == steps[0]).all()) else None


def _ascends(starts: np.ndarray) -> bool:
    return bool((np.diff(starts) > 0).all())


def _is_permutation(places: np.ndarray) -> bool:
    """Whether whole numbers are 0, 1, … in some order."""
    if not places.size:
        return True
    if places.min() < 0 or places.max() >= places.size:
        return False
    seen = np.zeros(places.size, dtype=bool)
    seen[places] = True
    return bool(seen.all())


def _permutation(places: np.ndarray | None, size: int) -> np.ndarray | None:
    """Check places, and tell whether there is anything to permute."""
    if places is None:
        return None
    found = np.asarray(places)
    are_numbers = found.shape == (size,) and (not size or found.dtype.kind in "iu")
    if are_numbers and np.array_equal(found, np.arange(size)):
        return None
    if not are_numbers or not _is_permutation(found):
        raise ValueError(
            f"expected places to be a permutation of 0..{size - 1}, one place for each control, got an array of shape {found.shape} "
            f"and dtype {found.dtype}: give each control, in the order of the chain, an index of its own"
        )
    return found.astype(np.int64)
