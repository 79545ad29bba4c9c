"""What counts as the null space of H, and who has a spectrum."""

from __future__ import annotations

from typing import Protocol

from linop_hess.lq.convexity import count_up_to
from linop_hess.lq.problem import Problem

# Eigenvalues up to this times ‖H‖ in size count as zero.
NULL = 1e-7


class HasSpectrum(Protocol):
    """A `Linearization` or `GaussNewtonLinearization`."""

    @property
    def problem(self) -> Problem:
        """The LQ problem whose H is meant."""
        ...


def nullity(problem: Problem) -> int:
    """Count the eigenvalues up to `NULL`·‖H‖ in size."""
    edge = NULL * problem.norm
    return count_up_to(problem, edge) - count_up_to(problem, -edge)
