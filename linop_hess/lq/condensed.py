"""Segments with all that can be eliminated exactly gone, as dense blocks.

Without the hidden controls and the states between its stages a segment is

    ½ sᵀ S s + sᵀ E δ + ½ δᵀ Z δ,        δ⁺ = F δ + R s.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from linop_hess.lq.segments import SegmentGroup, identity
from linop_hess.lq.singular import SingularPivotError


@dataclass(frozen=True)
class Condensed:
    """The blocks of a group of K segments."""

    S: Tensor  # (K, r, r)
    E: Tensor  # (K, r, n_in)
    Z: Tensor  # (K, n_in, n_in)
    F: Tensor  # (K, n_out, n_in)
    R: Tensor  # (K, n_out, r)


def condense(group: SegmentGroup, damping: float) -> Condensed:
    """Compute the condensed blocks of a group of segments.

    Raises
    ------
    SingularPivotError
        If damping = 0 and there are controls that the output does not see.
    """
    control, split, n_in = group.steps[0], group.split, group.n_in
    K, r = group.count, group.r
    eye = identity(group)
    S = damping * eye
    A = split.A_range()
    if A is not None:
        S = S + A
    R = split.R(eye)
    if n_in:
        F = control.dense_F()
        B = split.B_range()
        E = R.new_zeros(K, r, n_in) if B is None else B
        C = control.dense_C()
        Z = R.new_zeros(K, n_in, n_in) if C is None else C
    else:
        F, E, Z = R.new_zeros(K, control.n_out, 0), R.new_zeros(K, r, 0), R.new_zeros(K, 0, 0)
    if split.complement:
        if damping == 0.0:
            raise SingularPivotError(int(group.stages[0]))
        gram = split.B_complement_gram() if n_in else None
        if gram is not None:
            Z = Z - gram / damping
    for stage in group.steps[1:]:
        CR = stage.C(R)
        if CR is not None:
            S = S + R.mT @ CR
            CF = stage.C(F) if n_in else None
            if CF is not None:
                E = E + R.mT @ CF
                Z = Z + F.mT @ CF
        R = stage.F(R)
        F = stage.F(F) if n_in else R.new_zeros(K, stage.n_out, 0)
    return Condensed(S, E, Z, F, R)
