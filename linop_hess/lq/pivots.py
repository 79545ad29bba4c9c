"""The pivot of one step of the backward recursion: which directions are eliminated, and which are delayed.

A pivot block K_uu is written as T θ Tᵀ on the eliminated directions; `whiten` is T⁻¹. Directions whose pivot is too small to
divide by are delayed: carried to the stage before, with their values μ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linop_hess.lq.symmetric import Congruence

# Every stage has pivots of the size of ε by nature (controls its output does not see), so a pivot is small only where it
# is far below |ε|, and then far below the largest of its stage too.
DELAY = 0.1
SUSPECT = 0.01
_SMALL = 1e-4

# Up to this size eigenvectors cost no more than the calls of a Bunch-Kaufman factorization.
_NARROW = 64


@dataclass(frozen=True)
class Eigenpivots:
    """Pivots by eigenvectors: eliminated ones (U, θ) and delayed ones (W, μ)."""

    U: Tensor
    theta: Tensor
    W: Tensor | None = None
    mu: Tensor | None = None

    def whiten(self, X: Tensor) -> Tensor:
        """Uᵀ X."""
        return self.U.mT @ X

    def unwhiten_adjoint(self, Y: Tensor) -> Tensor:
        """U Y."""
        return self.U @ Y

    @property
    def delayed(self) -> int:
        """Number of delayed directions."""
        return 0 if self.mu is None else self.mu.numel()

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.U.nbytes + (0 if self.W is None else self.W.nbytes)


def pivots_of(
    K: Tensor, damping: float, *, last: bool, always_pivot: bool = False, caution: float = 1.0
) -> Congruence | Eigenpivots:
    """Factor a pivot block (its lower triangle is read).

    Parameters
    ----------
    K : Tensor, shape (n, n)
    damping : float
        What small is measured by.
    last : bool
        Whether no stage is left to delay to, so that everything is eliminated.
    always_pivot : bool
        Whether to take eigenvectors in any case.
    caution : float
        What to multiply by the sizes below which a pivot is small.

    Raises
    ------
    ZeroDivisionError
        If a direction that must be eliminated has the pivot zero.
    ArithmeticError
        If K holds NaN or Inf.
    """
    n = K.shape[0]
    if n > _NARROW and (last or not always_pivot):
        if not bool(torch.isfinite(K).all()):
            raise ArithmeticError("NaN or Inf in a pivot")
        congruence = Congruence.of(K)
        smallest, largest = _extremes(congruence.theta)
        if smallest > 0.0 if last else not is_suspect(smallest, largest, caution * damping):
            return congruence
        if last:
            raise ZeroDivisionError("a pivot is zero")
    try:
        values, vectors = torch.linalg.eigh(K)
    except torch.linalg.LinAlgError as error:
        raise ArithmeticError("NaN or Inf in a pivot") from error
    smallest, largest = _extremes(values)
    if not smallest < float("inf"):
        raise ArithmeticError("NaN or Inf in a pivot")
    if last:
        if smallest == 0.0:
            raise ZeroDivisionError("a pivot is zero")
        return Eigenpivots(vectors, values)
    if not always_pivot and not is_suspect(smallest, largest, caution * damping):
        return Eigenpivots(vectors, values)
    keep = values.abs() > _small(DELAY, largest, caution * damping)
    return Eigenpivots(vectors[:, keep], values[keep], vectors[:, ~keep], values[~keep])


def is_suspect(smallest: float, largest: float, damping: float) -> bool:
    """Whether the smallest |θ| of a pivot block is so small, or NaN, that its eigenvectors should be looked at."""
    return not smallest > _small(SUSPECT, largest, damping)


def _extremes(theta: Tensor) -> tuple[float, float]:
    """Smallest and largest |θ|."""
    if not theta.numel():
        return 1.0, 1.0
    low, high = theta.abs().aminmax()
    return float(low), float(high)


def _small(fraction: float, largest: float, damping: float) -> float:
    """What counts as a small pivot among those of a stage."""
    small = _SMALL * largest
    return min(small, fraction * abs(damping)) if damping else 1e-4 * small
