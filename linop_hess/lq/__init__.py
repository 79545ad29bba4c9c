"""Linear-quadratic problems and their factorizations; knows nothing of networks and is usable by itself."""

from linop_hess.lq.dense_stages import DenseStages, DiagonalStages
from linop_hess.lq.plan import METHODS, Plan, make_plan
from linop_hess.lq.problem import Problem
from linop_hess.lq.solver import Solution, Solver

__all__ = ["METHODS", "DenseStages", "DiagonalStages", "Plan", "Problem", "Solution", "Solver", "make_plan"]
