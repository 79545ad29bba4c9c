"""Selected entries of (H + εI)⁻¹: its diagonal and its diagonal blocks.

From the block LDLᵀ by eliminations that meet at every segment. What comes after a segment is eliminated from the last on, which leaves its
cost-to-go; what comes before it from the first on, which leaves a cost-to-come (see `lq.value.cost_to_come`). Where the two meet, the block
of the inverse follows from a solve of the size of the state. Both eliminations are backward stable, whatever the depth. One forward sweep
over the factors would do in exact arithmetic, but its errors grow exponentially with the depth where H is indefinite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from linop_hess.lq.elimination.stage_factor import StageFactor
from linop_hess.lq.methods.riccati import RiccatiFactorization
from linop_hess.lq.segments import SegmentGroup
from linop_hess.lq.stages.row_space import Joint
from linop_hess.lq.value.cost_to_come import CostToCome


def joint_covariances(factors: RiccatiFactorization) -> Iterator[Joint]:
    """Yield the covariance of (s, δ, c_h) of each segment, in the order of the chain, c_h being its delayed hidden directions.

    That of (δ, c), c being all delayed directions, is known where the eliminations meet; with X, Y and K of `Elimination.response` that of
    the unknowns of the segment is then XᵀY + K · Kᵀ.
    """
    costs = factors.costs_to_go()
    before = CostToCome.of_nothing(costs[0].value.V) if costs else None
    for l, (factor, cost) in enumerate(zip(factors.factors, costs, strict=True)):
        assert before is not None
        yield _joint(factor, before.joined(cost.value))
        if l + 1 < len(costs):
            before = before.through(factor.segment, costs[l + 1].value, costs[l + 1].units)


def _joint(factor: StageFactor, of_state: Tensor) -> Joint:
    """Covariance of (s, δ, c_h) of a segment from that of (δ, c)."""
    segment, r, n = factor.segment, factor.segment.r, factor.segment.n_in
    left, right, gain = factor.elimination.response()
    gain = torch.cat([gain[:r], gain.new_zeros(r, segment.hidden.delayed)], 1)
    cross = gain @ of_state
    # Of the delayed directions only the hidden ones of this segment are parts of its own controls; they stand last.
    seen = torch.arange(of_state.shape[0], device=of_state.device)
    seen = torch.cat([seen[:n], seen[of_state.shape[0] - segment.hidden.delayed :]])
    return Joint(
        torch.cat([left[:, :r], cross.mT]),
        torch.cat([right[:, :r], gain.mT]),
        cross[:, seen],
        of_state[seen][:, seen],
        segment.hidden.directions,
    )


def _per_stage(factors: RiccatiFactorization, of: Callable[[SegmentGroup, int, Joint], Tensor]) -> Iterator[Tensor]:
    analysis = factors.analysis
    for (g, k), joint in zip(analysis.pairs, joint_covariances(factors), strict=True):
        group = analysis.groups[g]
        if group.n_in and group.state_unit is not None:
            unit = torch.ones_like(joint.dd[:, :1])
            unit[: group.n_in] = group.state_unit[k]
            joint = replace(joint, sd=joint.sd * unit.mT, dd=joint.dd * unit * unit.mT)
        yield of(group, k, joint)


def diagonal(factors: RiccatiFactorization) -> Tensor:
    """Diagonal of (H + εI)⁻¹, shape (N,), from factors; no p × p block is formed."""

    def of(group: SegmentGroup, k: int, joint: Joint) -> Tensor:
        return group.space.at(k).covariance_diagonal(group.control.at(k), joint, factors.damping.real)

    like = torch.zeros(0, dtype=factors.analysis.problem.dtype, device=factors.analysis.problem.device)
    return factors.analysis.problem.layout.in_flat_order(torch.cat([like, *_per_stage(factors, of)]))


def blocks(factors: RiccatiFactorization) -> list[Tensor]:
    """Diagonal blocks of (H + εI)⁻¹, one of shape (p, p) per stage with controls; as `diagonal`."""

    def of(group: SegmentGroup, k: int, joint: Joint) -> Tensor:
        return group.space.at(k).covariance(group.control.at(k), joint, factors.damping.real)

    return list(_per_stage(factors, of))
