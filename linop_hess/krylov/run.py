"""SciPy's Krylov solvers, run with a record of the true residual after every iteration.

The solvers are SciPy's own code. This module wraps A and M to count their products, listens to the solver's
callback, and stops the clock while it measures. ``info == 0`` is not taken at its word: minres on an
ill-conditioned system returns it at a true residual near one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import scipy.sparse.linalg as spla

from linop_hess.krylov.checks import SolverName, check_atol, check_options, check_rtol, check_system
from linop_hess.krylov.observer import Breakdown, Observer, Reached, norm, relative_residual
from linop_hess.krylov.record import Comparison, Record, compare
from linop_hess.krylov.recycled import RecycledSpace

__all__ = ["SOLVERS", "Comparison", "Record", "compare", "direct", "run"]

SOLVERS: dict[SolverName, Callable[..., Any]] = {
    "cg": spla.cg,
    "minres": spla.minres,
    "gmres": spla.gmres,
    "lgmres": spla.lgmres,
    "bicgstab": spla.bicgstab,
    "gcrotmk": spla.gcrotmk,
}
# A solver that stops by its recurrence leaves the true residual a rounding error above its tolerance.
SLACK = 1.1
_MINRES_INDEFINITE = ("indefinite preconditioner", "non-symmetric matrix")


def run(
    solver: SolverName,
    A: Any,
    b: np.ndarray,
    M: Any = None,
    x0: np.ndarray | None = None,
    *,
    rtol: float = 1e-8,
    atol: float = 0.0,
    maxiter: int = 1000,
    restart: int | None = None,
    inner_m: int | None = None,
    recycled: RecycledSpace | None = None,
    name: str | None = None,
    setup_seconds: float = 0.0,
    progress: bool | Callable[[int], None] | None = None,
) -> Record:
    """Solve ``A x = b`` with one of SciPy's Krylov solvers and record how it went.

    Parameters
    ----------
    solver : {"cg", "minres", "gmres", "lgmres", "bicgstab", "gcrotmk"}
        The function of `scipy.sparse.linalg` to call. "gcrotmk" is flexible: M may change from product to product (another solve, say),
        and it is the one that recycles a space.
    A : LinearOperator, ndarray or sparse array, shape (N, N)
        The real matrix; symmetric for minres, symmetric positive definite for cg.
    b : ndarray, shape (N,) or (N, 1)
        The right-hand side.
    M : LinearOperator, ndarray or sparse array, shape (N, N), optional
        An approximation of A's *inverse*; positive definite for cg and minres.
    x0 : ndarray, shape (N,), optional
        The start; zero by default.
    rtol : float
        The tolerance given to SciPy. ``converged`` means that the true residual ``||b - A x||`` ends at or below
        ``1.1 * max(rtol ||b||, atol)``; the 10 % is for rounding in the solver's own, updated, residual. minres tests
        ``||r|| <= rtol ||A|| ||x||`` instead and so often stops before the true residual is there.
    atol : float
        SciPy's absolute tolerance, 0 by default. minres has none in SciPy: it is stopped at the first iterate whose true residual
        meets it.
    maxiter : int
        The most iterations. cg, minres: one product with A each. bicgstab: two. gmres: an *inner*
        iteration, one product each, whatever `restart`. lgmres: an outer cycle of about `inner_m` products,
        because SciPy shows none of its inner ones. gcrotmk: the same, of about ``restart`` products.
    restart : int, optional
        gmres and gcrotmk only: the cycle length. SciPy's default is 20; ``restart=maxiter`` never restarts gmres.
    inner_m : int, optional
        lgmres only: its inner iterations a cycle. SciPy's default is 30.
    recycled : RecycledSpace, optional
        gcrotmk only: a space that earlier solves left, which this one begins with and adds to. A must be the same, or the space is
        multiplied by A again (`RecycledSpace.for_other`).
    name : str, optional
        The record's label; the solver's name by default.
    setup_seconds : float
        Copied into the record, for the time it took to make M.
    progress : bool or callable, optional
        True shows a progress bar (needs tqdm), as it does everywhere in this package; a callable is called with the number of
        iterations done, off the clock.

    Returns
    -------
    Record
        ``residuals[k]`` is the true relative residual after k iterations.

    Raises
    ------
    TypeError
        If anything is complex, or `maxiter` is not an integer.
    ValueError
        For an unknown solver, wrong shapes, NaN or Inf, ``rtol <= 0``, ``atol < 0``, ``maxiter < 1``, or an option that
        belongs to another solver.
    ImportError
        If ``progress=True`` and tqdm is not installed.

    Notes
    -----
    *What is timed.* `seconds` covers SciPy's code and its products with A and M. The residual ``b - A x``
    is formed in the callback with the clock stopped, and its product is not counted.

    *Size.* SciPy's solvers square norms. A system whose b would under- or overflow in them is solved for b scaled by a power of
    two, which changes no digit.

    *gmres* builds its iterate only at the end of a cycle, where the recorded residual is ``b - A x`` of that
    iterate. In between it has no iterate, but its definition fixes one: from start residual r, basis V and
    the products A V and M A V that SciPy took (kept while the clock stands), inner iteration k stands for
    ``y`` minimizing ``||M r - M A V_k y||``, and its true residual is ``r - A V_k y``. These least-squares
    problems are solved after the cycle from one QR factorization of M A V, without further products.
    That keeps two copies of the basis (three with M) for the length of a cycle.

    *Definiteness.* Every product also gives the sign of ``vᵀAv`` and ``rᵀMr``. SciPy's cg checks neither;
    the status says when M was caught indefinite. minres raises then, which ends the run with the iterations
    so far.

    Examples
    --------
    >>> import numpy as np
    >>> from linop_hess import krylov
    >>> record = krylov.run("cg", np.diag([1.0, 2.0, 3.0]), np.ones(3))
    >>> record.status, record.iterations, record.products_A
    ('converged', 3, 3)
    """
    A, b, M, x0 = check_system(A, b, M, x0)
    atol = check_atol(atol)
    options = check_options(solver, len(b), rtol, maxiter, restart, inner_m, SOLVERS)
    if recycled is not None:
        options.update(recycled.options(solver, len(b)))
    exponent = _exponent(b, x0)
    scaled, start = np.ldexp(b, -exponent), None if x0 is None else np.ldexp(x0, -exponent)
    size = norm(scaled) or 1.0
    with np.errstate(over="ignore"):
        absolute = float(np.ldexp(atol, -exponent))
    allowed = max(float(rtol), absolute / size)
    if solver != "minres":
        options["atol"] = absolute
    with _steps(progress, solver, options["maxiter"]) as step:
        stop_at = allowed if solver == "minres" and atol > 0.0 else -1.0
        observer = Observer(solver, A, scaled, M, start, step, stop_at)
        info, problem = _solve(observer, {"x0": start, "M": observer.M, "rtol": float(rtol), **options}, allowed)
    residuals = np.array(observer.residuals)
    with np.errstate(all="ignore"):
        x = np.ldexp(observer.x, exponent)
        returned = np.ldexp(x, -exponent)
    if not np.array_equal(returned, observer.x) and np.isfinite(observer.x).all():
        # Rounded where it is too small or too large for its dtype.
        residuals[-1] = relative_residual(A, returned, scaled) if np.isfinite(x).all() else math.nan
        if not np.isfinite(x).all():
            problem = f"the solution exceeds the range of {x.dtype}: scale b down"
    converged = bool(residuals[-1] <= SLACK * allowed) and problem is None
    return Record(
        name=solver if name is None else name,
        solver=solver,
        x=x,
        iterations=observer.iterations,
        products_A=observer.A.products,
        products_M=0 if observer.M is None else observer.M.products,
        seconds=observer.clock.seconds,
        info=None if info is None else int(info),
        residuals=residuals,
        converged=converged,
        status=problem or _status(solver, info, residuals, converged, observer),
        negative_curvature=observer.A.negative,
        negative_curvature_M=0 if observer.M is None else observer.M.negative,
        setup_seconds=float(setup_seconds),
        memory=_workspace(solver, len(b), b.dtype.itemsize, observer.iterations, options),
    )


def _solve(observer: Observer, keywords: dict[str, Any], allowed: float) -> tuple[int | None, str | None]:
    """Run SciPy's solver; return its exit code, and in words what ended it otherwise."""
    solver, info = observer.solver, None
    if math.isnan(observer.residuals[0]):
        return None, "breakdown: the product of A with x0 is not finite"
    if observer.residuals[0] <= observer.stop_at or not observer.b.size:
        return 0, None
    if solver == "gmres" and observer.residuals[0] < allowed and observer.b.any():
        return 0, None  # SciPy 1.12's does not look at where it starts, and divides by the residual there
    start = keywords.pop("x0")
    observer.clock.start()
    try:
        with np.errstate(all="ignore"):
            x, info = SOLVERS[solver](
                observer.A,
                observer.b.copy(),
                x0=None if start is None else start.copy(),
                callback=observer.callback,
                **keywords,
            )
            observer.clock.stop()
            observer.finish(x)
    except Breakdown as stop:
        return info, f"breakdown: {stop}"
    except Reached:
        return 0, None
    except (ValueError, RuntimeError, ArithmeticError) as error:
        if error is observer.foreign or not (words := _ending(observer, error)):
            raise
        return info, words
    finally:
        observer.clock.stop()
    return info, None


