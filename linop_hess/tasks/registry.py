"""All tasks by name, and what may be chosen of each."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from linop_hess._validate import whole
from linop_hess.tasks.control import ControlTask
from linop_hess.tasks.digits import autoencoder, digits, digits_memorize
from linop_hess.tasks.learning import LearningTask
from linop_hess.tasks.neural_ode import neural_ode
from linop_hess.tasks.physics import burgers, poisson
from linop_hess.tasks.swing_up import Pendulum


@dataclass(frozen=True)
class ShootingTask:
    """A control task with the controls to start from.

    Attributes
    ----------
    name : str
    control : ControlTask
    controls : ndarray, shape (L,)
    """

    name: str
    control: ControlTask
    controls: np.ndarray

    @property
    def size(self) -> int:
        """Number of controls."""
        return self.control.length


def pendulum(seed: int = 0, *, depth: int = 1000) -> ShootingTask:
    """Swing a pendulum up from hanging at rest, starting from small random controls.

    Parameters
    ----------
    seed : int
        Of the controls.
    depth : int
        Control stages.

    Returns
    -------
    ShootingTask

    Raises
    ------
    ValueError, TypeError
        If a number is not usable.
    """
    depth = whole(depth, "depth", least=2)
    controls = 0.1 * np.random.default_rng(whole(seed, "seed", least=0)).standard_normal(depth)
    return ShootingTask("pendulum", Pendulum(depth), controls)


TASKS: dict[str, Callable[..., LearningTask | ShootingTask]] = {
    "digits-memorize": digits_memorize,
    "digits": digits,
    "autoencoder": autoencoder,
    "pendulum": pendulum,
    "neural-ode": neural_ode,
    "poisson": poisson,
    "burgers": burgers,
}


def task_options(name: str) -> dict[str, Any]:
    """Return what may be chosen of a task, its seed aside, and the values by default.

    Raises
    ------
    ValueError
        If there is no task of this name.
    """
    if name not in TASKS:
        raise ValueError(f"expected a task of {list(TASKS)}, got {name!r}: choose one")
    parameters = inspect.signature(TASKS[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.name != "seed"}


def make_task(name: str, seed: int = 0, **options: Any) -> LearningTask | ShootingTask:
    """Make a task at its initial point.

    Parameters
    ----------
    name : str
        One of `TASKS`.
    seed : int
    **options
        Of `task_options`.

    Returns
    -------
    LearningTask or ShootingTask

    Raises
    ------
    ValueError, TypeError
        If there is no task of this name, it has no such option, or a value is not usable.
    ImportError
        Where the data come from a package that is not installed.

    Examples
    --------
    >>> from linop_hess.tasks import make_task
    >>> make_task("digits-memorize", 0, depth=2, width=3, batch=4).size
    247
    """
    known = task_options(name)
    for option in options:
        if option not in known:
            takes = f"{', '.join(known)} alone" if known else "no options"
            raise ValueError(f"expected of {name} {takes}, got {option}: leave it out")
    return TASKS[name](seed, **options)
