"""The exact inverse of a chain's damped Hessian, as an operator."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, cast, overload

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from linop_hess._memory import require
from linop_hess._validate import real_damping
from linop_hess.lq.analysis import Analysis
from linop_hess.lq.inverse.factors import SegmentReport
from linop_hess.lq.inverse.inverse import Inverse
from linop_hess.lq.iterative.options import sketch_options
from linop_hess.lq.methods.sketched import SketchReport
from linop_hess.lq.pivots.inertia import Inertia
from linop_hess.lq.problem import Problem
from linop_hess.lq.solve.solution import Solution
from linop_hess.operators.block import NamedOperator, PositiveOperator
from linop_hess.operators.convert import Arrays, as_tensor, handed, require_arrays, to_numpy
from linop_hess.operators.parameters import ParameterTable

MethodName = Literal["auto", "banded", "riccati", "dense", "woodbury", "sketched", "iterative", "ldu"]
"""How to factor H + εI; "auto" chooses by the cost model."""

PrecisionName = Literal["auto", "single", "double"]
"""What to factor in."""


class HessianInverse(NamedOperator):
    """(H + εI)⁻¹ of a chain, every product certified by its backward error.

    As `M=` of SciPy's gmres it is always legal; for cg and minres only where H + εI is positive definite.

    Parameters
    ----------
    problem : Problem or Analysis
        The chain, as `Linearization.inverse` passes it.
    damping : float
        ε; may be zero or negative.
    method : {"auto", "banded", "riccati", "dense", "woodbury", "sketched", "iterative", "ldu"}
        How to factor; "auto" follows the cost model of `Linearization.plan`. With "sketched", asked for by name, products apply the
        sketch in use, M⁻¹, symmetric, for `M=`; `solve`, certified all the same, may make a larger one where no `rank` or `tol` is given.
    tolerance : float, optional
        Backward error every solve must reach; default 1e-14 in float64 and 1e-6 in float32.
    precision : {"auto", "single", "double"}
        What to factor in. "auto": a float64 problem in float32 where "dense" is faster so and ‖H‖/|ε| allows it, refined by GMRES to the
        same tolerance, else in float64; "single": in float32 alone. All but solves is answered by factors in float64.
    rank, tol, core : int, float and int, optional
        Of "sketched": directions (as many as pay), or the part of ‖H‖ below which they are left out; samples it is made of (all).
    right_hand_sides : int
        For how many solves "auto" chooses: what a factorization costs once, a method that iterates costs with every one.
    table : ParameterTable, optional
        Names of the parameters; without, those of the stages' controls (`ParameterTable.of_stages`).

    Raises
    ------
    ValueError, TypeError
        If method, damping, tolerance or precision is not usable.
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
        self,
        problem: Problem | Analysis,
        damping: float,
        method: MethodName = "auto",
        *,
        tolerance: float | None = None,
        precision: PrecisionName = "auto",
        table: ParameterTable | None = None,
        rank: int | None = None,
        tol: float | None = None,
        core: int | None = None,
        right_hand_sides: int = 1,
    ) -> None:
        analysis = problem if isinstance(problem, Analysis) else Analysis(problem)
        sketch = sketch_options(analysis, rank, tol, core, method)
        super().__init__((analysis.problem.size,) * 2, analysis.problem.dtype, analysis.problem.device)
        self.parameter_table = table or ParameterTable.of_stages(analysis.problem)
        with torch.no_grad():
            how: dict[str, Any] = {"tolerance": tolerance, "precision": precision, "sketch": sketch}
            self._inverse = Inverse(analysis, real_damping(damping), method, right_hand_sides=right_hand_sides, **how)

    @property
    def damping(self) -> float:
        """ε."""
        return self._inverse.damping.real

    @property
    def formula(self) -> str:
        return f"inverse of H + {self.damping:g}·I by {self.method}"

    @property
    def method(self) -> str:
        """The method whose factors are in use."""
        return self._inverse.solver.method

    @property
    def precision(self) -> str:
        """What the factors in use are computed in, "single" or "double"."""
        return self._inverse.solver.precision

    @property
    def nbytes(self) -> int:
        """Bytes held by the factors."""
        return self._inverse.solver.nbytes

    @property
    def tolerance(self) -> float:
        """Backward error every solve must reach."""
        return self._inverse.solver.tolerance

    def _apply(self, X: Tensor) -> Tensor:
        return self._inverse.product(X)

    @overload
    def solve(self, g: Tensor) -> Solution[Tensor]: ...
    @overload
    def solve(self, g: ArrayLike) -> Solution[np.ndarray]: ...
    def solve(self, g: Any) -> Solution[Any]:
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
            solution = self._inverse.solve(operand)
        return replace(cast(Any, solution), x=solution.x.clone() if isinstance(g, Tensor) else to_numpy(solution.x))

    def inertia(self) -> Inertia:
        """Numbers of negative, zero and positive eigenvalues of H + εI.

        Exact unless an eigenvalue lies within rounding of zero: pivots below 1e-15 times max(‖H‖, |ε|) are counted as zero.

        Returns
        -------
        Inertia

        Raises
        ------
        FactorizationError
            If H + εI is singular to working precision.
        """
        with torch.no_grad():
            return self._inverse.inertia

    @property
    def is_positive_definite(self) -> bool:
        """Whether all eigenvalues of H + εI are positive; errors as of `inertia`."""
        return self.inertia().positive == self.shape[0]

    def slogdet(self) -> tuple[float, float]:
        """Sign and logarithm of the absolute value of det(H + εI).

        The sign is that of the inertia. The logarithm is taken from a band LU where one fits, else from the block LDLᵀ.

        Raises
        ------
        FactorizationError
            If H + εI is singular to working precision.
        """
        with torch.no_grad():
            return self._inverse.slogdet()

    def factor_report(self) -> list[SegmentReport]:
        """Pivot extremes, hidden controls and delayed directions of each segment of the chain.

        Raises
        ------
        FactorizationError
            If H + εI is singular to working precision.
        """
        with torch.no_grad():
            return self._inverse.report()

    def report(self) -> SketchReport:
        """Ranks, samples, spans and memory of the sketch, and what it dropped, of method "sketched".

        Raises
        ------
        ValueError
            If solves are by another method.
        """
        return self._inverse.sketch_report()

    def positive(self) -> PositiveOperator:
        """Return L⁻ᵀ|D|⁻¹L⁻¹ where H + εI = L D Lᵀ: positive definite, a legal `M` for cg and minres.

        Where H + εI is positive definite that is the inverse itself (in float32, from factors in float64). Preconditioned by it H + εI
        has eigenvalues ±1, so that MINRES stops after two iterations.

        Returns
        -------
        PositiveOperator
            Of shape (N, N).

        Raises
        ------
        FactorizationError
            If H + εI is singular to working precision.
        MemoryError
            If its factors do not fit in memory; nothing has been allocated.
        """
        with torch.no_grad():
            return PositiveOperator(self, self._inverse.positive())

    @overload
    def diagonal(self, to: Literal["numpy"] = ...) -> np.ndarray: ...
    @overload
    def diagonal(self, to: Literal["torch"]) -> Tensor: ...
    def diagonal(self, to: Arrays = "numpy") -> Any:
        """Diagonal of the inverse, shape (N,).

        Up to N = 1000 by certified solves for all columns. Beyond, nothing of size N × N is formed; the error is about 1e-14 times the
        condition number of H + εI, and entries all along the chain are compared with certified solves.

        Parameters
        ----------
        to : {"numpy", "torch"}
            What to return: an array, or a tensor on the device of the operator.

        Returns
        -------
        ndarray or Tensor, shape (N,)

        Warns
        -----
        RuntimeWarning
            If they differ by a hundred times more than that.

        Raises
        ------
        ValueError
            If `to` is none of the two.
        FactorizationError
            If H + εI is singular to working precision.
        ArithmeticError
            If the comparison fails by more than 1e-5 of the largest entry.
        """
        require_arrays(to)
        with torch.no_grad():
            return handed(self._inverse.entries.diagonal.to(self.torch_dtype), to)

    def trace(self) -> float:
        """Trace of the inverse; errors as of `diagonal`."""
        with torch.no_grad():
            return float(self._inverse.entries.diagonal.sum())

    @overload
    def block_diagonal(self, to: Literal["numpy"] = ...) -> dict[str, np.ndarray]: ...
    @overload
    def block_diagonal(self, to: Literal["torch"]) -> dict[str, Tensor]: ...
    def block_diagonal(self, to: Arrays = "numpy") -> Any:
        """Diagonal blocks of the inverse, one for each module that has parameters of its own.

        Blocks of modules whose parameters are controls of one stage come from the factors, like the diagonal; others, as those of a module
        used by several stages, from certified solves for their columns.

        Parameters
        ----------
        to : {"numpy", "torch"}
            What to return: an array, or a tensor on the device of the operator.

        Returns
        -------
        dict of str to ndarray or Tensor, each of shape (p, p)
            By the module's name as in `model.named_modules()`, "" being the model itself, in the order of the flat vectors; rows and
            columns are the flat indices of the module's own parameters, ascending (weight before bias).

        Raises
        ------
        ValueError
            If `to` is none of the two.
        FactorizationError
            If H + εI is singular to working precision.
        ArithmeticError
            If the comparison of `diagonal` fails.
        MemoryError
            If the blocks do not fit in memory; nothing has been allocated.
        """
        require_arrays(to)
        modules = self.parameter_table.modules()
        sizes = [self._inverse.analysis.problem.layout.p, [places.size for places in modules.values()]]
        largest = max(float(np.square(np.asarray(p, dtype=float)).sum()) for p in sizes)
        require(8 * largest, "the diagonal blocks of the inverse")
        with torch.no_grad():
            blocks = self._inverse.blocks_at(list(modules.values()))
            return {name: handed(block.to(self.torch_dtype), to) for name, block in zip(modules, blocks, strict=True)}

    def quadratic_form(self, v: Any) -> float | np.ndarray:
        """Return vᵀ (H + εI)⁻¹ v for v of shape (N,), or those of the columns of v of shape (N, k); v as in `solve`."""
        x = self.solve(v := v.detach() if isinstance(v, Tensor) else v).x
        x, v = (np.asarray(a.cpu() if isinstance(a, Tensor) else a, dtype=np.float64) for a in (x, v))
        forms = np.einsum("i...,i...->...", x, v)
        return float(forms) if forms.ndim == 0 else forms

    @overload
    def sample(
        self, k: int = ..., generator: torch.Generator | None = ..., *, to: Literal["numpy"] = ...
    ) -> np.ndarray: ...
    @overload
    def sample(self, k: int = ..., generator: torch.Generator | None = ..., *, to: Literal["torch"]) -> Tensor: ...
    def sample(self, k: int = 1, generator: torch.Generator | None = None, *, to: Arrays = "numpy") -> Any:
        """Draw k samples of the normal distribution with mean zero and covariance (H + εI)⁻¹.

        Parameters
        ----------
        k : int
        generator : torch.Generator, optional
            The same state gives the same samples.
        to : {"numpy", "torch"}
            What to return: an array, or a tensor on the device of the operator.

        Returns
        -------
        ndarray or Tensor, shape (N, k)

        Raises
        ------
        ValueError, TypeError
            If `k` is no number of samples, `generator` no torch generator, or `to` none of the two.
        NotPositiveDefiniteError
            If H + εI is not positive definite; it names the inertia and a damping that works.
        """
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 0:
            raise ValueError(f"k must be a number of samples, got {k!r}")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
        require_arrays(to)
        if not k:
            return handed(torch.zeros(self.shape[0], 0, dtype=self.torch_dtype, device=self.device), to)
        with torch.no_grad():
            return handed(self._inverse.sample(int(k), generator).to(self.torch_dtype), to)

    def with_damping(self, damping: float) -> HessianInverse:
        """Factor again with another damping; derivatives are not computed again.

        Parameters
        ----------
        damping : float

        Returns
        -------
        HessianInverse

        Raises
        ------
        ValueError, TypeError
            If damping is not a finite real number.
        FactorizationError
            If H + damping·I is singular to working precision.
        """
        solver = self._inverse.solver
        options: dict[str, Any] = {name: getattr(solver.sketch, name) for name in ("rank", "tol", "core")}
        options |= {"tolerance": solver.tolerance, "right_hand_sides": solver.right_hand_sides}
        method, precision = cast(MethodName, solver.requested), cast(PrecisionName, solver.requested_precision)
        table = self.parameter_table
        return HessianInverse(solver.analysis, damping, method, precision=precision, table=table, **options)
