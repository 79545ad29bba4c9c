"""What `linop_hess.krylov.run` is given: checked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
from scipy.sparse.linalg import LinearOperator, aslinearoperator

from linop_hess._validate import finite_real, whole

SolverName = Literal["cg", "minres", "gmres", "lgmres", "bicgstab", "gcrotmk"]
"""The Krylov solvers of SciPy that may be asked for."""


def check_system(
    A: Any, b: Any, M: Any, x0: Any
) -> tuple[LinearOperator, np.ndarray, LinearOperator | None, np.ndarray | None]:
    """Return A and M as operators and b and x0 as float vectors, or raise.

    Raises
    ------
    ValueError, TypeError
        If one of them is not usable, or M has another shape than A.
    """
    A = check_operator("A", A)
    b = check_vector("b", b, A)
    M = None if M is None else check_operator("M", M)
    if M is not None and M.shape != A.shape:
        raise ValueError(f"expected M of A's shape {A.shape}, got {M.shape}: M approximates the inverse of A")
    return A, b, M, None if x0 is None else check_vector("x0", x0, A).astype(b.dtype)


def check_operator(name: str, operand: Any) -> LinearOperator:
    """Return a square real matrix as an operator, or raise.

    Raises
    ------
    TypeError
        If it is complex.
    ValueError
        If its shape is another, or a vector holds NaN or Inf.
    """
    base = aslinearoperator(operand)
    if len(base.shape) != 2 or base.shape[0] != base.shape[1]:
        raise ValueError(f"expected a square {name}, got shape {base.shape}: pass one with as many rows as columns")
    if np.issubdtype(base.dtype, np.complexfloating):
        raise TypeError(f"expected a real {name}, got {base.dtype}: complex systems are not supported")
    return base


def check_vector(name: str, vector: Any, A: LinearOperator) -> np.ndarray:
    """Return a real, finite vector of A's length as floats, or raise.

    Raises
    ------
    TypeError
        If it is complex.
    ValueError
        If its shape is another, or a vector holds NaN or Inf.
    """
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


def check_rtol(rtol: float) -> float:
    """Return a positive tolerance, or raise.

    Raises
    ------
    ValueError
        If it is not.
    """
    if finite_real(rtol, "rtol") <= 0:
        raise ValueError(f"expected a positive rtol, got {rtol}: pass one such as 1e-8")
    return float(rtol)


def check_atol(atol: float) -> float:
    """Return a tolerance of at least zero, or raise.

    Raises
    ------
    ValueError
        If it is not.
    """
    if finite_real(atol, "atol") < 0:
        raise ValueError(f"expected an atol of at least zero, got {atol}: pass 0.0 or a bound on ||b - A x||")
    return float(atol)


def check_options(
    solver: str, n: int, rtol: float, maxiter: int, restart: int | None, inner_m: int | None, solvers: Iterable[str]
) -> dict[str, Any]:
    """Return the keywords SciPy's solver takes besides the system and the tolerance, or raise.

    Raises
    ------
    ValueError, TypeError
        If a solver or an option is not known, or an option belongs to another solver.
    """
    if solver not in solvers:
        raise ValueError(f"expected a solver of {', '.join(solvers)}, got {solver!r}: choose one of them")
    check_rtol(rtol)
    options: dict[str, Any] = {"maxiter": whole(maxiter, "maxiter", least=1)}
    for key, value, owners in (("restart", restart, ("gmres", "gcrotmk")), ("inner_m", inner_m, ("lgmres",))):
        if value is None:
            continue
        if solver not in owners:
            owner = " and ".join(owners)
            raise ValueError(f"expected no {key} for {solver}, got {value!r}, an option of {owner}: leave it out")
        options["m" if solver == "gcrotmk" else key] = whole(value, key, least=1)
    if solver == "gmres":
        # "legacy" is the mode that counts maxiter in inner iterations and reports each of them.
        options["callback_type"] = "legacy"
        options["restart"] = max(1, min(options.get("restart", 20), options["maxiter"], n))
    return options
