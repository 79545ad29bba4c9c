"""Solutions that the blocks of a problem determine although H + εI, as a matrix, does not.

The Hessian of a chain whose states grow, such as an unstable system held for long, has a norm that grows with the square of them, and the
condition number with it; rounding in H would change the solution altogether. Rounding in the blocks A, B, C, F and G need not: the KKT
system of the chain, whose entries they are, may be well conditioned. How much of x rounding in the blocks leaves is measured here, by
solving for the change that random errors of the size of rounding make. In an H + εI that is singular whatever the blocks these
errors are as large as x.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from linop_hess.lq.analysis import Analysis
from linop_hess.lq.condensed import block_sizes
from linop_hess.lq.layout import Slots
from linop_hess.lq.methods.banded import BandedFactorization

# Random errors tried: that all of them miss a direction by a factor f has a probability of about f to this power.
_PROBES = 4
# Steps of refinement of the KKT system: one makes LU with partial pivoting as good as rounding in every entry, the second is to be sure.
_STEPS = 2


class StructuredSolver:
    """The KKT band system in float64, with what rounding in its blocks does to solutions.

    Parameters
    ----------
    analysis : Analysis
        In any precision.
    damping : float

    Raises
    ------
    SingularPivotError
        If the band matrix is exactly singular, or ε = 0 and there are hidden controls.
    """

    def __init__(self, analysis: Analysis, damping: float) -> None:
        self._analysis, self._damping = analysis.in_float64, damping
        self._factors = BandedFactorization(self._analysis, damping)
        layout, kl = self._factors.layout, self._factors.layout.bandwidth
        diagonals = self._factors.assemble().storage.T[kl : 3 * kl + 1]
        self._matrix = sp.dia_array((diagonals, -np.arange(-kl, kl + 1)), shape=(layout.order, layout.order)).tocsr()
        self._sizes = [block_sizes(group) for group in self._analysis.groups]

    def solve(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """Solve for g of shape (N, k).

        Returns
        -------
        x : Tensor, shape (N, k)
            In float64.
        error : Tensor, shape (k,)
            By how much of ‖x‖ rounding in the blocks moves x.
        """
        g, factors = g.double(), self._factors
        rhs, hidden = factors.band_load(g)
        y = factors.solve_band(rhs)
        for _ in range(_STEPS):
            y = y + factors.solve_band(rhs - self._product(y))
        x = factors.controls(y, hidden)
        moved = self._moved(g, y, (rhs - self._product(y)).abs())
        sizes = torch.linalg.vector_norm(x, dim=0)
        return x, torch.where(sizes > 0, moved / sizes, moved)

    def _product(self, y: Tensor) -> Tensor:
        return torch.from_numpy(self._matrix @ y.numpy())

    def _moved(self, g: Tensor, y: Tensor, residual: Tensor) -> Tensor:
        """Largest norm of the change of x by random errors, (k,)."""
        rows, of_hidden = self._rounding(g, y)
        rows = rows + residual
        generator = torch.Generator().manual_seed(0)
        moved = rows.new_zeros(rows.shape[1])
        none = [
            y.new_zeros(group.count, group.control.p, y.shape[1]) if group.hidden else None
            for group in self._analysis.groups
        ]
        for _ in range(_PROBES):
            errors = rows * torch.randn(rows.shape, generator=generator, dtype=rows.dtype, device="cpu")
            change = self._factors.controls(self._factors.solve_band(errors), none)
            moved = torch.maximum(moved, torch.linalg.vector_norm(change, dim=0))
        moved = moved + of_hidden
        return torch.where(moved.isfinite(), moved, torch.inf)

    def _rounding(self, g: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """What rounding makes of each row of the KKT system, (order, k), and of the hidden controls, (k,)."""
        layout, damping, weight = self._factors.layout, abs(self._damping), self._factors.weight
        rows, of_hidden = torch.zeros_like(y), y.new_zeros(y.shape[1])
        for group, controls, states, size in zip(
            self._analysis.groups, layout.controls, layout.states, self._sizes, strict=True
        ):
            at, r = layout.start[group.segments], group.r
            n = int(layout.n[group.segments[0]])
            multipliers, after = Slots(at + r, n), Slots(at + r + n, n)
            s, d = _norm(controls.gather(y)), _norm(states.gather(y))
            costate, reached = multipliers.gather(y).abs() * weight, after.gather(y).abs()
            load = _norm(group.x_slots.gather(g))
            of_s, of_d = size.s[:, :n], size.d[:, :n]
            on_controls = (size.ss + damping) * s + size.sd * d + (of_s * costate).sum(1, keepdim=True) + load
            on_states = size.sd * s + size.dd * d + (of_d * costate).sum(1, keepdim=True)
            if group.hidden:
                share = size.hidden / damping
                on_states = on_states + share * (size.hidden * d + load)
                of_hidden = of_hidden + ((load / damping + share * d) ** 2).sum((0, 1))
            controls.add(rows, on_controls.expand(-1, r, -1))
            states.add(rows, on_states.expand(-1, group.n_in, -1))
            multipliers.add(rows, weight * (of_s * s + of_d * d + reached))
            after.add(rows, costate)
        eps = torch.finfo(y.dtype).eps
        return rows * eps, of_hidden.sqrt() * eps


def _norm(part: Tensor) -> Tensor:
    """Norms of the columns of (K, n, k), (K, 1, k)."""
    return torch.linalg.vector_norm(part, dim=1, keepdim=True)
