"""The exact inverse of a chain's damped Hessian, as an operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linop_hess.lq.problem import Problem
from linop_hess.lq.solver import Solution, Solver
from linop_hess.operators.base import Operator
from linop_hess.operators.convert import as_tensor, to_numpy


class HessianInverse(Operator):
    """(H + εI)⁻¹ of a chain, every product certified by its backward error.

    As `M=` of SciPy's gmres it is always legal; for cg and minres only where H + εI is positive definite.

    Parameters
    ----------
    problem : Problem
        The chain, as `Linearization.inverse` passes it.
    damping : float
        ε; may be zero or negative.
    method : {"auto", "banded", "riccati", "dense", "ldu"}
        How to factor; "auto" follows the cost model of `Linearization.plan`.
    tolerance : float, optional
        Backward error every solve must reach; default 1e-14 in float64 and 1e-6 in float32.

    Raises
    ------
    ValueError, TypeError
        If method, damping or tolerance is not usable.
    MemoryError
        If the method does not fit in memory; nothing has been allocated.
    FactorizationError
        If H + εI is singular to working precision.

    Examples
    --------
    >>> import torch, linop_hess as lh
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1)).double()
    >>> x, y = torch.randn(5, 2).double(), torch.randn(5, 1).double()
    >>> lin = lh.linearize(model, torch.nn.functional.mse_loss, x, y)
    >>> inv = lin.inverse(damping=0.1)
    >>> inv.solve(lin.gradient).backward_error < 1e-14
    True
    """

    symmetric = True

    def __init__(
        self, problem: Problem, damping: float, method: str = "auto", *, tolerance: float | None = None
    ) -> None:
        super().__init__((problem.size, problem.size), problem.dtype, problem.device)
        with torch.no_grad():
            self._solver = Solver(problem, damping, method, tolerance=tolerance)

    @property
    def damping(self) -> float:
        """ε."""
        return self._solver.damping

    @property
    def method(self) -> str:
        """The method whose factors are in use."""
        return self._solver.method

    @property
    def nbytes(self) -> int:
        """Bytes held by the factors."""
        return self._solver.nbytes

    @property
    def tolerance(self) -> float:
        """Backward error every solve must reach."""
        return self._solver.tolerance

    def _apply(self, X: Tensor) -> Tensor:
        return self._solver.solve(X).x

    def solve(self, g: Any) -> Solution:
        """Solve (H + εI) x = g and tell how well.

        Parameters
        ----------
        g : array_like or Tensor, shape (N,) or (N, k)

        Returns
        -------
        Solution
            With x of the kind and shape of `g`.

        Raises
        ------
        ValueError, TypeError
            If `g` is no real, finite array of that shape.
        FactorizationError
            If no method reaches the tolerance.
        """
        with torch.no_grad():
            operand = as_tensor(
                g,
                self.shape[0],
                ndims=(1, 2),
                dtype=self.torch_dtype,
                device=self.device,
                who=type(self).__name__,
            )
            solution = self._solver.solve(operand.reshape(self.shape[0], -1))
            x = solution.x.reshape(operand.shape)
            x = x.clone() if isinstance(g, Tensor) else to_numpy(x)
        return Solution(x, solution.backward_error, solution.residual_norm, solution.refinement_steps, solution.method)

    def with_damping(self, damping: float) -> HessianInverse:
        """Factor again with another damping; derivatives are not computed again.

        Parameters
        ----------
        damping : float

        Returns
        -------
        HessianInverse
        """
        solver = self._solver
        return HessianInverse(solver.problem, damping, solver.requested, tolerance=solver.tolerance)
