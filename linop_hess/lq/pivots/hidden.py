"""Hidden controls of a segment at one damping: eliminated, but for directions whose elimination would make too much growth.

The pivot of a hidden control is ε, and the state acts on it by (I − QQᵀ)B. With that matrix = U Σ Wᵀ, the elimination of direction u_i
takes σ_i²/ε w_i w_iᵀ off the cost-to-go: for small ε far more than anything else is worth. Such directions are delayed like any other
pivot that is too small: carried to the segment before, with the value ε and the coupling σ_i w_i to the state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from linop_hess.lq.accuracy import RANK
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
    weak : Tensor or None, shape (p, i)
        Where some are delayed, orthonormal directions of all others that the state acts on.
    weak_coupling : Tensor or None, shape (n_in, i)
        Bᵀ times these.
    damping : float
        ε, the pivot of every direction.
    """

    gram: Tensor | None = None
    directions: Tensor | None = None
    coupling: Tensor | None = None
    weak: Tensor | None = None
    weak_coupling: Tensor | None = None
    damping: float = 0.0

    @property
    def delayed(self) -> int:
        """Number of delayed directions j."""
        return 0 if self.directions is None else self.directions.shape[1]

    @property
    def is_split(self) -> bool:
        """Whether some are delayed, so that the others are eliminated direction by direction."""
        return self.directions is not None

    def push(self, g: Tensor) -> Tensor:
        """(1/ε) Bᵀ times the part of g⊥ of shape (p, k) along the weak directions."""
        assert self.weak is not None and self.weak_coupling is not None
        return self.weak_coupling @ (self.weak.mT @ g) / self.damping

    def answer(self, c: Tensor, d: Tensor) -> Tensor:
        """U c of the delayed directions, and what the weak ones answer to a state δ, (p, k)."""
        assert self.directions is not None and self.weak is not None and self.weak_coupling is not None
        return self.directions @ c - self.weak @ (self.weak_coupling.mT @ d) / self.damping

    def largest_coupling(self, units: Tensor) -> float:
        """Largest norm of a column of N of those that are eliminated, in units of the state, (n_in, 1)."""
        if self.gram is None or not self.gram.numel():
            return 0.0
        return float((self.gram.diagonal().sqrt() * units[:, 0]).max())


def strongest_coupling(analysis: Analysis) -> float:
    """Largest diagonal entry of Bᵀ(I − QQᵀ)B of any segment, in units of the states: |ε| times what elimination adds to a cost-to-go."""
    largest = 0.0
    for group in analysis.groups if analysis.hidden else ():
        if group.is_coupled:
            diagonal = group.space.hidden_gram().diagonal(dim1=1, dim2=2)
            largest = max(largest, float((diagonal * group.unit_in[..., 0].square()).max()))
    return largest


def hidden_controls(group: SegmentGroup, gram: Tensor | None, damping: float, largest: float) -> list[Hidden]:
    """Decide for each segment of a group which hidden directions are delayed.

    Parameters
    ----------
    group : SegmentGroup
    gram : Tensor or None, shape (K, n_in, n_in)
        BᵀPB of all hidden controls, P = I − QQᵀ, in the unit of `SegmentGroup.state_unit`; None where they are not coupled.
    damping : float
    largest : float
        The largest coupling σ to the state, in its units, of a direction that is eliminated.
    """
    if gram is None:
        return [Hidden(damping=damping)] * group.count
    if largest == math.inf:
        return [Hidden(mine, damping=damping) for mine in gram.unbind()]
    # A unit per entry turns what is added to the cost-to-go into what is added to H; see `lq.scaling`.
    unit = group.unit_in / group.state_unit if group.state_unit is not None else group.unit_in
    size = (gram.diagonal(dim1=1, dim2=2).sqrt() * unit[..., 0]).amax(1)
    fine = (size <= largest).tolist()
    return [
        Hidden(gram[k], damping=damping) if fine[k] else _split(group, k, unit[k], damping, largest)
        for k in range(group.count)
    ]


def _split(group: SegmentGroup, k: int, unit: Tensor, damping: float, largest: float) -> Hidden:
    """Delay the directions of segment k that are coupled too strongly; `unit` takes its kept unit to the unit of `unit_in`."""
    state_unit = 1.0 if group.state_unit is None else group.state_unit[k]
    space = group.space.at(k)
    # The factor N and not the Gram matrix: squared singular values would lose half the digits of the small ones.
    N = space.hidden_coupling()[0] * (state_unit * unit).mT
    _, sigma, Wt = torch.linalg.svd(N, full_matrices=False)
    rank = int((sigma > RANK * max(N.shape) * torch.finfo(sigma.dtype).eps * sigma[0]).sum())
    late = int((sigma > largest).sum())
    # Directions from small singular values are orthogonal to rounding only in terms of the largest, which 1/ε would amplify: hence QR,
    # and all that the state acts on is split off, so that nothing of B is left on the others but exact zeros.
    along = Wt[:rank].mT / sigma[:rank] * (state_unit * unit)
    U = torch.linalg.qr(space.hidden_directions(along[None])[0]).Q
    coupling = group.control.at(k).Bt(U[None])[0] * state_unit
    weak = coupling[:, late:]
    return Hidden(weak @ weak.mT, U[:, :late], coupling[:, :late], U[:, late:], weak, damping)
