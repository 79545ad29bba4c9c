"""The diagonal of (H + εI)⁻¹ and its diagonal blocks, from certified solves or compared with them."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

from linop_hess.lq.inverse.factors import BlockLDL
from linop_hess.lq.inverse.gram_factors import GramFactors
from linop_hess.lq.inverse.solve import Solver

# The largest entry and a random one of so many parts of the chain are compared with certified solves, of more where there are few
# parameters.
_PARTS = 2
_MANY_PARTS = 32
_FEW = 5000

# By how much they may differ, in terms of the largest: beyond so many times 1 + κ, κ estimated from below, the entries are computed in a
# more careful way; beyond a hundred times that it is told, and beyond so much it is an error.
_ROUNDING = 1e-14
_TOLD = 1e-12
_WRONG = 1e-5

# Up to this many parameters all columns are solved for, which nothing is as sure as.
_SMALL = 1000


class DiagonalEntries:
    """Diagonal and diagonal blocks of (H + εI)⁻¹, in float64, by certified solves, or the first way that agrees with them.

    Parameters
    ----------
    factors : BlockLDL or GramFactors
    solver : Solver
        Of the same.

    Attributes
    ----------
    diagonal : Tensor, shape (N,)
    gap : float
        The largest difference from certified solves seen.

    Warns
    -----
    RuntimeWarning
        If no way agrees to 1e-12 (1 + κ) of the largest entry, κ estimated from below.

    Raises
    ------
    ArithmeticError
        If no way agrees to 1e-5 of the largest entry.
    SingularPivotError, FactorizationError
        If H + εI is singular to working precision.
    """

    def __init__(self, factors: BlockLDL | GramFactors, solver: Solver) -> None:
        self._factors = factors
        self._solver = (
            solver if factors.problem.dtype == solver.problem.dtype else Solver(factors.problem, solver.damping)
        )
        self._inverse: Tensor | None = None
        if factors.problem.size <= _SMALL:
            self._inverse = self._columns(torch.arange(factors.problem.size))
            self.diagonal, self.gap = self._inverse.diagonal(), 0.0
            return
        self.gap = np.inf
        for attempt in range(factors.attempts):
            diagonal = factors.diagonal(attempt)
            gap, largest = self._compared(diagonal)
            if not self.gap <= gap:
                self.gap, self.diagonal, self._attempt = gap, diagonal, attempt
            if self.gap <= _ROUNDING * (1.0 + factors.problem.norm * largest) * largest:
                return
        found = (
            f"the diagonal of the inverse at damping={solver.damping:g} differs by {self.gap:.1e} from certified solves, of "
            f"{largest:.1e}"
        )
        if not self.gap <= _WRONG * largest:
            raise ArithmeticError(f"{found}: H + damping·I is too ill-conditioned for it; use a larger damping")
        if self.gap > _TOLD * (1.0 + factors.problem.norm * largest) * largest:
            warnings.warn(f"{found}, which is more than rounding explains", RuntimeWarning, stacklevel=2)

    def blocks(self) -> list[Tensor]:
        """Return the diagonal blocks, one of shape (p, p) per stage with controls."""
        if self._inverse is None:
            return self._factors.blocks(self._attempt)
        edges = self._factors.problem.x_offsets
        pairs = zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)
        return [self._inverse[start:stop, start:stop].clone() for start, stop in pairs if stop > start]

    def _compared(self, diagonal: Tensor) -> tuple[float, float]:
        """How far entries are from certified solves, and the largest of them."""
        generator = torch.Generator().manual_seed(0)
        chosen: list[int] = []
        start = 0
        for part in diagonal.abs().tensor_split(
            min(diagonal.numel(), _PARTS if diagonal.numel() > _FEW else _MANY_PARTS)
        ):
            chosen += [start + int(part.argmax()), start + int(torch.randint(part.numel(), (), generator=generator))]
            start += part.numel()
        entries = torch.tensor(sorted(set(chosen)), device=diagonal.device)
        solved = self._columns(entries)[entries, torch.arange(entries.numel(), device=diagonal.device)]
        return float((solved - diagonal[entries]).abs().max()), float(solved.abs().max())

    def _columns(self, entries: Tensor) -> Tensor:
        """Columns of the inverse by certified solves, (N, entries)."""
        problem = self._factors.problem
        unit = torch.zeros(problem.size, entries.numel(), dtype=torch.float64, device=problem.device)
        unit[entries, torch.arange(entries.numel())] = 1.0
        tolerance = self._solver.tolerance
        return self._solver.solve(unit, tolerance if problem.size <= _FEW else max(tolerance, 1e-12)).x
