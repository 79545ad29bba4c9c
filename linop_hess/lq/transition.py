"""M, the unit lower block bidiagonal matrix of a chain, and its inverse by substitution.

    (M v)_l = v_l − F_l v_{l−1},        M⁻¹: the forward recursion,        M⁻ᵀ: the adjoint recursion.

Narrow chains are substituted by one LAPACK triangular band solve, sample by sample where samples do not meet before the last stage; wide
ones stage by stage.

A `Sweep` takes products with all of the Hessian stage by stage, of the chain or of part of it. With δ_l = F_l δ_{l−1} + G_l x_l and the
costates y_{l−1} = F_lᵀ y_l + C_l δ_{l−1} + B_lᵀ x_l, the rows are (H x)_l = G_lᵀ y_l + B_l δ_{l−1} + A_l x_l.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from scipy.linalg import lapack
from torch import Tensor

from linop_hess.lq.band_storage import BandMatrix
from linop_hess.lq.layout import Layout
from linop_hess.lq.stacked import neighbours
from linop_hess.lq.stacked import parts as pieces
from linop_hess.lq.stages.base import Stage, common_samples

# Calls of torch that a stage takes in the stage-by-stage recursion, and entries of a band that LAPACK substitutes in the time of one call.
_CALLS_PER_STAGE = 5
_ENTRIES_PER_CALL = 4000
_BAND_BYTES_LIMIT = 1 << 31
# Numbers of a state that products with a block of columns move at once.
_NUMBERS_IN_CACHE = 1 << 17


class Transition:
    """M of a chain: products and substitution. Vectors are (Σ n_1..L, k), in stage order.

    Parameters
    ----------
    stacks : sequence of Stage
    layout : Layout
    """

    def __init__(self, stacks: Sequence[Stage], layout: Layout) -> None:
        self._stacks = tuple(stacks)
        self._layout = layout

    @cached_property
    def stages(self) -> list[Stage]:
        """Every stage by itself, views into the stacks."""
        return [self._stacks[b].at(int(k)) for b, k in self._layout.order]

    @cached_property
    def bandwidth(self) -> int:
        """Number of subdiagonals of M."""
        n = self._layout.n_out
        return int((n[1:] + n[:-1]).max() - 1) if n.size > 1 else 0

    @cached_property
    def parts(self) -> int:
        """Into how many chains the states before the last stage fall, those of samples: each has a band of its own, narrower by as much.

        One, where there are too few stages to make it worth the calls.
        """
        parts = common_samples(self._stacks)
        return parts if parts > 1 and parts * len(self._stacks) <= self._layout.length else 1

    @cached_property
    def _entries(self) -> int:
        """Entries of the bands."""
        return self._layout.size_out * ((self.bandwidth + 1) // self.parts + 1)

    @cached_property
    def is_banded(self) -> bool:
        """Whether the band solve is the faster one (and there is a CPU to run it on)."""
        return (
            self._stacks[0].device.type == "cpu"
            and self._entries * 8 <= _BAND_BYTES_LIMIT
            and self._entries <= _ENTRIES_PER_CALL * _CALLS_PER_STAGE * self._layout.length
        )

    @property
    def calls(self) -> float:
        """About as many calls of torch as both substitutions by the band take the time of."""
        return 2.0 * self._entries / _ENTRIES_PER_CALL

    @cached_property
    def _of_parts(self) -> Tensor:
        """Where the entries of the states before the last stage lie, part after part and in each stage after stage."""
        layout, parts = self._layout, self.parts
        last = layout.size_out - int(layout.n_out[-1])
        each = np.repeat(layout.n_out[:-1] // parts, layout.n_out[:-1])
        within = np.arange(last) - np.repeat(layout.out_offsets[:-2], layout.n_out[:-1])
        return torch.from_numpy(np.argsort(within // np.maximum(each, 1), kind="stable"))

    @cached_property
    def _band(self) -> np.ndarray:
        layout, dtype = self._layout, np.dtype(str(self._stacks[0].dtype).removeprefix("torch."))
        parts = self.parts
        last = layout.length - 1 if parts > 1 else layout.length
        size = int(layout.out_offsets[last]) // parts
        width = int((layout.n_out[1:last] + layout.n_out[: last - 1]).max(initial=1)) // parts
        band = BandMatrix(size * parts, max(width, 1), 0, dtype)
        for b, stack in enumerate(self._stacks):
            inner = np.flatnonzero(layout.order[:, 0] == b)
            inner = inner[(inner > 0) & (inner < last)]
            if not inner.size:
                continue
            # Some stages at a time, so that their dense blocks are in cache.
            for some in pieces(inner.size, stack.n_in * stack.n_out * dtype.itemsize):
                at = inner[some]
                stages = stack.take(neighbours(layout.order[at, 1]))
                rows, columns = layout.out_offsets[at] // parts, layout.out_offsets[at - 1] // parts
                for s in range(parts):
                    of_part = stages if parts == 1 else stages.of_samples(s, s + 1, parts)
                    band.put(s * size + rows, s * size + columns, -of_part.dense_F().numpy())
        return band.storage.T

    def _band_substitute(self, v: Tensor, trans: str) -> Tensor:
        if not v.numel():
            return v.clone()
        tbtrs = lapack.dtbtrs if v.dtype == torch.float64 else lapack.stbtrs
        x, info = tbtrs(self._band, v.numpy(), uplo="L", trans=trans, diag="U")
        if info != 0:
            raise ValueError(f"LAPACK tbtrs refused its argument {-info}")
        return torch.from_numpy(x if v.stride(0) == 1 else np.ascontiguousarray(x))  # laid out as v is

    def _by_parts(self, v: Tensor, trans: str) -> Tensor:
        """The same where the states before the last stage fall into parts; what the last stage adds up is apart."""
        layout, stage, out = self._layout, self._last, v.clone()
        end, before = (
            layout.size_out - int(layout.n_out[-1]),
            slice(int(layout.out_offsets[-3]), int(layout.out_offsets[-2])),
        )
        if trans == "T":
            out[before] += stage.Ft(out[None, end:])[0]
        out[self._of_parts] = self._band_substitute(out[self._of_parts], trans)
        if trans == "N":
            out[end:] += stage.F(out[None, before])[0]
        return out

    @cached_property
    def _last(self) -> Stage:
        b, k = self._layout.order[-1]
        return self._stacks[b].at(int(k))

    def apply(self, v: Tensor) -> Tensor:
        """M v."""
        out, layout = v.clone(), self._layout
        before = layout.shift(v)
        for stack, source, target in zip(self._stacks, layout.in_slots, layout.out_slots, strict=True):
            if source.size and target.size:
                target.add(out, -stack.F(source.gather(before)))
        return out

    def apply_adjoint(self, v: Tensor) -> Tensor:
        """Mᵀ v."""
        layout = self._layout
        back = v.new_zeros(layout.size_in, v.shape[1])
        for stack, source, target in zip(self._stacks, layout.in_slots, layout.out_slots, strict=True):
            if source.size and target.size:
                source.put(back, stack.Ft(target.gather(v)))
        return v - layout.shift_adjoint(back)

    def substitute(self, v: Tensor) -> Tensor:
        """M⁻¹ v by forward substitution."""
        if self.is_banded:
            return self._by_parts(v, "N") if self.parts > 1 else self._band_substitute(v, "N")
        out = v.clone()
        offsets = self._layout.out_offsets.tolist()
        for l, stage in enumerate(self.stages):
            if l:
                before = out[offsets[l - 1] : offsets[l]]
                out[offsets[l] : offsets[l + 1]] += stage.F(before[None])[0]
        return out

    def substitute_adjoint(self, v: Tensor) -> Tensor:
        """M⁻ᵀ v by backward substitution."""
        if self.is_banded:
            return self._by_parts(v, "T") if self.parts > 1 else self._band_substitute(v, "T")
        out = v.clone()
        offsets = self._layout.out_offsets.tolist()
        for l in range(self._layout.length - 1, 0, -1):
            after = out[offsets[l] : offsets[l + 1]]
            out[offsets[l - 1] : offsets[l]] += self.stages[l].Ft(after[None])[0]
        return out

    @property
    def nbytes(self) -> int:
        """Bytes of the band, if there is one."""
        return self._entries * 8 if self.is_banded else 0


class Sweep:
    """Neighbouring stages of a chain; states are (n, k), controls (p, k) in the order of the chain.

    Parameters
    ----------
    stages : sequence of Stage
        Single ones.

    Attributes
    ----------
    p : int
        Number of their controls.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = list(stages)
        self._slices: list[slice | None] = []
        start = 0
        for stage in self.stages:
            self._slices.append(slice(start, start + stage.p) if stage.p else None)
            start += stage.p
        self.p = start

    def of_samples(self, start: int, stop: int, samples: int) -> Sweep:
        """Return the stages on samples start..stop out of `samples`."""
        if stop - start == samples:
            return self
        return Sweep([stage.of_samples(start, stop, samples) for stage in self.stages])

    def forward(self, x: Tensor | None, d: Tensor | None, *, through: int | None = None) -> list[Tensor | None]:
        """States before each stage and after the last (None: zero), of controls x and a state d before the first.

        `through`: how many stages; those after it are left out, and no state follows them.
        """
        states: list[Tensor | None] = [d]
        for stage, part in list(zip(self.stages, self._slices, strict=True))[:through]:
            d = None if d is None else stage.F(d[None])[0]
            if x is not None and part is not None:
                mine = stage.G(x[None, part])[0]
                d = mine if d is None else d.add_(mine)
            states.append(d)
        return states

    def back(
        self,
        y: Tensor | None,
        *,
        states: Sequence[Tensor | None] | None = None,
        x: Tensor | None = None,
        rows: Tensor | None = None,
        down: bool = True,
    ) -> Tensor | None:
        """Costate before the first stage, of a costate y after the last.

        Parameters
        ----------
        y : Tensor or None
            None: zero.
        states : sequence of Tensor or None
            Those of `forward`, for the curvature of the stages.
        x : Tensor or None
            The controls, as of `forward`.
        rows : Tensor or None, shape (p, k)
            To which the rows of the controls are added, A left out.
        down : bool
            Whether the costate before the first stage is needed.
        """
        for l in range(len(self.stages) - 1, -1, -1):
            stage, part = self.stages[l], self._slices[l]
            d = None if states is None else states[l]
            has_B = part is not None and "B" in stage.nonzero
            if rows is not None and part is not None:
                if y is not None:
                    rows[part] += stage.Gt(y[None])[0]
                if d is not None and has_B:
                    rows[part] += stage.B(d[None])[0]
            if l == 0 and not down:
                return None
            y = None if y is None else stage.Ft(y[None])[0]
            if d is not None and "C" in stage.nonzero:
                y = _plus(y, stage.C(d[None])[0])
            if x is not None and has_B:
                y = _plus(y, stage.Bt(x[None, part])[0])
        return y

    def add_A(self, x: Tensor, rows: Tensor) -> None:
        """Add A x to rows, both (p, k)."""
        for stage, part in zip(self.stages, self._slices, strict=True):
            if part is not None and "A" in stage.nonzero:
                rows[part] += stage.A(x[None, part])[0]


