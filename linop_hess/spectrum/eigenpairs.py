"""Eigenpairs of a chain's Hessian near a shift: inside the spectrum too, each with its residual, their number verified by inertia."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, LinearOperator
from scipy.sparse.linalg import eigsh as arpack

from linop_hess._validate import finite_real
from linop_hess.errors import FactorizationError
from linop_hess.lq.accuracy import NUDGE
from linop_hess.lq.analysis import Analysis
from linop_hess.lq.inverse.counting import count_up_to
from linop_hess.operators.dense import to_dense
from linop_hess.operators.inverse import HessianInverse
from linop_hess.operators.pieces import ChainHessian
from linop_hess.spectrum.extremes import NULL, HasSpectrum, analysis_of, negatives, nullity

# Up to this order LAPACK's dense solver is as fast, and finds all.
_SMALL = 300

# Lanczos runs, and ARPACK's restarts in each, before what was found is all that is returned.
_ROUNDS = 12
_TIE = 2e-8  # eigenvalues that differ in distance by less than this times ‖H‖ are equally near
_RESTARTS = 40


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenpairs of H near a shift.

    Attributes
    ----------
    values : ndarray, shape (k,)
        Ascending.
    vectors : ndarray, shape (N, k)
        Orthonormal.
    residuals : ndarray, shape (k,)
        ‖Hv − λv‖ of each pair: some eigenvalue lies no farther from λ than that.
    sigma : float
        The shift used: the one asked for, 0 if that is within 1e-7‖H‖ of it, or, where an eigenvalue is within 1e-8‖H‖, one 1e-7‖H‖
        beside it.
    norm : float
        ‖H‖, estimated from below.
    nullity : int
        Number of eigenvalues up to 1e-7‖H‖ in size.
    missing : tuple of (float, float, int)
        Intervals (a, b] nearer the shift than the farthest value that hold more eigenvalues than found there, by inertia, and how many
        more. Of equally far eigenvalues, the null space among them, only as many as `k` asks for are found, and the others not called
        missing.
    """

    values: np.ndarray
    vectors: np.ndarray
    residuals: np.ndarray
    sigma: float
    norm: float
    nullity: int
    missing: tuple[tuple[float, float, int], ...]

    def __str__(self) -> str:
        """Return the pairs as a table."""
        lines = [f"{'eigenvalue':>24}  residual / ‖H‖"]
        scale = self.norm or 1.0
        lines += [f"{v:>24.15e}  {r / scale:.1e}" for v, r in zip(self.values, self.residuals, strict=True)]
        lines.append(f"of the null space: {self._of_null_space()} of {self.nullity}")
        lines += [f"missing: {count} in ({a:.6e}, {b:.6e}]" for a, b, count in self.missing]
        return "\n".join(lines) if self.missing else "\n".join([*lines, "none missing, by inertia"])

    def _of_null_space(self) -> int:
        return int((np.abs(self.values) <= NULL * self.norm).sum())


def eigsh(lin: HasSpectrum, k: int = 6, sigma: float = 0.0, *, tolerance: float = 1e-8, seed: int = 0) -> Eigenpairs:
    """Find the k eigenvalues of H nearest `sigma`, by shift-invert Lanczos (ARPACK) with the exact inverse.

    What Lanczos misses (it sees one vector of each eigenspace) inertia tells; it is then started again, orthogonal to what is found.

    Parameters
    ----------
    lin : Linearization or GaussNewtonLinearization
    k : int
        1 ≤ k < N.
    sigma : float
    tolerance : float
        Every residual ‖Hv − λv‖ must be below this times ‖H‖.
    seed : int
        Of the start vectors.

    Returns
    -------
    Eigenpairs

    Raises
    ------
    ValueError, TypeError
        If k, sigma or tolerance is not usable.
    ArithmeticError
        If a residual exceeds its bound, or Lanczos finds fewer than k pairs.
    FactorizationError
        If H − σI can be factored neither at `sigma` nor 1e-7‖H‖ beside it.

    Notes
    -----
    Computed in float64 whatever the precision of the model.
    """
    analysis = analysis_of(lin)
    N = analysis.problem.size
    _check_k(k, N)
    shift, tolerance = finite_real(sigma, "sigma"), finite_real(tolerance, "tolerance")
    if not tolerance > 0.0:
        raise ValueError(f"tolerance must be positive, got {tolerance!r}")
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise TypeError(f"seed must be an integer of at least 0, got {seed!r}")
    if analysis.norm == 0.0:
        return Eigenpairs(np.zeros(k), np.eye(N, k), np.zeros(k), shift, 0.0, N, ())
    shift = 0.0 if abs(shift) <= NULL * analysis.norm else shift
    finder = _Finder(analysis, shift, np.random.default_rng(seed))
    pairs = finder.small(k) if N <= _SMALL else finder.lanczos(k)
    bound = tolerance * analysis.norm
    if pairs.residuals.size < k or not (pairs.residuals <= bound).all():
        raise ArithmeticError(
            f"found {pairs.residuals.size} of {k} eigenpairs near {sigma:g}, the largest residual "
            f"{pairs.residuals.max(initial=0.0):.1e} against {bound:.1e}; move sigma, or raise the tolerance"
        )
    return pairs


