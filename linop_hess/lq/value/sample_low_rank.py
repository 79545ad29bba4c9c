"""A cost-to-go as one block a sample and a symmetric part of low rank: ½ δᵀ(V₀ + U T Uᵀ)δ, T = ±1.

V₀ is the open-loop value, with the controls that follow left alone: exact, and block diagonal over the samples. What the controls that
follow gain, the feedback K, couples all samples. It is kept as its Nyström approximation on Y = JΩ, the states that s directions Ω of
the controls lead to,

    K̃ = KY (YᵀKY)⁻¹ YᵀK,        so that K̃Y = KY,

and this makes the factorization M of H + εI right on Ω: MΩ = (H + ε)Ω. K is cut off in the metric of what follows, and what is cut off is
not moved anywhere else; both matter (docs/batches.md). The first product by which Y enters, the strictly lower part of HΩ, is formed
before (`lq.iterative.sketch`), and UᵀY goes along, so that Y itself is kept nowhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from linop_hess.lq.accuracy import SKETCH_KEPT
from linop_hess.lq.pivots.delayed import Pivots
from linop_hess.lq.pivots.hidden import Hidden
from linop_hess.lq.stages.base import Stage
from linop_hess.lq.transition import Sweep, pulled_back, times_blocks


@dataclass(frozen=True)
class Part:
    """A span restricted to some samples: its stages, and their rows of the states before and after it."""

    sweep: Sweep
    before: slice
    after: slice
    samples: slice


@dataclass(frozen=True)
class Span:
    """Several stages with controls, and what follows each, at one damping: to be eliminated together.

    Attributes
    ----------
    sweep : Sweep
        All its stages.
    parts : tuple of Part
        The same in chunks of samples, for products with many columns.
    pivot_block : callable
        Forms its block of H, the controls that follow left alone, (p, p).
    V : Tensor or None, shape (samples, n, n)
        The open-loop value after it; None after the last, which holds the objective.
    V_before : Tensor or None
        The same before it; None before the first.
    omega : Tensor, shape (p, s)
        The directions Ω.
    lower : Tensor or None, shape (p, s)
        Its rows of the strictly lower part of HΩ; None of the first.
    damping : float
    stage : int
        Position of its first stage in the chain.
    kept_from : float
        Directions of the feedback below this, relatively, are left out.
    """

    sweep: Sweep
    parts: tuple[Part, ...]
    pivot_block: Callable[[], Tensor]
    V: Tensor | None
    V_before: Tensor | None
    omega: Tensor
    lower: Tensor | None
    damping: float
    stage: int
    kept_from: float = 0.0

    free = ()
    hidden = Hidden()

    @property
    def control(self) -> Span:
        """Itself: all its stages are eliminated together."""
        return self

    @property
    def r(self) -> int:
        """Number of controls."""
        return self.sweep.p

    @property
    def is_first(self) -> bool:
        """Whether no state precedes it."""
        return self.V_before is None

    @property
    def n_in(self) -> int:
        """Size of the state before that moves."""
        return 0 if self.V_before is None else self.V_before.shape[0] * self.V_before.shape[1]

    @property
    def through(self) -> int | None:
        """How many stages states need be carried through: after the last there is nothing to come."""
        return None if self.V is not None else len(self.sweep.stages) - 1

    def adjoint(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """(Gᵀv, Fᵀv) for v of shape (n_out, k)."""
        rows = v.new_zeros(self.r, v.shape[1])
        if self.is_first:
            for part in self.parts_for(v):
                part.sweep.back(v[part.after], rows=rows, down=False)
            return rows, v[:0]
        out = v.new_empty(self.n_in, v.shape[1])
        for part in self.parts_for(v):
            below = part.sweep.back(v[part.after], rows=rows)
            assert below is not None
            out[part.before] = below
        return rows, out

    def parts_for(self, v: Tensor) -> tuple[Part, ...]:
        """The chunks of samples for products with as many columns as v; all at once for few."""
        n_in, n_out = self.n_in, 0 if self.V is None else self.V.shape[0] * self.V.shape[1]
        whole = Part(self.sweep, slice(0, n_in), slice(0, n_out), slice(None))
        return self.parts if v.shape[1] > 2 else (whole,)

    def forward(self, s: Tensor, d: Tensor) -> Tensor:
        """F δ + G s."""
        if self.V is None:
            return s.new_zeros(0, s.shape[1])
        after = self.sweep.forward(s, None if self.is_first else d)[-1]
        assert after is not None
        return after


@dataclass(frozen=True)
class Felt:
    """What a span feels of the feedback U T Uᵀ after it: UᵀG and UᵀF by columns, (p, r) and (n_in, r), and T."""

    controls: Tensor
    state: Tensor
    T: Tensor


@dataclass(frozen=True)
class Coupling:
    """E = Gᵀ(V₀ + U T Uᵀ)F + … of a span: a product of sweeps, never an array of controls × states."""

    span: Span
    felt: Felt | None

    @property
    def shape(self) -> tuple[int, int]:
        """(p, n_in)."""
        return self.span.r, self.span.n_in

    def __matmul__(self, d: Tensor) -> Tensor:
        """E δ, (n_in, k) to (p, k)."""
        out = d.new_zeros(self.shape[0], d.shape[1])
        for part in self.span.parts_for(d):
            states = part.sweep.forward(None, d[part.before], through=self.span.through)
            part.sweep.back(self._after(part, states), states=states, rows=out, down=False)
        if self.felt is not None:
            out += self.felt.controls @ (self.felt.T[:, None] * (self.felt.state.mT @ d))
        return out

    def transposed(self, x: Tensor) -> Tensor:
        """Eᵀ x, (p, k) to (n_in, k)."""
        out = x.new_empty(self.shape[1], x.shape[1])
        for part in self.span.parts_for(x):
            states = part.sweep.forward(x, None, through=self.span.through)
            below = part.sweep.back(self._after(part, states), states=states, x=x)
            out[part.before] = 0.0 if below is None else below
        if self.felt is not None:
            out.addmm_(self.felt.state, self.felt.T[:, None] * (self.felt.controls.mT @ x))
        return out

    def _after(self, part: Part, states: list[Tensor | None]) -> Tensor | None:
        V, d = self.span.V, states[-1]
        return None if V is None or d is None else times_blocks(V[part.samples], d)

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept for it."""
        return 0 if self.felt is None else self.felt.controls.nbytes + self.felt.state.nbytes


