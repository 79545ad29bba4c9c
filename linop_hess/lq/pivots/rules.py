"""The pivot of one step of the backward recursion: which directions are eliminated, and which are delayed.

A pivot block K_uu is written as T θ Tᵀ on the eliminated directions; `whiten` is T⁻¹. Directions whose pivot is too small to
divide by are delayed: carried to the stage before, with their values μ.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from linop_hess.lq.pivots.bunch_kaufman import Congruence, packed_pivots

# Every stage has pivots of the size of ε by nature (controls its output does not see), so a pivot is small only where it
# is far below |ε|, and then far below the largest of its stage too.
DELAY = 0.1
SUSPECT = 0.01
_SMALL = 1e-4

# Up to this size eigenvectors cost no more than the calls of a Bunch-Kaufman factorization.
_NARROW = 64


class Pivots(ABC):
    """Some directions of K_uu eliminated, with pivots θ, and the others, if any, delayed: W, with values μ."""

    W: Tensor | None = None
    mu: Tensor | None = None

    @property
    @abstractmethod
    def theta(self) -> Tensor:
        """θ."""

    @abstractmethod
    def whiten(self, X: Tensor) -> Tensor:
        """T⁻¹ X, (eliminated, k)."""

    @abstractmethod
    def unwhiten_adjoint(self, Y: Tensor) -> Tensor:
        """T⁻ᵀ Y, (n, k)."""

    @property
    def delayed(self) -> int:
        """Number of delayed directions."""
        return 0 if self.mu is None else self.mu.numel()

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held."""


@dataclass(frozen=True)
class Eigenpivots(Pivots):
    """Pivots by eigenvectors U of eigenvalues θ."""

    U: Tensor
    values: Tensor
    W: Tensor | None = None
    mu: Tensor | None = None

    @property
    def theta(self) -> Tensor:
        return self.values

    def whiten(self, X: Tensor) -> Tensor:
        return self.U.mT @ X

    def unwhiten_adjoint(self, Y: Tensor) -> Tensor:
        return self.U @ Y

    @property
    def nbytes(self) -> int:
        return self.U.nbytes + (0 if self.W is None else self.W.nbytes)


@dataclass(frozen=True)
class CongruencePivots(Pivots):
    """Pivots by Bunch-Kaufman, all of them."""

    congruence: Congruence

    @property
    def theta(self) -> Tensor:
        return self.congruence.theta

    def whiten(self, X: Tensor) -> Tensor:
        return self.congruence.whiten(X)

    def unwhiten_adjoint(self, Y: Tensor) -> Tensor:
        return self.congruence.unwhiten_adjoint(Y)

    @property
    def nbytes(self) -> int:
        return self.congruence.nbytes


@dataclass(frozen=True)
class PivotsApart(Pivots):
    """The pivots of a block whose rows `alone` are coupled to no other row: their entries of the diagonal, and those of the rest."""

    rest: Pivots
    others: Tensor  # rows of the rest, in order
    kept: Tensor  # rows alone that are eliminated
    values: Tensor
    W: Tensor | None = None
    mu: Tensor | None = None

    @classmethod
    def of(cls, K: Tensor, rest: Pivots, others: Tensor, alone: Tensor, keep: Tensor) -> PivotsApart:
        """Put them together: `alone` are the rows alone, of which `keep` marks those to eliminate, `others` the others."""
        kept, delayed, diagonal = alone[keep], alone[~keep], K.diagonal()
        W = K.new_zeros(K.shape[0], rest.delayed + delayed.numel())
        mu = diagonal[delayed]
        if rest.W is not None and rest.mu is not None:
            W[others, : rest.delayed] = rest.W
            mu = torch.cat([rest.mu, mu])
        W[delayed, torch.arange(rest.delayed, W.shape[1], device=K.device)] = 1.0
        return cls(rest, others, kept, torch.cat([rest.theta, diagonal[kept]]), W, mu)

    @property
    def theta(self) -> Tensor:
        return self.values

    def whiten(self, X: Tensor) -> Tensor:
        return torch.cat([self.rest.whiten(X[self.others]), X[self.kept]])

    def unwhiten_adjoint(self, Y: Tensor) -> Tensor:
        assert self.W is not None
        out = Y.new_zeros(self.W.shape[0], Y.shape[1])
        first = self.rest.theta.numel()
        out[self.others], out[self.kept] = self.rest.unwhiten_adjoint(Y[:first]), Y[first:]
        return out

    @property
    def nbytes(self) -> int:
        return self.rest.nbytes + (0 if self.W is None else self.W.nbytes)


class PivotRule(Protocol):
    """Which pivots may be divided by."""

    def accepts(self, theta: Tensor, white: Tensor) -> bool:
        """Whether all of T θ Tᵀ may be eliminated, T⁻¹K_uδ being `white`."""
        ...

    def accepts_packed(self, packed: Tensor, interchanges: Tensor, cross: Tensor, gain: Tensor) -> bool:
        """The same for each of K steps: LAPACK's factors (K, r, r), (K, r), and K_uδ, K_uu⁻¹K_uδ, (K, r, n)."""
        ...

    def keeps(self, values: Tensor, Y: Tensor) -> Tensor:
        """Which eigenvectors to eliminate, by their eigenvalues, and their products with K_uδ, (n, n_in)."""
        ...


