"""SciPy's Krylov solvers, run with a record of the true residual after every iteration.

The solvers are SciPy's own code. This module wraps A and M to count their products, listens to the solver's
callback, and stops the clock while it measures. ``info == 0`` is not taken at its word: minres on an
ill-conditioned system returns it at a true residual near one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse.linalg as spla
from scipy.sparse.linalg import LinearOperator, aslinearoperator

from linop_hess._validate import finite_real, whole
from linop_hess.krylov.observer import Breakdown, Observer, relative_norm
from linop_hess.krylov.record import Comparison, Record, compare

__all__ = ["SOLVERS", "Comparison", "Record", "compare", "direct", "run"]

SOLVERS: dict[str, Callable[..., Any]] = {
    "cg": spla.cg,
    "minres": spla.minres,
    "gmres": spla.gmres,
    "lgmres": spla.lgmres,
    "bicgstab": spla.bicgstab,
}
# A solver that stops by its recurrence leaves the true residual a rounding error above its tolerance.
SLACK = 1.1
_MINRES_INDEFINITE = ("indefinite preconditioner", "non-symmetric matrix")


def run(
    solver: str,
    A: Any,
    b: np.ndarray,
    M: Any = None,
    x0: np.ndarray | None = None,
    *,
    rtol: float = 1e-8,
    maxiter: int = 1000,
    restart: int | None = None,
    inner_m: int | None = None,
    name: str | None = None,
    setup_seconds: float = 0.0,
    progress: Callable[[int], None] | None = None,
) -> Record:
    """Solve ``A x = b`` with one of SciPy's Krylov solvers and record how it went.

    Parameters
    ----------
    solver : {"cg", "minres", "gmres", "lgmres", "bicgstab"}
        The function of `scipy.sparse.linalg` to call.
    A : LinearOperator, ndarray or sparse array, shape (N, N)
        The real matrix; symmetric for minres, symmetric positive definite for cg.
    b : ndarray, shape (N,) or (N, 1)
        The right-hand side.
    M : LinearOperator, ndarray or sparse array, shape (N, N), optional
        An approximation of A's *inverse*; positive definite for cg and minres.
    x0 : ndarray, shape (N,), optional
        The start; zero by default.
    rtol : float
        The tolerance given to SciPy. ``converged`` means that the true residual ends at or below
        ``1.1 * rtol``; the 10 % is for rounding in the solver's own, updated, residual. minres tests
        ``||r|| <= rtol ||A|| ||x||`` instead and so often stops before the true residual is there.
    maxiter : int
        The most iterations. cg, minres: one product with A each. bicgstab: two. gmres: an *inner*
        iteration, one product each, whatever `restart`. lgmres: an outer cycle of about `inner_m` products,
        because SciPy shows none of its inner ones.
    restart : int, optional
        gmres only: its cycle length. SciPy's default is 20; ``restart=maxiter`` never restarts.
    inner_m : int, optional
        lgmres only: its inner iterations a cycle. SciPy's default is 30.
    name : str, optional
        The record's label; the solver's name by default.
    setup_seconds : float
        Copied into the record, for the time it took to make M.
    progress : callable, optional
        Called with the number of iterations done, off the clock.

    Returns
    -------
    Record
        ``residuals[k]`` is the true relative residual after k iterations.

    Raises
    ------
    TypeError
        If anything is complex, or `maxiter` is not an integer.
    ValueError
        For an unknown solver, wrong shapes, NaN or Inf, ``rtol <= 0``, ``maxiter < 1``, or an option that
        belongs to another solver.

    Notes
    -----
    *What is timed.* `seconds` covers SciPy's code and its products with A and M. The residual ``b - A x``
    is formed in the callback with the clock stopped, and its product is not counted.

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
    A, b, M, x0 = _check_system(A, b, M, x0)
    options = _check_options(solver, len(b), rtol, maxiter, restart, inner_m)
    observer = Observer(solver, A, b, M, x0, progress)
    keywords = {"x0": None if x0 is None else x0.copy(), "M": observer.M, "rtol": float(rtol), **options}
    info: int | None = None
    problem = None
    observer.clock.start()
    try:
        with np.errstate(all="ignore"):
            x, info = SOLVERS[solver](observer.A, b.copy(), callback=observer.callback, **keywords)
        observer.clock.stop()
        observer.finish(x)
    except Breakdown as stop:
        observer.clock.stop()
        problem = f"breakdown: {stop}"
    except ValueError as error:
        observer.clock.stop()
        if solver != "minres" or M is None or str(error) not in _MINRES_INDEFINITE:
            raise
        problem = (
            f"indefinite preconditioner: minres stopped after {observer.iterations} iterations; "
            "M must be positive definite"
        )
    except RuntimeError as error:
        observer.clock.stop()
        if solver != "lgmres" or "zero vector" not in str(error):
            raise
        problem = "breakdown: M returned the zero vector"
    residuals = np.array(observer.residuals)
    converged = bool(residuals[-1] <= SLACK * rtol)
    return Record(
        name=solver if name is None else name,
        solver=solver,
        x=observer.x,
        iterations=observer.iterations,
        products_A=observer.A.products,
        products_M=0 if observer.M is None else observer.M.products,
        seconds=observer.clock.seconds,
        info=None if info is None else int(info),
        residuals=residuals,
        converged=converged and problem is None,
        status=problem or _status(solver, info, residuals, converged, observer),
        negative_curvature=observer.A.negative,
        negative_curvature_M=0 if observer.M is None else observer.M.negative,
        setup_seconds=float(setup_seconds),
        memory=_workspace(solver, len(b), b.dtype.itemsize, observer.iterations, options),
    )