@dataclass(frozen=True)
class White:
    """T⁻¹E as a product, T θ Tᵀ being the pivots."""

    pivots: Pivots
    coupling: Coupling
    is_adjoint: bool = False

    @property
    def mT(self) -> White:
        """The adjoint."""
        return White(self.pivots, self.coupling, not self.is_adjoint)

    def __matmul__(self, v: Tensor) -> Tensor:
        if not self.is_adjoint:
            return self.pivots.whiten(self.coupling @ v)
        return self.coupling.transposed(self.pivots.unwhiten(v)) if self.coupling.shape[1] else v[:0]

    @property
    def nbytes(self) -> int:
        """Bytes held beside the pivots."""
        return self.coupling.nbytes


@dataclass(frozen=True)
class MappedElimination:
    """S = T θ Tᵀ, all of it eliminated, with T⁻¹E as a product: what `lq.elimination.stage_factor` needs of it."""

    pivots: Pivots
    white: White
    delayed: int = 0

    @property
    def theta(self) -> Tensor:
        """θ, shape (p,)."""
        return self.pivots.theta

    @property
    def W(self) -> Tensor:
        """No direction is delayed, (p, 0)."""
        return self.theta.new_zeros(self.theta.numel(), 0)

    def solve(self, X: Tensor) -> Tensor:
        """S⁻¹ X."""
        return self.pivots.unwhiten(self.pivots.whiten(X) / self.theta[:, None])

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.pivots.nbytes + self.white.nbytes


