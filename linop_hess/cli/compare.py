"""What `linop-hess compare` does: one Newton system, solved by Krylov solvers and by factorizations, judged alike."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.linalg
from scipy.sparse.linalg import LinearOperator

from linop_hess import krylov
from linop_hess._memory import available_bytes, format_bytes
from linop_hess.autograd import Hessian
from linop_hess.cli.networks import Problem
from linop_hess.errors import FactorizationError
from linop_hess.krylov.record import Comparison, Record
from linop_hess.linearization import Linearization, linearize
from linop_hess.operators.inverse import MethodName
from linop_hess.processes import Processes
from linop_hess.streamed import StreamedLinearization

METHODS: tuple[MethodName, ...] = ("banded", "riccati", "dense", "ldu")
CONVEX: tuple[krylov.SolverName, ...] = ("minres", "cg")
"""What takes a positive definite M."""
FULL_BATCH_FROM = 500
"""From so many images on a sketch is compared too."""
LONGEST_SECONDS, LONGEST_OF_FULL_BATCH = 60.0, 10.0
"""What is expected to take longer is left out; on full batches, where exact recursions are out of the question, sooner."""
POWER_STEPS = 30
Progress = Callable[[str, int], Any]
"""Given a row's label and its number of steps, returns something with ``update(n)`` and ``close()``."""


@dataclass(frozen=True)
class Outcome:
    """What `compare_solvers` found.

    Attributes
    ----------
    comparison : Comparison
        One record a row.
    skipped : dict of str to str
        Rows that were left out, and why.
    parameters, loss, gradient_norm, hessian_norm
        Facts about the system; the norm is that of H + damping·I, by power iteration, a lower bound.
    """

    comparison: Comparison
    parameters: int
    loss: float
    gradient_norm: float
    hessian_norm: float
    skipped: dict[str, str] = field(default_factory=dict)


def compare_solvers(
    problem: Problem,
    damping: float = 1e-3,
    *,
    rtol: float = 1e-10,
    maxiter: int = 300,
    progress: Progress | None = None,
    group: Any = None,
) -> Outcome:
    """Solve (H + damping·I) x = gradient by every method and judge each by the same autograd products.

    Parameters
    ----------
    problem : Problem
        From `digits_problem`.
    damping : float
        Added to the Hessian's diagonal. What finds the sum singular is left out.
    rtol, maxiter
        For the Krylov solvers; gmres never restarts.
    progress : callable, optional
        See `Progress`.
    group : optional
        Of processes, all of which call this with the same problem; each takes a part of its samples, as even as can be. As in
        `linop_hess.Hessian`.

    Returns
    -------
    Outcome

    Raises
    ------
    ValueError
        If there are fewer samples than processes.
    """
    processes, images = Processes(group), len(problem.targets)
    problem = _shard(problem, processes)
    data = [(problem.inputs, problem.targets)]
    judge = Hessian(problem.model, problem.loss_fn, data, group=group).damped(damping)
    # The first calls pay for torch's and LAPACK's own set-up, which is no method's.
    with suppress(FactorizationError, MemoryError):
        _linearize(problem, group).inverse(damping).solve(np.ones(judge.shape[0]))
    begin = time.perf_counter()
    lin = _linearize(problem, group)
    linearizing = time.perf_counter() - begin
    g = np.asarray(lin.gradient)
    norm, judging = _timed(lambda: _norm(judge))
    records: list[Record] = []
    skipped: dict[str, str] = {}

    def iterate(label: str, solver: krylov.SolverName, M: Any = None, setup: float = 0.0) -> None:
        restart = maxiter if solver == "gmres" else None
        with _bar(progress, label, maxiter) as step:
            record = krylov.run(
                solver, judge, g, M=M, rtol=rtol, maxiter=maxiter, restart=restart, name=label,
                setup_seconds=setup, progress=lambda _: step(1),
            )  # fmt: skip
        held = 0 if M is None else int(M.nbytes)
        records.append(record.replace(memory=(record.memory or 0) + held))

    for solver in ("cg", "minres", "gmres"):
        iterate(solver.upper(), solver)
    try:
        exact, seconds = _timed(lambda: lin.inverse(damping))
        iterate("GMRES, M = exact inverse", "gmres", exact, linearizing + seconds)
    except (FactorizationError, MemoryError) as error:
        skipped["GMRES, M = exact inverse"] = str(error)
    try:
        newton, seconds = _timed(lambda: lin.gauss_newton().inverse(damping))
        for solver in CONVEX:
            label = f"{solver.upper()}, M = Gauss-Newton inverse"
            iterate(label, solver, newton, linearizing + seconds)
    except (FactorizationError, MemoryError) as error:
        skipped["M = Gauss-Newton inverse"] = str(error)
    is_full = images >= FULL_BATCH_FROM
    longest = LONGEST_OF_FULL_BATCH if is_full else LONGEST_SECONDS
    why_not = lin.plan(damping).costs["sketched"].why_not if is_full else ""
    if why_not:
        skipped["GMRES, M = sketch"] = why_not
    elif is_full:
        try:
            sketch, seconds = _timed(lambda: lin.inverse(damping, method="sketched"))
            iterate("GMRES, M = sketch", "gmres", sketch, linearizing + seconds)
        except (FactorizationError, MemoryError) as error:
            skipped["GMRES, M = sketch"] = str(error)
    for method in METHODS:
        label = "paper's LDU" if method == "ldu" else f"exact inverse, {method}"
        with _bar(progress, label, 1) as step:
            outcome = _direct(lin, judge, g, damping, method, linearizing, label, rtol, longest)
            step(1)
        if isinstance(outcome, str):
            skipped[label] = outcome
        else:
            records.append(outcome)
    why_not = _why_not_dense(len(g), len(g) * processes.largest(judging) / POWER_STEPS, longest)
    if not processes.all_of(not why_not):
        skipped["dense LU"] = why_not or "does not fit in another process"
    else:
        with _bar(progress, "dense LU", len(g)) as step:
            try:
                records.append(_dense_lu(judge, g, rtol, step))
            except np.linalg.LinAlgError as error:
                skipped["dense LU"] = str(error)
    judged = [r.replace(backward_error=_backward_error(r, g, norm)) for r in records]
    return Outcome(Comparison(judged), len(g), float(lin.loss), float(np.linalg.norm(g)), norm, skipped)


