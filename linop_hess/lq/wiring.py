"""Which entries of a state a stage reads, which pass by, and where its outputs go.

Indices that are runs of neighbours become slices once, when a wiring is made; so products gather nothing in the usual case. Where states
hold sample after sample, the runs are those of one sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from linop_hess._memory import empty, zeros

# Up to so many runs of neighbours a part are copied one by one; more are gathered by index.
_RUNS = 6


# From so many entries a matrix on, a call for each matrix costs less than all entries along the second axis: 3 µs against 0.09 µs an entry.
_MATRICES = 40


def add_at(out: Tensor, index: Tensor, w: Tensor) -> None:
    """Add w, (K, count, k), to the entries `index` of out, (K, size, k).

    Along its first axis torch adds one column thirty times as fast as along the second one.
    """
    if index.numel() > _MATRICES * len(out):
        for one, other in zip(out, w, strict=True):
            one.index_add_(0, index, other)
    else:
        out.index_add_(1, index, w)


class Selection:
    """Entries of vectors of length `size` by an index, −1 being a zero; and what adds them back.

    Where the index repeats itself in equal parts of the vector, runs of neighbours are sought in one part.
    """

    def __init__(self, index: np.ndarray, size: int, device: torch.device) -> None:
        self.size, self.count = size, int(index.size)
        self._parts, self._runs = _fewest_runs(index, size)
        self.is_whole = self.count == size and len(self._runs) <= 1 and bool((index[:1] == 0).all())
        self.is_full = not bool((index < 0).any())
        self._is_one = self._parts == 1 and self.is_full and len(self._runs) == 1
        self._by_index = len(self._runs) > _RUNS
        if self._by_index:
            live = np.flatnonzero(index >= 0)
            self._index, self._at = (torch.from_numpy(a).to(device) for a in (index[live], live))

    @cached_property
    def calls(self) -> int:
        """About how many calls of torch it takes to pick entries or to add to them."""
        if self.is_whole or not self.count:
            return 0
        live = sum(source >= 0 for _, _, source in self._runs)
        return 2 if self._is_one or self._by_index else 3 + 2 * live

    def pick(self, v: Tensor) -> Tensor:
        """Entries of v, (K, size, k), as (K, count, k); perhaps in its memory."""
        if self.is_whole:
            return v
        if self._is_one:
            return v.narrow(1, self._runs[0][2], self.count)
        (K, _, k), m = v.shape, self._parts
        if self._by_index and self.is_full:
            return v.index_select(1, self._index)
        if self.is_full and self.count:
            V = v.reshape(K, m, self.size // m, k)
            runs = [V[:, :, source : source + stop - at] for at, stop, source in self._runs]
            return (runs[0] if len(runs) == 1 else torch.cat(runs, 2)).reshape(K, self.count, k)
        out = v.new_zeros(K, self.count, k)
        if self._by_index:
            return out.index_copy_(1, self._at, v.index_select(1, self._index))
        V, O = v.reshape(K, m, self.size // m, k), out.view(K, m, self.count // m, k)
        for at, stop, source in self._runs:
            if source >= 0:
                O[:, :, at:stop] = V[:, :, source : source + stop - at]
        return out

    def copy(self, v: Tensor) -> Tensor:
        """As `pick`, in memory of its own."""
        out = self.pick(v)
        return out.clone() if self.is_whole or (self.is_full and len(self._runs) == 1) else out

    def add_to(self, out: Tensor, w: Tensor) -> None:
        """Add w, (K, count, k), to the entries it was picked from, in out of shape (K, size, k)."""
        if not self.count:
            return
        if self.is_whole:
            out += w
            return
        (K, _, k), m = w.shape, self._parts
        if self._by_index:
            add_at(out, self._index, w if self.is_full else w.index_select(1, self._at))
            return
        O, W, along = out, w, 1
        if m > 1:
            O, W, along = out.view(K, m, self.size // m, k), w.reshape(K, m, self.count // m, k), 2
        for at, stop, source in self._runs:
            if source >= 0:
                O.narrow(along, source, stop - at).add_(W.narrow(along, at, stop - at))

    def spread(self, w: Tensor) -> Tensor:
        """The transpose of `pick`: (K, count, k) to (K, size, k)."""
        if self.is_whole:
            return w
        out = zeros((w.shape[0], self.size, w.shape[2]), w)
        self.add_to(out, w)
        return out

    def spread_columns(self, M: Tensor) -> Tensor:
        """`spread` along the columns: (K, j, count) to (K, j, size)."""
        return self.spread(M.mT).mT

    def conjugated(self, M: Tensor) -> Tensor:
        """The rows and columns of a matrix (size, size) that are picked, (count, count), each read and written once."""
        if self.is_whole:
            return empty(M.shape, M).copy_(M)
        if self._by_index:
            picked = M.index_select(0, self._index).index_select(1, self._index)
            if self.is_full:
                return picked
            wide = zeros((picked.shape[0], self.count), M).index_copy_(1, self._at, picked)
            return zeros((self.count, self.count), M).index_copy_(0, self._at, wide)
        m, each, count = self._parts, self.size // self._parts, self.count // self._parts
        out = (empty if self.is_full else zeros)((self.count, self.count), M)
        O, V = out.view(m, count, m, count), M.reshape(m, each, m, each)
        runs = [run for run in self._runs if run[2] >= 0]
        for at, stop, source in runs:
            for beside, until, origin in runs:
                part = V[:, source : source + stop - at, :, origin : origin + until - beside]
                O[:, at:stop, :, beside:until] = part
        return out

    def pick_both(self, M: Tensor) -> Tensor:
        """Rows and columns of symmetric matrices, (K, size, size) to (K, count, count)."""
        return self.pick(self.pick(M).mT)

    def spread_both(self, M: Tensor) -> Tensor:
        """Symmetric matrices spread along rows and columns: (K, count, count) to (K, size, size)."""
        return self.spread(self.spread(M).mT)


@dataclass(frozen=True, eq=False)
class Wiring:
    """Which entries of a state a stage reads, which live on beside it, and where its outputs go; the same for a whole stack.

    Parameters
    ----------
    n_in, n_out : int
        Sizes of the state before and after.
    outputs : int
        Size of the output of the inner stage.
    read : Tensor of int64, shape (inputs,)
        The entry of the state before that each input of the inner stage is; −1: a constant. Entries may be read several times.
    keep_from, keep_to : Tensor of int64, shape (k,)
        Entries of the state before that live on, each once, and where they stand in the state after.
    put_from, put_to : Tensor of int64, shape (m,)
        Outputs of the inner stage that live on, each once, and where; `keep_to` and `put_to` together are every entry of the state after.

    Raises
    ------
    ValueError
        If an index is out of range, is there twice, or an entry of the state after is missing.
    """

    n_in: int
    n_out: int
    outputs: int
    read: Tensor
    keep_from: Tensor
    keep_to: Tensor
    put_from: Tensor
    put_to: Tensor
    _cut: dict[tuple[int, int], Wiring] = field(init=False, default_factory=dict)
    _apart: dict[int, int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        read, keep_from, keep_to, put_from, put_to = self._indices
        if read.size and not -1 <= read.min() <= read.max() < self.n_in:
            raise ValueError(f"expected reads of entries 0..{self.n_in - 1}, or −1, got {read.min()}..{read.max()}")
        for name, at, to, size in (("keep", keep_from, keep_to, self.n_in), ("put", put_from, put_to, self.outputs)):
            if at.size != to.size:
                raise ValueError(f"expected as many {name}_from as {name}_to, got {at.size} and {to.size}")
            if at.size and not 0 <= at.min() <= at.max() < size:
                raise ValueError(f"expected {name}_from in 0..{size - 1}, got {at.min()}..{at.max()}")
            if at.size and int(np.bincount(at).max()) > 1:
                raise ValueError(f"expected each entry of {name}_from once, got one twice: let later stages read it")
        after = np.concatenate([keep_to, put_to])
        named = np.zeros(self.n_out, dtype=bool)
        named[after[(after >= 0) & (after < self.n_out)]] = True
        if after.size != self.n_out or not bool(named.all()):
            raise ValueError(
                f"expected keep_to and put_to to name each of the {self.n_out} entries of the state after once, got {after.size} "
                f"of them, {np.unique(after).size} different: give every entry one source"
            )

    @classmethod
    def of(
        cls,
        n_in: int,
        n_out: int,
        outputs: int,
        *,
        read: Sequence[int] | np.ndarray,
        keep: tuple[Sequence[int] | np.ndarray, Sequence[int] | np.ndarray],
        put: tuple[Sequence[int] | np.ndarray, Sequence[int] | np.ndarray],
        device: torch.device | str = "cpu",
    ) -> Wiring:
        """Make a wiring of array-likes, `keep` and `put` being pairs (from, to), for stages on a device.

        Raises
        ------
        ValueError
            As the class.
        """
        arrays = (np.array(index, dtype=np.int64).reshape(-1) for index in (read, *keep, *put))
        return cls(n_in, n_out, outputs, *(torch.from_numpy(index).to(device) for index in arrays))

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        """Pickle the indices alone."""
        return Wiring, (
            *(self.n_in, self.n_out, self.outputs, self.read),
            *(self.keep_from, self.keep_to, self.put_from, self.put_to),
        )

    @cached_property
    def _indices(self) -> tuple[np.ndarray, ...]:
        return tuple(a.cpu().numpy() for a in (self.read, self.keep_from, self.keep_to, self.put_from, self.put_to))

    def _selection(self, index: np.ndarray, size: int) -> Selection:
        return Selection(index, size, self.read.device)

    @cached_property
    def reads(self) -> Selection:
        """Inputs of the inner stage, of the state before."""
        return self._selection(self._indices[0], self.n_in)

    @cached_property
    def origin(self) -> Selection:
        """What is kept, of the state before."""
        return self._selection(self._indices[1], self.n_in)

    @cached_property
    def carried(self) -> Selection:
        """What is kept, of the state after."""
        return self._selection(self._indices[2], self.n_out)

    @cached_property
    def kept(self) -> Selection:
        """Each entry of the state before, of the state after; zero where it is not kept."""
        return self._selection(_table(self._indices[1], self._indices[2], self.n_in), self.n_out)

    @cached_property
    def seen(self) -> Selection:
        """Each output of the inner stage, of the state after; zero where it is dropped."""
        return self._selection(_table(self._indices[3], self._indices[4], self.outputs), self.n_out)

    @cached_property
    def _sources(self) -> list[tuple[np.ndarray, int]]:
        """Each entry of the state after, of the state before and of the outputs, −1 where it is of the other."""
        _, keep_from, keep_to, put_from, put_to = self._indices
        return [
            (_table(keep_to, keep_from, self.n_out), self.n_in),
            (_table(put_to, put_from, self.n_out), self.outputs),
        ]

    @cached_property
    def _joining(self) -> tuple[int, list[tuple[int, int, int]], Tensor | None]:
        """Parts and the runs that one is made of, of the state before (0) and the outputs (1); where there are many, an index into both."""
        kept, put = self._sources
        parts = max(1, _largest_parts([kept, put], math.gcd(self.n_out, self.n_in, self.outputs)))
        found = [(1, _joined(kept, put, 1)), (parts, _joined(kept, put, parts))]
        m, runs = min(found, key=lambda pair: (len(pair[1]), pair[0]))
        if len(runs) <= _RUNS:
            return m, runs, None
        index = np.where(kept[0] >= 0, kept[0], put[0] + self.n_in)
        return 1, [], torch.from_numpy(index).to(self.read.device)

    def join(self, d: Tensor, y: Tensor) -> Tensor:
        """The state after, of the state before and the outputs; never in the memory of the former."""
        if self.seen.is_whole:
            return y
        m, runs, index = self._joining
        if index is not None:
            return torch.cat([d, y], 1).index_select(1, index)
        K, _, k = d.shape
        if not runs:
            return d.new_zeros(K, 0, k)
        if m == 1:
            return torch.cat([(y if which else d).narrow(1, start, stop - start) for which, start, stop in runs], 1)
        both = d.reshape(K, m, self.n_in // m, k), y.reshape(K, m, self.outputs // m, k)
        parts = [both[which].narrow(2, start, stop - start) for which, start, stop in runs]
        return torch.cat(parts, 2).view(K, self.n_out, k)

    def samples(self, of_inner: int) -> int:
        """The largest number of parts, of those that the inner stage has, into which all of the wiring falls apart; 0: any."""
        if of_inner not in self._apart:
            read = self._indices[0]
            indices, among = [(read, self.n_in)], math.gcd(self.n_in, read.size, of_inner)
            if not self._adds(of_inner):
                indices, among = [*indices, *self._sources], math.gcd(among, self.n_out, self.outputs)
            self._apart[of_inner] = _largest_parts(indices, among)
        return self._apart[of_inner]

    def _adds(self, samples: int) -> bool:
        """Whether the stage adds samples up to an output that does not fall apart: an objective, beside which nothing is kept."""
        return self.outputs == self.n_out == 1 and samples > 1 and not self._indices[1].size

    def part(self, count: int, samples: int) -> Wiring:
        """The wiring of so many parts out of `samples`, one like another."""
        if count == samples:
            return self
        if (count, samples) not in self._cut:
            n_in, read = self.n_in * count // samples, self.read[: self.read.numel() * count // samples]
            if self._adds(samples):
                cut = replace(self, n_in=n_in, read=read)
            else:
                n_out, outputs = (size * count // samples for size in (self.n_out, self.outputs))
                pairs = ((self.keep_from, n_in), (self.keep_to, n_out), (self.put_from, outputs), (self.put_to, n_out))
                cut = Wiring(n_in, n_out, outputs, read, *(index[index < size] for index, size in pairs))
            self._cut[count, samples] = cut
        return self._cut[count, samples]


def _table(at: np.ndarray, value: np.ndarray, size: int) -> np.ndarray:
    """Values at places of an index of `size`, −1 elsewhere."""
    out = np.full(size, -1, dtype=np.int64)
    out[at] = value
    return out


def _largest_parts(indices: Sequence[tuple[np.ndarray, int]], among: int) -> int:
    """The largest divisor m of `among` so that part s of m of every (index, size) is about part s of the vector, all alike; 0 of 0."""
    divisors = {d for k in range(1, math.isqrt(among) + 1) if among % k == 0 for d in (k, among // k)}
    return next((m for m in sorted(divisors, reverse=True) if all(_repeats(*pair, m) for pair in indices)), among)


def _repeats(index: np.ndarray, size: int, parts: int) -> bool:
    if parts == 1 or not index.size:
        return True
    rows, each = index.reshape(parts, -1), size // parts
    first = rows[0]
    # The last part first, which most numbers of parts fail at.
    if bool((first >= each).any()) or not np.array_equal(rows[-1], np.where(first < 0, -1, first + each * (parts - 1))):
        return False
    moved = first + each * np.arange(parts)[:, None]
    return bool((rows == np.where(first < 0, -1, moved)).all())


def _runs(index: np.ndarray) -> list[tuple[int, int, int]]:
    """(start, stop, first source) of maximal runs index[start:stop] = source, source + 1, …, or of −1."""
    if not index.size:
        return []
    goes_on = np.where(index[:-1] < 0, index[1:] < 0, index[1:] == index[:-1] + 1)
    cuts = [0, *(np.flatnonzero(~goes_on) + 1).tolist(), index.size]
    return [(a, b, int(index[a])) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]


def _fewest_runs(index: np.ndarray, size: int) -> tuple[int, list[tuple[int, int, int]]]:
    """Parts and runs in a part: of the whole, or of as many parts as are alike, whichever has fewer."""
    parts = max(1, _largest_parts([(index, size)], math.gcd(index.size, size)))
    return min(((m, _runs(index[: index.size // m])) for m in (1, parts)), key=lambda found: (len(found[1]), found[0]))


def _joined(kept: tuple[np.ndarray, int], put: tuple[np.ndarray, int], parts: int) -> list[tuple[int, int, int]]:
    """(which of the two, start, stop) of the runs that one part is made of."""
    size = kept[0].size // parts
    runs = [
        (at, which, source, source + stop - at)
        for which, (index, _) in enumerate((kept, put))
        for at, stop, source in _runs(index[:size])
        if source >= 0
    ]
    return [run[1:] for run in sorted(runs)]
