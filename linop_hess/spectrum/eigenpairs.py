"""Eigenpairs of a Hessian near any shift or at its ends, each with its residual, their number verified by inertia."""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike
from scipy.sparse.linalg import ArpackError, ArpackNoConvergence, LinearOperator
from scipy.sparse.linalg import eigsh as arpack

from linop_hess._validate import finite_real
from linop_hess.errors import FactorizationError
from linop_hess.lq.accuracy import LANCZOS_SHARP, NUDGE
from linop_hess.lq.analysis import Analysis
from linop_hess.lq.inverse.counting import count_up_to
from linop_hess.operators.inverse import HessianInverse
from linop_hess.operators.pieces import ChainHessian
from linop_hess.spectrum.counts import dense_symmetric, factorable
from linop_hess.spectrum.extremes import NULL, HasSpectrum, extreme_eigenvalues, negatives, nullity
from linop_hess.spectrum.pairs import Eigenpairs

# Up to this order LAPACK's dense solver is as fast, and finds all.
_SMALL = 300

# Lanczos runs, and ARPACK's restarts in each, before what was found is all that is returned.
_ROUNDS = 12
_TIE = 2e-8  # eigenvalues that differ in distance by less than this times ‖H‖ are equally near
_RESTARTS = 40

# A shift for the ends is so far outside, in terms of the end; and in terms of ‖H‖ at least.
_OUTSIDE, _LEAST_OUTSIDE = 0.1, 1e-6

Which = Literal["nearest", "SA", "LA", "LM"]
WHICH = get_args(Which)


def eigsh(
    lin: HasSpectrum | LinearOperator | ArrayLike,
    k: int = 6,
    sigma: float | None = None,
    *,
    which: Which = "nearest",
    tolerance: float = 1e-8,
    seed: int = 0,
) -> Eigenpairs:
    """Find k eigenvalues of H, nearest `sigma` or at the ends, by shift-invert Lanczos (ARPACK) with the exact inverse.

    What Lanczos misses (it sees one vector of each eigenspace) inertia tells; it is then started again, orthogonal to what is found.

    Parameters
    ----------
    lin : Linearization, ChainCurvature or symmetric operator
        Of any other symmetric operator than a linearization's, as `lh.Hessian`, or matrix, all eigenpairs are computed by LAPACK from its
        dense matrix.
    k : int
        1 ≤ k < N.
    sigma : float, optional
        The shift, 0 by default; for ``which="nearest"`` alone.
    which : {"nearest", "SA", "LA", "LM"}
        The k nearest `sigma`, the k smallest ("smallest algebraic": the most negative ones first), the k largest, or the k largest in
        size, as SciPy names them.
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
        If k, sigma, which or tolerance is not usable; if `lin` is neither, or not symmetric.
    ArithmeticError
        If a residual exceeds its bound, or Lanczos finds fewer than k pairs.
    FactorizationError
        If H − σI can be factored neither at `sigma` nor 1e-7‖H‖ beside it.
    MemoryError
        If a dense matrix is needed and does not fit; nothing has been allocated.

    Notes
    -----
    Computed in float64 whatever the precision of the model. Eigenvalues that differ by less than 2e-8‖H‖ count as one where it is told
    whether any is missing.
    """
    shift, tolerance = _checked(sigma, which, tolerance, seed)
    analysis = factorable(lin)
    if analysis is not None:
        _check_k(k, analysis.problem.size)
        pairs = _of_chain(analysis, k, shift, which, np.random.default_rng(seed))
    else:
        matrix = dense_symmetric(lin)
        _check_k(k, len(matrix))
        pairs = _of_dense(matrix, k, shift, which)
    bound = tolerance * pairs.norm
    if pairs.residuals.size < k or not (pairs.residuals <= bound).all():
        where = f"near {shift:g}" if which == "nearest" else f'of which="{which}"'
        raise ArithmeticError(
            f"found {pairs.residuals.size} of {k} eigenpairs {where}, the largest residual {pairs.residuals.max(initial=0.0):.1e} "
            f"against {bound:.1e}; move sigma, or raise the tolerance"
        )
    return pairs


def _checked(sigma: float | None, which: str, tolerance: float, seed: int) -> tuple[float, float]:
    if which not in WHICH:
        raise ValueError(f"expected which to be one of {', '.join(map(repr, WHICH))}, got {which!r}: pass one of them")
    if which != "nearest" and sigma is not None:
        raise ValueError(f"expected no sigma with which={which!r}, got {sigma!r}: leave one of the two out")
    shift, tolerance = finite_real(0.0 if sigma is None else sigma, "sigma"), finite_real(tolerance, "tolerance")
    if not tolerance > 0.0:
        raise ValueError(f"tolerance must be positive, got {tolerance!r}")
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise TypeError(f"seed must be an integer of at least 0, got {seed!r}")
    return shift, tolerance


