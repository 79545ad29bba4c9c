"""Inertia: how many eigenvalues are negative, zero and positive, counted by the pivots of a congruence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

# A pivot below this times max(‖H‖, |ε|) counts as zero.
ZERO = 1e-15

# Below this times max(‖H‖, |ε|) the sign of a pivot may be rounding: it is delayed to where no stage is left to delay to.
UNSURE = 1e-11


@dataclass(frozen=True)
class Inertia:
    """Numbers of negative, zero and positive eigenvalues."""

    negative: int
    zero: int
    positive: int

    def __add__(self, other: Inertia) -> Inertia:
        """Inertia of the direct sum."""
        return Inertia(self.negative + other.negative, self.zero + other.zero, self.positive + other.positive)

    def __sub__(self, other: Inertia) -> Inertia:
        """Inertia of what remains without a summand."""
        return Inertia(self.negative - other.negative, self.zero - other.zero, self.positive - other.positive)


def inertia_of(pivots: Iterable[Tensor], zero_below: float) -> Inertia:
    """Count the pivots by sign, those of size up to `zero_below` as zero."""
    parts = [theta.reshape(-1) for theta in pivots]
    theta = torch.cat(parts) if parts else torch.zeros(0)
    negative, zero = int((theta < -zero_below).sum()), int((theta.abs() <= zero_below).sum())
    return Inertia(negative, zero, theta.numel() - negative - zero)


def hidden_inertia(count: int, damping: float) -> Inertia:
    """Inertia of the hidden controls, whose pivots are all ε."""
    return Inertia(0, 0, count) if damping > 0 else Inertia(count, 0, 0)