def _ending(observer: Observer, error: Exception) -> str:
    """What an error that SciPy raises says of the system; empty where nothing."""
    if observer.solver == "minres" and observer.M is not None and str(error) in _MINRES_INDEFINITE:
        return f"indefinite preconditioner: minres stopped after {observer.iterations} iterations; M must be positive definite"
    if observer.solver in ("lgmres", "gcrotmk") and "zero vector" in str(error):
        return "breakdown: M returned the zero vector"
    if isinstance(error, ArithmeticError):
        return f"breakdown: {error} in {observer.solver}"
    return ""


def _exponent(b: np.ndarray, x0: np.ndarray | None) -> int:
    """The power of two by which b is divided: 0 unless squares of its entries, or of what is left of them, leave the range of its dtype."""
    largest = float(np.abs(b).max(initial=0.0))
    comfortable = 1e15 if b.dtype.itemsize == 4 else 1e120
    if largest == 0.0 or 1.0 / comfortable < largest < comfortable:
        return 0
    exponent = math.frexp(largest)[1]
    if x0 is not None:
        with np.errstate(all="ignore"):
            moved = np.ldexp(x0, -exponent)
            if not np.array_equal(np.ldexp(moved, exponent), x0):
                return 0
    return exponent


@contextmanager
def _steps(
    progress: bool | Callable[[int], None] | None, solver: str, maxiter: int
) -> Iterator[Callable[[int], None] | None]:
    """What to call after each iteration."""
    if progress is None or callable(progress):
        yield progress
        return
    if not isinstance(progress, bool | np.bool_):
        raise TypeError(
            f"expected progress to be a bool or callable, got {type(progress).__name__}: pass True or leave it out"
        )
    if not progress:
        yield None
        return
    try:
        from tqdm import tqdm
    except ImportError:
        raise ImportError(
            "expected tqdm for progress=True, got no such package: run `python -m pip install tqdm`, or leave progress out"
        ) from None
    with tqdm(desc=solver, total=maxiter, unit="it", disable=None) as bar:
        yield lambda done: bar.update(done - bar.n)