def _check_k(k: int, N: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int | np.integer):
        raise TypeError(f"k must be an integer, got {k!r}")
    if not 1 <= k < N:
        raise ValueError(f"k must be from 1 to N - 1 = {N - 1}, got {k}; for all eigenvalues use numpy.linalg.eigvalsh")


def _shifted(analysis: Analysis, sigma: float) -> tuple[HessianInverse, float]:
    """(H − σI)⁻¹, at a σ moved by `NUDGE`·‖H‖ where an eigenvalue is so close that others would be lost in rounding."""
    probe = np.random.default_rng(0).standard_normal(analysis.problem.size)
    margin, nudge = 0.1 * NUDGE * analysis.norm, NUDGE * analysis.norm
    for moved in (sigma, sigma + nudge, sigma - nudge):
        if negatives(analysis, moved - margin) < negatives(analysis, moved + margin):
            continue
        try:
            inverse = HessianInverse(analysis, -moved)
            inverse.solve(probe)
            return inverse, moved
        except FactorizationError:
            continue
    return HessianInverse(analysis, -(sigma + nudge)), sigma + nudge


class _Finder:
    """Collects eigenpairs near σ until inertia agrees."""

    def __init__(self, analysis: Analysis, sigma: float, rng: np.random.Generator) -> None:
        self.analysis, self.sigma, self.rng = analysis, sigma, rng
        self.H = ChainHessian(analysis.problem)
        self.norm = analysis.norm
        self.vectors = np.zeros((analysis.problem.size, 0))
        self.values = np.zeros(0)

    def small(self, k: int) -> Eigenpairs:
        """All eigenpairs by LAPACK, the k nearest of them."""
        dense = to_dense(self.H)
        self.values, self.vectors = np.linalg.eigh((dense + dense.T) / 2)
        return self._nearest(k, int((np.abs(self.values) <= NULL * self.norm).sum()), ())

    def lanczos(self, k: int) -> Eigenpairs:
        """Lanczos, started again as long as inertia tells of more."""
        zeros = nullity(self.analysis)
        if self.sigma == 0.0:
            self._add_null_vectors(k, zeros)
            if self.values.size >= k:
                return self._nearest(k, zeros, ())
        self.inverse, self.sigma = _shifted(self.analysis, self.sigma)
        missing: tuple[tuple[float, float, int], ...] = ()
        wanted = k
        for _ in range(_ROUNDS):
            before = self.values.size
            self._more(wanted)
            self._add_null_vectors(k, zeros)
            missing = self._missing(k)
            found = sum(count for _, _, count in missing) + max(k - self.values.size, 0)
            if not found or self.values.size == before:
                break
            wanted = min(found, k)
        return self._nearest(k, zeros, missing)

    def _more(self, count: int) -> None:
        """Add up to `count` eigenpairs orthogonal to those found."""
        V, N = self.vectors, self.analysis.problem.size

        def project(x: np.ndarray) -> np.ndarray:
            return x - V @ (V.T @ x)

        deflated = LinearOperator(
            (N, N), matvec=lambda x: self.norm * project(self.inverse @ project(x)), dtype=np.float64
        )  # in terms of ‖H‖, since ARPACK takes what is smaller than 4e-11 for zero
        count = min(count, N - 1 - V.shape[1])
        new = np.zeros((N, 0))
        for wider in (0, 40):  # a start vector may lie in a small invariant subspace
            if count < 1:
                return
            ncv = min(N, max(2 * count + 1, 20) + wider)
            start = project(self.rng.standard_normal(N))
            try:
                _, new = arpack(deflated, k=count, which="LM", v0=start, ncv=ncv, maxiter=_RESTARTS)
                break
            except ArpackNoConvergence as error:
                new = error.eigenvectors
                break
            except ArpackError:
                continue
            except FactorizationError:
                self.sigma += NUDGE * self.norm
                self.inverse = HessianInverse(self.analysis, -self.sigma)
        self._add(new)

    def _add_null_vectors(self, k: int, zeros: int) -> None:
        """Add vectors of the null space, of which Lanczos finds few, if it is among the k nearest.

        (τ(H + τI)⁻¹)³ takes what belongs to λ down by (τ/λ)³, so that Hv is below τ whatever lies close to zero.
        """
        null = NULL * self.norm
        nearer = int((np.abs(self.values - self.sigma) < abs(self.sigma) - null).sum())
        wanted = min(zeros, k - nearer) - int((np.abs(self.values) <= null).sum())
        if wanted < 1:
            return
        tau = 1e-2 * null
        new = self.rng.standard_normal((self.analysis.problem.size, wanted))
        try:
            inverse = HessianInverse(self.analysis, tau)
            for _ in range(3):
                new = tau * (inverse @ (new - self.vectors @ (self.vectors.T @ new)))
        except FactorizationError:
            return
        self._add(new)

    def _add(self, new: np.ndarray) -> None:
        """Take in new directions: the Ritz pairs of H, whose products the inverse never made, that are eigenpairs."""
        V = self.vectors
        for _ in range(2):  # twice is enough for orthogonality
            new, _ = np.linalg.qr(new - V @ (V.T @ new))
        both = np.concatenate([V, new], 1)
        values, turn = np.linalg.eigh(both.T @ (self.H @ both))
        vectors = both @ turn
        good = self._residuals(values, vectors) <= 1e-6 * self.norm
        self.values, self.vectors = values[good], vectors[:, good]

    def _residuals(self, values: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        return np.linalg.norm(self.H @ vectors - vectors * values, axis=0)

    def _missing(self, k: int) -> tuple[tuple[float, float, int], ...]:
        """Intervals nearer than the k-th nearest value found with more eigenvalues than found."""
        nearest = np.sort(np.abs(self.values - self.sigma))[:k]
        null = NULL * self.norm
        # Of those as far as the last one any will do.
        reach = nearest[-1] - _TIE * self.norm if nearest.size else 0.0
        if reach <= 0.0:
            return ()
        a, b = self.sigma - reach, self.sigma + reach
        if a < -null and b > null:
            parts = [(a, -null), (-null, null), (null, b)]
        elif b > null >= a:
            # The null space reaches the edge of what is looked for: any of its vectors will do.
            parts = [(null, b)]
        elif a < -null <= b:
            parts = [(a, -null)]
        else:
            parts = [] if -null <= a and b <= null else [(a, b)]
        return tuple(hole for part in parts for hole in self._holes(*part))

    def _holes(self, a: float, b: float) -> list[tuple[float, float, int]]:
        inside = np.sort(self.values[(self.values > a) & (self.values <= b)])
        below = count_up_to(self.analysis, a)
        if count_up_to(self.analysis, b) - below == inside.size:
            return []
        # Cut between values that are well apart and count in each piece.
        gaps = np.flatnonzero(np.diff(inside) > 1e-6 * self.norm)
        cuts = [a, *((inside[gaps] + inside[gaps + 1]) / 2), b]
        counts = [below, *(count_up_to(self.analysis, float(cut)) for cut in cuts[1:])]
        holes = []
        for low, high, first, last in zip(cuts[:-1], cuts[1:], counts[:-1], counts[1:], strict=True):
            more = last - first - int(((inside > low) & (inside <= high)).sum())
            if more > 0:
                holes.append((float(low), float(high), more))
        return holes

    def _nearest(self, k: int, zeros: int, missing: tuple[tuple[float, float, int], ...]) -> Eigenpairs:
        chosen = np.sort(np.argsort(np.abs(self.values - self.sigma), kind="stable")[:k])
        values, vectors = self.values[chosen], self.vectors[:, chosen]
        order = np.argsort(values)
        values, vectors = values[order], vectors[:, order]
        return Eigenpairs(
            values, vectors, self._residuals(values, vectors), self.sigma, self.norm, zeros, tuple(missing)
        )
