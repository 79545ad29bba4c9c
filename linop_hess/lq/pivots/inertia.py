"""Inertia: how many eigenvalues are negative, zero and positive, counted by the pivots of a congruence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from linop_hess._display import Unpacked


@dataclass(frozen=True)
class Inertia(Unpacked):
    """Numbers of negative, zero and positive eigenvalues; ``negative, zero, positive = inertia`` unpacks them.

    By Sylvester's law of inertia these are the numbers of negative, zero and positive pivots of any congruence L D Lᵀ with L regular.

    Attributes
    ----------
    negative, zero, positive : int
    """

    negative: int
    zero: int
    positive: int

    _order = ("negative", "zero", "positive")

    def __add__(self, other: Inertia) -> Inertia:
        """Inertia of the direct sum."""
        return Inertia(self.negative + other.negative, self.zero + other.zero, self.positive + other.positive)

    def __sub__(self, other: Inertia) -> Inertia:
        """Inertia of what remains without a summand."""
        return Inertia(self.negative - other.negative, self.zero - other.zero, self.positive - other.positive)


def inertia_of(pivots: Iterable[Tensor], zero_below: float) -> Inertia:
    """Count pivots by sign.

    Parameters
    ----------
    pivots : iterable of Tensor
        Of any shapes.
    zero_below : float
        Pivots of size up to this count as zero.
    """
    parts = [theta.reshape(-1) for theta in pivots]
    theta = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64, device="cpu")
    negative, zero = int((theta < -zero_below).sum()), int((theta.abs() <= zero_below).sum())
    return Inertia(negative, zero, theta.numel() - negative - zero)


def hidden_inertia(count: int, damping: float) -> Inertia:
    """Inertia of the hidden controls, whose pivots are all ε."""
    return Inertia(0, 0, count) if damping > 0 else Inertia(count, 0, 0)
