"""Optimizers on exact curvature: each a `torch.optim.Optimizer` that knows the model and the loss."""

from linop_hess.optim.absolute import inverse_absolute, quadrature
from linop_hess.optim.damping import (
    ConditionNumber,
    Damping,
    DelayedGratification,
    Fixed,
    GainRatio,
    JustConvex,
    ResidualMonitored,
    Searched,
)
from linop_hess.optim.gauss_newton import GaussNewton
from linop_hess.optim.hessian_free import HessianFree
from linop_hess.optim.preconditioned import PreconditionedSGD
from linop_hess.optim.record import StepRecord
from linop_hess.optim.region import TrustRegion
from linop_hess.optim.saddle_free import SaddleFree

__all__ = [
    "ConditionNumber",
    "Damping",
    "DelayedGratification",
    "Fixed",
    "GainRatio",
    "GaussNewton",
    "HessianFree",
    "JustConvex",
    "PreconditionedSGD",
    "ResidualMonitored",
    "SaddleFree",
    "Searched",
    "StepRecord",
    "TrustRegion",
    "inverse_absolute",
    "quadrature",
]