def direct(
    solve: Callable[[np.ndarray], np.ndarray],
    A: Any,
    b: np.ndarray,
    *,
    rtol: float = 1e-8,
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
    rtol : float
        `converged` means a true residual of at most ``1.1 * rtol``.
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
    A, b, _, _ = _check_system(A, b, None, None)
    begin = time.perf_counter()
    x = np.asarray(solve(b.copy()))
    seconds = time.perf_counter() - begin
    if x.shape != b.shape:
        raise ValueError(f"expected solve(b) of shape {b.shape}, got {x.shape}: return one vector")
    residual = relative_norm(b - A.matvec(x), b) if np.isfinite(x).all() else math.nan
    converged = residual <= SLACK * rtol
    status = "converged" if converged else f"not solved: the true residual is {residual:.1e}"
    return Record(
        name, "direct", x, 0, 0, 0, seconds, None, np.array([residual]), converged, status,
        setup_seconds=float(setup_seconds), memory=memory,
    )  # fmt: skip


def _check_system(
    A: Any, b: Any, M: Any, x0: Any
) -> tuple[LinearOperator, np.ndarray, LinearOperator | None, np.ndarray | None]:
    """Return A and M as operators and b and x0 as float vectors, or raise."""
    A = _check_operator("A", A)
    b = _check_vector("b", b, A)
    M = None if M is None else _check_operator("M", M)
    if M is not None and M.shape != A.shape:
        raise ValueError(f"expected M of A's shape {A.shape}, got {M.shape}: M approximates the inverse of A")
    return A, b, M, None if x0 is None else _check_vector("x0", x0, A).astype(b.dtype)


def _check_operator(name: str, operand: Any) -> LinearOperator:
    base = aslinearoperator(operand)
    if len(base.shape) != 2 or base.shape[0] != base.shape[1]:
        raise ValueError(f"expected a square {name}, got shape {base.shape}: pass one with as many rows as columns")
    if np.issubdtype(base.dtype, np.complexfloating):
        raise TypeError(f"expected a real {name}, got {base.dtype}: complex systems are not supported")
    return base


def _check_vector(name: str, vector: Any, A: LinearOperator) -> np.ndarray:
    array = np.asarray(vector)
    n = A.shape[0]
    if array.shape not in ((n,), (n, 1)):
        raise ValueError(f"expected {name} of shape ({n},) or ({n}, 1) for this A, got {array.shape}: reshape it")
    if np.issubdtype(array.dtype, np.complexfloating):
        raise TypeError(f"expected a real {name}, got {array.dtype}: solve for its two parts apart")
    if not np.issubdtype(array.dtype, np.floating):
        array = array.astype(A.dtype if np.issubdtype(A.dtype, np.floating) else np.float64)
    if not np.isfinite(array).all():
        count = np.count_nonzero(~np.isfinite(array))
        raise ValueError(f"expected a finite {name}, got {count} NaN or Inf entries: find where they arise")
    return array.reshape(n)


def _check_options(
    solver: str, n: int, rtol: float, maxiter: int, restart: int | None, inner_m: int | None
) -> dict[str, Any]:
    """Return the keywords SciPy's solver takes besides the system and the tolerance, or raise."""
    if solver not in SOLVERS:
        raise ValueError(f"expected a solver of {', '.join(SOLVERS)}, got {solver!r}: choose one of them")
    if finite_real(rtol, "rtol") <= 0:
        raise ValueError(f"expected a positive rtol, got {rtol}: pass one such as 1e-8")
    options: dict[str, Any] = {"maxiter": whole(maxiter, "maxiter", least=1)}
    for key, value, owner in (("restart", restart, "gmres"), ("inner_m", inner_m, "lgmres")):
        if value is None:
            continue
        if solver != owner:
            raise ValueError(f"expected no {key} for {solver}, got {value!r}, an option of {owner}: leave it out")
        options[key] = whole(value, key, least=1)
    if solver != "minres":
        options["atol"] = 0.0
    if solver == "gmres":
        # "legacy" is the mode that counts maxiter in inner iterations and reports each of them.
        options["callback_type"] = "legacy"
        options["restart"] = min(options.get("restart", 20), options["maxiter"], n)
    return options


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
    elif solver == "lgmres":
        vectors = 5 + 2 * (options.get("inner_m", 30) + 3)
    return vectors * n * itemsize