class SweptProduct:
    """Products of H with blocks of columns, a chunk of samples after another, so that the states of a chunk stay in cache.

    Parameters
    ----------
    sweep : Sweep
        Of all stages, from the first with controls on.
    """

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self._samples = common_samples(sweep.stages)
        self._widest = max((stage.n_out for stage in sweep.stages), default=0)  # what precedes the first does not move
        self._is_cached = bool(sweep.stages) and sweep.stages[0].device.type == "cpu"
        self._parts: dict[int, list[Sweep]] = {1: [sweep]}

    def times(self, x: Tensor) -> Tensor:
        """H x for x of shape (N, k) in the order of the chain."""
        out = torch.zeros_like(x)
        for part in self._chunks(x.shape[1]):
            part.back(None, states=part.forward(x, None), x=x, rows=out, down=False)
        self.sweep.add_A(x, out)
        return out

    def _chunks(self, columns: int) -> list[Sweep]:
        """The stages on chunks of samples; all at once for one column, whose states are small beside what the stages hold."""
        samples = self._samples
        fitting = min(samples, self._widest * columns / _NUMBERS_IN_CACHE) if self._is_cached and columns > 1 else 1.0
        count = 1 << round(math.log2(max(1.0, fitting)))  # a power of two, so that few are made
        count = count if count <= samples else count // 2
        if count not in self._parts:
            bounds = [samples * c // count for c in range(count + 1)]
            self._parts[count] = [
                self.sweep.of_samples(start, stop, samples) for start, stop in zip(bounds[:-1], bounds[1:], strict=True)
            ]
        return self._parts[count]


def _plus(y: Tensor | None, more: Tensor) -> Tensor:
    # Not in place: what stages return may be a view of their argument.
    return more if y is None else y + more


def pulled_back(stage: Stage, V: Tensor, samples: int) -> Tensor:
    """FᵀVF + C of one stage for V of one block a sample, (samples, n, n) to the same of the state before.

    One block a sample, below each other, is an array of states; so the products that move states move V: V ← Fᵀ(FᵀV)ᵀ + C.
    """
    half = _each(stage, V, samples)
    V = _each(stage, half.mT, samples)
    return V + stage.C_of_samples(samples)[0] if "C" in stage.nonzero else V


def _each(stage: Stage, V: Tensor, samples: int) -> Tensor:
    out = stage.Ft(V.reshape(1, V.shape[0] * V.shape[1], V.shape[2]))
    return out.reshape(samples, out.shape[1] // samples, V.shape[2])


def times_blocks(V: Tensor, d: Tensor) -> Tensor:
    """V d for V of one block a sample, (samples, n, n), and d of shape (samples · n, k)."""
    m, n, _ = V.shape
    return torch.bmm(V, d.reshape(m, n, d.shape[-1])).reshape(m * n, d.shape[-1])
