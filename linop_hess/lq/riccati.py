"""Method "riccati": the backward recursion over stages, with level-3 BLAS and delayed pivots. For wide stages.

The cost-to-go of a stage is ½ δᵀVδ + δᵀYc + ½ cᵀΛc, c being directions whose pivot was too small to divide by. With
u = (s, c) the unknowns at hand,

    K_uu = [εI + QᵀAQ + RᵀVR, RᵀY; YᵀR, Λ],   K_uδ = [QᵀB + RᵀVF; YᵀF],   V ← C + FᵀVF − (1/ε)Bᵀ(I−QQᵀ)B − K_δu K_uu⁻¹ K_uδ.

K_uu is factored as T θ Tᵀ. Should its smallest pivot be far below |ε| (the trailing block of H + εI is nearly singular although
H + εI need not be), its eigenvectors are taken instead, those of eigenvalues below a tenth of |ε| are carried to the stage
before, and only the others are eliminated; the first stage eliminates everything. Every step is a congruence, so the θ of all stages have
the inertia of H + εI.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from linop_hess.lq.cost import Cost
from linop_hess.lq.problem import Problem
from linop_hess.lq.rangesplit import RangeSplit
from linop_hess.lq.singular import SingularPivotError
from linop_hess.lq.stages import Stages
from linop_hess.lq.symmetric import Congruence

# Every stage has pivots of the size of ε by nature (controls its output does not see), so a pivot is small only where it
# is far below |ε|, and then far below the largest of its stage too.
DELAY = 0.1
SUSPECT = 0.01
_SMALL = 1e-4


@dataclass(frozen=True)
class Eigenpivots:
    """Pivots of a stage by eigenvectors: eliminated ones (U, θ) and delayed ones (W, μ)."""

    U: Tensor
    theta: Tensor
    W: Tensor
    mu: Tensor

    def whiten(self, X: Tensor) -> Tensor:
        """Uᵀ X."""
        return self.U.mT @ X

    def unwhiten_adjoint(self, Y: Tensor) -> Tensor:
        """U Y."""
        return self.U @ Y

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.U.nbytes + self.W.nbytes


@dataclass(frozen=True)
class Step:
    """What one stage with controls leaves behind for the solves."""

    position: int
    pivots: Congruence | Eigenpivots
    cross: Tensor  # T⁻¹ K_uδ, (eliminated, n_in)
    carried_in: int  # size of c that came from the stage after

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.pivots.nbytes + self.cross.nbytes


class RiccatiFactorization:
    """Block LDLᵀ of H + εI along the chain.

    Raises
    ------
    SingularPivotError
        If H + εI is singular to working precision.
    """

    method = "riccati"

    def __init__(self, problem: Problem, damping: float, *, always_pivot: bool = False) -> None:
        self.problem = problem
        self.damping = damping
        self._always_pivot = always_pivot
        self._splits = [block.split if block.p else None for block in problem.blocks]
        self.steps: list[Step] = []
        self._factor()

    def split_of(self, l: int) -> RangeSplit:
        """Return the range split of stage l."""
        block, position = self.problem.order[l]
        split = self._splits[block]
        assert split is not None
        return split if self.problem.blocks[block].count == 1 else split.at(int(position))

    def _factor(self) -> None:
        problem = self.problem
        V: Tensor | None = None
        Y, mu = self._nothing_carried(int(problem.n_out[-1]))
        for l in range(problem.length - 1, problem.first - 1, -1):
            stage = problem.stages[l]
            first = l == problem.first
            if not problem.p[l]:
                V, Y = stage.pull_back(V), stage.Ft(Y[None])[0]
                continue
            V, Y, mu = self._eliminate(l, stage, V, Y, mu, first)

    def _nothing_carried(self, n: int) -> tuple[Tensor, Tensor]:
        empty = torch.zeros(n, 0, dtype=self.problem.dtype, device=self.problem.device)
        return empty, torch.zeros(0, dtype=empty.dtype, device=empty.device)

    def _eliminate(
        self, l: int, stage: Stages, V: Tensor | None, Y: Tensor, mu: Tensor, first: bool
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        damping = self.damping
        split = self.split_of(l)
        if split.complement and damping == 0.0:
            raise SingularPivotError(l)
        m = mu.numel()
        n_in = 0 if first else stage.n_in
        VR = None if V is None else split.Rt(V[None]).mT.contiguous()
        K, cross = self._own_blocks(stage, split, VR, n_in)
        if m:
            coupling = split.Rt(Y[None])[0]
            K = torch.cat([torch.cat([K, coupling], 1), torch.cat([coupling.mT, torch.diag(mu)], 1)])
            carried = stage.Ft(Y[None])[0].mT[:, :n_in]
            cross = torch.cat([cross, carried])
        pivots = self._pivots(K, l, first)
        white = pivots.whiten(cross)
        self.steps.append(Step(l, pivots, white, m))
        if first:
            return None, K.new_zeros(0, 0), K.new_zeros(0)
        V = stage.pull_back(V)
        gram = split.B_complement_gram() if split.complement else None
        if V is None:
            V = K.new_zeros(n_in, n_in)
        if gram is not None:
            V.add_(gram[0], alpha=-1.0 / damping)
        V.addmm_(white.mT, white / pivots.theta[:, None], alpha=-1.0)
        if isinstance(pivots, Eigenpivots):
            return V, cross.mT @ pivots.W, pivots.mu
        Y, mu = self._nothing_carried(n_in)
        return V, Y, mu

    def _own_blocks(self, stage: Stages, split: RangeSplit, VR: Tensor | None, n_in: int) -> tuple[Tensor, Tensor]:
        """K_uu and K_uδ for u = s alone."""
        K = torch.zeros(split.r, split.r, dtype=stage.dtype, device=stage.device) if VR is None else split.Rt(VR)[0]
        K.diagonal().add_(self.damping)
        A = split.A_range()
        if A is not None:
            K += A[0]
        cross = K.new_zeros(n_in, split.r) if VR is None or not n_in else stage.Ft(VR)[0]
        B = split.B_range() if n_in else None
        if B is not None:
            cross += B[0].mT
        return K, cross.mT

    def _pivots(self, K: Tensor, l: int, first: bool) -> Congruence | Eigenpivots:
        if not bool(torch.isfinite(K).all()):
            raise SingularPivotError(l)
        if first or not self._always_pivot or not K.numel():
            congruence = Congruence.of(K)
            size = congruence.theta.abs()
            if first:
                if size.numel() and float(size.min()) == 0.0:
                    raise SingularPivotError(l)
                return congruence
            if not size.numel() or float(size.min()) > self._small(SUSPECT, float(size.max())):
                return congruence
        values, vectors = torch.linalg.eigh(K)
        keep = values.abs() > self._small(DELAY, float(values.abs().max()))
        return Eigenpivots(vectors[:, keep], values[keep], vectors[:, ~keep], values[~keep])

    def _small(self, fraction: float, largest: float) -> float:
        """What counts as a small pivot among those of a stage."""
        small = _SMALL * largest
        return min(small, fraction * abs(self.damping)) if self.damping else 1e-4 * small

    def solve(self, g: Tensor) -> Tensor:
        """(H + εI)⁻¹ g for g of shape (N, k)."""
        problem, damping = self.problem, self.damping
        x = torch.zeros_like(g)
        if not self.steps:
            return x
        offsets = problem.x_offsets
        v = g.new_zeros(int(problem.n_out[-1]), g.shape[1])
        w = g.new_zeros(0, g.shape[1])
        held: dict[int, tuple[Tensor, Tensor | None]] = {}
        steps = {step.position: step for step in self.steps}
        for l in range(problem.length - 1, problem.first - 1, -1):
            stage = problem.stages[l]
            step = steps.get(l)
            if step is None:
                v = stage.Ft(v[None])[0]
                continue
            split = self.split_of(l)
            mine = g[offsets[l] : offsets[l + 1]][None]
            visible = split.Qt(mine)
            rest = mine - split.Q(visible) if split.complement else None
            load = torch.cat([visible[0] - split.Rt(v[None])[0], -w])
            white = step.pivots.whiten(load)
            held[l] = white, rest
            if l == problem.first:
                break
            v = stage.Ft(v[None])[0].addmm(step.cross.mT, white / step.pivots.theta[:, None])
            if rest is not None:
                pull = stage.Bt(rest)
                if pull is not None:
                    v = v + pull[0] / damping
            w = -step.pivots.W.mT @ load if isinstance(step.pivots, Eigenpivots) else w[:0]
        d: Tensor | None = None
        c = g.new_zeros(0, g.shape[1])
        for l in range(problem.first, problem.length):
            stage = problem.stages[l]
            step = steps.get(l)
            if step is None:
                d = stage.F(d[None])[0] if d is not None else None
                continue
            split = self.split_of(l)
            white, rest = held[l]
            if d is not None:
                white = white - step.cross @ d
            u = step.pivots.unwhiten_adjoint(white / step.pivots.theta[:, None])
            if isinstance(step.pivots, Eigenpivots):
                u = u + step.pivots.W @ c
            s, c = u[: split.r], u[split.r :]
            mine = split.Q(s[None])
            if rest is not None:
                if d is not None:
                    pull = stage.B(d[None])
                    if pull is not None:
                        rest = rest - split.project_out(pull)
                mine = mine + rest / damping
            x[offsets[l] : offsets[l + 1]] = mine[0]
            if l < problem.length - 1:
                after = split.R(s[None])[0]
                d = after if d is None else stage.F(d[None])[0] + after
        return x

    @property
    def nbytes(self) -> int:
        """Bytes held by the factors."""
        return sum(step.nbytes for step in self.steps)

    @property
    def delayed(self) -> dict[int, int]:
        """Number of directions delayed at each stage that delayed any."""
        return {s.position: s.pivots.mu.numel() for s in self.steps if isinstance(s.pivots, Eigenpivots)}


def factor(problem: Problem, damping: float) -> RiccatiFactorization:
    """Factor H + εI stage by stage."""
    return RiccatiFactorization(problem, damping)


def factor_pivoted(problem: Problem, damping: float) -> RiccatiFactorization:
    """Factor with the eigenvalue route at every stage: the most careful way, several times slower."""
    return RiccatiFactorization(problem, damping, always_pivot=True)


def estimate(problem: Problem) -> Cost:
    """Flops (4⅔ n³ a stage when all its blocks are n wide), bytes and seconds."""
    item = problem.numpy_dtype.itemsize
    visible = np.array([float(block.split.r) if block.p else 0.0 for block in problem.blocks])
    with_controls = np.flatnonzero(problem.p)
    r = visible[problem.order[with_controls, 0]]
    n = np.where(with_controls == problem.first, 0, problem.n_in[with_controls]).astype(float)
    flops = r**3 * 2 / 3 + 2 * r**2 * n + 2 * r * n**2
    done = r**3 / 3 + r**2 * n + 2 * r * n**2
    rate = np.where(np.maximum(r, n) > 256, 5e10, 1e10)
    widest = float(max(r.max(initial=0), problem.n_out.max(), problem.n_in[problem.first :].max(initial=0)))
    seconds = float((done / rate).sum()) + 4e-4 * with_controls.size + 5e-5 * problem.length
    nbytes = item * float((r**2 + r * n).sum())
    return Cost(float(flops.sum()), nbytes + 8.0 * item * widest**2, seconds)
