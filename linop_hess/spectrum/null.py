"""What counts as the null space of H, and who has a spectrum."""

from __future__ import annotations

from typing import Any, Protocol

from linop_hess.lq.analysis import Analysis
from linop_hess.lq.inverse.counting import count_up_to

# Eigenvalues up to this times ‖H‖ in size count as zero.
NULL = 1e-7


class HasSpectrum(Protocol):
    """A `Linearization`, its `H` or its `gauss_newton()`."""

    @property
    def analysis(self) -> Analysis:
        """Of the LQ problem whose H is meant."""
        ...


def nullity(analysis: Analysis) -> int:
    """Count the eigenvalues up to `NULL`·‖H‖ in size."""
    if analysis.norm == 0.0:
        return analysis.problem.size
    edge = NULL * analysis.norm
    return count_up_to(analysis, edge) - count_up_to(analysis, -edge)


def analysis_of(lin: Any) -> Analysis:
    """Return the analysis behind a linearization, in float64.

    Raises
    ------
    TypeError
        If there is none.
    """
    analysis = getattr(lin, "analysis", None)
    if not isinstance(analysis, Analysis):
        raise TypeError(f"a spectrum is that of a linearization or of its gauss_newton(), got {type(lin).__name__}")
    return analysis.in_float64
