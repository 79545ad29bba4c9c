"""A cost-to-go as a dense symmetric matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from linop_hess.lq.pivots.delayed import Elimination
from linop_hess.lq.pivots.hidden import Hidden
from linop_hess.lq.stages.base import Stage
from linop_hess.lq.value.base import Control


@dataclass(frozen=True)
class DenseValue:
    """½ δᵀVδ + δᵀYc + ½ cᵀΛc of a state δ, c being directions that are delayed: not eliminated yet.

    δ may be longer than the state that the next stage acts on: what follows passes through unchanged, as the nodes of
    `lq.elimination.parallel` do. All arrays may have leading axes, for values that are worked on side by side.

    Parameters
    ----------
    V : Tensor, shape (..., n, n)
    Y : Tensor or None, shape (..., n, m)
    Lambda : Tensor or None, shape (..., m, m)
    is_own : bool
        Whether nothing else holds V, so that what this value is taken back to may be written over it.
    """

    V: Tensor
    Y: Tensor | None = None
    Lambda: Tensor | None = None
    is_own: bool = False

    def pull_back(self, stage: Stage) -> Self:
        Y = None if self.Y is None else stage.Ft(self.Y[None])[0]
        V = stage.pull_back_over(self.V) if self.is_own else stage.pull_back(self.V)
        return type(self)(V, Y, self.Lambda, self.is_own)

    def pull_back_state(self, control: Control) -> Self:
        """Take V alone back through a stage with controls, s = 0; delayed directions end here."""
        return type(self)(control.pull_back(self.V))

    def pivot(self, control: Control) -> tuple[Tensor, Tensor, Self]:
        n = control.n_out
        if self.V.shape[-1] > n:
            return self._pivot_passing(control, n)
        S, E, V = control.congruence(self.V, self.is_own)
        if self.Y is not None and self.Lambda is not None:
            # Delayed directions are unknowns like the controls: the state that they are coupled to gives way to (s, δ).
            seen, through = control.adjoint(self.Y)
            S = torch.cat([torch.cat([S, seen], 1), torch.cat([seen.mT, self.Lambda], 1)])
            E = torch.cat([E, through.mT])
        return S, E, type(self)(V, is_own=self.is_own)

    def _pivot_passing(self, control: Control, n: int) -> tuple[Tensor, Tensor, Self]:
        """The same where the entries of δ beyond the first n pass the stage by."""
        S, E, inner = control.congruence(self.V[..., :n, :n])
        seen, through = control.adjoint(self.V[..., :n, n:])
        rest = self.V[..., n:, n:]
        V = torch.cat([torch.cat([inner, through], -1), torch.cat([through.mT, rest], -1)], -2)
        return S, torch.cat([E, seen], -1), type(self)(V)

    def downdate(self, elimination: Elimination, hidden: Hidden) -> Self:
        elimination.take_off(self.V)
        if not elimination.delayed and hidden.coupling is None:
            return self
        Y, mu = elimination.coupling, elimination.mu
        if hidden.coupling is not None:
            Y = torch.cat([Y, hidden.coupling], 1)
            mu = torch.cat([mu, mu.new_full((hidden.delayed,), hidden.damping)])
        return type(self)(self.V, Y, torch.diag(mu), self.is_own)

    def compress(self) -> Self:
        return self

    def __matmul__(self, d: Tensor) -> Tensor:
        return self.V @ d

    def largest(self, units: Tensor) -> float:
        """Largest |entry| of V in units of the states, (n, 1)."""
        return float((self.V * units * units.mT).abs().max()) if self.V.numel() else 0.0
