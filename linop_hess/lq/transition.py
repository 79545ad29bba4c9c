"""M, the unit lower block bidiagonal matrix of a chain, and its inverse by substitution.

    (M v)_l = v_l − F_l v_{l−1},        M⁻¹: the forward recursion,        M⁻ᵀ: the adjoint recursion.

Narrow chains are solved by one LAPACK triangular band solve; wide ones stage by stage.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.linalg import lapack
from torch import Tensor

from linop_hess.lq.band_storage import BandMatrix

if TYPE_CHECKING:
    from linop_hess.lq.problem import Problem

# Seconds a stage costs in the stage-by-stage recursion, and a band entry in LAPACK's triangular solve (2 cores).
_SECONDS_PER_STAGE = 1.2e-5
_SECONDS_PER_BAND_ENTRY = 6e-10
_BAND_BYTES_LIMIT = 1 << 31


class Transition:
    """M of a problem: products and solves. Vectors are (Σ n_1..L, k), in stage order."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem

    @cached_property
    def bandwidth(self) -> int:
        """Number of subdiagonals of M."""
        n = self._problem.n_out
        return int((n[1:] + n[:-1]).max() - 1) if n.size > 1 else 0

    @cached_property
    def is_banded(self) -> bool:
        """Whether the band solve is the faster one (and there is a CPU to run it on)."""
        problem = self._problem
        entries = problem.size_out * (self.bandwidth + 1)
        return (
            problem.device.type == "cpu"
            and entries * 8 <= _BAND_BYTES_LIMIT
            and entries * _SECONDS_PER_BAND_ENTRY <= problem.length * _SECONDS_PER_STAGE
        )

    @cached_property
    def _band(self) -> np.ndarray:
        problem = self._problem
        kd = self.bandwidth
        band = BandMatrix(problem.size_out, kd + 1, 0, problem.numpy_dtype)
        for block, inner in problem.blocks_after_first():
            rows = problem.out_slots[block].starts[inner]
            columns = problem.in_slots[block].starts[inner] - problem.n_in[0]
            band.put(rows, columns, -problem.blocks[block].take(inner).dense_F().numpy())
        return band.storage.T

    def _band_solve(self, v: Tensor, trans: str) -> Tensor:
        if not v.numel():
            return v.clone()
        tbtrs = lapack.dtbtrs if v.dtype == torch.float64 else lapack.stbtrs
        x, info = tbtrs(self._band, v.numpy(), uplo="L", trans=trans, diag="U")
        if info != 0:
            raise ValueError(f"LAPACK tbtrs refused its argument {-info}")
        return torch.from_numpy(np.ascontiguousarray(x))

    def apply(self, v: Tensor) -> Tensor:
        """M v."""
        return v - self._problem.apply_F(self._problem.shift(v))

    def apply_adjoint(self, v: Tensor) -> Tensor:
        """Mᵀ v."""
        return v - self._problem.shift_adjoint(self._problem.apply_Ft(v))

    def solve(self, v: Tensor) -> Tensor:
        """M⁻¹ v by forward substitution."""
        if self.is_banded:
            return self._band_solve(v, "N")
        out = v.clone()
        offsets = self._problem.out_offsets
        for l, stage in enumerate(self._problem.stages):
            if l:
                before = out[offsets[l - 1] : offsets[l]]
                out[offsets[l] : offsets[l + 1]] += stage.F(before[None])[0]
        return out

    def solve_adjoint(self, v: Tensor) -> Tensor:
        """M⁻ᵀ v by backward substitution."""
        if self.is_banded:
            return self._band_solve(v, "T")
        out = v.clone()
        offsets = self._problem.out_offsets
        for l in range(self._problem.length - 1, 0, -1):
            after = out[offsets[l] : offsets[l + 1]]
            out[offsets[l - 1] : offsets[l]] += self._problem.stages[l].Ft(after[None])[0]
        return out

    @property
    def nbytes(self) -> int:
        """Bytes of the band, if there is one."""
        return self._problem.size_out * (self.bandwidth + 1) * 8 if self.is_banded else 0
