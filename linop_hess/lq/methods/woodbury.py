"""Method "woodbury": Gauss-Newton matrices in function space, from the Gram matrix of batch × outputs; see `lq.elimination.function_space`.

The cost does not grow with the cube of the width: for wide networks, and batches of many samples with few outputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from linop_hess._validate import require_real_damping
from linop_hess.errors import SingularPivotError
from linop_hess.lq.analysis import Analysis
from linop_hess.lq.elimination.function_space import FunctionSpace, curved_stage, samples_apart
from linop_hess.lq.methods.base import EVERYTHING, Cost, Method, Tally
from linop_hess.lq.pivots.bunch_kaufman import SymmetricFactor
from linop_hess.lq.pivots.inertia import Inertia, inertia_of
from linop_hess.lq.stages.row_space import spread


class WoodburyFactorization:
    """εΣ + Γ, factored by Bunch-Kaufman.

    Raises
    ------
    SingularPivotError
        If it is singular to working precision, or ε = 0.
    """

    method = "woodbury"
    growth = 0.0

    def __init__(self, analysis: Analysis, damping: float) -> None:
        self.analysis, self.damping = analysis, damping
        self.space = analysis.once(FunctionSpace)
        if damping == 0.0:
            raise SingularPivotError(None)
        self.factor = SymmetricFactor.of(self.space.gram + damping * torch.diag(self.space.signs))
        theta = self.factor.theta
        if theta.numel() and not float(theta.abs().min()) > 0.0:
            raise SingularPivotError(None)

    @property
    def is_convex(self) -> bool:
        """Whether H + εI is positive definite: the objective convex, and ε > 0."""
        return self.damping > 0 and self.space.is_convex

    @property
    def answers(self) -> frozenset[str]:
        """Where the objective is not convex, no positive operator, samples or entries."""
        return EVERYTHING if self.is_convex else frozenset({"solve", "inertia", "determinant"})

    @property
    def precision(self) -> torch.dtype:
        """What the factors are computed in."""
        return self.analysis.problem.dtype

    def solve(self, g: Tensor) -> Tensor:
        """(H + εI)⁻¹ g for g of shape (N, k), without refinement."""
        return (g - self.space.Jt(self.factor.solve(self.space.J(g)))) / self.damping

    def inertia(self, zero_below: float) -> Inertia:
        """Inertia of H + εI = εI + JᵀΣJ: that of εI, and of −(Σ + Γ/ε), less that of −Σ."""
        of_gram, of_signs = inertia_of([self.factor.theta], zero_below), inertia_of([self.space.signs], 0.0)
        N = self.analysis.problem.size
        if self.damping > 0:
            return Inertia(of_gram.positive - of_signs.positive, of_gram.zero, N + of_gram.negative - of_signs.negative)
        return Inertia(N + of_gram.negative - of_signs.positive, of_gram.zero, of_gram.positive - of_signs.negative)

    def logabsdet(self) -> float:
        """Logarithm of |det(H + εI)|: that of εΣ + Γ, and N − M times log|ε|."""
        theta = self.factor.theta
        rest = (self.analysis.problem.size - theta.numel()) * math.log(abs(self.damping))
        return math.fsum(theta.abs().log().tolist()) + rest

    def positive(self, g: Tensor) -> Tensor:
        """(H + εI)⁻¹ g for g of shape (N, k), which is positive definite where the objective is convex."""
        return self.solve(g)

    @property
    def noise(self) -> int:
        """Size of the white noise that `color` takes: N + M."""
        return self.analysis.problem.size + self.space.rows

    def color(self, xi: Tensor) -> Tensor:
        """(H + εI)⁻¹(√ε ξ + Jᵀη) for (ξ, η) of shape (N + M, k), of covariance (H + εI)⁻¹ where that is white."""
        N = self.analysis.problem.size
        return self.solve(math.sqrt(self.damping) * xi[:N] + self.space.Jt(xi[N:]))

    def diagonal(self) -> Tensor:
        """Diagonal of (H + εI)⁻¹, shape (N,)."""
        space, A = self.space, self._inverse_gram()
        parts = [
            group.space.at(k).form_diagonal(group.control.at(k), Y, space.samples, A) for group, k, Y in space.walk()
        ]
        seen = torch.cat([A.new_zeros(0), *parts[::-1]])
        return self.analysis.problem.layout.in_flat_order((1.0 - seen) / self.damping)

    def blocks(self) -> list[Tensor]:
        """Diagonal blocks of (H + εI)⁻¹, one per stage with controls."""
        space, A = self.space, self._inverse_gram()
        out = []
        for group, k, Y in space.walk():
            X = group.control.at(k).Gt(spread(Y, space.samples)[None])[0]
            out.append((torch.eye(X.shape[0], dtype=X.dtype, device=X.device) - X @ A @ X.mT) / self.damping)
        return out[::-1]

    def _inverse_gram(self) -> Tensor:
        like = self.space.signs
        A = self.factor.solve(torch.eye(like.numel(), dtype=like.dtype, device=like.device))
        return (A + A.mT) / 2

    @property
    def nbytes(self) -> int:
        """Bytes held by the factors."""
        return int(self.factor.nbytes + self.space.gram.nbytes)


def factor(analysis: Analysis, damping: complex) -> WoodburyFactorization:
    """Factor H + εI in function space."""
    return WoodburyFactorization(analysis, require_real_damping(damping, 'method "woodbury"'))


# Calls of a factorization, and of a stage that the rows are walked back through.
_CALLS = 100
_CALLS_PER_STAGE = 15


def estimate(analysis: Analysis) -> Cost:
    """Flops, bytes and seconds: walking M rows back, their Gram matrix, and M³/3."""
    problem, layout = analysis.problem, analysis.problem.layout
    curved = curved_stage(problem)
    if curved is not None:
        return Cost.impossible(
            f"stage {problem.name(curved)} has curvature: only for Gauss-Newton, and costs of the last state alone"
        )
    if layout.p[-1]:
        return Cost.impossible(
            f"stage {problem.name(problem.length - 1)}, the last, has controls: only for costs of the last state alone"
        )
    rows = float(layout.n_in[-1])
    if not rows:
        return Cost.impossible("the last state is empty, so there is no function space")
    if rows > problem.size:
        return Cost.impossible(
            f"{rows:.0f} batch × outputs are more than the {problem.size} parameters: the Gram matrix is the larger one, and singular"
        )
    samples = samples_apart(problem)
    columns, tally, item = rows / samples, Tally(problem.dtype), problem.dtype.itemsize
    tally.calls(_CALLS + _CALLS_PER_STAGE * problem.length)
    for stage, after in zip(problem.stages[:-1], layout.n_out, strict=False):
        tally.kernel("gemm", 2 * columns * stage.entries("F"), (columns * max(1.0, stage.n_in / samples)) ** 0.5)
        if stage.p:
            tally.kernel("gemm", 2.0 * rows**2 / samples * float(after), (rows * float(after) / samples) ** 0.5)
            tally.moved(item * 6 * rows**2)
    tally.kernel("ldl", rows**3 / 3, rows)
    tally.moved(item * 10 * rows**2)
    nbytes = item * (5.0 * rows**2 + columns * 2.0 * float(layout.n_out.max()))
    return Cost(tally.flops, nbytes, tally.seconds)


METHOD = Method("woodbury", factor, estimate, EVERYTHING)
