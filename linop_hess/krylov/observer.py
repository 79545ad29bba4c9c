"""How `linop_hess.krylov` watches SciPy's solvers: counted products, a clock that halts, true residuals."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from scipy.linalg import solve_triangular
from scipy.sparse.linalg import LinearOperator

from linop_hess.krylov.checks import SolverName


def norm(v: np.ndarray) -> float:
    """Return ``||v||``, whose squares neither under- nor overflow."""
    v = np.asarray(v, dtype=np.float64)
    largest = float(np.abs(v).max(initial=0.0))
    if not 0.0 < largest < math.inf:
        return largest
    return largest * float(np.linalg.norm(v / largest))


def relative_norm(r: np.ndarray, b: np.ndarray) -> float:
    """Return ``||r|| / ||b||``, or ``||r||`` if b = 0."""
    scale = float(np.abs(b).max(initial=0.0))
    if scale == 0.0:
        return norm(r)
    # A denormal b has no reciprocal: divide both.
    return norm(np.asarray(r, dtype=np.float64) / scale) / norm(np.asarray(b, dtype=np.float64) / scale)


def relative_residual(A: LinearOperator, x: np.ndarray, b: np.ndarray) -> float:
    """Return ``||b - A x|| / ||b||`` of a finite x, or ``||A x||`` if b = 0; NaN where it cannot be computed."""
    with np.errstate(all="ignore"):
        product = np.asarray(A.matvec(x.copy()), dtype=np.float64)
        return relative_norm(b - product, b) if np.isfinite(product).all() else math.nan


class Breakdown(Exception):
    """Ends a solver that has left the finite numbers."""


class Reached(Exception):
    """Ends a solver that knows no ``atol`` where the true residual meets it."""


class _Clock:
    """A stopwatch that can be halted inside the timed call."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since: float | None = None

    def start(self) -> None:
        self._since = time.perf_counter()

    def stop(self) -> None:
        if self._since is not None:
            self.seconds += time.perf_counter() - self._since
        self._since = None

    @contextmanager
    def halted(self) -> Iterator[None]:
        self.stop()
        try:
            yield
        finally:
            self.start()


class _Counted(LinearOperator):
    """An operator that counts its products and their negative quadratic forms."""

    def __init__(self, name: str, base: LinearOperator, observer: Observer, seen: Callable[..., None]) -> None:
        super().__init__(base.dtype, base.shape)
        self._name, self._base, self._observer, self._seen = name, base, observer, seen
        self.products = 0
        self.negative = 0

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        with self._observer.clock.halted():
            if not np.isfinite(x).all():
                after = f"after {self._observer.iterations} iterations"
                raise Breakdown(f"{self._observer.solver}'s vectors are not finite {after}")
        try:
            y = self._base.matvec(x)
        except Exception as error:
            self._observer.foreign = error
            raise
        with self._observer.clock.halted():
            self.products += 1
            # SciPy's solvers keep products and write into them, and products are taken for the record in between: an operator may return
            # its operand, or one buffer time and again.
            y = np.array(y)
            if not np.isfinite(y).all():
                raise Breakdown(f"product {self.products} with {self._name} is not finite")
            form = float(np.dot(x.ravel(), y.ravel()))
            floor = float(np.finfo(y.dtype).eps) if np.issubdtype(y.dtype, np.floating) else 0.0
            self.negative += form < -floor * norm(x) * norm(y)
            self._seen(x, y)
        return y

    def _adjoint(self) -> LinearOperator:
        return self._base.adjoint()


