"""Method "woodbury": Gauss-Newton matrices in function space, from the Gram matrix of batch × outputs; see `lq.function_space`.

The cost does not grow with the cube of the width: for wide networks, and batches of many samples with few outputs.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from linop_hess.lq.methods.cost import Cost
from linop_hess.lq.methods.function_space import FunctionSpace, curved_stage, keeps_apart
from linop_hess.lq.methods.singular import SingularPivotError
from linop_hess.lq.pivots.bunch_kaufman import Congruence
from linop_hess.lq.problem import Problem


class WoodburyFactorization:
    """εΣ + Γ, factored by Bunch-Kaufman.

    Raises
    ------
    SingularPivotError
        If it is singular to working precision, or ε = 0.
    """

    method = "woodbury"

    def __init__(self, problem: Problem, damping: float) -> None:
        self.problem = problem
        self.damping = damping
        self.space = space_of(problem)
        if damping == 0.0:
            raise SingularPivotError(None)
        self.pivots = Congruence.of(self.space.gram + damping * torch.diag(self.space.signs))
        theta = self.pivots.theta
        if theta.numel() and not float(theta.abs().min()) > 0.0:
            raise SingularPivotError(None)

    def solve(self, g: Tensor) -> Tensor:
        """(H + εI)⁻¹ g for g of shape (N, k)."""
        return (g - self.space.Jt(self.pivots.solve(self.space.J(g)))) / self.damping

    @property
    def nbytes(self) -> int:
        """Bytes held by the factors."""
        return int(self.pivots.nbytes + self.space.gram.nbytes)


def space_of(problem: Problem) -> FunctionSpace:
    """Return the function space of a problem, made once."""
    if "function_space" not in problem.__dict__:
        problem.__dict__["function_space"] = FunctionSpace(problem)
    space: FunctionSpace = problem.__dict__["function_space"]
    return space


def factor(problem: Problem, damping: float) -> WoodburyFactorization:
    """Factor H + εI in function space."""
    return WoodburyFactorization(problem, damping)


def estimate(problem: Problem) -> Cost:
    """Flops, bytes and seconds: walking M rows back, their Gram matrix, and M³/3."""
    curved = curved_stage(problem)
    if curved is not None:
        why = f"stage {problem.name(curved)} has curvature: only for Gauss-Newton, and costs of the last state alone"
        return Cost(np.inf, np.inf, np.inf, why)
    rows = float(problem.n_in[-1])
    if not rows:
        return Cost(np.inf, np.inf, np.inf, "the last state is empty, so there is no function space")
    if rows > problem.size:
        why = f"{rows:.0f} batch × outputs are more than the {problem.size} parameters: the Gram matrix is the larger one, and singular"
        return Cost(np.inf, np.inf, np.inf, why)
    last = problem.stages[-1]
    samples = getattr(last, "c", torch.zeros(1, 1)).shape[1]
    if not keeps_apart(problem, samples):
        samples = 1
    columns = rows / samples
    walked = 2.0 * columns / samples * float((problem.n_in[:-1] * problem.n_out[:-1]).sum())
    of_gram = 2.0 * rows**2 / samples * float(problem.n_out[problem.p > 0].sum())
    flops = walked + of_gram + rows**3 / 3
    item = problem.numpy_dtype.itemsize
    nbytes = item * (4.0 * rows**2 + columns * 2.0 * float(problem.n_out.max()))
    seconds = 1e-3 + 1e-4 * problem.length + walked / 1e10 + of_gram / 3e10 + rows**3 / 3e10
    return Cost(flops, nbytes, seconds)