def _of_chain(analysis: Analysis, k: int, shift: float, which: str, rng: np.random.Generator) -> Eigenpairs:
    N, norm = analysis.problem.size, analysis.norm
    if norm == 0.0:
        return Eigenpairs(np.zeros(k), np.eye(N, k), np.zeros(k), shift, 0.0, N, ())
    if N <= _SMALL:
        return _of_dense(dense_symmetric(ChainHessian(analysis.problem)), k, shift, which, norm)
    if which == "LM":
        return _largest(analysis, k, rng)
    if which != "nearest":
        return _at_end(analysis, k, which, rng)
    return _Finder(analysis, 0.0 if abs(shift) <= NULL * norm else shift, rng).lanczos(k)


def _of_dense(matrix: np.ndarray, k: int, shift: float, which: str, norm: float | None = None) -> Eigenpairs:
    """All eigenpairs by LAPACK, and of them the k that are asked for."""
    values, vectors = np.linalg.eigh(matrix)
    norm = float(np.abs(values).max()) if norm is None else norm
    shift = 0.0 if abs(shift) <= NULL * norm else shift
    keys = {"nearest": np.abs(values - shift), "SA": values, "LA": -values, "LM": -np.abs(values)}
    chosen = np.sort(np.argsort(keys[which], kind="stable")[:k])
    values, vectors, zeros = values[chosen], vectors[:, chosen], int((np.abs(values) <= NULL * norm).sum())
    residuals = np.linalg.norm(matrix @ vectors - vectors * values, axis=0)
    ends = {"nearest": shift, "SA": float(values[0]), "LA": float(values[-1]), "LM": math.nan}
    return Eigenpairs(values, vectors, residuals, ends[which], norm, zeros, ())


def _at_end(analysis: Analysis, k: int, which: str, rng: np.random.Generator) -> Eigenpairs:
    """The k nearest to a shift just outside an end: what is nearer is counted by inertia, as for any shift."""
    low, high = extreme_eigenvalues(analysis)
    end, outwards = (low, -1.0) if which == "SA" else (high, 1.0)
    outside = max(_OUTSIDE * abs(end), _LEAST_OUTSIDE * analysis.norm)
    return _Finder(analysis, end + outwards * outside, rng).lanczos(k)


def _largest(analysis: Analysis, k: int, rng: np.random.Generator) -> Eigenpairs:
    """Largest in size: as many from each end as inertia finds beyond a radius with k or just more outside it."""
    N, norm, null = analysis.problem.size, analysis.norm, NULL * analysis.norm

    def beyond(radius: float) -> tuple[int, int]:
        return count_up_to(analysis, -radius), N - count_up_to(analysis, radius)

    inner, outer = null, 1.01 * max(map(abs, extreme_eigenvalues(analysis)))
    below, above = beyond(inner)
    zeros = N - below - above
    while below + above > k and outer - inner > _TIE * norm:
        middle = (inner * outer) ** 0.5
        counts = beyond(middle)
        if sum(counts) >= k:
            inner, (below, above) = middle, counts
        else:
            outer = middle
    below, above = beyond(max(null, inner - 2 * NUDGE * norm))  # one at the radius may have been counted on either side
    both = _Finder(analysis, math.nan, rng)
    missing: list[tuple[float, float, int]] = []
    for which, count in (("SA", min(below, k)), ("LA", min(above, k))):
        if count:
            part = _at_end(analysis, count, which, rng)
            both._add(part.vectors)
            missing += part.missing
    if (more := k - both.values.size) > 0:
        # Everything else is the null space.
        both._add(_Finder(analysis, 0.0, rng).lanczos(min(more, zeros)).vectors)
    return both._nearest(k, zeros, tuple(missing))


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
        # Lanczos sees one vector of each eigenspace: the next round asks for as many as inertia says are missing, orthogonal to all found.
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
        # Beside an eigenvalue next to the shift ARPACK may leave others at 1e-6 (SciPy 1.12): the next round finds them without that one.
        values = np.einsum("ij,ij->j", new, self.H @ new)
        sharp = self._residuals(values, new) <= LANCZOS_SHARP * self.norm
        self._add(new[:, sharp] if sharp.any() else new)

    def _add_null_vectors(self, k: int, zeros: int) -> None:
        """Add vectors of the null space, of which Lanczos finds few, if it is among the k nearest.

        (τ(H + τI)⁻¹)³ takes what belongs to λ down by (τ/λ)³, so that Hv is below τ whatever lies close to zero.
        """
        null = NULL * self.norm
        nearer = int((np.abs(self.values - self.sigma) < abs(self.sigma) - null).sum())
        wanted = min(zeros, k - nearer) - int((np.abs(self.values) <= null).sum())
        if wanted < 1:
            return
        # Orthogonal to what was found before each step, or a pair that is known would grow back out of rounding.
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
        """Intervals nearer than the k-th nearest value found that hold more eigenvalues than were found."""
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
        distances = -np.abs(self.values) if math.isnan(self.sigma) else np.abs(self.values - self.sigma)
        chosen = np.sort(np.argsort(distances, kind="stable")[:k])
        values, vectors = self.values[chosen], self.vectors[:, chosen]
        order = np.argsort(values)
        values, vectors = values[order], vectors[:, order]
        return Eigenpairs(
            values, vectors, self._residuals(values, vectors), self.sigma, self.norm, zeros, tuple(missing)
        )
