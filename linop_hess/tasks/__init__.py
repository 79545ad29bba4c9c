"""Problems to try optimizers and factorizations on: models to train, and optimal control."""

from linop_hess.tasks.control import ControlTask, Expansion, Trajectory, regulator
from linop_hess.tasks.learning import LearningTask
from linop_hess.tasks.neural_ode import neural_ode
from linop_hess.tasks.newton import ControlRecord, ControlResult, lbfgs, newton, refined
from linop_hess.tasks.physics import burgers, poisson
from linop_hess.tasks.swing_up import CartPole, ControlStage, Pendulum, as_network

__all__ = [
    "CartPole",
    "ControlRecord",
    "ControlResult",
    "ControlStage",
    "ControlTask",
    "Expansion",
    "LearningTask",
    "Pendulum",
    "Trajectory",
    "as_network",
    "burgers",
    "lbfgs",
    "neural_ode",
    "newton",
    "poisson",
    "refined",
    "regulator",
]
