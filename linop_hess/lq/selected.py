"""Selected entries of (H + εI)⁻¹: its diagonal blocks, by one forward sweep over the block LDLᵀ factors.

With H + εI = L D Lᵀ the inverse is the covariance that the forward sweep makes of white noise of covariance D⁻¹ (the algebra
is the same where D is indefinite). All that is needed is the joint covariance of a segment's visible controls s, of the
directions c it took over, and of the state δ before it:

    u = (s, c⁺) = T⁻ᵀθ⁻¹ξ − T⁻ᵀθ⁻¹(T⁻¹K_uδ) δ + W c,        δ⁺ = F δ + R s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from linop_hess.lq.riccati import RiccatiFactorization
from linop_hess.lq.segments import SegmentGroup
from linop_hess.lq.steps import WhitenedStep


@dataclass(frozen=True)
class Joint:
    """Blocks of the covariance of (s, δ) in one segment."""

    ss: Tensor  # (r, r)
    sd: Tensor  # (r, n_in)
    dd: Tensor  # (n_in, n_in)


def joint_covariances(factors: RiccatiFactorization) -> Iterator[Joint]:
    """Yield the covariance of (s, δ) of each segment, in the order of the chain; `factors` must be whitened."""
    state: Tensor | None = None  # of (δ, c)
    for step in factors.steps:
        assert isinstance(step, WhitenedStep)
        theta, r = step.pivots.theta, step.segment.r
        half = step.pivots.unwhiten_adjoint(torch.diag(1.0 / theta))
        own = half @ (half * theta).mT
        n = step.cross.shape[1]
        if state is None:
            state = own.new_zeros(n, n)
        gain = -half @ step.cross
        if step.delayed:
            gain = torch.cat([gain, step.delayed_directions], 1)
        cross = gain @ state
        u = torch.addmm(own, cross, gain.mT)
        yield Joint(u[:r, :r], cross[:r, :n], state[:n, :n])
        together = torch.cat([torch.cat([u, cross[:, :n]], 1), torch.cat([cross[:, :n].mT, state[:n, :n]], 1)])
        state = _mapped(step, _mapped(step, together).mT)


def _mapped(step: WhitenedStep, columns: Tensor) -> Tensor:
    """(δ⁺, c⁺) of columns (s, c⁺, δ)."""
    r, m = step.segment.r, step.carried_in
    d = columns[r + m :]
    after = step.segment.forward(columns[:r], d if d.shape[0] else None)
    return torch.cat([after, columns[r : r + m]]) if m else after


def _per_stage(factors: RiccatiFactorization, of: Callable[[SegmentGroup, int, Joint], Tensor]) -> Iterator[Tensor]:
    groups = factors.problem.segment_groups
    for (g, k), joint in zip(factors.order, joint_covariances(factors), strict=True):
        yield of(groups[g], k, joint)


def diagonal(factors: RiccatiFactorization) -> Tensor:
    """Diagonal of (H + εI)⁻¹, shape (N,)."""

    def of(group: SegmentGroup, k: int, joint: Joint) -> Tensor:
        return group.split.at(k).covariance_diagonal(
            group.steps[0].at(k), joint.ss, joint.sd, joint.dd, factors.damping
        )

    return torch.cat(list(_per_stage(factors, of)))


def blocks(factors: RiccatiFactorization) -> list[Tensor]:
    """Diagonal blocks of (H + εI)⁻¹, one of shape (p, p) per stage with controls."""

    def of(group: SegmentGroup, k: int, joint: Joint) -> Tensor:
        return group.split.at(k).covariance(group.steps[0].at(k), joint.ss, joint.sd, joint.dd, factors.damping)

    return list(_per_stage(factors, of))
