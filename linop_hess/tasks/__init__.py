"""Problems to try optimizers and factorizations on: models to train, and optimal control."""

from linop_hess.tasks.control import ControlTask, Expansion, Trajectory, regulator
from linop_hess.tasks.digits import autoencoder, digits, digits_memorize
from linop_hess.tasks.learning import LearningTask
from linop_hess.tasks.neural_ode import neural_ode
from linop_hess.tasks.newton import ControlRecord, ControlResult, lbfgs, newton, refined
from linop_hess.tasks.physics import burgers, poisson
from linop_hess.tasks.registry import TASKS, ShootingTask, make_task, pendulum, task_options
from linop_hess.tasks.swing_up import CartPole, ControlStage, Pendulum, as_network

__all__ = [
    "TASKS",
    "CartPole",
    "ControlRecord",
    "ControlResult",
    "ControlStage",
    "ControlTask",
    "Expansion",
    "LearningTask",
    "Pendulum",
    "ShootingTask",
    "Trajectory",
    "as_network",
    "autoencoder",
    "burgers",
    "digits",
    "digits_memorize",
    "lbfgs",
    "make_task",
    "neural_ode",
    "newton",
    "pendulum",
    "poisson",
    "refined",
    "regulator",
    "task_options",
]
