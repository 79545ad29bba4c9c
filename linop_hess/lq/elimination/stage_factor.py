"""One segment after its elimination: what it does in the backward and in the forward sweep of the halves L⁻¹ and L⁻ᵀ.

With T θ Tᵀ the pivots of the segment, v the multiplier of the state after it and load the right-hand side of u = (s, c),

    backward (L⁻¹):  w = T⁻¹(load − (Rᵀv, w_c)),     v ← Fᵀv + (T⁻¹E)ᵀ θ⁻¹ w,     w_c ← W ᵀ(load − ...) for the directions delayed here;
    forward (L⁻ᵀ):   u = T⁻ᵀ(w − θ⁻¹ T⁻¹E δ) + W c,     δ ← F δ + R s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from linop_hess.lq.pivots.delayed import Elimination, WhitenedElimination
from linop_hess.lq.value.controls import Segment


@dataclass(frozen=True)
class StageFactor:
    """A segment and its elimination.

    Attributes
    ----------
    segment : Segment
    elimination : Elimination
    arrived : int
        Number of delayed directions that came from the segment after.
    """

    segment: Segment
    elimination: Elimination
    arrived: int

    @property
    def delayed(self) -> int:
        """Number of directions that go to the segment before."""
        return self.elimination.delayed + self.segment.hidden.delayed

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.elimination.nbytes


@dataclass(frozen=True)
class SegmentLoad:
    """What a right-hand side puts on one segment: on its visible controls, its state, and its delayed hidden directions."""

    visible: Tensor  # (r, k)
    state: Tensor | None  # (n_in, k), None where zero
    directions: Tensor  # (j, k)


def whiten_one(
    factor: StageFactor, elimination: WhitenedElimination, load: SegmentLoad, v: Tensor | None, carried: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward step of one segment: w, v of the state before, and the load on directions that are delayed here.

    v is that of the state after, None after the last segment, and `carried` the load on directions that arrive.
    """
    unknown, after = load.visible, None
    if v is not None:
        seen, after = factor.segment.adjoint(v)
        unknown = unknown - seen
    if factor.arrived:
        unknown = torch.cat([unknown, carried])
    w = elimination.pivots.whiten(unknown)
    v = elimination.white.mT @ (w / elimination.theta[:, None])
    if after is not None:
        v += after
    if load.state is not None:
        v += load.state
    return w, v, torch.cat([elimination.W.mT @ unknown, load.directions]) if factor.delayed else carried


def unwhiten_one(
    factor: StageFactor, elimination: WhitenedElimination, w: Tensor, d: Tensor, c: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward step of one segment: s, the state after, and the directions that arrived, for those delayed at the segment after.

    d is the state before, and c the directions that were delayed here.
    """
    r = factor.segment.r
    white = w - (elimination.white @ d) / elimination.theta[:, None] if d.shape[0] else w
    u = elimination.pivots.unwhiten(white)
    if elimination.delayed:
        u = u + elimination.W @ c[: elimination.delayed]
    return u[:r], factor.segment.forward(u[:r], d), u[r:]


def whiten(
    factors: Sequence[StageFactor], eliminations: Sequence[WhitenedElimination], load: Sequence[SegmentLoad]
) -> list[Tensor]:
    """L⁻¹ of the visible controls: eliminate from the last segment to the first; w of each, (e, k)."""
    out: list[Tensor] = []
    v: Tensor | None = None
    carried = load[-1].visible[:0]  # none after the last segment
    for factor, elimination, mine in zip(reversed(factors), reversed(eliminations), reversed(load), strict=True):
        w, v, carried = whiten_one(factor, elimination, mine, v, carried)
        out.append(w)
    return out[::-1]


def unwhiten(
    factors: Sequence[StageFactor], eliminations: Sequence[WhitenedElimination], w: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """L⁻ᵀ: substitute from the first segment to the last; s, δ before, and the delayed hidden directions of each segment."""
    controls, states, directions = [], [], []
    d = w[0].new_zeros(factors[0].segment.n_in, w[0].shape[1])
    c = w[0][:0]
    for factor, elimination, mine in zip(factors, eliminations, w, strict=True):
        states.append(d)
        directions.append(c[elimination.delayed :])
        s, d, c = unwhiten_one(factor, elimination, mine, d, c)
        controls.append(s)
    return controls, states, directions
