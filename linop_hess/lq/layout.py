"""Where the pieces of a stack of same-shaped stages lie in a flat vector.

Stages of one shape are computed together, as arrays with a leading stage axis. Their pieces of a flat vector
start at arbitrary places; most often those are evenly spaced, and then a strided view serves without a copy.
"""

from __future__ import annotations

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
            flat[self.index(flat.device)] = values.reshape(-1, flat.shape[1])

    def add(self, flat: Tensor, values: Tensor) -> None:
        """Add `values`, shape (K, size, k), to the pieces of `flat`."""
        view = self._view(flat)
        if view is not None:
            view.add_(values)
        elif self.count:
            flat.index_add_(0, self.index(flat.device), values.reshape(-1, flat.shape[1]))
