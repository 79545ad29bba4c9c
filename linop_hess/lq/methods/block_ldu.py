"""Method "ldu": the algorithm of the paper as published, for comparison.

𝒦' = Π𝒦Πᵀ, with the unknowns of a layer (x_l, y_l, z_l) together, is block tridiagonal with blocks of size p_l + 2 n_l. Its
block LDU decomposition factors every diagonal block densely (rows pivoted within a block only), at max(n, p)³ a layer:

    D_l = T_ll − T_l,l−1 D_{l−1}⁻¹ T_l−1,l.

As in the paper's own code a layer is a parametric map together with the activation after it, so A_l is a dense p × p block.
Source: A. Rahimi, "The Hessian of tall-skinny networks is easy to invert", arXiv 2601.06096.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from linop_hess._validate import require_real_damping
from linop_hess.errors import SingularPivotError
from linop_hess.lq.analysis import Analysis
from linop_hess.lq.methods.base import Cost, Method, Tally
from linop_hess.lq.segments import SegmentGroup


@dataclass(frozen=True)
class _Layer:
    """Dense blocks of a stage with controls and the control-free stages after it."""

    stage: int
    A: Tensor
    B: Tensor
    C: Tensor
    F: Tensor
    G: Tensor


def _layer(group: SegmentGroup, k: int) -> _Layer:
    control = group.control.at(k)
    A, B, C = control.dense_A()[0], control.dense_B()[0], control.dense_C()[0]
    F, G = control.dense_F()[0], control.dense_G()[0]
    # The paper's layer is its map with the activation: the curvature of the latter, seen through the former, makes A dense.
    for stage in group.free:
        after = stage.at(k)
        if "C" in after.nonzero:
            curvature = after.dense_C()[0]
            A = A + G.mT @ (curvature @ G)
            B = B + G.mT @ (curvature @ F)
            C = C + F.mT @ (curvature @ F)
        F, G = after.F(F[None])[0], after.F(G[None])[0]
    return _Layer(int(group.stages[k]), A, B, C, F, G)


class BlockLdu:
    """Block LDU of 𝒦' at a damping.

    Raises
    ------
    SingularPivotError
        If a diagonal block is exactly singular.
    """

    method = "ldu"
    answers = frozenset({"solve"})

    def __init__(self, analysis: Analysis, damping: float) -> None:
        self.analysis, self.damping = analysis, damping
        self._layers = [_layer(analysis.groups[g], k) for g, k in analysis.pairs]
        self._factors: list[tuple[Tensor, Tensor]] = []
        carried: Tensor | None = None
        for l, layer in enumerate(self._layers):
            after = self._layers[l + 1] if l + 1 < len(self._layers) else None
            m, p = layer.G.shape
            block = _diagonal_block(layer, after, damping)
            if carried is not None:
                block -= carried
            packed, pivots, info = torch.linalg.lu_factor_ex(block)
            if int(info) > 0:
                raise SingularPivotError(layer.stage)
            self._factors.append((packed, pivots))
            if after is None:
                break
            eye = torch.eye(sum(after.G.shape) + after.G.shape[0], dtype=block.dtype, device=block.device)
            # Rows of the layer after see only y_l.
            carried = _from_previous(
                after, torch.linalg.lu_solve(packed, pivots, _to_next(layer, after, eye))[p : p + m]
            )

    @property
    def precision(self) -> torch.dtype:
        """What the factors are computed in."""
        return self.analysis.problem.dtype

    def solve(self, g: Tensor) -> Tensor:
        """(H + εI)⁻¹ g for g of shape (N, k)."""
        layout = self.analysis.problem.layout
        offsets, g = layout.x_offsets, layout.in_chain_order(g)
        halves: list[Tensor] = []
        for l, layer in enumerate(self._layers):
            m, p = layer.G.shape
            rhs = g.new_zeros(p + 2 * m, g.shape[1])
            rhs[:p] = g[offsets[layer.stage] : offsets[layer.stage + 1]]
            if l:
                q, n = self._layers[l - 1].G.shape[1], self._layers[l - 1].G.shape[0]
                rhs -= _from_previous(layer, halves[-1][q : q + n])
            halves.append(torch.linalg.lu_solve(*self._factors[l], rhs))
        # Backwards, the block U of LDU: D⁻¹T_l,l+1 is applied by another solve rather than kept as a matrix.
        x = torch.zeros_like(g)
        value: Tensor | None = None
        for l in range(len(self._layers) - 1, -1, -1):
            layer, half = self._layers[l], halves[l]
            if value is not None:
                half = half - torch.linalg.lu_solve(*self._factors[l], _to_next(layer, self._layers[l + 1], value))
            value = half
            x[offsets[layer.stage] : offsets[layer.stage + 1]] = value[: layer.G.shape[1]]
        return layout.in_flat_order(x)

    @property
    def nbytes(self) -> int:
        """Bytes held by the factors and blocks."""
        blocks = sum(b.nbytes for la in self._layers for b in (la.A, la.B, la.C, la.F, la.G))
        return blocks + sum(lu.nbytes + pivots.nbytes for lu, pivots in self._factors)


def _diagonal_block(layer: _Layer, after: _Layer | None, damping: float) -> Tensor:
    """[A+εI, 0, Gᵀ; −G, I, 0; 0, −C', I] in the unknowns (x_l, y_l, z_l), C' the curvature of the layer after."""
    m, p = layer.G.shape
    block = layer.A.new_zeros(p + 2 * m, p + 2 * m)
    block.diagonal().fill_(1.0)
    block[:p, :p] = layer.A
    block.diagonal()[:p].add_(damping)
    block[:p, p + m :] = layer.G.mT
    block[p : p + m, :p] = -layer.G
    if after is not None:
        block[p + m :, p : p + m] = -after.C
    return block


def _to_next(layer: _Layer, after: _Layer, v: Tensor) -> Tensor:
    """T_l,l+1 v: only the row of z_l sees the layer after, by −B'ᵀ x − F'ᵀ z."""
    (m, p), (n, q) = layer.G.shape, after.G.shape
    out = v.new_zeros(p + 2 * m, v.shape[1])
    out[p + m :] = -(after.B.mT @ v[:q]) - after.F.mT @ v[q + n :]
    return out


def _from_previous(layer: _Layer, y: Tensor) -> Tensor:
    """T_l,l−1 applied to y_{l−1}: B y in the row of x, −F y in the row of y."""
    m, p = layer.G.shape
    out = y.new_zeros(p + 2 * m, y.shape[1])
    out[:p] = layer.B @ y
    out[p : p + m] = -(layer.F @ y)
    return out


def factor(analysis: Analysis, damping: complex) -> BlockLdu:
    """Factor 𝒦' by block LDU."""
    return BlockLdu(analysis, require_real_damping(damping, 'method "ldu"'))


# Calls of a layer: its dense blocks, and its elimination.
_CALLS_PER_LAYER = 150

# Times that columns, and a dense C, are moved at a stage.
_COPIES = 6.0


def estimate(analysis: Analysis) -> Cost:
    """LU of every diagonal block and its solves with the couplings."""
    of = analysis.order[:, 0]
    p, n_in, n_out = (
        np.array([(g.control.p, g.n_in, g.n_out) for g in analysis.groups], dtype=float).reshape(-1, 3)[of].T
    )
    size = p + 2 * n_out
    tally, item = Tally(analysis.problem.dtype), analysis.problem.dtype.itemsize
    tally.calls(_CALLS_PER_LAYER * size.size)
    pairs = np.column_stack([size, np.append(size[1:], 0.0)[: size.size]])
    for (n, after), count in zip(*np.unique(pairs, axis=0, return_counts=True), strict=True):
        tally.kernel("lu", count * 2 / 3 * n**3, n)
        tally.kernel("substitution", count * 2 * n**2 * after, min(n, after))
        tally.moved(count * item * 6 * n**2)
    for group in analysis.groups:
        _count_blocks(tally, group, item)
    blocks = float((p * (p + n_in + n_out)).sum())
    nbytes = item * (float((size**2).sum()) + blocks + 4 * float(size.max(initial=0.0)) ** 2)
    return Cost(tally.flops, nbytes, tally.seconds)


def _count_blocks(tally: Tally, group: SegmentGroup, item: int) -> None:
    """The dense blocks of layers: products of the stages that follow their controls with all columns, which most layers have one of."""
    K, columns = group.count, float(group.control.p + group.n_in)
    for stage in group.free:
        n = float(stage.n_in)
        tally.calls(K * stage.calls("F"))
        tally.kernel("gemm", K * 2 * columns * stage.entries("F"), columns)
        tally.moved(K * item * _COPIES * columns * (n + stage.n_out))
        if "C" in stage.nonzero:
            tally.kernel("gemm", K * 2 * n * columns * (n + columns), n)
            tally.moved(K * item * _COPIES * n**2)


METHOD = Method("ldu", factor, estimate, BlockLdu.answers, is_automatic=False)
