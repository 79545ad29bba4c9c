"""SciPy's Krylov solvers with the true residual of every iteration recorded."""

from linop_hess.krylov.record import Comparison, Record, compare
from linop_hess.krylov.run import SOLVERS, direct, run

__all__ = ["SOLVERS", "Comparison", "Record", "compare", "direct", "run"]
