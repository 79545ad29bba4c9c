"""Selected entries of (H + εI)⁻¹: its diagonal blocks, from eliminations that meet at every segment.

What comes after a segment is eliminated from the last on, which leaves its cost-to-go; what comes before it from the first on, which
leaves a compliance (see `lq.compliance`). Where the two meet, the block of the inverse is had by a solve of the size of the state. Both
eliminations are backward stable, whatever the depth. One forward sweep over the factors would do in exact arithmetic, but its errors
grow exponentially with the depth where H is indefinite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from linop_hess.lq.methods.riccati import RiccatiFactorization
from linop_hess.lq.segments import SegmentGroup
from linop_hess.lq.stages.row_space import Joint
from linop_hess.lq.value.cost_to_come import Compliance
from linop_hess.lq.value.dense import CostToGo


def joint_covariances(factors: RiccatiFactorization, costs: Sequence[CostToGo]) -> Iterator[Joint]:
    """Yield the covariance of (s, δ) of each segment, in the order of the chain, δ in its units.

    That of (δ, c), c being delayed directions, is had where the eliminations meet; with X, Y and K of `Step.response` that of the unknowns
    of the segment is then XᵀY + K · Kᵀ.
    """
    compliance = Compliance.of_nothing(costs[0].V) if costs else None
    for l, (step, cost) in enumerate(zip(factors.steps, costs, strict=True)):
        assert compliance is not None
        n, r = cost.V.shape[0], step.segment.r
        of_state = compliance.joined(cost)
        left, right, gain = step.response()
        gain = gain[:r]
        cross = gain @ of_state
        yield Joint(
            torch.cat([left[:, :r], cross.mT]), torch.cat([right[:, :r], gain.mT]), cross[:, :n], of_state[:n, :n]
        )
        if l + 1 < len(costs):
            compliance = compliance.through(step.segment, costs[l + 1])


def _per_stage(
    factors: RiccatiFactorization, costs: Sequence[CostToGo], of: Callable[[SegmentGroup, int, Joint], Tensor]
) -> Iterator[Tensor]:
    groups = factors.problem.segment_groups
    for (g, k), joint in zip(factors.order, joint_covariances(factors, costs), strict=True):
        group = groups[g]
        if group.n_in:
            unit = group.scale_in[k]
            joint = replace(joint, sd=joint.sd * unit.mT, dd=joint.dd * unit * unit.mT)
        yield of(group, k, joint)


def diagonal(factors: RiccatiFactorization, costs: Sequence[CostToGo]) -> Tensor:
    """Diagonal of (H + εI)⁻¹, shape (N,), from factors and their costs-to-go."""

    def of(group: SegmentGroup, k: int, joint: Joint) -> Tensor:
        return group.split.at(k).covariance_diagonal(group.steps[0].at(k), joint, factors.damping)

    parts = list(_per_stage(factors, costs, of))
    return torch.cat(parts) if parts else torch.zeros(0, dtype=factors.problem.dtype, device=factors.problem.device)


def blocks(factors: RiccatiFactorization, costs: Sequence[CostToGo]) -> list[Tensor]:
    """Diagonal blocks of (H + εI)⁻¹, one of shape (p, p) per stage with controls; as `diagonal`."""

    def of(group: SegmentGroup, k: int, joint: Joint) -> Tensor:
        return group.split.at(k).covariance(group.steps[0].at(k), joint, factors.damping)

    return list(_per_stage(factors, costs, of))
