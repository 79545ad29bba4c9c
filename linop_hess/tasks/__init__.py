"""Problems beyond classification, to try optimizers and factorizations on: optimal control."""

from linop_hess.tasks.control import ControlTask, Expansion, Trajectory, regulator
from linop_hess.tasks.newton import ControlRecord, ControlResult, lbfgs, newton
from linop_hess.tasks.swing_up import CartPole, ControlStage, Pendulum, as_network

__all__ = [
    "CartPole",
    "ControlRecord",
    "ControlResult",
    "ControlStage",
    "ControlTask",
    "Expansion",
    "Pendulum",
    "Trajectory",
    "as_network",
    "lbfgs",
    "newton",
    "regulator",
]
