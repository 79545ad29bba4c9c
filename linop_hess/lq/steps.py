"""What the elimination of one segment leaves behind: its pivot block and how it couples to the state before it.

With u the directions eliminated (or delayed), K u = load − K_uδ δ. A step answers, in the backward sweep, with what the load
lifts to the state before, K_δu K⁻¹ load; in the forward sweep, with u.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from linop_hess.lq.pivots import Eigenpivots
from linop_hess.lq.pullback import Segment
from linop_hess.lq.symmetric import Congruence, packed_pivots


@dataclass(frozen=True)
class Step(ABC):
    """One segment after its elimination."""

    segment: Segment

    @abstractmethod
    def backward(self, load: Tensor) -> tuple[Tensor, Tensor]:
        """What to hold for the forward sweep, and K_δu K⁻¹ load of shape (n_in, k)."""

    @abstractmethod
    def forward(self, held: Tensor, d: Tensor | None, c: Tensor | None) -> Tensor:
        """Return u, given the state before (None: zero) and the delayed directions."""

    @abstractmethod
    def whitened(self) -> WhitenedStep:
        """Return the same step with its pivot block as T θ Tᵀ."""

    @property
    def carried_in(self) -> int:
        """Number of directions that came from the segment after."""
        return 0

    @property
    def delayed(self) -> int:
        """Number of directions that go to the segment before."""
        return 0

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held."""


@dataclass(frozen=True)
class WhitenedStep(Step):
    """K = T θ Tᵀ, kept with T⁻¹ K_uδ."""

    pivots: Congruence | Eigenpivots
    cross: Tensor  # T⁻¹ K_uδ, (eliminated, n_in)
    arrived: int = 0

    def backward(self, load: Tensor) -> tuple[Tensor, Tensor]:
        white = self.pivots.whiten(load)
        return white, self.cross.mT @ (white / self.pivots.theta[:, None])

    def forward(self, held: Tensor, d: Tensor | None, c: Tensor | None) -> Tensor:
        if d is not None:
            held = held - self.cross @ d
        u = self.pivots.unwhiten_adjoint(held / self.pivots.theta[:, None])
        return u if c is None else u + self.delayed_directions @ c

    def whitened(self) -> WhitenedStep:
        return self

    @property
    def delayed_directions(self) -> Tensor:
        """W, (u, delayed)."""
        assert isinstance(self.pivots, Eigenpivots) and self.pivots.W is not None
        return self.pivots.W

    @property
    def carried_in(self) -> int:
        return self.arrived

    @property
    def delayed(self) -> int:
        return self.pivots.delayed if isinstance(self.pivots, Eigenpivots) else 0

    @property
    def nbytes(self) -> int:
        return self.pivots.nbytes + self.cross.nbytes


@dataclass(frozen=True)
class PackedStep(Step):
    """K as LAPACK's Bunch-Kaufman factorization left it, kept with K_uδ and K⁻¹ K_uδ: the fewest calls, for narrow segments."""

    packed: Tensor
    interchanges: Tensor
    cross: Tensor
    gain: Tensor

    @classmethod
    def of(cls, segment: Segment, K: Tensor, cross: Tensor) -> PackedStep:
        """Eliminate all of a pivot block, whatever its pivots: `smallest_pivots` tells."""
        packed, interchanges, _ = torch.linalg.ldl_factor_ex(K)
        return cls(segment, packed, interchanges, cross, torch.linalg.ldl_solve(packed, interchanges, cross))

    def backward(self, load: Tensor) -> tuple[Tensor, Tensor]:
        k = torch.linalg.ldl_solve(self.packed, self.interchanges, load)
        return k, self.cross.mT @ k

    def forward(self, held: Tensor, d: Tensor | None, c: Tensor | None) -> Tensor:
        return held if d is None else held - self.gain @ d

    def whitened(self) -> WhitenedStep:
        pivots = Congruence.from_packed(self.packed, self.interchanges)
        return WhitenedStep(self.segment, pivots, pivots.whiten(self.cross))

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.cross.nbytes + self.gain.nbytes


def pivot_sizes(steps: Sequence[PackedStep]) -> list[tuple[float, float]]:
    """Smallest and largest |θ| of each step, NaN where there is a NaN; steps of one size are looked at together."""
    sizes = [(1.0, 1.0)] * len(steps)
    for r in {step.packed.shape[0] for step in steps} - {0}:
        mine = [k for k, step in enumerate(steps) if step.packed.shape[0] == r]
        theta = packed_pivots(
            torch.stack([steps[k].packed for k in mine]), torch.stack([steps[k].interchanges for k in mine])
        ).abs()
        low, high = theta.aminmax(dim=1)
        for k, a, b in zip(mine, low.tolist(), high.tolist(), strict=True):
            sizes[k] = a, b
    return sizes
