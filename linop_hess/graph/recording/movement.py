"""Element ids of tensors, and operations that move entries and compute nothing, carried out on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from linop_hess.autograd.differentiate import is_fused

aten = torch.ops.aten


@dataclass(slots=True)
class Strided:
    """Element ids of a tensor that lies in a storage whose ids are consecutive: `start` plus the place in the storage."""

    start: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def ids(self) -> np.ndarray:
        """The ids, flat, in row-major order."""
        return self.start + places(self.shape, self.stride, self.offset)


@cache
def places(shape: tuple[int, ...], stride: tuple[int, ...], offset: int) -> np.ndarray:
    """Places in a storage of a tensor's entries, in row-major order."""
    at = np.array(offset, dtype=np.int64)
    for size, step in zip(shape, stride, strict=True):
        at = at[..., None] + step * np.arange(size, dtype=np.int64)
    return at.reshape(-1)


Ids = Strided | np.ndarray


@dataclass(frozen=True)
class Views:
    """Element ids of K tensors that lie alike: those of each are from its own of `starts` on."""

    starts: np.ndarray
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def size(self) -> int:
        """Entries of each."""
        return math.prod(self.shape)

    def ids(self) -> np.ndarray:
        """The ids, (K, entries), each in row-major order."""
        return self.starts[:, None] + places(self.shape, self.stride, 0)

    @property
    def is_consecutive(self) -> bool:
        """Whether ids are consecutive in row-major order."""
        return fills(self.shape, self.stride, in_order=True)

    @property
    def is_run(self) -> bool:
        """Whether ids are consecutive, in whatever order."""
        return fills(self.shape, self.stride)


@cache
def fills(shape: tuple[int, ...], stride: tuple[int, ...], in_order: bool = False) -> bool:
    """Whether a tensor fills the memory from its first entry to its last, each place once; `in_order`: in row-major order."""
    steps = [(step, size) for size, step in zip(shape, stride, strict=True) if size != 1][::-1]
    end = 1
    for step, size in steps if in_order else sorted(steps):
        if step != end:
            return False
        end *= size
    return True


def as_tensor(ids: Ids, shape: torch.Size) -> Tensor:
    """The ids of a tensor, in its shape."""
    return torch.from_numpy(ids.ids() if isinstance(ids, Strided) else ids).view(shape)


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= int(size)
    return tuple(reversed(strides))


def _overloads(names: str) -> frozenset[Any]:
    packets = [getattr(aten, name) for name in names.split() if hasattr(aten, name)]
    return frozenset(getattr(packet, overload) for packet in packets for overload in packet.overloads())


# New tensors with the shape of an argument, whose values they do not read.
_CREATES = _overloads(
    "zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty new_empty_strided scalar_tensor lift_fresh"
)

# In place, but only of shape and strides.
_RELABELS_IN_PLACE = _overloads("transpose_ t_ squeeze_ unsqueeze_ as_strided_ swapaxes_ swapdims_ detach_ resize_")

_MOVES = _overloads(
    "clone cat stack index index_select gather embedding slice_scatter select_scatter diagonal_scatter diag_embed diagonal_copy tril "
    "triu roll flip repeat unfold_copy im2col pixel_shuffle pixel_unshuffle channel_shuffle _to_copy contiguous lift_fresh_copy "
    "constant_pad_nd masked_fill where masked_select take reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d "
    "replication_pad2d replication_pad3d split_with_sizes_copy view_copy permute_copy expand_copy _reshape_copy narrow_copy "
    "rot90 index_copy masked_scatter index_put"
)
_MOVES_IN_PLACE = _overloads("copy_ masked_fill_ fill_ zero_ index_copy_ masked_scatter_ index_put_ tril_ triu_") | {
    overload for overload in _overloads("scatter scatter_") if overload._overloadname in ("src", "value")
}

# Selections of one entry of several: (values, indices).
_POOLS = {
    aten.max_pool2d_with_indices.default: 2,
    aten.max_pool3d_with_indices.default: 3,
    aten.adaptive_max_pool2d.default: 2,
    aten.adaptive_max_pool3d.default: 3,
}
_SELECTS = frozenset(_POOLS) | {
    aten.sort.default,
    aten.sort.stable,
    aten.topk.default,
    aten.max.dim,
    aten.min.dim,
    aten.median.dim,
    aten.nanmedian.dim,
    aten.kthvalue.default,
    aten.mode.default,
}

_COPIES = _overloads("clone contiguous lift_fresh_copy _to_copy")

# Moves, unless entries are added up.
_ADDS_UP = _overloads("index_put index_put_")


@cache
def only_relabels(func: Any) -> bool:
    """Whether an operation gives views of its argument and changes nothing."""
    if func in (aten._unsafe_view.default, aten.detach.default):
        return True
    returns = func._schema.returns
    alias = [r.alias_info is not None and not r.alias_info.is_write for r in returns]
    return bool(returns) and all(alias)


def is_creation(func: Any) -> bool:
    """Whether an operation makes a new tensor without reading a value."""
    return func in _CREATES


def moves(func: Any) -> bool:
    """Whether each entry of an operation's outputs is an entry of its arguments or a constant."""
    return func in _MOVES or func in _MOVES_IN_PLACE or func in _SELECTS


