"""A problem whose only curvature is that of its last stage, seen from there: H = JᵀΣJ.

With C = U diag(λ) Uᵀ the curvature of the last stage, J = |λ|^½ Uᵀ ∂δ/∂x and Σ the signs of λ. J has as many rows M as C has
eigenvalues that are not zero, so that with the Gram matrix Γ = JJᵀ (M × M),

    (H + εI)⁻¹ = (1/ε) (I − Jᵀ(εΣ + Γ)⁻¹J).

The rows of J are walked back through the chain. Where the stages keep samples apart, one column stands for a row of every sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from linop_hess.lq.accuracy import RANK
from linop_hess.lq.analysis import Analysis
from linop_hess.lq.problem import Problem
from linop_hess.lq.segments import SegmentGroup
from linop_hess.lq.stages.base import common_samples


class FunctionSpace:
    """J, Jᵀ and Γ of a problem.

    Parameters
    ----------
    analysis : Analysis

    Attributes
    ----------
    samples : int
        Blocks into which the stages and C fall apart; 1 where they do not.
    seeds : Tensor, shape (samples, n / samples, q)
        U|λ|^½ of each sample, the columns of the smaller |λ| last, zero where λ is.
    signs : Tensor, shape (M,)
        Diagonal of Σ, M = samples · q; 1 where the seed is zero.
    """

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        last = analysis.problem.stages[-1]
        self.samples = samples_apart(analysis.problem)
        blocks = last.C_of_samples(self.samples)[0]
        values, vectors = torch.linalg.eigh(blocks)
        order = values.abs().argsort(dim=1, descending=True)
        values, vectors = values.gather(1, order), vectors.gather(2, order[:, None].expand_as(vectors))
        nonzero = values.abs() > values.shape[1] * torch.finfo(values.dtype).eps * RANK * values.abs().max()
        q = max(int(nonzero.sum(1).max()), 1)  # of an objective without curvature one zero
        values = torch.where(nonzero, values, 0.0)[:, :q]
        self.seeds = vectors[:, :, :q] * values.abs().sqrt()[:, None]
        self.signs = torch.where(values < 0, -1.0, 1.0).to(values.dtype).reshape(-1)

    @property
    def rows(self) -> int:
        """M."""
        return self.signs.numel()

    @property
    def is_convex(self) -> bool:
        """Whether the cost is convex, so that H is positive semidefinite."""
        return not bool((self.signs < 0).any())

    def J(self, x: Tensor) -> Tensor:
        """J x: (N, k) to (M, k)."""
        p = self.analysis.problem
        d = p.layout.shift(p.transition.substitute(p.apply_G(x)))[int(p.layout.in_offsets[-2]) :]
        return (self.seeds.mT @ d.reshape(*self.seeds.shape[:2], d.shape[1])).reshape(self.rows, d.shape[1])

    def Jt(self, w: Tensor) -> Tensor:
        """Jᵀ w: (M, k) to (N, k)."""
        p = self.analysis.problem
        d = w.new_zeros(p.layout.size_in, w.shape[1])
        d[int(p.layout.in_offsets[-2]) :] = (
            self.seeds @ w.reshape(self.samples, self.seeds.shape[2], w.shape[1])
        ).flatten(0, 1)
        return p.apply_Gt(p.transition.substitute_adjoint(p.layout.shift_adjoint(d)))

    @cached_property
    def gram(self) -> Tensor:
        """Γ, computed once for all dampings."""
        out = self.seeds.new_zeros(self.rows, self.rows)
        for group, k, Y in self.walk():
            out += group.space.at(k).gram(Y, self.samples)
        return out

    def walk(self) -> Iterator[tuple[SegmentGroup, int, Tensor]]:
        """Yield the stages with controls from last to first: group, position in it, and the rows of J's costate after it.

        The costate has shape (n_out, q), its rows sample by sample.
        """
        p = self.analysis.problem
        where = {int(stage): (group, k) for group in self.analysis.groups for k, stage in enumerate(group.stages)}
        Y = self.seeds.flatten(0, 1)
        for l in range(p.length - 2, -1, -1):
            if l in where:
                yield (*where[l], Y)
            if l > p.layout.first:
                Y = p.stages[l].Ft(Y[None])[0]


def curved_stage(problem: Problem) -> int | None:
    """The first stage, but for the last, with curvature of its own; None if there is none."""
    layout = problem.layout
    for l, (b, _) in enumerate(layout.order[:-1]):
        block = problem.blocks[b]
        curved = ("C" in block.nonzero and block.n_in) or ("AB" if block.p else "") and block.nonzero & set("AB")
        if curved and l >= layout.first:
            return l
    return None


def samples_apart(problem: Problem) -> int:
    """Into how many samples the last state and all states after the first controls split; 1 where samples interact."""
    layout = problem.layout
    used = {int(b) for b, _ in layout.order[layout.first :]}
    inner = [problem.blocks[b].at(0) for b in sorted(used)]
    return common_samples(inner)
