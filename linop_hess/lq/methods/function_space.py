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

from linop_hess.lq.problem import Problem
from linop_hess.lq.segments import SegmentGroup
from linop_hess.lq.stages.base import Stages
from linop_hess.lq.stages.dense import CostStage


class FunctionSpace:
    """J, Jᵀ and Γ of a problem.

    Attributes
    ----------
    samples : int
        Blocks into which the stages and C fall apart; 1 where they do not.
    seeds : Tensor, shape (samples, n / samples, q)
        U|λ|^½ of each sample, the columns of the smaller |λ| last, zero where λ is.
    signs : Tensor, shape (M,)
        Diagonal of Σ, M = samples · q; 1 where the seed is zero.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        blocks = _cost_blocks(problem.stages[-1])
        if blocks.shape[0] > 1 and not keeps_apart(problem, blocks.shape[0]):
            blocks = torch.block_diag(*blocks)[None]
        self.samples = blocks.shape[0]
        values, vectors = torch.linalg.eigh(blocks)
        order = values.abs().argsort(dim=1, descending=True)
        values, vectors = values.gather(1, order), vectors.gather(2, order[:, None].expand_as(vectors))
        nonzero = values.abs() > values.shape[1] * torch.finfo(values.dtype).eps * values.abs().max()
        q = max(int(nonzero.sum(1).max()), 1)  # of a cost without curvature one zero
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
        p = self.problem
        d = p.shift(p.transition.solve(p.apply_G(x)))[int(p.in_offsets[-2]) :]
        return (self.seeds.mT @ d.reshape(self.samples, -1, d.shape[1])).reshape(self.rows, -1)

    def Jt(self, w: Tensor) -> Tensor:
        """Jᵀ w: (M, k) to (N, k)."""
        p = self.problem
        d = w.new_zeros(p.size_in, w.shape[1])
        d[int(p.in_offsets[-2]) :] = (self.seeds @ w.reshape(self.samples, -1, w.shape[1])).flatten(0, 1)
        return p.apply_Gt(p.transition.solve_adjoint(p.shift_adjoint(d)))

    @cached_property
    def gram(self) -> Tensor:
        """Γ, computed once for all dampings."""
        out = self.seeds.new_zeros(self.rows, self.rows)
        for group, k, Y in self.walk():
            out += group.split.at(k).gram(Y, self.samples)
        return out

    def walk(self) -> Iterator[tuple[SegmentGroup, int, Tensor]]:
        """Yield the stages with controls from last to first: group, position in it, and the rows of J's costate after it.

        The costate has shape (n_out, q), its rows sample by sample.
        """
        p = self.problem
        where = {int(stage): (group, k) for group in p.segment_groups for k, stage in enumerate(group.stages)}
        Y = self.seeds.flatten(0, 1)
        for l in range(p.length - 2, -1, -1):
            if l in where:
                yield (*where[l], Y)
            if l > p.first:
                Y = p.stages[l].Ft(Y[None])[0]


def curved_stage(problem: Problem) -> int | None:
    """The first stage, but for the last, with curvature of its own; None if there is none."""
    for b, block in enumerate(problem.blocks):
        members = (problem.order[:, 0] == b).nonzero()[0]
        if members.size == 0 or members[0] == problem.length - 1:
            continue
        x = torch.zeros(block.count, block.p, 1, dtype=block.dtype, device=block.device)
        d = torch.zeros(block.count, block.n_in, 1, dtype=block.dtype, device=block.device)
        if (block.p and block.A(x) is not None) or (block.p and block.B(d) is not None) or block.C(d) is not None:
            return int(members[0])
    return None


def keeps_apart(problem: Problem, samples: int) -> bool:
    """Whether F of every stage but the last is block diagonal over samples, tried with random weights of the samples."""
    generator = torch.Generator().manual_seed(0)
    last = int(problem.order[-1, 0])
    weights = torch.randn(samples, generator=generator, dtype=torch.float64)
    for b, block in enumerate(problem.blocks):
        if b == last or not block.n_in:
            continue
        if block.n_in % samples or block.n_out % samples:
            return False
        d = torch.randn(block.count, block.n_in, 1, generator=generator, dtype=torch.float64)
        d, w = d.to(block.dtype).to(block.device), weights.to(block.dtype).to(block.device)
        weighed = block.F(d * w.repeat_interleave(block.n_in // samples)[:, None])
        expected = block.F(d) * w.repeat_interleave(block.n_out // samples)[:, None]
        if not torch.allclose(weighed, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max())):
            return False
    return True


def _cost_blocks(stage: Stages) -> Tensor:
    """C of the last stage as diagonal blocks, (samples, i, i)."""
    if isinstance(stage, CostStage):
        return stage.c[0]
    C = stage.dense_C()
    return stage.eye(stage.n_in) * 0.0 if C is None else C
