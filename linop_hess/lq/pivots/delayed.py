"""The elimination of one symmetric pivot block: S is divided by, but for directions whose pivot is too small, which are delayed.

A block is written as T θ Tᵀ on the eliminated directions; `whiten` is T⁻¹. With u the unknowns and δ what remains,

    ½ uᵀSu + uᵀEδ − loadᵀu   is least at   u = T⁻ᵀ(θ⁻¹(T⁻¹load − T⁻¹E δ)) + W c,

c being the delayed directions W, of values μ and coupling EᵀW to δ, which the stage before gets to eliminate.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from linop_hess.lq.pivots.bunch_kaufman import SymmetricFactor, packed_pivots
from linop_hess.lq.pivots.rules import PivotRule, extremes

# Up to this size eigenvectors cost no more than the calls of a Bunch-Kaufman factorization that is unpacked.
_EIGENVECTORS_UP_TO = 64


class Pivots(Protocol):
    """T θ Tᵀ of the eliminated directions."""

    @property
    def theta(self) -> Tensor:
        """θ, shape (e,)."""

    def whiten(self, X: Tensor) -> Tensor:
        """T⁻¹ X: (r, k) to (e, k)."""

    def unwhiten(self, Y: Tensor) -> Tensor:
        """T⁻ᵀ Y: (e, k) to (r, k)."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""


@dataclass(frozen=True)
class Eigenpivots:
    """Pivots by eigenvectors U of eigenvalues θ."""

    U: Tensor
    theta: Tensor

    def whiten(self, X: Tensor) -> Tensor:
        """Uᵀ X."""
        return self.U.mT @ X

    def unwhiten(self, Y: Tensor) -> Tensor:
        """U Y."""
        return self.U @ Y

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.U.nbytes + self.theta.nbytes


class Elimination(ABC):
    """What is left of a pivot block once it has been divided by.

    Attributes
    ----------
    delayed : int
        Number of delayed directions.
    W : Tensor, shape (r, delayed)
    mu : Tensor, shape (delayed,)
    coupling : Tensor, shape (n, delayed)
        EᵀW.
    """

    delayed: int
    W: Tensor
    mu: Tensor
    coupling: Tensor

    @abstractmethod
    def take_off(self, V: Tensor) -> None:
        """V − EᵀS⁻¹E, in place."""

    @property
    @abstractmethod
    def theta(self) -> Tensor:
        """θ, shape (e,)."""

    @abstractmethod
    def whitened(self) -> WhitenedElimination:
        """Return the same with its pivots as T θ Tᵀ."""

    @abstractmethod
    def response(self) -> tuple[Tensor, Tensor, Tensor]:
        """X, Y and K with u = XᵀY load + K (δ, c)."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held."""


@dataclass(frozen=True)
class WhitenedElimination(Elimination):
    """S = T θ Tᵀ on the eliminated directions, kept with T⁻¹E of shape (e, n)."""

    pivots: Pivots
    white: Tensor
    W: Tensor
    mu: Tensor
    coupling: Tensor

    @property
    def delayed(self) -> int:  # type: ignore[override]
        return self.mu.numel()

    @property
    def theta(self) -> Tensor:
        return self.pivots.theta

    def take_off(self, V: Tensor) -> None:
        subtract_gram(V, self.white, self.theta)

    def whitened(self) -> WhitenedElimination:
        return self

    def response(self) -> tuple[Tensor, Tensor, Tensor]:
        half = self.pivots.unwhiten(torch.diag(1.0 / self.theta))
        return half.mT * self.theta[:, None], half.mT, torch.cat([-half @ self.white, self.W], 1)

    @property
    def nbytes(self) -> int:
        return self.pivots.nbytes + self.white.nbytes + self.W.nbytes


@dataclass(frozen=True)
class PackedElimination(Elimination):
    """All of S eliminated whatever its pivots, as LAPACK's Bunch-Kaufman factorization left it: the fewest calls, for narrow blocks."""

    packed: Tensor
    interchanges: Tensor
    E: Tensor
    gain: Tensor  # S⁻¹E

    @classmethod
    def of(cls, S: Tensor, E: Tensor) -> PackedElimination:
        """Eliminate a block; leading axes are carried along."""
        packed, interchanges, _ = torch.linalg.ldl_factor_ex(S)
        # A copy: E is a view of a block that nothing else needs for long, and that would be kept with it.
        return cls(packed, interchanges, E.clone(), torch.linalg.ldl_solve(packed, interchanges, E))

    @property
    def delayed(self) -> int:  # type: ignore[override]
        return 0

    @cached_property
    def W(self) -> Tensor:  # type: ignore[override]
        return self.packed.new_zeros(self.packed.shape[-1], 0)

    @cached_property
    def mu(self) -> Tensor:  # type: ignore[override]
        return self.packed.new_zeros(0)

    @cached_property
    def coupling(self) -> Tensor:  # type: ignore[override]
        return self.packed.new_zeros(self.E.shape[-1], 0)

    def take_off(self, V: Tensor) -> None:
        if V.ndim == 2:
            V.addmm_(self.E.mT, self.gain, alpha=-1.0)
        else:
            V.baddbmm_(self.E.mT, self.gain, alpha=-1.0)

    @cached_property
    def theta(self) -> Tensor:
        single = self.packed.ndim == 2
        theta = (
            packed_pivots(self.packed[None], self.interchanges[None])
            if single
            else packed_pivots(self.packed, self.interchanges)
        )
        return theta[0] if single else theta

    def whitened(self) -> WhitenedElimination:
        pivots = SymmetricFactor.from_packed(self.packed.clone(), self.interchanges)
        return WhitenedElimination(pivots, pivots.whiten(self.E), self.W, self.mu, self.coupling)

    def response(self) -> tuple[Tensor, Tensor, Tensor]:
        eye = torch.eye(self.packed.shape[0], dtype=self.packed.dtype, device=self.packed.device)
        return torch.linalg.ldl_solve(self.packed, self.interchanges, eye), eye, -self.gain

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.E.nbytes + self.gain.nbytes


