"""A stack of K same-shaped stages of a linear-quadratic (LQ) problem, and what every kind of stage can do.

Stage l contributes

    ½ xᵀ(A + εI)x + xᵀB δ_in + ½ δ_inᵀ C δ_in − gᵀx,        δ_out = F δ_in + G x,

with x its controls (p of them), δ_in the state before it and δ_out the state after it. A kind of stage is one
class that multiplies with A, B, C, F and G, for all K stages of a stack at once, in whatever structure they have.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from linop_hess.lq.stages.row_space import RangeSplit


@dataclass(frozen=True)
class Stacked:
    """Arrays with a common leading stage axis: every tensor field is sliced together."""

    def take(self, which: slice | np.ndarray) -> Self:
        """Return the stages `which` of the stack, a slice (views) or an index array (copies)."""
        changed: dict[str, Tensor | Stacked] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changed[field.name] = value[
                    which if isinstance(which, slice) else torch.from_numpy(which).to(value.device)
                ]
            elif isinstance(value, Stacked):
                changed[field.name] = value.take(which)
        return replace(self, **changed)

    def at(self, position: int) -> Self:
        """Return the single stage at `position`, as a stack of one."""
        return self.take(slice(position, position + 1))

    def to(self, dtype: torch.dtype) -> Self:
        """Return the stack with its floating-point arrays in another dtype."""
        changed: dict[str, Tensor | Stacked] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Stacked) or (isinstance(value, Tensor) and value.is_floating_point()):
                changed[field.name] = value.to(dtype)
        return replace(self, **changed)

    def first_not_finite(self) -> int | None:
        """Position of the first stage with a NaN or Inf in its arrays, or None."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Stacked):
                inner = value.first_not_finite()
                if inner is not None:
                    return inner
            elif isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
                return int(torch.isfinite(value).flatten(1).all(1).long().argmin())
        return None

    @property
    def nbytes(self) -> int:
        """Bytes held by the arrays."""
        total = 0
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                total += value.untyped_storage().nbytes()
            elif isinstance(value, Stacked):
                total += value.nbytes
        return total


@dataclass(frozen=True)
class Stages(Stacked, ABC):
    """A stack of K same-shaped stages.

    Every product takes and gives arrays with a leading stage axis and a trailing axis of k right-hand sides:
    controls (K, p, k), states before the stage (K, n_in, k), states after it (K, n_out, k).
    """

    @property
    @abstractmethod
    def count(self) -> int:
        """Number of stages K in the stack."""

    @property
    @abstractmethod
    def n_in(self) -> int:
        """State dimension before the stage."""

    @property
    @abstractmethod
    def n_out(self) -> int:
        """State dimension after the stage."""

    @property
    @abstractmethod
    def p(self) -> int:
        """Number of controls (parameters) of a stage."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Floating dtype of the arrays."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device of the arrays."""

    @abstractmethod
    def F(self, d: Tensor) -> Tensor:
        """F δ: (K, n_in, k) to (K, n_out, k)."""

    @abstractmethod
    def Ft(self, y: Tensor) -> Tensor:
        """Fᵀ y: (K, n_out, k) to (K, n_in, k)."""

    def G(self, x: Tensor) -> Tensor:
        """G x: (K, p, k) to (K, n_out, k)."""
        return x.new_zeros(self.count, self.n_out, x.shape[-1])

    def Gt(self, y: Tensor) -> Tensor:
        """Gᵀ y: (K, n_out, k) to (K, p, k)."""
        return y.new_zeros(self.count, self.p, y.shape[-1])

    def A(self, x: Tensor) -> Tensor | None:
        """A x: (K, p, k) to (K, p, k), or None where A = 0."""
        return None

    def B(self, d: Tensor) -> Tensor | None:
        """B δ: (K, n_in, k) to (K, p, k), or None where B = 0."""
        return None

    def Bt(self, x: Tensor) -> Tensor | None:
        """Bᵀ x: (K, p, k) to (K, n_in, k), or None where B = 0."""
        return None

    def C(self, d: Tensor) -> Tensor | None:
        """C δ: (K, n_in, k) to (K, n_in, k), or None where C = 0."""
        return None

    @abstractmethod
    def without_curvature(self) -> Self:
        """Return the same stages with A = 0, B = 0 and C = 0, as Gauss-Newton wants them."""

    def range_split(self) -> RangeSplit:
        """Split the controls into the row range of G and its complement; see `lq.rangesplit`."""
        from linop_hess.lq.stages.row_space import dense_range_split

        return dense_range_split(self)

    @cached_property
    def split(self) -> RangeSplit:
        """The range split of every stage, computed once for the whole stack."""
        return self.range_split()

    def eye(self, size: int) -> Tensor:
        """K identity matrices, shape (K, size, size), sharing memory."""
        return torch.eye(size, dtype=self.dtype, device=self.device).expand(self.count, size, size)

    def dense_F(self) -> Tensor:
        """F as an array, shape (K, n_out, n_in)."""
        return self.F(self.eye(self.n_in))

    def dense_G(self) -> Tensor:
        """G as an array, shape (K, n_out, p)."""
        return self.Gt(self.eye(self.n_out)).mT

    def dense_A(self) -> Tensor | None:
        """A as an array, shape (K, p, p), or None where A = 0."""
        return self.A(self.eye(self.p))

    def dense_B(self) -> Tensor | None:
        """B as an array, shape (K, p, n_in), or None where B = 0."""
        return self.B(self.eye(self.n_in))

    def dense_C(self) -> Tensor | None:
        """C as an array, shape (K, n_in, n_in), or None where C = 0."""
        return self.C(self.eye(self.n_in))

    def pull_back(self, V: Tensor | None) -> Tensor | None:
        """FᵀVF + C for symmetric V of one stage, (n_out, n_out) to (n_in, n_in), in memory of its own; None stands for zero."""
        C = self.dense_C()
        if V is None:
            return None if C is None else C[0].clone()
        FtVF = self.Ft(self.Ft(V[None]).mT)[0]
        return FtVF if C is None else FtVF.add_(C[0])
