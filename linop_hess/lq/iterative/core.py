"""A weighted core of the samples, of which a sketch is made in place of all.

Sample b is drawn with a probability in proportion to what it contributes to H, Σ_l ‖z̃_lb‖²‖V_lb‖ + 2‖β_lb‖ over the stages with controls
(V_lb its open-loop value, β_lb its adjoint), by systematic sampling, and counts 1/probability times: an unbiased estimate of H.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linop_hess.lq.problem import Problem
from linop_hess.lq.stages.base import Stage
from linop_hess.lq.transition import pulled_back

_ROUNDS = 50


def weighted_core(problem: Problem, samples: int, core: int) -> Problem | None:
    """Return the problem on `core` of its samples, weighted.

    Parameters
    ----------
    problem : Problem
        Of a chain whose states all split into that many samples.
    samples : int
    core : int

    Returns
    -------
    Problem or None
        None where a kind of stage cannot be restricted to some samples.
    """
    which, weights = draw(contributions(problem, samples), core)
    blocks: list[Stage] = []
    for block in problem.blocks:
        chosen = block.of_chosen(which, weights, samples)
        if chosen is None:
            return None
        blocks.append(chosen)
    return Problem(blocks, problem.order, problem.names, problem.places, problem.of_loss)


def contributions(problem: Problem, samples: int) -> Tensor:
    """What each sample contributes to H, up to a factor, (samples,)."""
    V: Tensor | None = None
    total = torch.zeros(samples, dtype=torch.float64, device="cpu")
    for stage in reversed(problem.stages[problem.layout.first :]):
        if stage.p:
            rows = stage.sample_rows(samples)
            size = torch.ones(samples, dtype=torch.float64, device="cpu")
            if rows is not None:
                size = rows.Z.double().square().sum(1).cpu()
                if rows.beta is not None:
                    total += 2.0 * rows.beta.double().norm(dim=1).cpu()
            if V is not None:
                total += size * V.double().flatten(1).norm(dim=1).cpu()
        if V is not None:
            V = pulled_back(stage, V, samples)
        elif "C" in stage.nonzero:
            V = stage.C_of_samples(samples)[0]
    return total


def draw(score: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Systematic sampling: ascending positions, and 1/probability of each.

    Parameters
    ----------
    score : Tensor, shape (n,)
        Not negative.
    count : int
    """
    score = score + score.mean() / score.numel() if bool((score > 0).any()) else torch.ones_like(score)
    chance = score / score.sum() * count
    for _ in range(_ROUNDS):
        certain = chance >= 1.0
        left = count - int(certain.sum())
        if not bool((chance > 1.0).any()) or not left or bool(certain.all()):
            break
        chance = torch.where(certain, 1.0, score / score[~certain].sum() * left)
    chance = chance.clamp(max=1.0)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(score.numel(), generator=generator, device="cpu")
    reached = torch.cumsum(chance[order], 0) - torch.rand(1, generator=generator, dtype=chance.dtype, device="cpu")
    chosen = torch.diff(torch.floor(reached), prepend=-torch.ones_like(chance[:1])) > 0
    which = order[chosen].sort().values
    return which, 1.0 / chance[which]
