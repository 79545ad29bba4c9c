"""Plots: how solvers converge, how optimizers train, and spectra."""

from linop_hess.plot.figure import COLOURS
from linop_hess.plot.histogram import spectrum
from linop_hess.plot.losses import History, losses
from linop_hess.plot.residuals import convergence

__all__ = ["COLOURS", "History", "convergence", "losses", "spectrum"]
