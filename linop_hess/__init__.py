"""The exact inverse of a deep network's Hessian, and every piece of it, as SciPy linear operators."""

from linop_hess import errors, krylov, lq, optim, plot, spectrum, trust_region
from linop_hess.autograd import GaussNewton, Hessian
from linop_hess.linearization import Linearization, linearize
from linop_hess.lq.pivots.inertia import Inertia
from linop_hess.lq.solve.solution import Solution
from linop_hess.minimum import MinimumReport, certify_minimum
from linop_hess.operators import to_dense
from linop_hess.operators.inverse import HessianInverse
from linop_hess.streamed import StreamedLinearization

__all__ = [
    "GaussNewton",
    "Hessian",
    "HessianInverse",
    "Inertia",
    "Linearization",
    "MinimumReport",
    "Solution",
    "StreamedLinearization",
    "certify_minimum",
    "errors",
    "krylov",
    "linearize",
    "load",
    "lq",
    "optim",
    "plot",
    "spectrum",
    "to_dense",
    "trust_region",
]
load = Linearization.load
__version__ = "0.1.0"
