"""Hidden controls of a segment at one damping: eliminated, but for directions whose elimination would make too much growth.

The pivot of a hidden control is ε, and the state acts on it by (I − QQᵀ)B. With that matrix = U Σ Wᵀ, the elimination of direction u_i
takes σ_i²/ε w_i w_iᵀ off the cost-to-go: for small ε far more than anything else is worth. Such directions are delayed like any other
pivot that is too small: carried to the segment before, with the value ε and the coupling σ_i w_i to the state.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linop_hess.lq.analysis import Analysis
from linop_hess.lq.segments import SegmentGroup


@dataclass(frozen=True)
class Hidden:
    """The hidden controls of one segment, the state in the unit that the recursion keeps it in.

    Attributes
    ----------
    gram : Tensor or None, shape (n_in, n_in)
        NᵀN of those that are eliminated, N = (I − QQᵀ)B; None where they are not coupled to the state.
    directions : Tensor or None, shape (p, j)
        Orthonormal directions U that are delayed.
    coupling : Tensor or None, shape (n_in, j)
        BᵀU.
    damping : float
        ε, the pivot of every direction.
    """

    gram: Tensor | None = None
    directions: Tensor | None = None
    coupling: Tensor | None = None
    damping: float = 0.0

    @property
    def delayed(self) -> int:
        """Number of delayed directions j."""
        return 0 if self.directions is None else self.directions.shape[1]

    def growth(self, units: Tensor) -> float:
        """What the elimination adds to the cost-to-go, in units of the state, (n_in, 1)."""
        if self.gram is None or not self.gram.numel():
            return 0.0
        return float((self.gram.diagonal() * units[:, 0].square()).max()) / abs(self.damping)


def largest_coupling(analysis: Analysis) -> float:
    """Largest diagonal entry of Bᵀ(I − QQᵀ)B of any segment, in units of the states: |ε| times what elimination adds to a cost-to-go."""
    largest = 0.0
    for group in analysis.groups:
        if group.is_coupled:
            diagonal = group.space.hidden_gram().diagonal(dim1=1, dim2=2)
            largest = max(largest, float((diagonal * group.unit_in[..., 0].square()).max()))
    return largest


def hidden_controls(group: SegmentGroup, gram: Tensor | None, damping: float, limit: float) -> list[Hidden]:
    """Decide for each segment of a group which hidden directions are delayed.

    Parameters
    ----------
    group : SegmentGroup
    gram : Tensor or None, shape (K, n_in, n_in)
        BᵀPB of all hidden controls, P = I − QQᵀ, in the unit of `SegmentGroup.state_unit`; None where they are not coupled.
    damping : float
    limit : float
        What the elimination of a direction may add to the cost-to-go, in units of the states.
    """
    if gram is None:
        return [Hidden(damping=damping)] * group.count
    # A unit per entry turns the growth of the cost-to-go into that of H; see `lq.scaling`.
    unit = group.unit_in / group.state_unit if group.state_unit is not None else group.unit_in
    growth = (gram.diagonal(dim1=1, dim2=2) * unit[..., 0].square()).amax(1) / abs(damping)
    fine = (growth <= limit).tolist()
    return [
        Hidden(gram[k], damping=damping) if fine[k] else _split(group, k, unit[k], damping, limit)
        for k in range(group.count)
    ]


def _split(group: SegmentGroup, k: int, unit: Tensor, damping: float, limit: float) -> Hidden:
    """Delay the directions of segment k that grow beyond the limit; `unit` takes its kept unit to the unit of `unit_in`."""
    state_unit = 1.0 if group.state_unit is None else group.state_unit[k]
    space = group.space.at(k)
    # The factor N and not the Gram matrix: squared singular values would lose half the digits of the small ones.
    _, sigma, Wt = torch.linalg.svd(space.hidden_coupling()[0] * (state_unit * unit).mT, full_matrices=False)
    late = sigma.square() > limit * abs(damping)
    kept = Wt[~late] * sigma[~late, None] / unit.mT
    along = Wt[late].mT / sigma[late] * (state_unit * unit)
    directions = space.hidden_directions(along[None])[0]
    coupling = Wt[late].mT * sigma[late] / unit
    return Hidden(kept.mT @ kept, directions, coupling, damping)
