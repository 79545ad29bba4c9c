"""Segments with all that can be eliminated exactly gone, as dense blocks.

Without the hidden controls and the states between its stages a segment is, with u = (s, δ),

    ½ uᵀ T u,        δ⁺ = W u,        T = [S, E; Eᵀ, Z],        W = [R, F],

δ and δ⁺ in their units (see `lq.scaling`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linop_hess.lq.methods.singular import SingularPivotError
from linop_hess.lq.segments import SegmentGroup, identity


@dataclass(frozen=True)
class Condensed:
    """The blocks of a group of K segments but for the damping."""

    r: int
    curvature: Tensor  # T at ε = 0 without the hidden controls, (K, r + n_in, r + n_in)
    gram: Tensor | None  # Bᵀ(I − QQᵀ)B of the hidden controls, (K, n_in, n_in)
    W: Tensor  # (K, n_out, r + n_in)

    def T(self, damping: float) -> Tensor:
        """T at a damping, (K, r + n_in, r + n_in)."""
        T = self.curvature.clone()
        T.diagonal(dim1=1, dim2=2)[:, : self.r].add_(damping)
        if self.gram is not None:
            T[:, self.r :, self.r :].sub_(self.gram, alpha=1.0 / damping)
        return T


def condensed(group: SegmentGroup, damping: float) -> Condensed:
    """Return the condensed blocks of a group, computed once for all dampings.

    Raises
    ------
    SingularPivotError
        If damping = 0 and there are controls that the output does not see.
    """
    if group.split.complement and damping == 0.0:
        raise SingularPivotError(int(group.stages[0]))
    if "condensed" not in group.__dict__:
        group.__dict__["condensed"] = _condense(group)
    blocks: Condensed = group.__dict__["condensed"]
    return blocks


def _condense(group: SegmentGroup) -> Condensed:
    control, split, n_in, r = group.steps[0], group.split, group.n_in, group.r
    W = split.R(identity(group))
    T = W.new_zeros(group.count, r + n_in, r + n_in)
    gram: Tensor | None = None
    A = split.A_range()
    if A is not None:
        T[:, :r, :r] = A
    if n_in:
        W = torch.cat([W, control.dense_F()], 2)
        B = split.B_range()
        if B is not None:
            T[:, :r, r:] = B
            T[:, r:, :r] = B.mT
        C = control.dense_C()
        if C is not None:
            T[:, r:, r:] = C
        gram = split.B_complement_gram() if split.coupled else None
    for stage in group.steps[1:]:
        curved = stage.C(W)
        if curved is not None:
            T.baddbmm_(W.mT, curved)
        W = stage.F(W)
    W = W / group.scale_out
    if n_in:
        unit = group.scale_in
        W[:, :, r:] *= unit.mT
        T[:, r:] *= unit
        T[:, :, r:] *= unit.mT
        gram = None if gram is None else gram * unit * unit.mT
    return Condensed(r, T, gram, W)
