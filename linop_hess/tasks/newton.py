"""Newton's method on control tasks, each step with its certificate; and Gauss-Newton (iLQR) and L-BFGS to compare it with."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from linop_hess._display import Shown
from linop_hess._validate import finite_real, whole
from linop_hess.lq import Analysis, Inverse
from linop_hess.lq.inverse.counting import smallest_convex_damping
from linop_hess.tasks.control import ControlTask, Expansion, Trajectory, regulator

# Of a step's first-order decrease, what the cost must fall by (Armijo); and, in terms of the cost, the rounding of its sum.
_ARMIJO = 1e-4
_ROUNDING = 1e-13

# The shortest step tried, in terms of the full one; how far above the least convex damping to go, and how close that is found.
_SHORTEST = 1e-9
_ABOVE, _CLOSE = 1.1, 0.1

# Between dampings tried after the first.
_STRIDE = 4.0

# Backward error of a step: Newton's method corrects what is left, and 100,000 stages do not always leave less.
_SOLVED = 1e-12

# Inverse iterations for a direction of negative curvature, and the length of the first step along it.
_ITERATIONS, _FIRST = 6, 30.0

_CURVATURES = ("exact", "gauss-newton")


@dataclass(frozen=True)
class ControlRecord:
    """One iteration.

    Attributes
    ----------
    cost, gradient_norm : float
        Before the step; of the controls u, without feedback.
    damping : float
        ε; 0 where H is positive definite by inertia.
    backward_error : float
        Of the solve for the step; NaN where there was none.
    length : float
        Of the step, in terms of the full one.
    seconds : float
        Since the start.
    """

    cost: float
    gradient_norm: float
    damping: float
    backward_error: float
    length: float
    seconds: float


@dataclass(frozen=True, repr=False)
class ControlResult(Shown):
    """Where a method ended.

    Attributes
    ----------
    trajectory : Trajectory
    records : list of ControlRecord
        The last is of the point where it ended.
    is_minimum : bool
        The gradient norm is at most the tolerance, and H is positive definite there, by the inertia of the closed loop's, congruent to
        it where g = 0.
    """

    trajectory: Trajectory
    records: list[ControlRecord]
    is_minimum: bool

    @property
    def iterations(self) -> int:
        """Steps taken."""
        return len(self.records) - 1

    def __str__(self) -> str:
        """Return it in a line."""
        last, what = self.records[-1], "a minimum, by inertia" if self.is_minimum else "not shown to be a minimum"
        return (
            f"cost {last.cost:.8g}, gradient norm {last.gradient_norm:.1e} after {self.iterations} iterations: {what}"
        )


Watch = Callable[[ControlRecord], object]
"""Told of each iteration, as soon as it is known."""


class _Records(list[ControlRecord]):
    """Records that a watcher is told of."""

    def __init__(self, watch: Watch | None) -> None:
        super().__init__()
        self._watch = watch

    def append(self, record: ControlRecord) -> None:
        super().append(record)
        if self._watch is not None:
            self._watch(record)


def newton(
    task: ControlTask,
    u: np.ndarray | None = None,
    *,
    gtol: float = 1e-10,
    most: int = 200,
    curvature: Literal["exact", "gauss-newton"] = "exact",
    watch: Watch | None = None,
) -> ControlResult:
    """Minimize a task's cost over its controls, by Newton steps in the loop that a regulator closes.

    Each iteration closes the loop by the regulator of the linearized system and the task's own costs, so that second derivatives are those
    of a stable system that keeps its end, solves (H + εI)s = −g with about the least damping at which H + εI is positive definite by
    inertia, and searches along s on the true cost. At a stationary point that is no minimum it leaves along negative curvature, found by
    inverse iteration.

    Parameters
    ----------
    task : ControlTask
    u : ndarray, shape (L,), optional
        Controls to start from; by default zeros.
    gtol : float
        It ends where the norm of the gradient by the controls is at most this and H is positive definite.
    most : int
        Steps.
    curvature : {"exact", "gauss-newton"}
        H, or iLQR's matrix without the curvature of the dynamics.
    watch : callable, optional
        Called with each record; what it raises ends the iteration.

    Returns
    -------
    ControlResult

    Raises
    ------
    ValueError
        If the controls have another shape, or their rollout no finite cost; if `curvature` is unknown, `gtol` is not positive and finite
        or `most` less than 1.
    TypeError
        If these two are no numbers.
    FactorizationError
        If no damping makes H positive definite.
    """
    if curvature not in _CURVATURES:
        raise ValueError(f"expected curvature to be one of {list(_CURVATURES)}, got {curvature!r}: choose one")
    if not (gtol := finite_real(gtol, "gtol")) > 0.0:
        raise ValueError(f"expected gtol to be positive, got {gtol:g}: pass the norm of a gradient that will do")
    most = whole(most, "most", least=1)
    at = task.rollout(np.zeros(task.length) if u is None else np.asarray(u, dtype=np.float64))
    if not np.isfinite(at.cost):
        raise ValueError("expected controls whose rollout has a finite cost: start from smaller ones")
    began, records = time.perf_counter(), _Records(watch)
    gauss_newton, last = curvature == "gauss-newton", 0.0
    while True:
        free = task.expand(at, gauss_newton=True)
        slope = float(np.linalg.norm(free.gradient))
        K = regulator(free, task.h * np.array(task.weight))
        closed = task.expand(at, K, gauss_newton=gauss_newton)
        inverse, damping = _convex(closed, last)
        last = damping or last
        # Where g = 0, the two H are congruent, so that inertia in the loop is that of the controls, which rounding reaches sooner.
        is_end = slope <= gtol and damping == 0.0
        if is_end or len(records) >= most:
            records.append(ControlRecord(at.cost, slope, damping, np.nan, 0.0, time.perf_counter() - began))
            return ControlResult(at, records, is_end and not gauss_newton)
        solution = inverse.solve(torch.from_numpy(-closed.gradient)[:, None], _SOLVED)
        step, first = solution.x[:, 0].numpy(), 1.0
        if slope <= gtol:
            step, first = _negative_curvature(inverse, closed.gradient), _FIRST
        found = _search(task, at, K, step, float(closed.gradient @ step), first, damping > 0.0)
        length = 0.0 if found is None else found[1]
        records.append(
            ControlRecord(at.cost, slope, damping, solution.backward_error, length, time.perf_counter() - began)
        )
        if found is None:  # nothing falls: rounding
            return ControlResult(at, records, False)
        at = found[0]


def _convex(closed: Expansion, last: float) -> tuple[Inverse, float]:
    """The inverse of H, or of H + εI at a damping that makes it positive definite; such are near those of the step before, `last`."""
    analysis = Analysis(closed.problem)
    damping = 0.0
    inverse = Inverse(analysis, damping)
    while not inverse.is_positive_definite:
        if last == 0.0:
            last = _ABOVE * smallest_convex_damping(analysis, _CLOSE)
            return Inverse(analysis, last), last
        damping = _STRIDE * damping if damping else last / _STRIDE
        inverse = Inverse(analysis, damping)
    return inverse, damping


def _negative_curvature(inverse: Inverse, gradient: np.ndarray) -> np.ndarray:
    """A unit vector near the lowest eigenspace, with −g and otherwise with a sum that is positive."""
    v = torch.from_numpy(np.random.default_rng(0).standard_normal(gradient.size))[:, None]
    for _ in range(_ITERATIONS):
        v = inverse.solve(v).x
        v = v / v.norm()
    step: np.ndarray = v[:, 0].numpy()
    return step if step.sum() >= 0.0 else -step


def _search(
    task: ControlTask, at: Trajectory, K: np.ndarray, step: np.ndarray, slope: float, first: float, grow: bool
) -> tuple[Trajectory, float] | None:
    """Halve until the cost falls enough; where the step was damped, double while it falls further."""

    def trial(length: float) -> Trajectory:
        return task.rollout(at.u + length * step, at, K)

    length, found = first, trial(first)
    while not found.cost <= at.cost + _ARMIJO * length * min(slope, 0.0) + _ROUNDING * abs(at.cost):
        length /= 2
        if length < _SHORTEST:
            return None
        found = trial(length)
    while grow and (further := trial(2 * length)).cost < found.cost:
        length, found = 2 * length, further
    return found, length


def refined(u: np.ndarray, length: int) -> np.ndarray:
    """Return controls of a horizon cut into `length` stages, interpolated from those of another cut: where to start from.

    Parameters
    ----------
    u : ndarray, shape (L,)
    length : int

    Returns
    -------
    ndarray, shape (length,)

    Raises
    ------
    ValueError
        If there are no controls, one is not finite, or `length` is less than 1.
    TypeError
        If it is no whole number.
    """
    length = whole(length, "length", least=1)
    u = np.asarray(u, dtype=np.float64)
    if u.ndim != 1 or not u.size:
        raise ValueError(f"expected controls of shape (L,), got {u.shape}: one number a stage")
    if not np.isfinite(u).all():
        raise ValueError("expected finite controls, got NaN or Inf: pass those of a run that ended well")
    middles = [(np.arange(count) + 0.5) / count for count in (length, u.size)]
    return np.interp(middles[0], middles[1], u)


def lbfgs(
    task: ControlTask,
    u: np.ndarray | None = None,
    *,
    gtol: float = 1e-10,
    most: int = 3000,
    history: int = 20,
    watch: Watch | None = None,
) -> ControlResult:
    """Minimize a task's cost over its controls by torch's L-BFGS with strong Wolfe line searches, without feedback.

    Parameters
    ----------
    task : ControlTask
    u : ndarray, shape (L,), optional
    gtol : float
    most : int
        Evaluations of cost and gradient.
    history : int
    watch : callable, optional
        As of `newton`, called for each evaluation.

    Returns
    -------
    ControlResult
        With a record an evaluation; `is_minimum` is False, since nothing here knows of inertia.
    """
    began, records, seen = time.perf_counter(), _Records(watch), list[Trajectory]()
    x = torch.tensor(np.zeros(task.length) if u is None else u, dtype=torch.float64, device="cpu")
    x.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [x],
        max_iter=most,
        max_eval=most,
        history_size=history,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        at = task.rollout(x.detach().numpy().copy())
        gradient = task.gradient(at) if np.isfinite(at.cost) else np.full(task.length, np.nan)
        x.grad = torch.from_numpy(gradient)
        slope = float(np.linalg.norm(gradient))
        records.append(ControlRecord(at.cost, slope, 0.0, np.nan, 1.0, time.perf_counter() - began))
        seen[:] = [at] if not seen or at.cost <= seen[0].cost else seen
        if slope <= gtol:
            raise _Reached
        return at.cost

    step: Callable[..., object] = optimizer.step
    try:
        step(closure)
    except _Reached:
        pass
    return ControlResult(seen[0], records, False)


class _Reached(Exception):
    """The gradient is small enough."""