@dataclass(frozen=True)
class SampleLowRankValue:
    """½ δᵀ(V₀ + U T Uᵀ)δ.

    Parameters
    ----------
    V : Tensor or None, shape (samples, n, n)
        V₀; None: zero, after the last stage.
    U : Tensor, shape (samples · n, r)
    T : Tensor, shape (r,)
        Signs.
    seen : Tensor, shape (r, s)
        UᵀY.
    coupling : Coupling or None
        That of the span whose pivot was just given.
    """

    V: Tensor | None
    U: Tensor
    T: Tensor
    seen: Tensor
    coupling: Coupling | None = None

    @classmethod
    def zero(cls, like: Tensor, directions: int) -> Self:
        """Return the value after the last stage."""
        return cls(None, like.new_zeros(0, 0), like.new_zeros(0), like.new_zeros(0, directions))

    @property
    def rank(self) -> int:
        """Rank r of the feedback."""
        return self.T.numel()

    def pull_back(self, stage: Stage) -> Self:
        """Take it back through a stage without controls."""
        samples = 1 if self.V is None else self.V.shape[0]
        V = None if self.V is None else pulled_back(stage, self.V, samples)
        return replace(self, V=V, U=stage.Ft(self.U[None])[0])

    def pivot(self, control: Span) -> tuple[Tensor, Coupling, Self]:
        """S = H₀ + εI + GᵀU T UᵀG, E as a product, and the value before at s = 0."""
        S = control.pivot_block()
        S.diagonal().add_(control.damping)
        if not self.rank:
            coupling = Coupling(control, None)
            nothing = S.new_zeros(control.n_in, 0)
            return S, coupling, replace(self, V=control.V_before, U=nothing, coupling=coupling)
        felt = Felt(*control.adjoint(self.U), self.T)
        S.addmm_(felt.controls * self.T, felt.controls.mT)
        coupling, seen = Coupling(control, felt), self.seen - felt.controls.mT @ control.omega
        return S, coupling, replace(self, V=control.V_before, U=felt.state, seen=seen, coupling=coupling)

    def downdate(self, elimination: MappedElimination, hidden: Hidden) -> Self:
        """K − EᵀS⁻¹E by its Nyström approximation on Y."""
        assert self.coupling is not None
        span, felt = self.coupling.span, self.coupling.felt
        if span.lower is None:
            return self
        EY, weighted = span.lower, self.T[:, None] * self.seen
        if felt is not None:
            EY = EY + felt.controls @ weighted
        gain = elimination.solve(EY)
        # YᵀKY in double precision: of its eigenvalues, which spread over many decades, single precision would lose all but the largest.
        form = self.seen.double().mT @ weighted.double() - EY.double().mT @ gain.double()
        values, vectors = torch.linalg.eigh((form + form.mT) / 2)
        size = values.abs()
        kept = size > max(span.kept_from, SKETCH_KEPT[EY.dtype]) * size.max()
        values, vectors, size = values[kept], vectors[:, kept], size[kept].sqrt()
        scaled = (vectors / size).to(EY.dtype)
        U = self.coupling.transposed(gain @ scaled).neg_()
        if self.rank:
            U.addmm_(self.U, weighted @ scaled)
        T = values.sign().to(EY.dtype)
        return replace(self, U=U, T=T, seen=T[:, None] * (vectors * size).mT.to(EY.dtype), coupling=None)

    def compress(self) -> Self:
        """Itself: `downdate` keeps what matters to what precedes."""
        return self

    def __matmul__(self, d: Tensor) -> Tensor:
        """(V₀ + U T Uᵀ) δ."""
        out = torch.zeros_like(d) if self.V is None else times_blocks(self.V, d)
        return out + self.U @ (self.T[:, None] * (self.U.mT @ d)) if self.rank else out
