"""Segments with all that can be eliminated exactly gone, as dense blocks.

Without the hidden controls and the states between its stages a segment is, with u = (s, δ),

    ½ uᵀ T u,        δ⁺ = W u,        T = [S, E; Eᵀ, Z],        W = [R, F],

δ and δ⁺ in their units (see `lq.scaling`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linop_hess.lq.segments import SegmentGroup, identity


@dataclass(frozen=True)
class Condensed:
    """The blocks of a group of K segments but for the damping.

    Attributes
    ----------
    r : int
    curvature : Tensor, shape (K, r + n_in, r + n_in)
        T at ε = 0 without the hidden controls.
    gram : Tensor or None, shape (K, n_in, n_in)
        Bᵀ(I − QQᵀ)B of the hidden controls; None where they are not coupled to the state.
    W : Tensor, shape (K, n_out, r + n_in)
    """

    r: int
    curvature: Tensor
    gram: Tensor | None
    W: Tensor

    def T(self, damping: float, gram: Tensor | None = None) -> Tensor:
        """T at a damping, (K, r + n_in, r + n_in); `gram` takes the place of that of all hidden controls."""
        T = self.curvature.clone()
        T.diagonal(dim1=1, dim2=2)[:, : self.r].add_(damping)
        gram = self.gram if gram is None else gram
        if gram is not None:
            T[:, self.r :, self.r :].sub_(gram, alpha=1.0 / damping)
        return T

    def out_of_units(self, unit_in: Tensor, unit_out: Tensor) -> Condensed:
        """Return the blocks for states that are not in units."""
        back = torch.cat([unit_in.new_ones(unit_in.shape[0], self.r, 1), 1.0 / unit_in], 1)
        gram = None if self.gram is None else self.gram / unit_in / unit_in.mT
        return Condensed(self.r, self.curvature * back * back.mT, gram, self.W * unit_out * back.mT)


def condense(group: SegmentGroup) -> Condensed:
    """Return the condensed blocks of a group."""
    control, space, n_in, r = group.control, group.space, group.n_in, group.r
    R = space.R(identity(group))
    T = R.new_zeros(group.count, r + n_in, r + n_in)
    if "A" in control.nonzero:
        T[:, :r, :r] = space.QtAQ()
    if "B" in control.nonzero and n_in:
        B = space.QtB()
        T[:, :r, r:] = B
        T[:, r:, :r] = B.mT
    if "C" in control.nonzero and n_in:
        T[:, r:, r:] = control.dense_C()
    W = torch.cat([R, control.dense_F()], 2)
    # Push u = (s, δ) through the control-free stages; each adds its own curvature, seen from u.
    for stage in group.free:
        if "C" in stage.nonzero:
            T.baddbmm_(W.mT, stage.C(W))
        W = stage.F(W)
    unit = group.unit_in
    W = W / group.unit_out
    W[:, :, r:] *= unit.mT
    T[:, r:] *= unit
    T[:, :, r:] *= unit.mT
    gram = group.space.hidden_gram() * unit * unit.mT if group.is_coupled else None
    return Condensed(r, T, gram, W)