def direct(
    solve: Callable[[np.ndarray], np.ndarray],
    A: Any,
    b: np.ndarray,
    *,
    rtol: float = 1e-8,
    atol: float = 0.0,
    name: str = "direct",
    setup_seconds: float = 0.0,
    memory: int | None = None,
) -> Record:
    """Time one direct solve and judge it by the true residual, as `run` does for an iterative one.

    Parameters
    ----------
    solve : callable
        Takes b, returns x, both of shape (N,).
    A : LinearOperator, ndarray or sparse array, shape (N, N)
        The matrix that judges x; it need not be what `solve` was made from.
    b : ndarray, shape (N,)
        The right-hand side.
    rtol, atol : float
        `converged` means a true residual of at most ``1.1 * max(rtol ||b||, atol)``.
    name, setup_seconds, memory
        Copied into the record.

    Returns
    -------
    Record
        With ``solver="direct"``, no iterations, and ``residuals`` of one entry.

    Raises
    ------
    TypeError
        If A or b is complex.
    ValueError
        For wrong shapes, that of what `solve` returns included, NaN or Inf.
    """
    A, b, _, _ = check_system(A, b, None, None)
    allowed = max(check_rtol(rtol), check_atol(atol) / (norm(b) or 1.0))
    begin = time.perf_counter()
    x = np.asarray(solve(b.copy()))
    seconds = time.perf_counter() - begin
    if x.shape != b.shape:
        raise ValueError(f"expected solve(b) of shape {b.shape}, got {x.shape}: return one vector")
    residual = relative_residual(A, x, b) if np.isfinite(x).all() else math.nan
    converged = residual <= SLACK * allowed
    status = "converged" if converged else f"not solved: the true residual is {residual:.1e}"
    return Record(
        name, "direct", x, 0, 0, 0, seconds, None, np.array([residual]), converged, status,
        setup_seconds=float(setup_seconds), memory=memory,
    )  # fmt: skip


def _status(solver: str, info: int | None, residuals: np.ndarray, converged: bool, observer: Observer) -> str:
    """Say in one line how a run ended that raised nothing."""
    last = residuals[-1]
    indefinite_M = solver in ("cg", "minres") and observer.M is not None and observer.M.negative > 0
    if converged:
        return "converged, although M is indefinite" if indefinite_M else "converged"
    if indefinite_M and observer.M is not None:
        seen = f"rᵀMr < 0 in {observer.M.negative} of {observer.M.products} products"
        return f"indefinite preconditioner ({seen}): the true residual is {last:.1e}"
    if info == 0:
        return f"SciPy reports success but the true residual is {last:.1e}"
    if info is not None and info < 0:
        return f"breakdown: {solver} returned {info}, the true residual is {last:.1e}"
    why = ""
    if solver == "cg" and observer.A.negative:
        why = f" (A is indefinite: vᵀAv < 0 in {observer.A.negative} of {observer.A.products} products)"
    if last > residuals[0]:
        word = "diverged"
    elif last > 0.1 * residuals[len(residuals) // 2]:
        word = "stalled"
    else:
        word = "iteration limit reached"
    return f"{word} at {last:.1e}{why}"


def _workspace(solver: str, n: int, itemsize: int, iterations: int, options: dict[str, Any]) -> int:
    """Return the bytes of the vectors of length n that SciPy's solver keeps, b among them."""
    vectors = {"cg": 6, "minres": 10, "bicgstab": 10}.get(solver, 0)
    if solver == "gmres":
        vectors = 5 + min(options["restart"] + 1, iterations + 1)
    elif solver == "gcrotmk":
        vectors = 5 + 3 * options.get("m", 20) + 2 * options.get("k", options.get("m", 20))
    elif solver == "lgmres":
        vectors = 5 + 2 * (options.get("inner_m", 30) + 3)
    return vectors * n * itemsize
