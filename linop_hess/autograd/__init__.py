"""Products with the curvature matrices of any torch model, by automatic differentiation."""

from linop_hess.autograd.hessian import GaussNewton, Hessian

__all__ = ["GaussNewton", "Hessian"]
