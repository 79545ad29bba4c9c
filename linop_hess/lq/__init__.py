"""Linear-quadratic problems and their factorizations; knows nothing of networks and is usable by itself."""

from linop_hess.lq.analysis import Analysis
from linop_hess.lq.inverse.inverse import Inverse
from linop_hess.lq.inverse.solver import Solver
from linop_hess.lq.methods.plan import METHODS, Plan, make_plan
from linop_hess.lq.problem import Problem
from linop_hess.lq.solve.solution import Solution
from linop_hess.lq.stages import DenseStage, DiagonalStage
from linop_hess.lq.summed import SummedProblem

__all__ = [
    "METHODS",
    "Analysis",
    "DenseStage",
    "DiagonalStage",
    "Inverse",
    "Plan",
    "Problem",
    "Solution",
    "Solver",
    "SummedProblem",
    "make_plan",
]
