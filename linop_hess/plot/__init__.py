"""Plots: how solvers converge, and spectra."""

from linop_hess.plot.figure import COLOURS
from linop_hess.plot.histogram import spectrum
from linop_hess.plot.residuals import convergence

__all__ = ["COLOURS", "convergence", "spectrum"]
