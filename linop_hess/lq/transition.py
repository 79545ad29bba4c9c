"""M, the unit lower block bidiagonal matrix of a chain, and its inverse by substitution.

    (M v)_l = v_l − F_l v_{l−1},        M⁻¹: the forward recursion,        M⁻ᵀ: the adjoint recursion.

Narrow chains are substituted by one LAPACK triangular band solve, sample by sample where samples do not meet before the last stage; wide
ones stage by stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from scipy.linalg import lapack
from torch import Tensor

from linop_hess.lq.band_storage import BandMatrix
from linop_hess.lq.layout import Layout
from linop_hess.lq.stages.base import Stage, common_samples

# Calls of torch that a stage takes in the stage-by-stage recursion, and entries of a band that LAPACK substitutes in the time of one call.
_CALLS_PER_STAGE = 5
_ENTRIES_PER_CALL = 4000
_BAND_BYTES_LIMIT = 1 << 31


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
            stages = stack.take(layout.order[inner, 1])
            rows, columns = layout.out_offsets[inner] // parts, layout.out_offsets[inner - 1] // parts
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
        return torch.from_numpy(np.ascontiguousarray(x))

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
        offsets = self._layout.out_offsets
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
        offsets = self._layout.out_offsets
        for l in range(self._layout.length - 1, 0, -1):
            after = out[offsets[l] : offsets[l + 1]]
            out[offsets[l - 1] : offsets[l]] += self.stages[l].Ft(after[None])[0]
        return out

    @property
    def nbytes(self) -> int:
        """Bytes of the band, if there is one."""
        return self._entries * 8 if self.is_banded else 0
