"""What the elimination of one segment leaves behind: its pivot block and how it couples to the state before it.

With u the directions eliminated (or delayed), K u = load − K_uδ δ. A step answers, in the backward sweep, with what the load
lifts to the state before, K_δu K⁻¹ load; in the forward sweep, with u.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from linop_hess.lq.pivots.bunch_kaufman import Congruence, packed_pivots
from linop_hess.lq.pivots.rules import CongruencePivots, Pivots
from linop_hess.lq.value.dense import Segment


@dataclass(frozen=True)
class Step(ABC):
    """One segment after its elimination."""

    segment: Segment

    @abstractmethod
    def eliminate_from(self, V: Tensor) -> None:
        """Take K_δu K⁻¹ K_uδ off V, in place."""

    @abstractmethod
    def backward(self, load: Tensor) -> tuple[Tensor, Tensor]:
        """What to hold for the forward sweep, and K_δu K⁻¹ load of shape (n_in, k)."""

    @abstractmethod
    def forward(self, held: Tensor, d: Tensor | None, c: Tensor | None) -> Tensor:
        """Return u, given the state before (None: zero) and the delayed directions."""

    @abstractmethod
    def response(self) -> tuple[Tensor, Tensor, Tensor]:
        """X, Y and K with u = XᵀY load + K (δ, c), the directions c being delayed ones."""

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

    pivots: Pivots
    cross: Tensor  # T⁻¹ K_uδ, (eliminated, n_in)
    arrived: int = 0
    coupling: Tensor | None = None  # of the delayed directions to the state before, (n_in, delayed)

    def eliminate_from(self, V: Tensor) -> None:
        V.addmm_(self.cross.mT, self.cross / self.pivots.theta[:, None], alpha=-1.0)

    def backward(self, load: Tensor) -> tuple[Tensor, Tensor]:
        white = self.pivots.whiten(load)
        return white, self.cross.mT @ (white / self.pivots.theta[:, None])

    def forward(self, held: Tensor, d: Tensor | None, c: Tensor | None) -> Tensor:
        if d is not None:
            held = held - self.cross @ d
        u = self.pivots.unwhiten_adjoint(held / self.pivots.theta[:, None])
        return u if c is None else u + self.delayed_directions @ c

    def response(self) -> tuple[Tensor, Tensor, Tensor]:
        theta = self.pivots.theta
        half = self.pivots.unwhiten_adjoint(torch.diag(1.0 / theta))
        gain = -half @ self.cross
        if self.delayed:
            gain = torch.cat([gain, self.delayed_directions], 1)
        return half.mT * theta[:, None], half.mT, gain

    def whitened(self) -> WhitenedStep:
        return self

    @property
    def delayed_directions(self) -> Tensor:
        """W, (u, delayed)."""
        assert self.pivots.W is not None
        return self.pivots.W

    @property
    def carried_in(self) -> int:
        return self.arrived

    @property
    def delayed(self) -> int:
        return self.pivots.delayed

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
        """Eliminate all of a pivot block, whatever its pivots."""
        packed, interchanges, _ = torch.linalg.ldl_factor_ex(K)
        return cls(segment, packed, interchanges, cross, torch.linalg.ldl_solve(packed, interchanges, cross))

    def eliminate_from(self, V: Tensor) -> None:
        V.addmm_(self.cross.mT, self.gain, alpha=-1.0)

    def backward(self, load: Tensor) -> tuple[Tensor, Tensor]:
        k = torch.linalg.ldl_solve(self.packed, self.interchanges, load)
        return k, self.cross.mT @ k

    def forward(self, held: Tensor, d: Tensor | None, c: Tensor | None) -> Tensor:
        return held if d is None else held - self.gain @ d

    def response(self) -> tuple[Tensor, Tensor, Tensor]:
        eye = torch.eye(self.packed.shape[0], dtype=self.packed.dtype, device=self.packed.device)
        return torch.linalg.ldl_solve(self.packed, self.interchanges, eye), eye, -self.gain

    def whitened(self) -> WhitenedStep:
        pivots = CongruencePivots(Congruence.from_packed(self.packed, self.interchanges))
        return WhitenedStep(self.segment, pivots, pivots.whiten(self.cross))

    @property
    def regular(self) -> bool:
        """Whether no pivot is zero or NaN."""
        theta = packed_pivots(self.packed[None], self.interchanges[None]).abs()
        return not theta.numel() or float(theta.min()) > 0.0

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.cross.nbytes + self.gain.nbytes


def stacked_by_size(steps: Sequence[PackedStep]) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield packed, interchanges, cross and gain of the steps of each size, stacked."""
    by_size: dict[torch.Size, list[PackedStep]] = {}
    for step in steps:
        by_size.setdefault(step.cross.shape, []).append(step)
    for alike in by_size.values():
        yield (
            torch.stack([step.packed for step in alike]),
            torch.stack([step.interchanges for step in alike]),
            torch.stack([step.cross for step in alike]),
            torch.stack([step.gain for step in alike]),
        )
