"""The graph of a batch's gradient, recorded once and used by many products while memory allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from linop_hess._memory import available_on, empty, is_huge
from linop_hess.autograd.backward_graph import has_zeros_without_memory, saved_bytes
from linop_hess.autograd.differentiate import Gradients, flat_copy

Product = Callable[[Tensor], Tensor]
"""Multiplies a block (n, k) by one batch's curvature matrix."""

# From a weight of this size on (128 × 128 in float64) sixteen copies of it take longer to allocate and to move than
# batching saves (tests/benchmarks/hvp.py).
_LARGEST_BATCHED = 2**17

# Of the memory that was free when an operator was made, what must stay free for a graph to be kept.
_STAYS_FREE = 0.5

# Of the memory that is free, what the columns that are multiplied at once may take.
_FOR_COLUMNS = 0.25


class Recording:
    """One batch's curvature matrix, as a graph: a product is a backward pass through it.

    Parameters
    ----------
    product : callable
        ``product(v, batched)`` multiplies a flat vector (n,), or the k rows of v (k, n) where `batched`, and returns the
        result in tensors of the parameters' shapes, with k first where `batched`.
    graph : sequence of torch.Tensor
        The tensors whose graphs `product` goes through.
    parameters : sequence of torch.Tensor
    """

    def __init__(
        self,
        product: Callable[[Tensor, bool], Gradients],
        graph: Sequence[Tensor],
        parameters: Sequence[Tensor],
    ) -> None:
        self.product, self.graph, self.parameters = product, graph, parameters
        self.sizes = [parameter.numel() for parameter in parameters]
        self._column_bytes: int | None = None
        self._batched: bool | None = None  # not known yet

    def __call__(self, X: Tensor) -> Tensor:
        """Return the product with a block, both of shape (n, k); the result is nobody else's."""
        if X.shape[1] == 1:
            return self._single(X[:, 0].contiguous())[:, None]
        rows = empty(X.shape[::-1], X).copy_(X.T)
        if self._batched is None:
            self._batched = self._can_batch(rows[:2])
        out = empty(rows.shape, X)
        chunk = max(1, int(_FOR_COLUMNS * available_on(X.device) / self.column_bytes)) if self._batched else 1
        if chunk == 1:
            for row, result in zip(rows, out, strict=True):
                self._single(row, result)
        else:
            for part, result in zip(rows.split(chunk), out.split(chunk), strict=True):
                self._at_once(part, result)
        return out.T

    @property
    def column_bytes(self) -> int:
        """About the bytes that one column of a block needs: as much as the graph has saved, and the results twice."""
        if self._column_bytes is None:
            results = sum(parameter.numel() * parameter.element_size() for parameter in self.parameters)
            self._column_bytes = saved_bytes(self.graph) + 2 * results
        return self._column_bytes

    def _single(self, flat: Tensor, out: Tensor | None = None) -> Tensor:
        product = zip(self.product(flat, False), self.sizes, strict=True)
        parts = [flat.new_zeros(size) if h is None else h for h, size in product]
        if out is None and not is_huge(flat.shape, flat):
            return flat_copy(parts)
        return torch.cat([part.reshape(-1) for part in parts], out=empty(flat.shape, flat) if out is None else out)

    def _at_once(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        k = len(rows)
        product = zip(self.product(rows, True), self.sizes, strict=True)
        parts = [rows.new_zeros(k, size) if h is None else h.reshape(k, -1) for h, size in product]
        return torch.cat(parts, dim=1, out=empty(rows.shape, rows) if out is None else out)

    def _can_batch(self, rows: Tensor) -> bool:
        """Tell whether columns multiplied at once are right, which torch's batching rules do not promise, and pay."""
        if any(parameter.numel() * parameter.element_size() >= _LARGEST_BATCHED for parameter in self.parameters):
            return False
        if has_zeros_without_memory(*self.graph):
            return False
        try:
            batched = self._at_once(rows)[-1]
        except RuntimeError:  # an operation without a batching rule, or with a wrong one
            return False
        single = self._single(rows[-1])
        # A wrong rule is off by order one; rounding is amplified by ill-conditioned operations such as norms.
        gap = torch.linalg.vector_norm(batched - single)
        return bool(gap <= torch.finfo(single.dtype).eps ** 0.5 * torch.linalg.vector_norm(single))


class Recordings:
    """The recordings of an operator's batches, kept from product to product.

    A recording is kept while half of the memory that was free at the start stays free, and used again while the data
    of its batch are equal to those it was recorded with, of which it has a copy. Copies and pickles hold none.

    Parameters
    ----------
    device : torch.device
        Where the graphs lie.
    keep : bool
        Whether to keep any.
    """

    def __init__(self, device: torch.device, keep: bool = True) -> None:
        self.device, self.keep = device, keep
        self._kept: dict[int, tuple[Any, Product]] = {}
        self._must_stay_free = _STAYS_FREE * available_on(device) if keep else 0.0

    def __len__(self) -> int:
        return len(self._kept)

    def __getstate__(self) -> dict[str, Any]:
        return {"device": self.device, "keep": self.keep}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def recording(self, index: int, data: Any, record: Callable[[Any], Product]) -> Product:
        """Return the recording of a batch: the kept one where the data are still the same, else a new one."""
        if index in self._kept and _equal(self._kept[index][0], data):
            return self._kept[index][1]
        self._kept.pop(index, None)  # now, that two of one batch never take memory
        if not (self.keep and _can_copy(data)):
            return record(data)
        private = _copy(data)
        # A loss may differentiate by its data, as physics-informed ones do: then it must be given those that it knows.
        recording = record(data if _requires_grad(data) else private)
        if available_on(self.device) > self._must_stay_free:
            self._kept[index] = private, recording
        return recording

    def release(self) -> None:
        """Free the memory of all recordings."""
        self._kept.clear()


def _requires_grad(data: Any) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves(data))


def _can_copy(data: Any) -> bool:
    """Tell whether all that data consist of can be copied and compared."""
    if isinstance(data, Tensor):
        return type(data) is Tensor and data.layout == torch.strided and not data.is_meta and not data.is_quantized
    if isinstance(data, dict):
        return all(map(_can_copy, data.values()))
    if isinstance(data, tuple | list):
        return type(data) in (tuple, list) and all(map(_can_copy, data))
    return data is None or isinstance(data, bool | int | float | str | bytes | np.ndarray)


def _copy(data: Any) -> Any:
    if isinstance(data, Tensor):
        return data.detach().clone()
    if isinstance(data, np.ndarray):
        return data.copy()
    if isinstance(data, dict):
        return {key: _copy(item) for key, item in data.items()}
    return type(data)(map(_copy, data)) if isinstance(data, tuple | list) else data


def _equal(ours: Any, theirs: Any) -> bool:
    """Tell whether data equal the copy that was made of them, dtypes and devices included."""
    if type(ours) is not type(theirs):
        return False
    if isinstance(ours, Tensor):
        return ours.dtype == theirs.dtype and ours.device == theirs.device and torch.equal(ours, theirs)
    if isinstance(ours, np.ndarray):
        return ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(_equal(item, theirs[key]) for key, item in ours.items())
    if isinstance(ours, tuple | list):
        return len(ours) == len(theirs) and all(map(_equal, ours, theirs))
    return bool(ours == theirs)
