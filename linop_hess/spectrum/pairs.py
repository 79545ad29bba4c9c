"""Eigenpairs, each with its residual, and what is missing among them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from linop_hess._display import Shown
from linop_hess.spectrum.extremes import NULL


@dataclass(frozen=True, repr=False)
class Eigenpairs(Shown):
    """Eigenpairs of H near a shift or at an end of the spectrum; ``values, vectors = pairs`` unpacks them as those of SciPy's `eigsh`.

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
        beside it. For "SA" and "LA" a shift just outside that end; NaN for "LM", which has two ends.
    norm : float
        ‖H‖, estimated from below.
    nullity : int
        Number of eigenvalues up to 1e-7‖H‖ in size.
    missing : tuple of (float, float, int)
        Intervals (a, b] nearer the shift, or the end, than the farthest value that hold more eigenvalues than found there, by inertia,
        and how many more. Of equally far eigenvalues, the null space among them, only as many as `k` asks for are found, and the others
        not called missing.
    """

    values: np.ndarray
    vectors: np.ndarray
    residuals: np.ndarray
    sigma: float
    norm: float
    nullity: int
    missing: tuple[tuple[float, float, int], ...]

    def __iter__(self) -> Iterator[np.ndarray]:
        """The values, then the vectors."""
        return iter((self.values, self.vectors))

    def __str__(self) -> str:
        """Return the pairs as a table."""
        return "\n".join([*(f"{value:>24}  {residual}" for value, residual in self._cells()), *self._notes()])

    def _cells(self) -> list[tuple[str, str]]:
        scale = self.norm or 1.0
        pairs = zip(self.values, self.residuals, strict=True)
        return [("eigenvalue", "residual / ‖H‖"), *((f"{v:.15e}", f"{r / scale:.1e}") for v, r in pairs)]

    def _notes(self) -> list[str]:
        holes = [f"missing: {count} in ({a:.6e}, {b:.6e}]" for a, b, count in self.missing]
        return [
            f"of the null space: {self._of_null_space()} of {self.nullity}",
            *(holes or ["none missing, by inertia"]),
        ]

    def _of_null_space(self) -> int:
        return int((np.abs(self.values) <= NULL * self.norm).sum())