class Observer:
    """Follows one run: the operators it is given, its callback, its true residuals."""

    def __init__(
        self,
        solver: SolverName,
        A: LinearOperator,
        b: np.ndarray,
        M: LinearOperator | None,
        x0: np.ndarray | None,
        progress: Callable[[int], None] | None,
        stop_at: float = 0.0,
    ) -> None:
        self.solver = solver
        self.clock = _Clock()
        self.base, self.b, self.progress = A, b, progress
        self.x = np.zeros_like(b) if x0 is None else x0.copy()
        self.stop_at = stop_at
        self.foreign: Exception | None = None
        self.residuals = [relative_norm(b, b) if x0 is None else relative_residual(A, x0, b)]
        self.cycle = _Cycle(b, preconditioned=M is not None) if solver == "gmres" else None
        self.A = _Counted("A", A, self, self._seen_A)
        self.M = None if M is None else _Counted("M", M, self, self._seen_M)
        self._announced = 0

    @property
    def iterations(self) -> int:
        return len(self.residuals) - 1

    def callback(self, state: Any) -> None:
        """SciPy's callback: an iterate, or for gmres a norm that only marks an inner iteration.

        Raises
        ------
        Reached
            Where the true residual meets an ``atol`` that the solver does not know.
        """
        with self.clock.halted():
            self._announced += 1
            if self.cycle is not None:
                self.cycle.mark()
            elif self.solver not in ("lgmres", "gcrotmk") or self._announced > 1:  # these also announce their start
                self._append(state)
            if self.progress is not None:
                self.progress(self._announced)
            if self.residuals[-1] <= self.stop_at:
                raise Reached

    def finish(self, x: np.ndarray) -> None:
        """Take the returned x, which bicgstab and lgmres may not have announced, and gmres may not have multiplied."""
        x = np.asarray(x).reshape(self.b.shape)
        if self.cycle is not None:
            self._close_cycle()
        if np.array_equal(x, self.x):
            return
        self._append(x)
        # SciPy answers b = 0 by x = 0 before any iteration, and gmres has counted the iteration already.
        if self._announced == 0 or self.cycle is not None:
            del self.residuals[-2]

    def _append(self, x: np.ndarray) -> None:
        x = np.array(x).reshape(self.b.shape)  # a copy: cg's x is live
        residual = relative_residual(self.base, x, self.b) if np.isfinite(x).all() else math.nan
        if math.isnan(residual):
            raise Breakdown(f"iterate {self.iterations + 1}, or its product with A, is not finite")
        self.x = x
        self.residuals.append(residual)

    def _seen_A(self, x: np.ndarray, y: np.ndarray) -> None:
        if self.cycle is not None:
            self._close_cycle()
            self.cycle.product_A(x, y)

    def _seen_M(self, _: np.ndarray, y: np.ndarray) -> None:
        if self.cycle is not None:
            self.cycle.product_M(y)

    def _close_cycle(self) -> None:
        """End gmres's cycle if its last product was no inner one: then it was A times the new iterate."""
        assert self.cycle is not None
        if self.cycle.pending is None:
            return
        self.x, Ax = self.cycle.pending
        inner = self.cycle.residual_norms()
        self.cycle.restart_from(self.b - Ax)
        if inner:
            scale = norm(self.b) or 1.0
            self.residuals += [size / scale for size in inner[:-1]] + [relative_norm(self.b - Ax, self.b)]


class _Cycle:
    """The vectors of one gmres cycle, as seen through the products it takes."""

    def __init__(self, b: np.ndarray, *, preconditioned: bool) -> None:
        self.preconditioned = preconditioned
        self.last_M = b
        self.pending: tuple[np.ndarray, np.ndarray] | None = None
        self.restart_from(b)

    def restart_from(self, r: np.ndarray) -> None:
        self.r, self.z, self.pending = r.copy(), r, None
        self.AV: list[np.ndarray] = []
        self.MAV: list[np.ndarray] = []

    def product_A(self, v: np.ndarray, Av: np.ndarray) -> None:
        if not self.AV:
            self.z = self.last_M if self.preconditioned else self.r
        self.pending = v.copy(), Av.copy()

    def product_M(self, z: np.ndarray) -> None:
        self.last_M = z.copy()

    def mark(self) -> None:
        """Count the last product with A as an inner iteration."""
        assert self.pending is not None
        self.AV.append(self.pending[1])
        if self.preconditioned:
            self.MAV.append(self.last_M)
        self.pending = None

    def residual_norms(self) -> list[float]:
        """Return ``||r - A V_k y_k||`` for every k, ``y_k`` minimizing ``||M r - M A V_k y||``."""
        if not self.AV:
            return []
        AV = np.stack(self.AV, axis=1)
        W = np.stack(self.MAV, axis=1) if self.preconditioned else AV
        if not np.isfinite(W).all():
            return [math.nan] * AV.shape[1]
        Q, R = np.linalg.qr(W)
        c = Q.T @ self.z
        k = len(R)
        lost = np.abs(np.diag(R)) <= np.finfo(R.dtype).eps * np.abs(np.diag(R)).max()
        R[lost, lost] = 1.0  # a direction that adds nothing gets a zero coefficient, as in SciPy
        c[:k][lost] = 0.0
        Y = solve_triangular(R, np.triu(np.repeat(c[:k, None], AV.shape[1], axis=1)))
        norms: list[float] = []
        for j in range(0, AV.shape[1], 256):
            norms += map(norm, (self.r[:, None] - AV @ Y[:, j : j + 256]).T)
        return norms
