"""Stages whose blocks are dense arrays, of the whole state or of each sample of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from linop_hess.lq.accuracy import SYMMETRIC
from linop_hess.lq.stages.base import Stage, entries_of


@dataclass(frozen=True)
class DenseStage(Stage):
    """K stages with dense blocks, acting on m samples independently with shared controls.

    The state before a stage is m samples of size i, the state after it m samples of size o; m = 1 is a plain dense stage. `f` may have
    one sample shared by all m. The curvature is what is given, whatever the adjoint.

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
    def plain(cls, F: Tensor, G: Tensor | None, A: Tensor | None, B: Tensor | None, C: Tensor | None) -> Self:
        """Build from plain blocks F (K, n_out, n_in), G (K, n_out, p), A, B (K, p, n_in), C; None stands for zero."""
        return cls(
            F[:, None],
            None if G is None else G[:, None],
            A,
            None if B is None else B[:, :, None],
            None if C is None else C[:, None],
        )

    @classmethod
    def from_arrays(
        cls,
        l: int,
        A: np.ndarray | Tensor,
        B: np.ndarray | Tensor,
        C: np.ndarray | Tensor,
        F: np.ndarray | Tensor,
        G: np.ndarray | Tensor,
    ) -> Self:
        """Make one stage of blocks that are checked and copied.

        Parameters
        ----------
        l : int
            Its position in the chain (0-based), for messages.
        A : array, shape (p, p)
            Symmetric to `accuracy.SYMMETRIC`, of which the symmetric part is taken, as of C.
        B : array, shape (p, n_in)
        C : array, shape (n_in, n_in)
        F : array, shape (n_out, n_in)
        G : array, shape (n_out, p)

        Raises
        ------
        ValueError
            If shapes disagree, a block holds NaN or Inf, or A or C is not symmetric.
        TypeError
            If a dtype is not a floating one of at least 32 bits, or dtypes differ.
        """
        A, B, C, F, G = blocks = [
            block.detach().clone() if isinstance(block, Tensor) else _array(l, name, block)
            for name, block in zip("ABCFG", (A, B, C, F, G), strict=True)
        ]
        for name, block in zip("ABCFG", blocks, strict=True):
            if block.ndim != 2:
                raise ValueError(
                    f"stage {l + 1}: {name} has shape {tuple(block.shape)}, expected a matrix: pass an array of two dimensions, "
                    "(1, 1) for a number"
                )
        p, n = B.shape
        expected = {"A": (p, p), "B": (p, n), "C": (n, n), "F": (F.shape[0], n), "G": (F.shape[0], p)}
        for name, block in zip("ABCFG", blocks, strict=True):
            if tuple(block.shape) != expected[name]:
                raise ValueError(
                    f"stage {l + 1}: {name} has shape {tuple(block.shape)}, expected {expected[name]} "
                    f"to go with B of shape {tuple(B.shape)} and F of shape {tuple(F.shape)}"
                )
            if not block.dtype.is_floating_point or block.dtype.itemsize < 4:
                raise TypeError(f"stage {l + 1}: {name} has dtype {block.dtype}, expected float32 or float64")
            if not bool(torch.isfinite(block).all()):
                raise ValueError(f"stage {l + 1}: {name} holds NaN or Inf")
        dtypes = {block.dtype for block in blocks}
        if len(dtypes) > 1:
            raise TypeError(f"stage {l + 1}: all blocks need one dtype, got {sorted(map(str, dtypes))}")
        for name, block in (("A", A), ("C", C)):
            if block.numel() and not torch.allclose(block, block.T, rtol=0, atol=SYMMETRIC * float(block.abs().max())):
                raise ValueError(f"stage {l + 1}: {name} is not symmetric; pass its symmetric part")
        a, b, c = (block[None] if bool(block.any()) else None for block in ((A + A.T) / 2, B, (C + C.T) / 2))
        return cls.plain(F[None], G[None], a, b, c)

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
    def nonzero(self) -> frozenset[str]:
        return frozenset(name for name, block in zip("ABC", (self.a, self.b, self.c), strict=True) if block is not None)

    def _per_sample(self, blocks: Tensor, v: Tensor) -> Tensor:
        k = v.shape[-1]
        if k == 1:  # as rows: batches of products with one column take torch up to seven times as long
            rows = v.reshape(self.count, blocks.shape[1], self.samples // blocks.shape[1], blocks.shape[-1])
            return (rows @ blocks.mT).reshape(self.count, self.samples * blocks.shape[-2], 1)
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

    def A(self, x: Tensor) -> Tensor:
        return super().A(x) if self.a is None else self.a @ x

    def B(self, d: Tensor) -> Tensor:
        return super().B(d) if self.b is None else self.b.flatten(2) @ d

    def Bt(self, x: Tensor) -> Tensor:
        return super().Bt(x) if self.b is None else self.b.flatten(2).mT @ x

    def C(self, d: Tensor) -> Tensor:
        return super().C(d) if self.c is None else self._per_sample(self.c, d)

    def gauss_newton(self) -> Self:
        return replace(self, a=None, b=None, c=None)

    def dense_F(self) -> Tensor:
        return self.f[:, 0] if self.samples == 1 else super().dense_F()

    def dense_G(self) -> Tensor:
        return super().dense_G() if self.g is None else self.g.flatten(1, 2)

    def dense_A(self) -> Tensor:
        return super().dense_A() if self.a is None else self.a

    def dense_B(self) -> Tensor:
        return super().dense_B() if self.b is None else self.b.flatten(2)

    def dense_C(self) -> Tensor:
        return super().dense_C() if self.c is None or self.samples > 1 else self.c[:, 0]

    def of_chosen(self, which: Tensor, weights: Tensor, samples: int) -> Self:
        at, weight = entries_of(which, weights, self.samples // samples, self.f)
        return replace(
            self,
            f=self.f if self.f.shape[1] < self.samples else self.f[:, at],
            g=None if self.g is None else self.g[:, at],
            b=None if self.b is None else self.b[:, :, at] * weight[:, None],
            c=None if self.c is None else self.c[:, at] * weight[:, None, None],
            samples=at.numel(),
        )

    def of_samples(self, start: int, stop: int, samples: int) -> Self:
        each = self.samples // samples
        part = slice(start * each, stop * each)
        return replace(
            self,
            f=self.f if self.f.shape[1] < self.samples else self.f[:, part],
            g=None if self.g is None else self.g[:, part],
            a=None,
            b=None if self.b is None else self.b[:, :, part],
            c=None if self.c is None else self.c[:, part],
            samples=part.stop - part.start,
        )

    def entries(self, block: str) -> int:
        return super().entries(block) // (self.samples if block in "FC" else 1)


def _array(l: int, name: str, block: Any) -> Tensor:
    array = np.array(block)
    if array.dtype.kind not in "biufc":
        raise TypeError(f"stage {l + 1}: {name} has dtype {array.dtype}, expected float32 or float64")
    return torch.from_numpy(array)