def _shard(problem: Problem, processes: Processes) -> Problem:
    """The samples of this process."""
    if len(problem.targets) < processes.size:
        raise ValueError(
            f"expected as many images as processes at least, got {len(problem.targets)} for {processes.size}: pass a larger --batch, or "
            "start fewer processes"
        )
    parts = (tensor.tensor_split(processes.size)[processes.rank] for tensor in (problem.inputs, problem.targets))
    return Problem(problem.model, problem.loss_fn, *parts)


def _linearize(problem: Problem, group: Any) -> Linearization | StreamedLinearization:
    if group is None:
        return linearize(problem.model, problem.loss_fn, problem.inputs, problem.targets)
    return linearize(problem.model, problem.loss_fn, problem.inputs, problem.targets, group=group)


def _direct(
    lin: Linearization | StreamedLinearization,
    judge: LinearOperator,
    g: np.ndarray,
    damping: float,
    method: MethodName,
    linearizing: float,
    label: str,
    rtol: float,
    longest: float,
) -> Record | str:
    """Return the record of one method of `Linearization.inverse`, or why it was left out."""
    plan = lin.plan(damping)
    cost = plan.costs[method]
    if not plan.fits(method):
        return cost.why_not or f"needs about {format_bytes(cost.nbytes)}"
    if cost.seconds > longest:
        return f"its plan says about {cost.seconds:.0f} s, more than {longest:.0f} s"
    try:
        inverse, seconds = _timed(lambda: lin.inverse(damping, method=method))
        solutions = []

        def solve(b: np.ndarray) -> np.ndarray:
            solutions.append(inverse.solve(b))
            return solutions[-1].x

        record = krylov.direct(
            solve, judge, g, rtol=rtol, name=label, setup_seconds=linearizing + seconds,
            memory=int(inverse.nbytes),
        )  # fmt: skip
    except (FactorizationError, MemoryError) as error:
        return str(error)
    steps = solutions[-1].refinement_steps
    used = solutions[-1].method
    words = f"{record.status}, {steps} refinement step{'s' * (steps != 1)}"
    return record.replace(status=words if used == method else f"{words}, escalated to {used}")


def _why_not_dense(n: int, seconds: float, longest: float) -> str:
    # The matrix, its factor, and the identity's columns in passing.
    needed, available = 3 * 8 * n**2, available_bytes()
    if needed > available:
        return f"needs about {format_bytes(needed)}, {format_bytes(available)} are available"
    if n > 10_000:
        return f"would take {n:,} Hessian products, more than 10,000"
    if seconds > longest:
        return f"its {n:,} Hessian products would take about {seconds:.0f} s, more than {longest:.0f} s"
    return ""


def _dense_lu(judge: LinearOperator, g: np.ndarray, rtol: float, step: Callable[[int], Any]) -> Record:
    n = len(g)

    def factor() -> Any:
        dense = np.empty((n, n))
        for first in range(0, n, 32):
            columns = np.arange(first, min(first + 32, n))
            probes = np.zeros((n, len(columns)))
            probes[columns, np.arange(len(columns))] = 1.0
            dense[:, columns] = judge.matmat(probes)
            step(len(columns))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", scipy.linalg.LinAlgWarning)  # LAPACK's of a pivot that is zero
            lu, order = scipy.linalg.lu_factor(dense, overwrite_a=True)
        if not np.diagonal(lu).all():
            raise np.linalg.LinAlgError("a pivot is exactly zero: the matrix is singular")
        return lu, order

    factors, seconds = _timed(factor)
    record = krylov.direct(
        lambda b: scipy.linalg.lu_solve(factors, b), judge, g, rtol=rtol, name="dense LU",
        setup_seconds=seconds, memory=8 * n * n,
    )  # fmt: skip
    return record.replace(products_A=n, status=f"{record.status}, formed by {n:,} products")


def _norm(A: LinearOperator, steps: int = POWER_STEPS) -> float:
    """Return a lower bound of ``||A||`` for a symmetric A, by power iteration."""
    v = np.random.default_rng(0).standard_normal(A.shape[0])
    norm = 0.0
    for _ in range(steps):
        v = A.matvec(v / np.linalg.norm(v))
        norm = max(norm, float(np.linalg.norm(v)))
    return norm


def _backward_error(record: Record, b: np.ndarray, norm: float) -> float:
    size = float(np.linalg.norm(b))
    return record.residual * size / (norm * float(np.linalg.norm(record.x)) + size)


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    begin = time.perf_counter()
    result = work()
    return result, time.perf_counter() - begin


@contextmanager
def _bar(progress: Progress | None, label: str, total: int) -> Iterator[Callable[[int], Any]]:
    if progress is None:
        yield lambda _: None
        return
    bar = progress(label, total)
    try:
        yield bar.update
    finally:
        bar.close()
