"""SciPy's Krylov solvers with the true residual of every iteration recorded."""

from linop_hess.krylov.block import run_block
from linop_hess.krylov.checks import SolverName
from linop_hess.krylov.record import Comparison, Record, compare
from linop_hess.krylov.recycled import RecycledSpace
from linop_hess.krylov.run import SOLVERS, direct, run

__all__ = ["SOLVERS", "Comparison", "Record", "RecycledSpace", "SolverName", "compare", "direct", "run", "run_block"]
