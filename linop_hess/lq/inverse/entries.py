"""The diagonal of (H + εI)⁻¹ and its diagonal blocks, from certified solves or compared with them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from linop_hess.lq.accuracy import ENTRIES_ROUNDING, ENTRIES_SOLVED, ENTRIES_TOLD, ENTRIES_WRONG
from linop_hess.lq.inverse import selected
from linop_hess.lq.inverse.factors import Factors
from linop_hess.lq.inverse.solver import Solver
from linop_hess.lq.layout import Layout
from linop_hess.lq.methods.plan import METHODS
from linop_hess.lq.methods.riccati import RiccatiFactorization

_Entries = TypeVar("_Entries")

# The largest entry and a random one of so many parts of the chain are compared with certified solves, of more where there are few
# parameters.
_PARTS = 2
_MANY_PARTS = 32
_FEW = 5000

# Up to this many parameters all columns are solved for, which nothing is as sure as.
SOLVED_UP_TO = 1000

# Columns that are solved for at once take so much.
_COLUMNS_BYTES = 2**27


class Entrywise(Protocol):
    """Factors that give entries of the inverse by themselves."""

    def diagonal(self) -> Tensor:
        """Diagonal of (H + εI)⁻¹, shape (N,)."""

    def blocks(self) -> list[Tensor]:
        """Diagonal blocks, one per stage with controls."""


class DiagonalEntries:
    """Diagonal and diagonal blocks of (H + εI)⁻¹, in float64, by certified solves, or the first way that agrees with them.

    Parameters
    ----------
    factors : Factors
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

    def __init__(self, factors: Factors, solver: Solver) -> None:
        self._factors, analysis = factors, solver.analysis.in_float64
        self._solver = solver if analysis is solver.analysis else Solver(analysis, solver.damping)
        self._inverse: Tensor | None = None
        if analysis.problem.size <= SOLVED_UP_TO:
            self._inverse = self._columns(torch.arange(analysis.problem.size, device=analysis.problem.device))
            self.diagonal, self.gap = self._inverse.diagonal(), 0.0
            return
        self.gap = np.inf
        for diagonal, blocks in self._ways():
            entries = diagonal()
            gap, largest = self._compared(entries)
            if not self.gap <= gap:
                self.gap, self.diagonal, self._blocks = gap, entries, blocks
            if self.gap <= ENTRIES_ROUNDING * (1.0 + analysis.norm * largest) * largest:
                return
        found = (
            f"the diagonal of the inverse at damping={solver.damping:g} differs by {self.gap:.1e} from certified solves, of "
            f"{largest:.1e}"
        )
        if not self.gap <= ENTRIES_WRONG * largest:
            raise ArithmeticError(f"{found}: H + damping·I is too ill-conditioned for it; use a larger damping")
        if self.gap > ENTRIES_TOLD * (1.0 + analysis.norm * largest) * largest:
            warnings.warn(f"{found}, which is more than rounding explains", RuntimeWarning, stacklevel=2)

    def _ways(self) -> list[tuple[Callable[[], Tensor], Callable[[], list[Tensor]]]]:
        """How to get the diagonal and the blocks, each way more accurate than the one before, and slower."""
        change = self._factors.change
        return [
            (lambda d=diagonal: change.diagonal(d()), lambda b=blocks: change.blocks(b()))  # type: ignore[misc]
            for diagonal, blocks in self._ways_there()
        ]

    def _ways_there(self) -> list[tuple[Callable[[], Tensor], Callable[[], list[Tensor]]]]:
        """The same in the variables that are factored in."""
        factors = self._factors
        solver = self._solver
        answers = METHODS[solver.method].answers if solver.precision == "single" else solver.factorization.answers
        if solver.method != "riccati" and "entries" in answers:
            own = cast(Entrywise, factors.answering("entries"))
            return [(own.diagonal, own.blocks)]
        return [
            (
                partial(_selected, selected.diagonal, factors, attempt),
                partial(_selected, selected.blocks, factors, attempt),
            )
            for attempt in range(2)
        ]

    def blocks(self) -> list[Tensor]:
        """Return the diagonal blocks, one of shape (p, p) per stage with controls."""
        if self._inverse is None:
            return self._blocks()
        layout, inverse = self._factors.analysis.problem.layout, self._inverse
        own = (torch.from_numpy(layout.controls(l)).to(inverse.device) for l in np.flatnonzero(layout.p).tolist())
        return [inverse[at[:, None], at] for at in own]

    def blocks_at(self, sets: Sequence[np.ndarray]) -> list[Tensor]:
        """Return the blocks of the inverse in the rows and columns of sets of places.

        Parameters
        ----------
        sets : sequence of ndarray of int
            Places in flat vectors, each set ascending.

        Returns
        -------
        list of Tensor
            One of shape (m, m) for each set of m places: cut out of a stage's block where all are controls of one stage, else from
            certified solves for its columns.
        """
        device = self.diagonal.device
        if self._inverse is not None:
            places = [torch.from_numpy(one).to(device) for one in sets]
            return [self._inverse[one[:, None], one] for one in places]
        stage, position, sizes = _controls_of_stages(self._factors.analysis.problem.layout)
        single = [bool((stage[one] == stage[one[:1]]).all()) for one in sets]
        of_stages = self._blocks() if any(single) else []
        out = []
        for one, is_single in zip(sets, single, strict=True):
            if not is_single:
                out.append(self._solved_block(torch.from_numpy(one).to(device)))
            elif one.size:
                block, inside = of_stages[stage[one[0]]], position[one]
                if np.array_equal(inside, np.arange(sizes[stage[one[0]]])):
                    out.append(block)
                else:
                    at = torch.from_numpy(inside).to(device)
                    out.append(block[at[:, None], at])
            else:
                out.append(self.diagonal.new_zeros(0, 0))
        return out

    def _solved_block(self, places: Tensor) -> Tensor:
        """The block in some rows and columns by certified solves, so many columns at once as keep them small."""
        width = max(1, _COLUMNS_BYTES // (8 * self._factors.analysis.problem.size))
        return torch.cat([self._columns(part)[places] for part in places.split(width)], 1)

    def _compared(self, diagonal: Tensor) -> tuple[float, float]:
        """How far entries are from certified solves, and the largest of them."""
        generator = torch.Generator().manual_seed(0)
        chosen: list[int] = []
        start = 0
        for part in diagonal.abs().tensor_split(
            min(diagonal.numel(), _PARTS if diagonal.numel() > _FEW else _MANY_PARTS)
        ):
            random = int(torch.randint(part.numel(), (), generator=generator, device="cpu"))
            chosen += [start + int(part.argmax()), start + random]
            start += part.numel()
        entries = torch.tensor(sorted(set(chosen)), device=diagonal.device)
        solved = self._columns(entries)[entries, torch.arange(entries.numel(), device=diagonal.device)]
        return float((solved - diagonal[entries]).abs().max()), float(solved.abs().max())

    def _columns(self, entries: Tensor) -> Tensor:
        """Columns of the inverse by certified solves, (N, entries)."""
        problem = self._factors.analysis.problem
        unit = torch.zeros(problem.size, entries.numel(), dtype=torch.float64, device=problem.device)
        unit[entries, torch.arange(entries.numel(), device=problem.device)] = 1.0
        tolerance = self._solver.tolerance
        return self._solver.solve(unit, tolerance if problem.size <= _FEW else max(tolerance, ENTRIES_SOLVED)).x


def _controls_of_stages(layout: Layout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each place of a flat vector the stage it belongs to, of those with controls, and its position there; and their sizes."""
    sizes = layout.p[layout.p > 0]
    of_chain = np.repeat(np.arange(sizes.size), sizes)
    inside = np.arange(layout.size) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    if layout.places is None:
        return of_chain, inside, sizes
    stage, position = np.empty_like(of_chain), np.empty_like(inside)
    stage[layout.places], position[layout.places] = of_chain, inside
    return stage, position, sizes


def _selected(entries: Callable[[RiccatiFactorization], _Entries], factors: Factors, attempt: int) -> _Entries:
    return entries(factors.for_entries(attempt))