@dataclass(frozen=True)
class SmallPivots:
    """For solves: pivots far below |ε| are delayed. What a pivot near |ε| costs, refinement gives back."""

    damping: float

    def accepts(self, theta: Tensor, white: Tensor) -> bool:
        smallest, largest = _extremes(theta)
        return smallest > self._small(SUSPECT, largest)

    def accepts_packed(self, packed: Tensor, interchanges: Tensor, cross: Tensor, gain: Tensor) -> bool:
        if not packed.shape[1]:
            return True
        low, high = packed_pivots(packed, interchanges).abs().aminmax(dim=1)
        return all(a > self._small(SUSPECT, b) for a, b in zip(low.tolist(), high.tolist(), strict=True))

    def keeps(self, values: Tensor, Y: Tensor) -> Tensor:
        return values.abs() > self._small(DELAY, _extremes(values)[1])

    def _small(self, fraction: float, largest: float) -> float:
        """What counts as a small pivot among those of a stage."""
        small = _SMALL * largest
        return min(small, fraction * abs(self.damping)) if self.damping else 1e-4 * small


@dataclass(frozen=True)
class BoundedGrowth:
    """For all else: pivots are delayed that make the cost-to-go, or a multiplier, grow beyond its limit, or are up to `smallest`."""

    limit: float
    multiplier: float = float("inf")
    smallest: float = 0.0

    def accepts(self, theta: Tensor, white: Tensor) -> bool:
        if not _extremes(theta)[0] > self.smallest:
            return False
        if not white.numel():
            return True
        size = theta.abs()[:, None]
        grown = white.square() / size
        return float(grown.sum(0).max()) <= self.limit and float((white.abs() / size).max()) <= self.multiplier

    def accepts_packed(self, packed: Tensor, interchanges: Tensor, cross: Tensor, gain: Tensor) -> bool:
        if not cross.numel():
            return True
        growth = float((cross.abs() * gain.abs()).sum(1).max())
        if not (growth <= self.limit and float(gain.abs().max()) <= self.multiplier):
            return False
        return not self.smallest or float(packed_pivots(packed, interchanges).abs().min()) > self.smallest

    def keeps(self, values: Tensor, Y: Tensor) -> Tensor:
        size = values.abs()
        coupling = Y.norm(dim=1)
        return (coupling.square() <= self.limit * size) & (coupling <= self.multiplier * size) & (size > self.smallest)


def pivots_of(
    K: Tensor, cross: Tensor, rule: PivotRule, *, last: bool, always_pivot: bool = False
) -> tuple[Pivots, Tensor]:
    """Factor a pivot block (its lower triangle is read); also T⁻¹ K_uδ.

    Parameters
    ----------
    K : Tensor, shape (n, n)
    cross : Tensor, shape (n, n_in)
        K_uδ.
    rule : PivotRule
        Which pivots to delay.
    last : bool
        Whether no stage is left to delay to, so that everything is eliminated.
    always_pivot : bool
        Whether to take eigenvectors in any case.

    Raises
    ------
    ZeroDivisionError
        If a direction that must be eliminated has the pivot zero.
    ArithmeticError
        If K holds NaN or Inf.
    """
    if K.shape[0] > _NARROW and not last:
        coupled = (K != 0).sum(1) > (K.diagonal() != 0).long()
        alone, others = (~coupled).nonzero()[:, 0], coupled.nonzero()[:, 0]
        if alone.numel():
            keep = rule.keeps(K.diagonal()[alone], cross[alone])
            rest, white = pivots_of(K[others][:, others], cross[others], rule, last=False, always_pivot=always_pivot)
            return PivotsApart.of(K, rest, others, alone, keep), torch.cat([white, cross[alone[keep]]])
    if K.shape[0] > _NARROW and (last or not always_pivot):
        if not bool(torch.isfinite(K).all()):
            raise ArithmeticError("NaN or Inf in a pivot")
        congruence = Congruence.of(K)
        white = congruence.whiten(cross)
        if last and not _extremes(congruence.theta)[0] > 0.0:
            raise ZeroDivisionError("a pivot is zero")
        if last or rule.accepts(congruence.theta, white):
            return CongruencePivots(congruence), white
    try:
        values, vectors = torch.linalg.eigh(K)
    except torch.linalg.LinAlgError as error:
        raise ArithmeticError("NaN or Inf in a pivot") from error
    smallest, largest = _extremes(values)
    if not smallest < float("inf"):
        raise ArithmeticError("NaN or Inf in a pivot")
    if last and smallest == 0.0:
        raise ZeroDivisionError("a pivot is zero")
    white = vectors.mT @ cross
    if last or (not always_pivot and rule.accepts(values, white)):
        return Eigenpivots(vectors, values), white
    vectors, white = _turned(values, vectors, white, 10 * K.shape[0] * torch.finfo(K.dtype).eps * largest)
    keep = rule.keeps(values, white)
    return Eigenpivots(vectors[:, keep], values[keep], vectors[:, ~keep], values[~keep]), white[keep]


def _turned(values: Tensor, vectors: Tensor, white: Tensor, gap: float) -> tuple[Tensor, Tensor]:
    """Turn the eigenvectors of each repeated eigenvalue so that as few of them as possible are coupled to the state."""
    starts = torch.cat([values.new_ones(1, dtype=torch.bool), values.diff() > gap]).nonzero()[:, 0].tolist()
    for start, stop in zip(starts, [*starts[1:], values.numel()], strict=True):
        if stop - start > 1:
            left, _, _ = torch.linalg.svd(white[start:stop])
            vectors[:, start:stop] = vectors[:, start:stop] @ left
            white[start:stop] = left.mT @ white[start:stop]
    return vectors, white


def _extremes(theta: Tensor) -> tuple[float, float]:
    """Smallest and largest |θ|."""
    if not theta.numel():
        return 1.0, 1.0
    low, high = theta.abs().aminmax()
    return float(low), float(high)