def eliminate(
    S: Tensor, E: Tensor, rule: PivotRule, units: Tensor, *, last: bool, careful: bool = False
) -> WhitenedElimination:
    """Divide by a pivot block, but for the directions that the rule delays.

    Parameters
    ----------
    S : Tensor, shape (r, r)
        Symmetric; its lower triangle is read. Of a complex one nothing is delayed.
    E : Tensor, shape (r, n)
        Coupling to the state that remains.
    rule : PivotRule
    units : Tensor, shape (n, 1)
        How far each entry of the state moves; see `lq.scaling`.
    last : bool
        Whether no stage is left to delay to, so that everything is eliminated.
    careful : bool
        Whether to take eigenvectors in any case.

    Raises
    ------
    ZeroDivisionError
        If a direction that must be eliminated has the pivot zero.
    ArithmeticError
        If S holds NaN or Inf.
    """
    none = S.new_zeros(S.shape[0], 0), S.new_zeros(0), S.new_zeros(E.shape[1], 0)
    # Bunch-Kaufman first, whose pivots show whether all may be eliminated; eigenvectors, several times the work, only where they may not.
    if S.is_complex() or (S.shape[0] > _EIGENVECTORS_UP_TO and not (rule.is_orthogonal if last else careful)):
        if not bool(torch.isfinite(S).all()):
            raise ArithmeticError("NaN or Inf in a pivot")
        factor = SymmetricFactor.of(S)
        white = factor.whiten(E)
        if last and not extremes(factor.theta)[0] > 0.0:
            raise ZeroDivisionError("a pivot is zero")
        if last or S.is_complex() or rule.accepts(factor.theta, white, units):
            return WhitenedElimination(factor, white, *none)
    try:
        values, vectors = torch.linalg.eigh(S)
    except torch.linalg.LinAlgError as error:
        raise ArithmeticError("NaN or Inf in a pivot") from error
    smallest, _ = extremes(values)
    if not smallest < float("inf"):
        raise ArithmeticError("NaN or Inf in a pivot")
    if last and smallest == 0.0:
        raise ZeroDivisionError("a pivot is zero")
    white = vectors.mT @ E
    if last or (not careful and rule.accepts(values, white, units)):
        return WhitenedElimination(Eigenpivots(vectors, values), white, *none)
    keep = rule.keeps(values, white * units.mT)
    late = vectors[:, ~keep]
    return WhitenedElimination(
        Eigenpivots(vectors[:, keep], values[keep]), white[keep], late, values[~keep], white[~keep].mT.contiguous()
    )


def packed_among(eliminations: Iterable[Elimination]) -> dict[int, PackedElimination]:
    """Those that are kept as LAPACK left them, by their positions."""
    return {k: e for k, e in enumerate(eliminations) if isinstance(e, PackedElimination)}


def stacked_by_size(eliminations: Mapping[int, PackedElimination]) -> Iterator[tuple[list[int], PackedElimination]]:
    """Yield those of each size, as (positions, one elimination with a leading axis)."""
    by_size: dict[torch.Size, list[int]] = {}
    for k, elimination in eliminations.items():
        by_size.setdefault(elimination.E.shape, []).append(k)
    for positions in by_size.values():
        alike = [eliminations[k] for k in positions]
        yield (
            positions,
            PackedElimination(
                *(torch.stack([getattr(e, name) for e in alike]) for name in ("packed", "interchanges", "E", "gain"))
            ),
        )


def obey(rule: PivotRule, eliminations: Sequence[Elimination], units: Sequence[Tensor]) -> bool:
    """Whether by `rule` none of them need delay anything, or anything more; `units` are those of the states before."""
    packed = packed_among(eliminations)
    # Narrow blocks come in the units of the states already.
    if not all(rule.accepts_packed(e.packed, e.interchanges, e.E, e.gain) for _, e in stacked_by_size(packed)):
        return False
    others = [(e, u) for k, (e, u) in enumerate(zip(eliminations, units, strict=True)) if k not in packed]
    return all(rule.accepts(e.theta, e.whitened().white, u) for e, u in others)


def pivots_of(eliminations: Sequence[Elimination]) -> list[Tensor]:
    """θ of each."""
    theta: dict[int, Tensor] = {}
    for positions, stacked in stacked_by_size(packed_among(eliminations)):
        theta.update(zip(positions, stacked.theta.unbind(), strict=True))
    return [theta[k] if k in theta else e.theta for k, e in enumerate(eliminations)]


# Below so many products of numbers one matrix product takes no longer than several; above, the upper triangle need not be computed.
_BLOCKED_FROM = 1 << 26
_BLOCKS = 4


def subtract_gram(V: Tensor, X: Tensor, theta: Tensor) -> None:
    """V − Xᵀ diag(θ)⁻¹ X in place, V (n, n) symmetric, X (e, n)."""
    scaled = X / theta[:, None]
    n = V.shape[0]
    if X.numel() * n < _BLOCKED_FROM:
        V.addmm_(X.mT, scaled, alpha=-1.0)
        return
    # Lower triangle by strips, 5/8 of the flops for four of them, then mirrored.
    edges = [round(n * k / _BLOCKS) for k in range(_BLOCKS + 1)]
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        V[start:stop, :stop].addmm_(X[:, start:stop].mT, scaled[:, :stop], alpha=-1.0)
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        V[:start, start:stop] = V[start:stop, :start].mT
