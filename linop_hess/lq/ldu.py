"""Method "ldu": the algorithm of the paper as published, for comparison.

𝒦' = Π𝒦Πᵀ, with the unknowns of a layer (x_l, y_l, z_l) together, is block tridiagonal with blocks of size p_l + 2 n_l.
Its block LDU decomposition factors every diagonal block densely (rows pivoted within a block only), at max(n, p)³ a layer:

    D_l = T_ll − T_l,l−1 D_{l−1}⁻¹ T_l−1,l.

Source: A. Rahimi, "The Hessian of tall-skinny networks is easy to invert", arXiv 2601.06096.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from linop_hess.lq.cost import Cost
from linop_hess.lq.problem import Problem
from linop_hess.lq.singular import SingularPivotError


class LduFactorization:
    """Block LDU of 𝒦' of `problem` at `damping`.

    Raises
    ------
    SingularPivotError
        If a diagonal block is exactly singular.
    """

    method = "ldu"

    def __init__(self, problem: Problem, damping: float) -> None:
        self.problem = problem
        self._factors: list[tuple[Tensor, Tensor]] = []
        self._upper: list[Tensor] = []
        self._lower: list[Tensor] = []
        carried: Tensor | None = None
        for l, stage in enumerate(problem.stages):
            p, m = stage.p, stage.n_out
            block = _diagonal_block(problem, l, damping)
            if carried is not None:
                block -= carried
            packed, pivots, info = torch.linalg.lu_factor_ex(block)
            if int(info) > 0:
                raise SingularPivotError(l)
            self._factors.append((packed, pivots))
            if l == problem.length - 1:
                break
            upper, lower = _couplings(problem, l + 1)
            self._upper.append(upper)
            self._lower.append(lower)
            # Of this layer only z_l's row sees the layer after, whose rows see only y_l.
            into = torch.zeros(p + 2 * m, upper.shape[1], dtype=problem.dtype, device=problem.device)
            into[p + m :] = upper
            carried = lower @ torch.linalg.lu_solve(packed, pivots, into)[p : p + m]

    def solve(self, g: Tensor) -> Tensor:
        """(H + εI)⁻¹ g for g of shape (N, k)."""
        problem = self.problem
        offsets = problem.x_offsets
        solutions: list[Tensor] = []
        for l, stage in enumerate(problem.stages):
            p, m = stage.p, stage.n_out
            rhs = g.new_zeros(p + 2 * m, g.shape[1])
            rhs[:p] = g[offsets[l] : offsets[l + 1]]
            if l:
                before = problem.stages[l - 1]
                rhs -= self._lower[l - 1] @ solutions[-1][before.p : before.p + before.n_out]
            solutions.append(torch.linalg.lu_solve(*self._factors[l], rhs))
        x = torch.zeros_like(g)
        after: Tensor | None = None
        for l in range(problem.length - 1, -1, -1):
            stage = problem.stages[l]
            p, m = stage.p, stage.n_out
            value = solutions[l]
            if after is not None:
                into = g.new_zeros(p + 2 * m, g.shape[1])
                into[p + m :] = self._upper[l] @ after
                value = value - torch.linalg.lu_solve(*self._factors[l], into)
            x[offsets[l] : offsets[l + 1]] = value[:p]
            after = value
        return x

    @property
    def nbytes(self) -> int:
        """Bytes held by the factors."""
        return sum(lu.nbytes + pivots.nbytes for lu, pivots in self._factors) + sum(
            block.nbytes for block in self._upper + self._lower
        )


def _diagonal_block(problem: Problem, l: int, damping: float) -> Tensor:
    """[A+εI, 0, Gᵀ; −G, I, 0; 0, −C', I] in the unknowns (x_l, y_l, z_l), C' the curvature of the stage after."""
    stage = problem.stages[l]
    p, m = stage.p, stage.n_out
    block = torch.zeros(p + 2 * m, p + 2 * m, dtype=problem.dtype, device=problem.device)
    block.diagonal().fill_(1.0)
    block[:p, :p] = damping * torch.eye(p, dtype=problem.dtype, device=problem.device)
    A = stage.dense_A() if p else None
    if A is not None:
        block[:p, :p] += A[0]
    if p:
        G = stage.dense_G()[0]
        block[:p, p + m :] = G.mT
        block[p : p + m, :p] = -G
    C = problem.stages[l + 1].dense_C() if l + 1 < problem.length else None
    if C is not None:
        block[p + m :, p : p + m] = -C[0]
    return block


def _couplings(problem: Problem, l: int) -> tuple[Tensor, Tensor]:
    """Blocks between layer l−1 and layer l: rows of z_{l−1} at (x_l, y_l, z_l), and rows of layer l at y_{l−1}."""
    stage = problem.stages[l]
    p, m, n = stage.p, stage.n_out, stage.n_in
    F = stage.dense_F()[0]
    B = stage.dense_B() if p else None
    upper = F.new_zeros(n, p + 2 * m)
    lower = F.new_zeros(p + 2 * m, n)
    if B is not None:
        upper[:, :p] = -B[0].mT
        lower[:p] = B[0]
    upper[:, p + m :] = -F.mT
    lower[p : p + m] = -F
    return upper, lower


def factor(problem: Problem, damping: float) -> LduFactorization:
    """Factor 𝒦' by block LDU."""
    return LduFactorization(problem, damping)


def estimate(problem: Problem) -> Cost:
    """LU of every diagonal block and its solves with the couplings."""
    size = (problem.p + 2 * problem.n_out).astype(float)
    item = problem.numpy_dtype.itemsize
    flops = float((2 / 3 * size**3).sum()) + float((2 * size[:-1] ** 2 * size[1:]).sum())
    nbytes = item * float((size**2).sum() + 2 * (size * problem.n_in).sum())
    return Cost(flops, nbytes + 4 * item * float(size.max()) ** 2, flops / 2e10 + 3e-4 * problem.length)
