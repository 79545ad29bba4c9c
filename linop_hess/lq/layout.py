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
        First index of each piece, ascending.
    size : int
        Length of every piece.

    Attributes
    ----------
    count : int
        Number of pieces K.
    """

    def __init__(self, starts: np.ndarray, size: int) -> None:
        self.starts = np.asarray(starts, dtype=np.int64)
        self.size = int(size)
        self.count = int(self.starts.size)
        self._begin = int(self.starts[0]) if self.count else 0
        steps = np.diff(self.starts)
        even = steps.size == 0 or bool((steps == steps[0]).all())
        self._step = (int(steps[0]) if steps.size else max(self.size, 1)) if even else None
        self._index: Tensor | None = None

    def take(self, which: np.ndarray) -> Slots:
        """Return the slots of a subset of the pieces."""
        return Slots(self.starts[which], self.size)

    def index(self, device: torch.device) -> Tensor:
        """Flat indices of all pieces, shape (K · size,)."""
        if self._index is None or self._index.device != device:
            flat = (self.starts[:, None] + np.arange(self.size)).ravel()
            self._index = torch.from_numpy(flat).to(device)
        return self._index

    def _view(self, flat: Tensor) -> Tensor | None:
        if self._step is None or self.count == 0:
            return None
        row, column = flat.stride()
        return flat.as_strided(
            (self.count, self.size, flat.shape[1]),
            (self._step * row, row, column),
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


class Layout:
    """Sizes and places of the controls and states of a chain.

    Parameters
    ----------
    stacks : sequence
        Stacks of same-shaped stages.
    order : array_like of int, shape (L, 2)
        For each stage of the chain, its stack and its position there; positions of a stack ascend along the chain.

    Attributes
    ----------
    n_in, n_out, p : ndarray of int, shape (L,)
        Sizes of the state before and after each stage, and of its controls.
    x_offsets, in_offsets, out_offsets : ndarray of int, shape (L + 1,)
        Where controls (N in all), states before (z_0..z_{L−1}) and states after (z_1..z_L) begin.
    x_slots, in_slots, out_slots : list of Slots
        The same by stack.
    first : int
        The first stage with controls: before it no state moves.
    """

    def __init__(self, stacks: Sequence[Sized], order: np.ndarray) -> None:
        self.order = np.asarray(order, dtype=np.int64).reshape(-1, 2)
        of = self.order[:, 0]
        self.n_in, self.n_out, self.p = (
            np.array([getattr(stack, size) for stack in stacks], dtype=np.int64)[of] for size in ("n_in", "n_out", "p")
        )
        self.x_offsets, self.in_offsets, self.out_offsets = map(_offsets, (self.p, self.n_in, self.n_out))
        members = [np.flatnonzero(of == b) for b in range(len(stacks))]
        self.x_slots = [Slots(self.x_offsets[m], s.p) for m, s in zip(members, stacks, strict=True)]
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
