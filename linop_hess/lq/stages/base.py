"""A stage of a linear-quadratic (LQ) problem: what every kind of stage can do.

Stage l contributes

    ½ xᵀ(A + εI)x + xᵀB δ_in + ½ δ_inᵀ C δ_in − gᵀx,        δ_out = F δ_in + G x,

with x its controls (p of them), δ_in the state before it and δ_out the state after it. A kind of stage is one class that multiplies with
A, B, C, F and G, for all K stages of a stack at once, in whatever structure they have.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from linop_hess._memory import require
from linop_hess.lq.stacked import Stacked
from linop_hess.lq.stages.row_space import RowSpace, generic_row_space, showing_row_space

# Arrays of the size of G and B that a row space from arrays takes at once: these, and a singular value decomposition.
_COPIES = 4
# Calls of a product of most kinds: some reshapes on both sides of a matrix product, which is five calls by itself.
_CALLS = 10


@dataclass(frozen=True)
class SampleRows:
    """One stage whose controls act on one row a sample: G_b = z̃_bᵀ ⊗ I and, in the rows of the weight, B_b δ = β_b δᵀ.

    Attributes
    ----------
    Z : Tensor, shape (samples, k)
        z̃: the row where the weight is a control, then a one where the bias is.
    beta : Tensor or None, shape (samples, o)
        Adjoint of the output; None: B = 0.
    weight, bias : bool
        Whether the controls hold a weight (o × i, row-major), and then a bias (o).
    """

    Z: Tensor
    beta: Tensor | None
    weight: bool
    bias: bool


@dataclass(frozen=True)
class Stage(Stacked, ABC):
    """A stack of K same-shaped stages.

    Every product takes and gives arrays with a leading stage axis and a trailing axis of k right-hand sides: controls (K, p, k), states
    before the stage (K, n_in, k), states after it (K, n_out, k). Blocks that are zero give zeros; `nonzero` says which need no product.
    What a method returns may share memory with the stage, `pull_back` excepted.
    """

    @property
    @abstractmethod
    def n_in(self) -> int:
        """State dimension before the stage."""

    @property
    @abstractmethod
    def n_out(self) -> int:
        """State dimension after the stage."""

    @property
    def inputs(self) -> int:
        """Number of entries of the state before the stage that it reads; the others pass by."""
        return self.n_in

    @property
    def outputs(self) -> int:
        """Number of entries that it computes."""
        return self.n_out

    @property
    @abstractmethod
    def p(self) -> int:
        """Number of controls (parameters) of a stage."""

    @property
    @abstractmethod
    def samples(self) -> int:
        """Number of equal parts of the state, in order, that a stage treats by themselves: 1 where they interact, 0 (any) of no state.

        F and C are block diagonal over them, and so over any number that divides theirs; of an objective, whose F adds them up, C is, and
        without a state before the stage the parts are those of the state after it.
        """

    @property
    def nonzero(self) -> frozenset[str]:
        """Which of the curvature blocks "A", "B" and "C" may differ from zero."""
        return frozenset()

    @abstractmethod
    def F(self, d: Tensor) -> Tensor:
        """F δ: (K, n_in, k) to (K, n_out, k)."""

    def rows_by_sample(self) -> Tensor:
        """Fᵀ of a last stage of one output, a sample a column: (K, n_in, samples). Of one column where it does not tell them apart."""
        return self.Ft(next(self._arrays()).new_ones(self.count, self.n_out, 1))

    @abstractmethod
    def Ft(self, y: Tensor) -> Tensor:
        """Fᵀ y: (K, n_out, k) to (K, n_in, k)."""

    def G(self, x: Tensor) -> Tensor:
        """G x: (K, p, k) to (K, n_out, k)."""
        return x.new_zeros(self.count, self.n_out, x.shape[-1])

    def Gt(self, y: Tensor) -> Tensor:
        """Gᵀ y: (K, n_out, k) to (K, p, k)."""
        return y.new_zeros(self.count, self.p, y.shape[-1])

    def A(self, x: Tensor) -> Tensor:
        """A x: (K, p, k) to (K, p, k)."""
        return torch.zeros_like(x)

    def B(self, d: Tensor) -> Tensor:
        """B δ: (K, n_in, k) to (K, p, k)."""
        return d.new_zeros(self.count, self.p, d.shape[-1])

    def Bt(self, x: Tensor) -> Tensor:
        """Bᵀ x: (K, p, k) to (K, n_in, k)."""
        return x.new_zeros(self.count, self.n_in, x.shape[-1])

    def C(self, d: Tensor) -> Tensor:
        """C δ: (K, n_in, k) to (K, n_in, k)."""
        return torch.zeros_like(d)

    def add_curvature(self, T: Tensor, W: Tensor) -> None:
        """T + Wᵀ C W in place: what C is in the unknowns that W, (K, n_in, k), makes the state of; T is (K, k, k)."""
        T.baddbmm_(W.mT, self.C(W))

    def with_adjoint(self, beta: Tensor) -> Self:
        """Return the same stages with the curvature they have against adjoints of their outputs, β of shape (K, n_out).

        Kinds whose curvature is given as arrays (dense, objective), or that have none (embedding), return themselves.
        """
        return self

    @abstractmethod
    def gauss_newton(self) -> Self:
        """Return the same stages with A = 0, B = 0 and C = 0; an objective, whose curvature Gauss-Newton keeps, returns itself."""

    def row_space(self) -> RowSpace:
        """The controls split into those the output sees and those it does not, for every stage of the stack; nothing is cached."""
        return generic_row_space(self)

    def curved_row_space(self, diagonal: Tensor) -> RowSpace | None:
        """The same where A = diag(diagonal), of shape (K, p), is added; None where all controls are visible then."""
        if self.p <= self.n_out or "A" in self.nonzero or bool((diagonal != 0.0).any(0).all()):
            return None
        self.require_dense()
        return showing_row_space(self, diagonal)

    def require_dense(self) -> None:
        """Raise where there is no memory for a row space from G as an array.

        Raises
        ------
        MemoryError
        """
        numbers = float(_COPIES * self.count * self.p * (self.n_out + self.n_in))
        require(
            numbers * self.dtype.itemsize, f"the row space of {self.p} parameters, each with a curvature of its own"
        )

    def row_space_in_units(self, t: Tensor) -> RowSpace | None:
        """Return the row space of `in_units` where that is None, but its structure known; None where that is not."""
        return None

    def in_units(self, t: Tensor) -> Stage | None:
        """Return stages that know their structure with controls x̃, x = t ∘ x̃; None where no kind does. See `lq.stages.penalized.scaled`."""
        return None

    def eye(self, size: int) -> Tensor:
        """K identity matrices, shape (K, size, size), sharing memory."""
        return torch.eye(size, dtype=self.dtype, device=self.device).expand(self.count, size, size)

    def dense_F(self) -> Tensor:
        """F as an array, shape (K, n_out, n_in)."""
        return self.F(self.eye(self.n_in))

    def dense_G(self) -> Tensor:
        """G as an array, shape (K, n_out, p)."""
        return self.Gt(self.eye(self.n_out)).mT

    def dense_A(self) -> Tensor:
        """A as an array, shape (K, p, p)."""
        return self.A(self.eye(self.p))

    def dense_B(self) -> Tensor:
        """B as an array, shape (K, p, n_in)."""
        return self.B(self.eye(self.n_in))

    def dense_C(self) -> Tensor:
        """C as an array, shape (K, n_in, n_in)."""
        return self.C(self.eye(self.n_in))

    def C_of_samples(self, samples: int) -> Tensor:
        """C of each of that many parts of the state, a divisor of `self.samples`: (K, samples, i, i), samples · i = n_in."""
        i = self.n_in // samples
        return self.C(self.eye(i).repeat(1, samples, 1)).reshape(self.count, samples, i, i)

    @abstractmethod
    def of_samples(self, start: int, stop: int, samples: int) -> Self:
        """Return the stages on parts start..stop of the state out of `samples`, a divisor of `self.samples`.

        Controls stay as they are. A is left out, since it is of no part by itself.
        """

    def of_chosen(self, which: Tensor, weights: Tensor, samples: int) -> Stage | None:
        """Return the stages on the parts `which` of the state out of `samples`, a divisor of `self.samples`, each counted so many times.

        B and C of a part, which are linear in its adjoint, are multiplied by its weight; controls and A stay as they are. None where a
        kind does not know how.
        """
        return None

    def sample_rows(self, samples: int) -> SampleRows | None:
        """The Kronecker factors of G and B of one stage where its controls act on one row a sample, else None."""
        return None

    def G_columns(self, start: int, stop: int) -> Tensor:
        """Columns start..stop of G of one stage, (1, n_out, stop − start)."""
        return self.G(self.eye(self.p)[:, :, start:stop])

    def Gt_each(self, y: Tensor, samples: int) -> Tensor:
        """G_bᵀ y_b for each part of one stage, not added up: (samples, n_out / samples, k) to (samples, p, k)."""
        return self.dense_G()[0].reshape(samples, self.n_out // samples, self.p).mT @ y

    def entries(self, block: str) -> int:
        """By how many numbers a product with "F", "G", "B" or "C" of one stage multiplies, where that is not zero."""
        rows = {"F": self.n_out, "G": self.n_out, "B": self.p, "C": self.n_in}[block]
        return rows * (self.p if block == "G" else self.n_in)

    def calls(self, block: str) -> int:
        """About how many calls of torch a product with "F", "G", "A", "B" or "C" of one stage or its transpose takes, views counted."""
        return _CALLS

    def pull_back(self, V: Tensor) -> Tensor:
        """FᵀVF + C for symmetric V of one stage, (n_out, n_out) to (n_in, n_in), in memory of its own."""
        out = self.Ft(self.Ft(V[None]).mT)[0]
        return out.add_(self.dense_C()[0]) if "C" in self.nonzero else out

    def pull_back_over(self, V: Tensor) -> Tensor:
        """The same where V may be overwritten: in its memory, where a kind knows how. New memory of that size is slow to come by."""
        return self.pull_back(V)


def entries_of(which: Tensor, weights: Tensor, each: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the entries of some parts of a vector, each `each` long, and the weight of each entry in the dtype of `like`."""
    positions = which[:, None] * each + torch.arange(each, device=which.device)
    return positions.flatten().to(like.device), weights.repeat_interleave(each).to(like)


def common_samples(stages: Iterable[Stage]) -> int:
    """Into how many parts the states of all these stages fall at once, the largest number that divides each `samples`; 1 of none."""
    return max(1, math.gcd(*(stage.samples for stage in stages)))


def times(X: Tensor, Y: Tensor) -> Tensor:
    """Products X Y of matrices in stacks; of a column and a row entry by entry, ten times as fast as small products are."""
    return X * Y if X.shape[-1] == 1 else torch.bmm(X, Y)
