"""Arrays of a stack of K alike things, with a common leading axis."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

# Bytes of the largest array of what is worked on at a time: new memory takes longer than what is computed in it, and several such arrays
# fit in a cache.
_AT_A_TIME = 1 << 21


def parts(count: int, nbytes: int) -> list[slice]:
    """Neighbours among `count` things, of so many bytes each, that are worked on at a time."""
    step = max(1, _AT_A_TIME // max(nbytes, 1))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def neighbours(at: np.ndarray) -> slice | np.ndarray:
    """Ascending positions, of one at least, as a slice where they are neighbours."""
    first, last = int(at[0]), int(at[-1])
    return slice(first, last + 1) if last - first + 1 == at.size else at


def compact(value: Any) -> Any:
    """Return a tensor in memory no larger than itself: a view would be pickled with all that it is a view of. All else as it is."""
    if isinstance(value, Tensor) and value.untyped_storage().nbytes() > value.numel() * value.element_size():
        return value.clone()
    return value


def recipe(thing: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """What makes a dataclass again, without what it has computed since: what it is pickled as."""
    kind: Callable[..., Any] = type(thing)
    return partial(kind, **{f.name: compact(getattr(thing, f.name)) for f in fields(thing) if f.init}), ()


@dataclass(frozen=True)
class Stacked:
    """Tensor fields with a leading axis of K, sliced and cast together; fields that are `Stacked` themselves follow."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Pickle the fields alone."""
        return recipe(self)

    def _arrays(self) -> Iterator[Tensor]:
        """All tensors, in the order of the fields."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, Stacked):
                yield from value._arrays()

    @cached_property
    def count(self) -> int:
        """Number K of the stack."""
        return next(self._arrays()).shape[0]

    @cached_property
    def dtype(self) -> torch.dtype:
        """Floating or complex dtype of the arrays."""
        return next(array.dtype for array in self._arrays() if array.is_floating_point() or array.is_complex())

    @cached_property
    def device(self) -> torch.device:
        """Device of the arrays."""
        return next(self._arrays()).device

    def take(self, which: slice | np.ndarray) -> Self:
        """Return the members `which` of the stack, a slice (views) or an index array (copies)."""
        values: dict[str, Any] = {}
        for field in fields(self):
            if not field.init:
                continue
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                value = value[which if isinstance(which, slice) else torch.from_numpy(which).to(value.device)]
            elif isinstance(value, Stacked):
                value = value.take(which)
            values[field.name] = value
        return type(self)(**values)

    def at(self, position: int) -> Self:
        """Return the single member at `position`, as a stack of one."""
        return self.take(slice(position, position + 1))

    def to(self, dtype: torch.dtype) -> Self:
        """Return the stack with its floating-point arrays in another dtype, which may be complex."""
        changed: dict[str, Tensor | Stacked] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Stacked) or (isinstance(value, Tensor) and value.is_floating_point()):
                changed[field.name] = value.to(dtype)
        return replace(self, **changed)

    def first_not_finite(self, known: Set[int] = frozenset()) -> int | None:
        """Position of the first member with a NaN or Inf in its arrays, but for those whose `id` is known; None where there is none."""
        for array in self._arrays():
            if id(array) in known:
                continue
            # A sum is finite only where all terms are, and takes a fifth of the time that looking at each does.
            if array.is_floating_point() and not math.isfinite(array.sum()):
                finite = torch.isfinite(array).flatten(1).all(1)
                if not bool(finite.all()):
                    return int(finite.long().argmin())
        return None

    @property
    def nbytes(self) -> int:
        """Bytes held by the arrays."""
        return sum(array.untyped_storage().nbytes() for array in self._arrays())
