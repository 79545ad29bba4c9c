"""Global minimizers of quadratic and cubic-regularized models of a loss, on factorizations of H + λI, with certificates."""

from linop_hess.trust_region.api import cubic, solve
from linop_hess.trust_region.certificate import Certificate
from linop_hess.trust_region.step import Step

__all__ = ["Certificate", "Step", "cubic", "solve"]
