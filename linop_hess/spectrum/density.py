"""The histogram of a chain's whole spectrum, exact: as many inertias as it has edges."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.sparse.linalg import LinearOperator

from linop_hess._display import Shown
from linop_hess.spectrum.counts import ByInertia, ByLapack, Counts, dense_symmetric, factorable
from linop_hess.spectrum.extremes import NULL, HasSpectrum


@dataclass(frozen=True, repr=False)
class Density(Shown):
    """How many eigenvalues lie where.

    Attributes
    ----------
    edges : ndarray, shape (bins + 1,)
    counts : ndarray of int, shape (bins,)
        Eigenvalues in (edges[i], edges[i + 1]], those of the null space not among them.
    nullity : int
        Eigenvalues up to `null` in size.
    null : float
        1e-7‖H‖.
    scale : {"linear", "symlog"}
        How the edges are spaced.
    size : int
        N, the number of all eigenvalues.
    """

    edges: np.ndarray
    counts: np.ndarray
    nullity: int
    null: float
    scale: str
    size: int

    def __str__(self) -> str:
        """Return the non-empty bins as a table."""
        return "\n".join(f"{low:>14} {high:>14} {count:>9}" for low, high, count in self._cells())

    def __repr__(self) -> str:
        """In one line."""
        inside = int(self.counts.sum())
        return (
            f"<Density of {self.size:,} eigenvalues: {inside:,} in {self.counts.size} bins from {self.edges[0]:.4g} to "
            f"{self.edges[-1]:.4g}, {self.nullity:,} in the null space; print it, or draw it with plot.spectrum>"
        )

    def _cells(self) -> list[tuple[str, str, str]]:
        rows = [("(from", "to]", "count")]
        for low, high, count in zip(self.edges[:-1], self.edges[1:], self.counts, strict=True):
            if low < 0.0 <= high and self.nullity:
                rows.append(("", "null space", str(self.nullity)))
            if count:
                rows.append((f"{low:.6g}", f"{high:.6g}", str(count)))
        return rows


def density(
    lin: HasSpectrum | LinearOperator | ArrayLike, bins: int | ArrayLike = 60, *, scale: str = "symlog"
) -> Density:
    """Count the eigenvalues of H in bins.

    Parameters
    ----------
    lin : Linearization, ChainCurvature or symmetric operator
        Of a linearization eigenvalues are counted by inertia. Of any other symmetric operator, as `lh.Hessian`, or matrix, all of them
        are computed by LAPACK from its dense matrix.
    bins : int or array_like of float
        Number of bins between the smallest and the largest eigenvalue, or their edges, ascending.
    scale : {"symlog", "linear"}
        Whether edges are spaced evenly in the logarithm of |λ| on either side of zero, from 1e-6 times the largest on, or evenly, zero
        being an edge (so that there may be one bin more than asked for).

    Returns
    -------
    Density

    Raises
    ------
    ValueError, TypeError
        If `bins` is below 1, its edges do not ascend or are not finite, or `scale` is unknown; if `lin` is neither, or not symmetric.
    MemoryError
        If a dense matrix is needed and does not fit; nothing has been allocated.

    Notes
    -----
    The cost is one inertia an edge. An edge within 1e-7‖H‖ of zero counts as just below the null space.
    """
    if scale not in ("symlog", "linear"):
        raise ValueError(f"scale must be 'symlog' or 'linear', got {scale!r}")
    with torch.no_grad():
        analysis = factorable(lin)
        found: Counts = ByLapack(np.linalg.eigvalsh(dense_symmetric(lin))) if analysis is None else ByInertia(analysis)
        edges = _edges(found, bins, scale)
        null = NULL * found.norm
        zeros = found.nullity()
        below = [found.up_to(-null if abs(b) <= null else float(b)) - (zeros if b > null else 0) for b in edges]
    return Density(edges, np.diff(below), zeros, null, scale, found.size)


def _edges(found: Counts, bins: int | ArrayLike, scale: str) -> np.ndarray:
    if isinstance(bins, list | tuple | np.ndarray) or np.ndim(bins) > 0:
        try:
            edges = np.array(bins, dtype=np.float64)
        except (TypeError, ValueError):
            raise TypeError(f"edges of bins must be real numbers, got {bins!r}") from None
        if edges.ndim != 1 or edges.size < 2 or not np.isfinite(edges).all() or not (np.diff(edges) > 0).all():
            raise ValueError("edges of bins must be at least two finite numbers in ascending order")
        return edges
    if isinstance(bins, bool) or not isinstance(bins, int | np.integer) or bins < 1:
        raise ValueError(f"bins must be a number of at least 1, or edges, got {bins!r}")
    low, high = found.ends()
    if low == high == 0.0:
        return np.array([-1.0, 1.0])
    if high - low < 1e-3 * max(abs(low), abs(high)):  # as good as one eigenvalue: room to draw it
        low, high = low - 0.05 * abs(low), high + 0.05 * abs(high)
    margin = 1e-6 * max(abs(low), abs(high))
    low, high = low - margin, high + margin
    if scale == "linear":
        width = (high - low) / bins
        return width * np.arange(np.floor(low / width), np.ceil(high / width) + 1)
    if low < 0.0 < high and bins == 1:
        return np.array([low, high])
    if low >= 0.0 or high <= 0.0:
        # On one side of zero: from there on.
        near, far = sorted((low, high), key=abs)
        near = max(abs(near), margin)
        spaced = np.geomspace(near, abs(far), int(bins) + 1)
        return spaced if far > 0 else -spaced[::-1]
    share = np.log(abs(low) / margin) / (np.log(abs(low) / margin) + np.log(high / margin))
    left = int(np.clip(round(share * bins), 1, bins - 1))
    negative = -np.geomspace(-low, margin, left + 1) if -low > margin else np.array([low, 0.0])
    positive = np.geomspace(margin, high, int(bins) - left + 1) if high > margin else np.array([0.0, high])
    return np.concatenate([negative[:-1], [0.0], positive[1:]])
