"""What counts as the null space of H, and who has a spectrum."""

from __future__ import annotations

from typing import Any, Protocol

from linop_hess.lq.inverse.counting import count_up_to
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
    if problem.norm == 0.0:
        return problem.size
    edge = NULL * problem.norm
    return count_up_to(problem, edge) - count_up_to(problem, -edge)


def problem_of(lin: Any) -> Problem:
    """Return the problem behind a linearization, in float64.

    Raises
    ------
    TypeError
        If it is none.
    """
    problem = getattr(lin, "problem", None)
    if not isinstance(problem, Problem):
        raise TypeError(f"a spectrum is that of a linearization or of its gauss_newton(), got {type(lin).__name__}")
    return problem.in_float64
