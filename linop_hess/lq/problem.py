"""A linear-quadratic (LQ) problem: a chain of stages, and the products every operator is made of.

    min over x of  Σ_l ½ x_lᵀ(A_l+εI)x_l + x_lᵀB_l δ_{l−1} + ½ δ_{l−1}ᵀC_l δ_{l−1} − g_lᵀx_l,
    δ_l = F_l δ_{l−1} + G_l x_l,   δ_0 = 0.

Its solution is (H + εI)⁻¹g with H = A + B P M⁻¹ G + Gᵀ M⁻ᵀ Pᵀ Bᵀ + Gᵀ M⁻ᵀ Pᵀ C P M⁻¹ G. The state after the last stage
is free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from linop_hess.lq.arrays import stage_of_arrays
from linop_hess.lq.layout import Slots
from linop_hess.lq.scaling import state_scales
from linop_hess.lq.segments import SegmentGroup, segment_groups
from linop_hess.lq.stages.base import Stages
from linop_hess.lq.transition import Transition


class Problem:
    """Stages in order, kept as stacks of same-shaped ones.

    Parameters
    ----------
    blocks : sequence of Stages
        The stacks.
    order : array_like of int, shape (L, 2)
        For each stage of the chain, its stack and its position there; positions of a stack ascend along the chain.
    names : sequence of str, optional
        A name for each stage, used in error messages.

    Raises
    ------
    ValueError
        If neighbouring stages do not fit together.
    """

    def __init__(self, blocks: Sequence[Stages], order: np.ndarray, names: Sequence[str] | None = None) -> None:
        self.blocks = tuple(blocks)
        self.order = np.asarray(order, dtype=np.int64).reshape(-1, 2)
        self.names = names
        if not self.length:
            raise ValueError("an LQ problem needs at least one stage, got none")
        of = self.order[:, 0]
        self.n_in = np.array([block.n_in for block in self.blocks])[of]
        self.n_out = np.array([block.n_out for block in self.blocks])[of]
        self.p = np.array([block.p for block in self.blocks])[of]
        wrong = np.flatnonzero(self.n_in[1:] != self.n_out[:-1])
        if wrong.size:
            l = int(wrong[0])
            raise ValueError(
                f"stage {self.name(l)} leaves a state of size {self.n_out[l]}, but stage {self.name(l + 1)} "
                f"expects one of size {self.n_in[l + 1]}: make the F and C of neighbours agree"
            )
        self.x_offsets = _offsets(self.p)
        self.in_offsets = _offsets(self.n_in)
        self.out_offsets = _offsets(self.n_out)
        members = [np.flatnonzero(of == b) for b in range(len(self.blocks))]
        self.x_slots = [Slots(self.x_offsets[m], s.p) for m, s in zip(members, self.blocks, strict=True)]
        self.in_slots = [Slots(self.in_offsets[m], s.n_in) for m, s in zip(members, self.blocks, strict=True)]
        self.out_slots = [Slots(self.out_offsets[m], s.n_out) for m, s in zip(members, self.blocks, strict=True)]

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
        """
        if not len(A) == len(B) == len(C) == len(F) == len(G):
            raise ValueError(
                "A, B, C, F and G need one block per stage, got "
                f"{len(A)}, {len(B)}, {len(C)}, {len(F)} and {len(G)} blocks"
            )
        stages = [stage_of_arrays(l, *group) for l, group in enumerate(zip(A, B, C, F, G, strict=True))]
        dtypes = {stage.dtype for stage in stages}
        if len(dtypes) > 1:
            raise TypeError(f"all blocks need one dtype, got {sorted(map(str, dtypes))}")
        return cls.stacked(stages)

    @classmethod
    def stacked(cls, stages: Iterable[Stages], names: Sequence[str] | None = None) -> Problem:
        """Build a problem from single stages, each a stack of one."""
        blocks = list(stages)
        return cls(blocks, np.array([(b, 0) for b in range(len(blocks))]), names)

    def name(self, l: int) -> str:
        """What to call stage l (0-based) in a message."""
        return f"{l + 1}" if self.names is None else f"{l + 1} ({self.names[l]})"

    @property
    def length(self) -> int:
        """Number of stages L."""
        return self.order.shape[0]

    @property
    def size(self) -> int:
        """Number of controls N = Σ p_l."""
        return int(self.x_offsets[-1])

    @property
    def size_in(self) -> int:
        """Σ n_0..n_{L−1}."""
        return int(self.in_offsets[-1])

    @property
    def size_out(self) -> int:
        """Σ n_1..n_L."""
        return int(self.out_offsets[-1])

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
        return sum(block.nbytes for block in self.blocks)

    @cached_property
    def first(self) -> int:
        """The first stage with controls: before it δ = 0."""
        with_controls = np.flatnonzero(self.p)
        return int(with_controls[0]) if with_controls.size else self.length

    @cached_property
    def stages(self) -> list[Stages]:
        """Every stage by itself, views into the stacks."""
        return [self.blocks[b].at(int(k)) for b, k in self.order]

    @cached_property
    def segment_groups(self) -> list[SegmentGroup]:
        """The chain cut into segments, those of the same make-up together."""
        return segment_groups(self)

    def with_extended_splits(self) -> Problem:
        """Return the problem with all controls that are coupled to the state, by G or B, counted as visible."""
        problem = Problem(self.blocks, self.order, self.names)
        groups = [replace(group, problem=problem, extended=True) for group in self.segment_groups]
        for name in {"transition", "state_scales", "probe", "norm"} & self.__dict__.keys():
            problem.__dict__[name] = self.__dict__[name]
        problem.__dict__["segment_groups"] = groups
        return problem

    @cached_property
    def state_scales(self) -> Tensor:
        """Units for the states before each stage, powers of two, (Σ n_0..L−1,); see `lq.scaling`."""
        return state_scales(self)

    @cached_property
    def scales_after(self) -> Tensor:
        """The same for the states after each stage, (Σ n_1..L,); 1 after the last."""
        out = self.state_scales.new_ones(self.size_out)
        out[: self.size_out - int(self.n_out[-1])] = self.state_scales[int(self.n_in[0]) :]
        return out

    @cached_property
    def transition(self) -> Transition:
        """M and M⁻¹."""
        return Transition(self)

    def blocks_after_first(self) -> list[tuple[int, np.ndarray]]:
        """(stack, positions in it) of all stages but the first."""
        rest = self.order[1:]
        return [(b, rest[rest[:, 0] == b, 1]) for b in range(len(self.blocks)) if (rest[:, 0] == b).any()]

    def _blockwise(
        self,
        v: Tensor,
        read: list[Slots],
        write: list[Slots],
        size: int,
        product: Callable[[Stages, Tensor], Tensor | None],
    ) -> Tensor:
        out = v.new_zeros(size, v.shape[1])
        for block, source, target in zip(self.blocks, read, write, strict=True):
            if source.size and target.size:
                result = product(block, source.gather(v))
                if result is not None:
                    target.put(out, result)
        return out

    def apply_F(self, d: Tensor) -> Tensor:
        """(F_l δ_{l−1})_l: (Σ n_0..L−1, k) to (Σ n_1..L, k)."""
        return self._blockwise(d, self.in_slots, self.out_slots, self.size_out, lambda s, v: s.F(v))

    def apply_Ft(self, y: Tensor) -> Tensor:
        """(F_lᵀ y_l)_l: (Σ n_1..L, k) to (Σ n_0..L−1, k)."""
        return self._blockwise(y, self.out_slots, self.in_slots, self.size_in, lambda s, v: s.Ft(v))

    def apply_G(self, x: Tensor) -> Tensor:
        """D_x: (N, k) to (Σ n_1..L, k)."""
        return self._blockwise(x, self.x_slots, self.out_slots, self.size_out, lambda s, v: s.G(v))

    def apply_Gt(self, y: Tensor) -> Tensor:
        """D_xᵀ: (Σ n_1..L, k) to (N, k)."""
        return self._blockwise(y, self.out_slots, self.x_slots, self.size, lambda s, v: s.Gt(v))

    def apply_A(self, x: Tensor) -> Tensor:
        """DD_xx: (N, k) to (N, k)."""
        return self._blockwise(x, self.x_slots, self.x_slots, self.size, lambda s, v: s.A(v))

    def apply_B(self, d: Tensor) -> Tensor:
        """DD_zx: (Σ n_0..L−1, k) to (N, k)."""
        return self._blockwise(d, self.in_slots, self.x_slots, self.size, lambda s, v: s.B(v))

    def apply_Bt(self, x: Tensor) -> Tensor:
        """DM_xz: (N, k) to (Σ n_0..L−1, k)."""
        return self._blockwise(x, self.x_slots, self.in_slots, self.size_in, lambda s, v: s.Bt(v))

    def apply_C(self, d: Tensor) -> Tensor:
        """DM_zz: (Σ n_0..L−1, k) to the same."""
        return self._blockwise(d, self.in_slots, self.in_slots, self.size_in, lambda s, v: s.C(v))

    def shift(self, y: Tensor) -> Tensor:
        """P: (z_1..z_L) to (z_0..z_{L−1}) with z_0 = 0."""
        out = y.new_zeros(self.size_in, y.shape[1])
        out[self.n_in[0] :] = y[: self.size_out - self.n_out[-1]]
        return out

    def shift_adjoint(self, d: Tensor) -> Tensor:
        """Pᵀ: (z_0..z_{L−1}) to (z_1..z_L) with z_L = 0."""
        out = d.new_zeros(self.size_out, d.shape[1])
        out[: self.size_out - self.n_out[-1]] = d[self.n_in[0] :]
        return out

    def hessian_product(self, x: Tensor, damping: float = 0.0) -> Tensor:
        """(H + εI) x, shape (N, k): one forward and one backward substitution."""
        d = self.shift(self.transition.solve(self.apply_G(x)))
        costate = self.transition.solve_adjoint(self.shift_adjoint(self.apply_Bt(x) + self.apply_C(d)))
        out = self.apply_A(x) + self.apply_B(d) + self.apply_Gt(costate)
        return out.add_(x, alpha=damping) if damping else out

    @cached_property
    def probe(self) -> tuple[Tensor, Tensor]:
        """A random unit vector v and Hv, each of shape (N, 1)."""
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(self.size, 1, generator=generator, dtype=torch.float64).to(self.dtype).to(self.device)
        v = v / float(v.norm())
        return v, self.hessian_product(v)

    @cached_property
    def norm(self) -> float:
        """‖H‖₂ to within some per cent, from below."""
        return self.damped_norm(0.0)

    def damped_norm(self, damping: float) -> float:
        """‖H + εI‖₂ to within some per cent, from below, by power iteration on a fixed start."""
        v, product = self.probe
        v = product + damping * v
        norm = float(v.double().norm())
        for _ in range(7):
            if norm == 0.0:
                break
            v = self.hessian_product((v.double() / v.double().norm()).to(v.dtype), damping)
            norm = max(norm, float(v.double().norm()))
        return norm

    def to(self, dtype: torch.dtype) -> Problem:
        """Return the problem in another floating-point dtype."""
        return Problem([block.to(dtype) for block in self.blocks], self.order, self.names)

    @cached_property
    def in_float64(self) -> Problem:
        """The problem in float64, itself where it is."""
        return self if self.dtype == torch.float64 else self.to(torch.float64)

    def with_curvature(self, blocks: Sequence[Stages]) -> Problem:
        """Return the problem with other blocks of the same F; M is kept as it is."""
        problem = Problem(blocks, self.order, self.names)
        problem.__dict__["transition"] = self.transition
        if "state_scales" in self.__dict__:
            problem.__dict__["state_scales"] = self.state_scales
        return problem

    def without_curvature(self) -> Problem:
        """Return the Gauss-Newton problem: only the curvature of the cost remains."""
        return self.with_curvature([block.without_curvature() for block in self.blocks])


def _offsets(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
