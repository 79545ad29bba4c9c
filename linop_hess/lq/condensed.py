"""Segments with all that can be eliminated exactly gone, as dense blocks.

Without the hidden controls and the states between its stages a segment is, with u = (s, δ),

    ½ uᵀ T u,        δ⁺ = W u,        T = [S, E; Eᵀ, Z],        W = [R, F],

δ and δ⁺ in their units (see `lq.scaling`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from linop_hess.lq.segments import SegmentGroup, identity
from linop_hess.lq.stacked import parts

# Random signs that sizes are taken with.
_SIGNS = 16


@dataclass(frozen=True)
class Condensed:
    """The blocks of a group of K segments but for the damping.

    Attributes
    ----------
    r : int
    curvature : Tensor, shape (K, r + n_in, r + n_in)
        T at ε = 0 without the hidden controls.
    gram : Tensor or None, shape (K, n_in, n_in)
        Bᵀ(I − QQᵀ)B of the hidden controls; None where they are not coupled to the state.
    W : Tensor, shape (K, n_out, r + n_in)
    """

    r: int
    curvature: Tensor
    gram: Tensor | None
    W: Tensor

    def T(self, damping: complex, gram: Tensor | None = None) -> Tensor:
        """T at a damping, (K, r + n_in, r + n_in); `gram` takes the place of that of all hidden controls."""
        T = self.curvature.clone()
        T.diagonal(dim1=1, dim2=2)[:, : self.r].add_(damping)
        gram = self.gram if gram is None else gram
        if gram is not None:
            T[:, self.r :, self.r :].sub_(gram, alpha=1.0 / damping)
        return T

    def part(self, which: slice | np.ndarray) -> Condensed:
        """Return the blocks of some segments, of neighbours in the memory of these."""
        gram = None if self.gram is None else self.gram[which]
        return Condensed(self.r, self.curvature[which], gram, self.W[which])

    def to(self, dtype: torch.dtype) -> Condensed:
        """Return the blocks in another dtype."""
        gram = None if self.gram is None else self.gram.to(dtype)
        return Condensed(self.r, self.curvature.to(dtype), gram, self.W.to(dtype))

    def out_of_units(self, unit_in: Tensor, unit_out: Tensor) -> Condensed:
        """Return the blocks for states that are not in units."""
        back = torch.cat([unit_in.new_ones(unit_in.shape[0], self.r, 1), 1.0 / unit_in], 1)
        gram = None if self.gram is None else self.gram / unit_in / unit_in.mT
        return Condensed(self.r, self.curvature * back * back.mT, gram, self.W * unit_out * back.mT)


class Damped:
    """T of the segments of a group at a damping, of some neighbours at a time when one of them is asked for; the last are kept.

    Parameters
    ----------
    blocks : Condensed
    damping : complex
    gram : Tensor or None, shape (K, n_in, n_in)
        Takes the place of that of all hidden controls.
    """

    def __init__(self, blocks: Condensed, damping: complex, gram: Tensor | None = None) -> None:
        self._blocks, self._damping, self._gram = blocks, damping, gram
        self._parts = parts(len(blocks.curvature), blocks.curvature[:1].nbytes)
        self._last: tuple[int, tuple[Tensor, ...]] = (-1, ())

    def T(self, k: int) -> Tensor:
        """T of segment k, (r + n_in, r + n_in)."""
        part = self._parts[k // self._parts[0].stop]
        start, made = self._last
        if start != part.start:
            gram = None if self._gram is None else self._gram[part]
            start, made = self._last = part.start, self._blocks.part(part).T(self._damping, gram).unbind()
        return made[k - start]


def condense(group: SegmentGroup) -> Condensed:
    """Return the condensed blocks of a group."""
    K, r, columns, like = group.count, group.r, group.r + group.n_in, group.unit_out
    T, W = like.new_zeros(K, columns, columns), like.new_empty(K, group.n_out, columns)
    gram = like.new_empty(K, group.n_in, group.n_in) if group.is_coupled else None
    widest = max(columns, *(stage.n_out for stage in (group.control, *group.free)))
    for part in parts(K, T.element_size() * columns * widest):
        some = group if part == slice(0, K) else group.part(part)
        _condense_over(some, T[part], W[part])
        if gram is not None:
            torch.mul(some.space.hidden_gram() * some.unit_in, some.unit_in.mT, out=gram[part])
    return Condensed(r, T, gram, W)


def _condense_over(group: SegmentGroup, T: Tensor, out: Tensor) -> None:
    """Add the curvature of some segments to T, which is zero, and put W in `out`."""
    control, space, n_in, r, unit = group.control, group.space, group.n_in, group.r, group.unit_in
    R = space.R(identity(group))
    if "A" in control.nonzero:
        T[:, :r, :r] = space.QtAQ()
    if "B" in control.nonzero and n_in:
        B = torch.mul(space.QtB(), unit.mT, out=T[:, :r, r:])
        T[:, r:, :r] = B.mT
    if "C" in control.nonzero and n_in:
        torch.mul(control.dense_C() * unit, unit.mT, out=T[:, r:, r:])
    W = torch.cat([R, control.dense_F() * unit.mT], 2)
    # Push u = (s, δ) through the control-free stages; each adds its own curvature, seen from u.
    for stage in group.free:
        if "C" in stage.nonzero:
            stage.add_curvature(T, W)
        W = stage.F(W)
    torch.div(W, group.unit_out, out=out)


@dataclass(frozen=True)
class BlockSizes:
    """What the entries of the condensed blocks of a group of K segments are made of, nothing cancelled.

    Attributes
    ----------
    ss, sd, dd : Tensor, shape (K, 1, 1)
        Sizes of the parts of T: on controls, between controls and states, on states.
    s, d : Tensor, shape (K, n_out, 1)
        Sizes of the rows of R and F.
    hidden : Tensor, shape (K, 1, 1)
        √‖Bᵀ(I − QQᵀ)B‖.
    """

    ss: Tensor
    sd: Tensor
    dd: Tensor
    s: Tensor
    d: Tensor
    hidden: Tensor


def block_sizes(group: SegmentGroup) -> BlockSizes:
    """Sizes of what the condensed blocks of a group are summed from, as `condense` sums them.

    Products are taken with random signs on the sizes of rows: what cancels in the blocks themselves does not then.
    """
    control, space, n_in = group.control, group.space, group.n_in
    one = space.R(identity(group)).new_zeros(group.count, 1, 1)
    s, d = _row_sizes(space.R(identity(group))), _row_sizes(control.dense_F() * group.unit_in.mT)
    ss, sd, dd, hidden = one, one, one, one
    if "A" in control.nonzero:
        ss = _size(space.QtAQ())
    if "B" in control.nonzero and n_in:
        sd = _size(space.QtB() * group.unit_in.mT)
        if group.is_coupled:
            hidden = _size(space.hidden_gram() * group.unit_in * group.unit_in.mT).sqrt()
    if "C" in control.nonzero and n_in:
        dd = _size(control.dense_C() * group.unit_in * group.unit_in.mT)
    signs = torch.Generator().manual_seed(0)
    for stage in group.free:
        if "C" in stage.nonzero:
            of_s, of_d = _without_cancelling(stage.C, s, signs), _without_cancelling(stage.C, d, signs)
            ss = ss + (s * of_s).sum(1, keepdim=True)
            sd = sd + (s * of_d).sum(1, keepdim=True)
            dd = dd + (d * of_d).sum(1, keepdim=True)
        s, d = _without_cancelling(stage.F, s, signs), _without_cancelling(stage.F, d, signs)
    return BlockSizes(ss, sd, dd, s / group.unit_out, d / group.unit_out, hidden)


def _without_cancelling(product: Callable[[Tensor], Tensor], size: Tensor, generator: torch.Generator) -> Tensor:
    """√(Σ_j M_ij² size_j²), to within some per cent, for the product with M, of sizes of shape (K, n, 1)."""
    signs = torch.randn(*size.shape[:2], _SIGNS, generator=generator, dtype=size.dtype, device="cpu").to(size.device)
    return product(size * signs).square().mean(2, keepdim=True).sqrt()


def _row_sizes(block: Tensor) -> Tensor:
    return torch.linalg.vector_norm(block, dim=2, keepdim=True)


def _size(block: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(block, keepdim=True)


def moved(
    blocks: Condensed, sizes: BlockSizes, damping: complex, share: float, generator: torch.Generator
) -> Condensed:
    """Return blocks moved by random errors of so large a share of what they are made of at a damping."""

    def errors(of: Tensor) -> Tensor:
        return share * torch.randn(of.shape, generator=generator, dtype=of.dtype, device="cpu").to(of.device)

    r, T, W = blocks.r, blocks.curvature, blocks.W
    size = torch.zeros_like(T)
    size[:, :r, :r] = sizes.ss + abs(damping)
    size[:, :r, r:] = sizes.sd
    size[:, r:, r:] = sizes.dd + (sizes.hidden.square() / abs(damping) if blocks.gram is not None else 0.0)
    E = (size * errors(T)).triu()
    of_W = torch.cat([sizes.s.expand(-1, -1, r), sizes.d.expand(-1, -1, W.shape[2] - r)], 2)
    return Condensed(r, T + E + E.triu(1).mT, blocks.gram, W + of_W * errors(W))
