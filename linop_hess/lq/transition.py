"""M, the unit lower block bidiagonal matrix of a chain, and its inverse by substitution.

    (M v)_l = v_l − F_l v_{l−1},        M⁻¹: the forward recursion,        M⁻ᵀ: the adjoint recursion.

Narrow chains are substituted by one LAPACK triangular band solve; wide ones stage by stage.
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
from linop_hess.lq.stages.base import Stage

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
    def is_banded(self) -> bool:
        """Whether the band solve is the faster one (and there is a CPU to run it on)."""
        entries = self._layout.size_out * (self.bandwidth + 1)
        return (
            self._stacks[0].device.type == "cpu"
            and entries * 8 <= _BAND_BYTES_LIMIT
            and entries <= _ENTRIES_PER_CALL * _CALLS_PER_STAGE * self._layout.length
        )

    @cached_property
    def _band(self) -> np.ndarray:
        layout, dtype = self._layout, np.dtype(str(self._stacks[0].dtype).removeprefix("torch."))
        band = BandMatrix(layout.size_out, self.bandwidth + 1, 0, dtype)
        for stack, inner in layout.after_first():
            rows = layout.out_slots[stack].starts[inner]
            columns = layout.in_slots[stack].starts[inner] - layout.n_in[0]
            band.put(rows, columns, -self._stacks[stack].take(inner).dense_F().numpy())
        return band.storage.T

    def _band_substitute(self, v: Tensor, trans: str) -> Tensor:
        if not v.numel():
            return v.clone()
        tbtrs = lapack.dtbtrs if v.dtype == torch.float64 else lapack.stbtrs
        x, info = tbtrs(self._band, v.numpy(), uplo="L", trans=trans, diag="U")
        if info != 0:
            raise ValueError(f"LAPACK tbtrs refused its argument {-info}")
        return torch.from_numpy(np.ascontiguousarray(x))

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
            return self._band_substitute(v, "N")
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
            return self._band_substitute(v, "T")
        out = v.clone()
        offsets = self._layout.out_offsets
        for l in range(self._layout.length - 1, 0, -1):
            after = out[offsets[l] : offsets[l + 1]]
            out[offsets[l - 1] : offsets[l]] += self.stages[l].Ft(after[None])[0]
        return out

    @property
    def nbytes(self) -> int:
        """Bytes of the band, if there is one."""
        return self._layout.size_out * (self.bandwidth + 1) * 8 if self.is_banded else 0