def moved_ids(
    func: Any, args: Sequence[Any], kwargs: dict[str, Any], ids: dict[int, Tensor], results: Sequence[Any]
) -> list[Tensor | None] | None:
    """Carry out a moving operation on element ids.

    Parameters
    ----------
    func : torch._ops.OpOverload
    args, kwargs : sequence and dict
        Its arguments.
    ids : dict of int to Tensor
        Ids of the arguments that depend on parameters, by the `id` of the tensor, of its shape; they are not changed.
    results : sequence
        What the operation gave, of which selections are told the entries that they took.

    Returns
    -------
    list of Tensor or None
        Ids of each output; None for the operation where it cannot be carried out on ids, and so is one that computes.
    """
    if func in _SELECTS:
        return _selected(func, args, kwargs, ids[id(args[0])], results)
    first = ids.get(id(args[0])) if args else None
    if func in _COPIES:
        return [first]
    if func is aten.copy_.default:
        source = ids.get(id(args[1]))
        return [
            torch.zeros(args[0].shape, dtype=torch.int64, device="cpu")
            if source is None
            else source.expand(args[0].shape)
        ]
    if func in _ADDS_UP and (args[3:4] or [kwargs.get("accumulate", False)])[0]:
        return None
    mine = [_instead(a, ids) for a in args]
    keywords = {k: _instead(v, ids) for k, v in kwargs.items() if k not in ("dtype", "memory_format")}
    for k, argument in enumerate(func._schema.arguments[: len(mine)]):
        if str(argument.type) == "number" and argument.name != "alpha":
            mine[k] = 0  # a constant
        elif argument.alias_info is not None and argument.alias_info.is_write:
            mine[k] = mine[k].clone()
    if func is aten.embedding.default and (padding := args[2] if len(args) > 2 else kwargs.get("padding_idx", -1)) >= 0:
        mine[0] = mine[0].clone()
        mine[0][padding] = 0  # this row has no gradient
    out = _carried_out(func, mine, keywords)
    return None if out is None else [o if isinstance(o, Tensor) else None for o in tree_flatten(out)[0]]


class _Ids:
    """Element ids among the arguments of an operation, apart from indices."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def clone(self) -> _Ids:
        return _Ids(self.ids.clone())

    def __setitem__(self, row: int, value: int) -> None:
        self.ids[row] = value


def _instead(argument: Any, ids: dict[int, Tensor]) -> Any:
    """The ids in place of an argument; those of a constant tensor are zeros."""
    if isinstance(argument, (list, tuple)):
        return [_instead(a, ids) for a in argument]
    if not isinstance(argument, Tensor):
        return argument
    if id(argument) in ids:
        return _Ids(ids[id(argument)])
    return (
        _Ids(torch.zeros(argument.shape, dtype=torch.int64, device="cpu")) if argument.is_floating_point() else argument
    )


def _carried_out(func: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    for dtype in (torch.int64, torch.float64):  # where there is no kernel for integers; exact up to 2^53
        positional, keywords = tree_map(lambda a, d=dtype: a.ids.to(d) if isinstance(a, _Ids) else a, (args, kwargs))
        try:
            out = func(*positional, **keywords)
        except (RuntimeError, NotImplementedError, IndexError):
            continue
        return tree_map(lambda t: t.long() if isinstance(t, Tensor) else t, out)
    return None


def _selected(
    func: Any, args: Sequence[Any], kwargs: dict[str, Any], ids: Tensor, results: Sequence[Any]
) -> list[Tensor | None]:
    values, index = results
    if func in _POOLS:
        spatial = _POOLS[func]
        return [ids.flatten(-spatial).gather(-1, index.flatten(-spatial)).view(index.shape)]
    names = [a.name for a in func._schema.arguments]
    place = names.index("dim")
    dim = kwargs.get("dim", args[place] if len(args) > place else -1)
    if index.ndim < ids.ndim:
        return [ids.gather(dim, index.unsqueeze(dim)).squeeze(dim)]
    return [ids.gather(dim, index) if ids.ndim else ids]


@dataclass(frozen=True)
class Handling:
    """How an operation is dealt with."""

    writes: tuple[int, ...] = ()  # positions of the arguments that it changes
    moves: bool = False
    random: bool = False
    fused: bool = False  # torch has its second derivative wrong, or not at all
    only: bool = False  # it gives views, makes something new without reading it, or changes shape and strides


RELABELS, RELABELS_IN_PLACE, AS_NEW = Handling(only=True), Handling(only=True), Handling(only=True)


@cache
def handling(func: Any) -> Handling:
    """How an operation is dealt with: `RELABELS`, `RELABELS_IN_PLACE`, `AS_NEW`, or what its schema says of it."""
    if is_creation(func):
        return AS_NEW
    if func in _RELABELS_IN_PLACE:
        return RELABELS_IN_PLACE
    if only_relabels(func):
        return RELABELS
    schema = func._schema
    writes = tuple(i for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write)
    return Handling(writes, moves(func), torch.Tag.nondeterministic_seeded in func.tags, is_fused(func))


def draws(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a random operation draws: some do so in training alone, or where something is to be dropped."""
    return all(
        args[k] if k < len(args) else kwargs.get(argument.name, argument.default_value)
        for k, argument in enumerate(func._schema.arguments)
        if argument.name in ("training", "train", "dropout_p", "dropout")
    )
