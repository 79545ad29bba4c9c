"""A linear-quadratic (LQ) problem: a chain of stages, and the products every operator is made of.

    min over x of  Σ_l ½ x_lᵀ(A_l+εI)x_l + x_lᵀB_l δ_{l−1} + ½ δ_{l−1}ᵀC_l δ_{l−1} − g_lᵀx_l,
    δ_l = F_l δ_{l−1} + G_l x_l,   δ_0 = 0.

Its solution is (H + εI)⁻¹g with H = A + B P M⁻¹ G + Gᵀ M⁻ᵀ Pᵀ Bᵀ + Gᵀ M⁻ᵀ Pᵀ C P M⁻¹ G. The state after the last stage
is free. A diagonal part of A, the curvature of a separable penalty on the controls, may stand apart: no stage sees it, so that their
structure is that of the chain without it (`Analysis.at` says how it is factored).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from linop_hess.lq.layout import Layout, Slots, sizes_of
from linop_hess.lq.stages.base import Stage
from linop_hess.lq.stages.dense import DenseStage
from linop_hess.lq.transition import Sweep, SweptProduct, Transition
from linop_hess.processes import ALONE, Processes


class Problem:
    """Stages in order, kept as stacks of same-shaped ones.

    Parameters
    ----------
    blocks : sequence of Stage
        The stacks.
    order : array_like of int, shape (L, 2)
        For each stage of the chain, its stack and its position there; positions of a stack ascend along the chain.
    names : sequence, optional
        For each stage what to call it in messages: strings, or what has one.
    places : array_like of int, shape (N,), optional
        Where each control lies in flat vectors, in the order of the chain: stage by stage, and of each in its own order. By default
        flat vectors are in that order. Everything of size N is flat: gradients, H, its diagonal, samples.
    of_loss : frozenset of int
        Stacks whose curvature Gauss-Newton keeps, beside objectives.
    diagonal : Tensor, shape (N,), optional
        What is added to the diagonal of A, and so of H; flat, of the dtype of the stages.

    Attributes
    ----------
    diagonal : Tensor or None
    layout : Layout
        Sizes and places of controls and states.
    transition : Transition
        M and M⁻¹.

    Raises
    ------
    ValueError
        If there is no stage, neighbouring stages do not fit together, `places` is not a permutation, or `diagonal` is not one number a
        control.
    """

    def __init__(
        self,
        blocks: Sequence[Stage],
        order: np.ndarray,
        names: Sequence[object] | None = None,
        places: np.ndarray | None = None,
        of_loss: frozenset[int] = frozenset(),
        diagonal: Tensor | None = None,
    ) -> None:
        if not len(order):
            raise ValueError("expected at least one stage, got none: an LQ problem is a chain of stages")
        self._fill(Layout(blocks, order, places), blocks, names, of_loss, diagonal)
        layout = self.layout
        wrong = np.flatnonzero(layout.n_in[1:] != layout.n_out[:-1])
        if wrong.size:
            l = int(wrong[0])
            raise ValueError(
                f"stage {self.name(l)} leaves a state of size {layout.n_out[l]}, but stage {self.name(l + 1)} "
                f"expects one of size {layout.n_in[l + 1]}: make the F and C of neighbours agree"
            )

    @classmethod
    def laid_out(
        cls,
        layout: Layout,
        blocks: Sequence[Stage],
        names: Sequence[object] | None = None,
        of_loss: frozenset[int] = frozenset(),
        diagonal: Tensor | None = None,
    ) -> Problem:
        """Build a problem of stacks that have the sizes of another's, and so its layout, which is not made again.

        Raises
        ------
        ValueError
            If they have other sizes, or `diagonal` is not one number a control.
        """
        if layout.sizes != sizes_of(blocks):
            raise ValueError("expected stacks of the sizes of the layout, got others: build the problem from its order")
        problem = cls.__new__(cls)
        problem._fill(layout, blocks, names, of_loss, diagonal)
        return problem

    def _fill(
        self,
        layout: Layout,
        blocks: Sequence[Stage],
        names: Sequence[object] | None,
        of_loss: frozenset[int],
        diagonal: Tensor | None,
    ) -> None:
        self.blocks, self.layout, self.names, self.of_loss = tuple(blocks), layout, names, of_loss
        self.diagonal = diagonal
        self.transition = Transition(self.blocks, layout)
        if diagonal is not None and (diagonal.shape != (layout.size,) or not bool(torch.isfinite(diagonal).all())):
            raise ValueError(
                f"expected a diagonal of {layout.size} finite numbers, got one of shape {tuple(diagonal.shape)}: give each control its own"
            )

    @classmethod
    def from_blocks(
        cls,
        A: Sequence[np.ndarray | Tensor],
        B: Sequence[np.ndarray | Tensor],
        C: Sequence[np.ndarray | Tensor],
        F: Sequence[np.ndarray | Tensor],
        G: Sequence[np.ndarray | Tensor],
    ) -> Problem:
        """Build a problem from plain arrays, one of each per stage; any size may differ from stage to stage, or be 0.

        Parameters
        ----------
        A : sequence of array, each (p_l, p_l), symmetric to 1e-5 of its largest entry; its symmetric part is taken
        B : sequence of array, each (p_l, n_{l−1})
        C : sequence of array, each (n_{l−1}, n_{l−1}), as A
        F : sequence of array, each (n_l, n_{l−1})
        G : sequence of array, each (n_l, p_l)

        Raises
        ------
        ValueError
            If shapes disagree, a block holds NaN or Inf, or A or C is not symmetric.
        TypeError
            If dtypes are not one of float32 and float64.
        """
        if not len(A) == len(B) == len(C) == len(F) == len(G):
            raise ValueError(
                "expected one block per stage of A, B, C, F and G, got "
                f"{len(A)}, {len(B)}, {len(C)}, {len(F)} and {len(G)} blocks: pass as many of each"
            )
        stages = [DenseStage.from_arrays(l, *group) for l, group in enumerate(zip(A, B, C, F, G, strict=True))]
        dtypes = {stage.dtype for stage in stages}
        if len(dtypes) > 1:
            raise TypeError(f"expected blocks of one dtype, got {sorted(map(str, dtypes))}: convert them to one")
        return cls.stacked(stages)

    @classmethod
    def stacked(
        cls,
        stages: Iterable[Stage],
        names: Sequence[object] | None = None,
        places: np.ndarray | None = None,
        diagonal: Tensor | None = None,
    ) -> Problem:
        """Build a problem from single stages, each a stack of one."""
        blocks = list(stages)
        return cls(blocks, np.array([(b, 0) for b in range(len(blocks))]), names, places, diagonal=diagonal)

    why_no_chain: str = ""
    """Of a problem that has no stages of its own, as a sum over batches: why, as messages say it."""

    processes: Processes = ALONE
    """Of a sum over parts: those that have some each."""

    def parts(self) -> Iterator[tuple[Problem, float]]:
        """Yield the chains whose Hessians, weighted, H is the sum of: itself, here; see `lq.SummedProblem`."""
        yield self, 1.0

    def typical_part(self) -> tuple[Problem, int]:
        """Return a chain and how many about its size there are, for estimates."""
        return self, 1

    def name(self, l: int) -> str:
        """What to call stage l (0-based) in a message."""
        return f"{l + 1}" if self.names is None else f"{l + 1} ({self.names[l]})"

    def recipe(self) -> dict[str, Any]:
        """The arguments that make this problem again, by name."""
        return {
            "blocks": self.blocks,
            "order": self.order,
            "names": self.names,
            "places": self.places,
            "of_loss": self.of_loss,
            "diagonal": self.diagonal,
        }

    def __reduce__(self) -> tuple[Callable[..., Problem], tuple[Any, ...]]:
        """Pickle the blocks and their places alone; what was computed from them is computed again where it is needed."""
        return type(self), tuple(self.recipe().values())

    @property
    def order(self) -> np.ndarray:
        """For each stage of the chain its stack and its position there, shape (L, 2)."""
        return self.layout.order

    @property
    def places(self) -> np.ndarray | None:
        """Where each control lies in flat vectors, in the order of the chain, shape (N,); None: there."""
        return self.layout.places

    @property
    def length(self) -> int:
        """Number of stages L."""
        return self.layout.length

    @property
    def size(self) -> int:
        """Number of controls N = Σ p_l."""
        return self.layout.size

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype of the blocks."""
        return self.blocks[0].dtype

    @property
    def numpy_dtype(self) -> np.dtype:
        """The same for NumPy."""
        return np.dtype(str(self.dtype).removeprefix("torch."))

    @property
    def device(self) -> torch.device:
        """Device of the blocks."""
        return self.blocks[0].device

    @property
    def nbytes(self) -> int:
        """Bytes held by the blocks."""
        return sum(block.nbytes for block in self.blocks) + (0 if self.diagonal is None else self.diagonal.nbytes)

    @cached_property
    def stages(self) -> list[Stage]:
        """Every stage by itself, views into the stacks."""
        # Not those of M, which may be shared with a problem of other curvature.
        return [self.blocks[b].at(k) for b, k in self.order.tolist()]

    def _blockwise(
        self,
        v: Tensor,
        read: list[Slots],
        write: list[Slots],
        size: int,
        product: Callable[[Stage, Tensor], Tensor],
        block: str | None = None,
    ) -> Tensor:
        """Apply a product stack by stack; those are left out whose curvature `block` is zero."""
        out = v.new_zeros(size, v.shape[1])
        for stage, source, target in zip(self.blocks, read, write, strict=True):
            if source.size and target.size and (block is None or block in stage.nonzero):
                target.put(out, product(stage, source.gather(v)))
        return out

    def apply_F(self, d: Tensor) -> Tensor:
        """(F_l δ_{l−1})_l: (Σ n_0..L−1, k) to (Σ n_1..L, k)."""
        q = self.layout
        return self._blockwise(d, q.in_slots, q.out_slots, q.size_out, lambda s, v: s.F(v))

    def apply_Ft(self, y: Tensor) -> Tensor:
        """(F_lᵀ y_l)_l: (Σ n_1..L, k) to (Σ n_0..L−1, k)."""
        q = self.layout
        return self._blockwise(y, q.out_slots, q.in_slots, q.size_in, lambda s, v: s.Ft(v))

    def apply_G(self, x: Tensor) -> Tensor:
        """D_x: (N, k) to (Σ n_1..L, k)."""
        q = self.layout
        return self._blockwise(x, q.x_slots, q.out_slots, q.size_out, lambda s, v: s.G(v))

    def apply_Gt(self, y: Tensor) -> Tensor:
        """D_xᵀ: (Σ n_1..L, k) to (N, k)."""
        q = self.layout
        return self._blockwise(y, q.out_slots, q.x_slots, q.size, lambda s, v: s.Gt(v))

    def apply_A(self, x: Tensor) -> Tensor:
        """DD_xx: (N, k) to (N, k)."""
        q = self.layout
        out = self._blockwise(x, q.x_slots, q.x_slots, q.size, lambda s, v: s.A(v), "A")
        return out if self.diagonal is None else out.addcmul_(self.diagonal[:, None], x)

    def apply_B(self, d: Tensor) -> Tensor:
        """DD_zx: (Σ n_0..L−1, k) to (N, k)."""
        q = self.layout
        return self._blockwise(d, q.in_slots, q.x_slots, q.size, lambda s, v: s.B(v), "B")

    def apply_Bt(self, x: Tensor) -> Tensor:
        """DM_xz: (N, k) to (Σ n_0..L−1, k)."""
        q = self.layout
        return self._blockwise(x, q.x_slots, q.in_slots, q.size_in, lambda s, v: s.Bt(v), "B")

    def apply_C(self, d: Tensor) -> Tensor:
        """DM_zz: (Σ n_0..L−1, k) to the same."""
        q = self.layout
        return self._blockwise(d, q.in_slots, q.in_slots, q.size_in, lambda s, v: s.C(v), "C")

    def hessian_product(self, x: Tensor, damping: complex = 0.0) -> Tensor:
        """(H + εI) x, shape (N, k): one forward and one backward substitution. x and ε may be complex."""
        if isinstance(damping, complex) or (x.is_complex() and not self.dtype.is_complex):
            parts = [x.real, x.imag] if x.is_complex() else [x]
            products = self.hessian_product(torch.cat(parts, 1)).split(x.shape[1], 1)
            out = torch.complex(products[0], products[1] if x.is_complex() else torch.zeros_like(products[0]))
            return out.add_(x, alpha=damping) if damping else out
        out = self._times(x)
        return out.add_(x, alpha=damping) if damping else out

    def _times(self, x: Tensor) -> Tensor:
        """H x, as fresh memory."""
        q = self.layout
        if not self.transition.is_banded:
            return self._swept_product(x)
        d = q.shift(self.transition.substitute(self.apply_G(x)))
        costate = self.transition.substitute_adjoint(q.shift_adjoint(self.apply_Bt(x) + self.apply_C(d)))
        out = self.apply_Gt(costate)
        for stage, states, controls in zip(self.blocks, q.in_slots, q.x_slots, strict=True):
            if controls.size and "A" in stage.nonzero:
                controls.add(out, stage.A(controls.gather(x)))
            if controls.size and states.size and "B" in stage.nonzero:
                controls.add(out, stage.B(states.gather(d)))
        if self.diagonal is not None:
            out.addcmul_(self.diagonal[:, None], x)
        return out

    @cached_property
    def _swept(self) -> SweptProduct:
        return SweptProduct(Sweep(self.stages[self.layout.first :]))

    def _swept_product(self, x: Tensor) -> Tensor:
        """The same stage by stage, which keeps wide states in cache where products of whole stacks do not."""
        out = self.layout.in_flat_order(self._swept.times(self.layout.in_chain_order(x)))
        if self.diagonal is not None:
            out.addcmul_(self.diagonal[:, None], x)
        return out

    def to(self, dtype: torch.dtype) -> Problem:
        """Return the problem in another floating-point dtype."""
        diagonal = None if self.diagonal is None else self.diagonal.to(dtype)
        return self._with([block.to(dtype) for block in self.blocks], diagonal)

    def with_curvature(self, blocks: Sequence[Stage], diagonal: Tensor | None = None) -> Problem:
        """Return the problem with other stages of the same F, and another diagonal, by default none; M is kept as it is."""
        problem = self._with(blocks, diagonal)
        problem.transition = self.transition
        return problem

    def gauss_newton(self) -> Problem:
        """Return the Gauss-Newton problem: only the curvature of the loss remains.

        That is the curvature of objectives and of `of_loss`, and the diagonal, a penalty's.
        """
        kept = self.of_loss
        blocks = [s if b in kept else s.gauss_newton() for b, s in enumerate(self.blocks)]
        return self.with_curvature(blocks, self.diagonal)

    def _with(self, blocks: Sequence[Stage], diagonal: Tensor | None) -> Problem:
        return Problem.laid_out(self.layout, blocks, self.names, self.of_loss, diagonal)
