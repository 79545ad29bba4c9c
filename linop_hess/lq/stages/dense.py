"""Stages whose blocks are dense arrays, and stages that are diagonal."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from linop_hess.lq.stages.base import Stages


@dataclass(frozen=True)
class DenseStages(Stages):
    """K stages with dense blocks, acting on m samples independently with shared controls.

    The state before a stage is m samples of size i, the state after it m samples of size o; m = 1 is a plain dense
    stage. `f` may have one sample shared by all m.

    Parameters
    ----------
    f : Tensor, shape (K, m or 1, o, i)
    g : Tensor or None, shape (K, m, o, p)
        None: no controls.
    a : Tensor or None, shape (K, p, p)
    b : Tensor or None, shape (K, p, m, i)
    c : Tensor or None, shape (K, m, i, i)
    samples : int
        m.
    """

    f: Tensor
    g: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    c: Tensor | None = None
    samples: int = 1

    @classmethod
    def plain(cls, F: Tensor, G: Tensor | None, A: Tensor | None, B: Tensor | None, C: Tensor | None) -> DenseStages:
        """Build from plain blocks F (K, n_out, n_in), G (K, n_out, p), A, B (K, p, n_in), C."""
        return cls(
            F[:, None],
            None if G is None else G[:, None],
            A,
            None if B is None else B[:, :, None],
            None if C is None else C[:, None],
        )

    @property
    def count(self) -> int:
        return self.f.shape[0]

    @property
    def n_in(self) -> int:
        return self.samples * self.f.shape[3]

    @property
    def n_out(self) -> int:
        return self.samples * self.f.shape[2]

    @property
    def p(self) -> int:
        return 0 if self.g is None else self.g.shape[3]

    @property
    def dtype(self) -> torch.dtype:
        return self.f.dtype

    @property
    def device(self) -> torch.device:
        return self.f.device

    def _per_sample(self, blocks: Tensor, v: Tensor) -> Tensor:
        k = v.shape[-1]
        product = blocks @ v.reshape(self.count, self.samples, blocks.shape[-1], k)
        return product.reshape(self.count, self.samples * blocks.shape[-2], k)

    def F(self, d: Tensor) -> Tensor:
        return self._per_sample(self.f, d)

    def Ft(self, y: Tensor) -> Tensor:
        return self._per_sample(self.f.mT, y)

    def G(self, x: Tensor) -> Tensor:
        return super().G(x) if self.g is None else self.g.flatten(1, 2) @ x

    def Gt(self, y: Tensor) -> Tensor:
        return super().Gt(y) if self.g is None else self.g.flatten(1, 2).mT @ y

    def A(self, x: Tensor) -> Tensor | None:
        return None if self.a is None else self.a @ x

    def B(self, d: Tensor) -> Tensor | None:
        return None if self.b is None else self.b.flatten(2) @ d

    def Bt(self, x: Tensor) -> Tensor | None:
        return None if self.b is None else self.b.flatten(2).mT @ x

    def C(self, d: Tensor) -> Tensor | None:
        return None if self.c is None else self._per_sample(self.c, d)

    def dense_G(self) -> Tensor:
        return super().dense_G() if self.g is None else self.g.flatten(1, 2)

    def without_curvature(self) -> Self:
        return replace(self, a=None, b=None, c=None)


@dataclass(frozen=True)
class DiagonalStages(Stages):
    """K stages without controls, δ_out = f ∘ δ_in with curvature diag(c): pointwise functions.

    Parameters
    ----------
    f : Tensor, shape (K, n)
    c : Tensor or None, shape (K, n)
    """

    f: Tensor
    c: Tensor | None = None

    @property
    def count(self) -> int:
        return self.f.shape[0]

    @property
    def n_in(self) -> int:
        return self.f.shape[1]

    @property
    def n_out(self) -> int:
        return self.f.shape[1]

    @property
    def p(self) -> int:
        return 0

    @property
    def dtype(self) -> torch.dtype:
        return self.f.dtype

    @property
    def device(self) -> torch.device:
        return self.f.device

    def F(self, d: Tensor) -> Tensor:
        return self.f[:, :, None] * d

    def Ft(self, y: Tensor) -> Tensor:
        return self.f[:, :, None] * y

    def C(self, d: Tensor) -> Tensor | None:
        return None if self.c is None else self.c[:, :, None] * d

    def dense_F(self) -> Tensor:
        return torch.diag_embed(self.f)

    def dense_C(self) -> Tensor | None:
        return None if self.c is None else torch.diag_embed(self.c)

    def without_curvature(self) -> Self:
        return replace(self, c=None)

    def pull_back(self, V: Tensor | None) -> Tensor | None:
        if V is None:
            return super().pull_back(V)
        out = (V * self.f[0, :, None]).mul_(self.f[0])
        if self.c is not None:
            out.diagonal().add_(self.c[0])
        return out


@dataclass(frozen=True)
class CostStage(Stages):
    """The last stage of a chain: a scalar cost, δ_out = rowᵀ δ_in, with curvature block diagonal over m samples.

    Parameters
    ----------
    row : Tensor, shape (1, n_in)
        Gradient of the cost.
    c : Tensor, shape (1, m, i, i)
        Its Hessian, m · i = n_in.
    """

    row: Tensor
    c: Tensor

    @property
    def count(self) -> int:
        return 1

    @property
    def n_in(self) -> int:
        return self.row.shape[1]

    @property
    def n_out(self) -> int:
        return 1

    @property
    def p(self) -> int:
        return 0

    @property
    def dtype(self) -> torch.dtype:
        return self.row.dtype

    @property
    def device(self) -> torch.device:
        return self.row.device

    def F(self, d: Tensor) -> Tensor:
        return self.row[:, None, :] @ d

    def Ft(self, y: Tensor) -> Tensor:
        return self.row[:, :, None] @ y

    def C(self, d: Tensor) -> Tensor | None:
        m, i = self.c.shape[1:3]
        return (self.c @ d.reshape(1, m, i, d.shape[-1])).reshape(d.shape)

    def without_curvature(self) -> Self:
        """Return itself: Gauss-Newton keeps the curvature of the cost."""
        return self

    def to(self, dtype: torch.dtype) -> Self:
        """As of any stage; what rounding in a lower precision left of eigenvalues of C that are zero is taken off."""
        stage = super().to(dtype)
        rounding = self.c.shape[-1] * torch.finfo(self.dtype).eps
        if torch.finfo(dtype).eps >= torch.finfo(self.dtype).eps or not self.c.numel():
            return stage
        values, vectors = torch.linalg.eigh(stage.c)
        values = torch.where(values.abs() > rounding * values.abs().max(), values, 0.0)
        c = (vectors * values[..., None, :]) @ vectors.mT
        return replace(stage, c=(c + c.mT) / 2)
