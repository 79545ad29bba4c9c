"""Products along part of a chain, stage by stage: states forward, costates back, and what both put on the controls.

With δ_l = F_l δ_{l−1} + G_l x_l and the costates y_{l−1} = F_lᵀ y_l + C_l δ_{l−1} + B_lᵀ x_l, the Hessian of all that the stages and the
costate at their end stand for has the rows (H x)_l = G_lᵀ y_l + B_l δ_{l−1} + A_l x_l. Nothing but the states of these stages is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from linop_hess.lq.stages.base import Stage


class Sweep:
    """Neighbouring stages of a chain; states are (n, k), controls (p, k) in the order of the chain.

    Parameters
    ----------
    stages : sequence of Stage
        Single ones.

    Attributes
    ----------
    p : int
        Number of their controls.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = list(stages)
        self._slices: list[slice | None] = []
        start = 0
        for stage in self.stages:
            self._slices.append(slice(start, start + stage.p) if stage.p else None)
            start += stage.p
        self.p = start

    def of_samples(self, start: int, stop: int, samples: int) -> Sweep:
        """Return the stages on samples start..stop out of `samples`."""
        if stop - start == samples:
            return self
        return Sweep([stage.of_samples(start, stop, samples) for stage in self.stages])

    def forward(self, x: Tensor | None, d: Tensor | None, *, through: int | None = None) -> list[Tensor | None]:
        """States before each stage and after the last (None: zero), of controls x and a state d before the first.

        `through`: how many stages; those after it are left out, and no state follows them.
        """
        states: list[Tensor | None] = [d]
        for stage, part in list(zip(self.stages, self._slices, strict=True))[:through]:
            d = None if d is None else stage.F(d[None])[0]
            if x is not None and part is not None:
                mine = stage.G(x[None, part])[0]
                d = mine if d is None else d.add_(mine)
            states.append(d)
        return states

    def back(
        self,
        y: Tensor | None,
        *,
        states: Sequence[Tensor | None] | None = None,
        x: Tensor | None = None,
        rows: Tensor | None = None,
        down: bool = True,
    ) -> Tensor | None:
        """Costate before the first stage, of a costate y after the last.

        Parameters
        ----------
        y : Tensor or None
            None: zero.
        states : sequence of Tensor or None
            Those of `forward`, for the curvature of the stages.
        x : Tensor or None
            The controls, as of `forward`.
        rows : Tensor or None, shape (p, k)
            To which the rows of the controls are added, A left out.
        down : bool
            Whether the costate before the first stage is needed.
        """
        for l in range(len(self.stages) - 1, -1, -1):
            stage, part = self.stages[l], self._slices[l]
            d = None if states is None else states[l]
            has_B = part is not None and "B" in stage.nonzero
            if rows is not None and part is not None:
                if y is not None:
                    rows[part] += stage.Gt(y[None])[0]
                if d is not None and has_B:
                    rows[part] += stage.B(d[None])[0]
            if l == 0 and not down:
                return None
            y = None if y is None else stage.Ft(y[None])[0]
            if d is not None and "C" in stage.nonzero:
                y = _plus(y, stage.C(d[None])[0])
            if x is not None and has_B:
                y = _plus(y, stage.Bt(x[None, part])[0])
        return y

    def add_A(self, x: Tensor, rows: Tensor) -> None:
        """Add A x to rows, both (p, k)."""
        for stage, part in zip(self.stages, self._slices, strict=True):
            if part is not None and "A" in stage.nonzero:
                rows[part] += stage.A(x[None, part])[0]


def _plus(y: Tensor | None, more: Tensor) -> Tensor:
    # Not in place: what stages return may be a view of their argument.
    return more if y is None else y + more


def pulled_back(stage: Stage, V: Tensor, samples: int) -> Tensor:
    """FᵀVF + C of one stage for V of one block a sample, (samples, n, n) to the same of the state before.

    One block a sample, below each other, is an array of states; so the products that move states move V: V ← Fᵀ(FᵀV)ᵀ + C.
    """
    half = _each(stage, V, samples)
    V = _each(stage, half.mT, samples)
    return V + stage.C_of_samples(samples)[0] if "C" in stage.nonzero else V


def _each(stage: Stage, V: Tensor, samples: int) -> Tensor:
    out = stage.Ft(V.reshape(1, V.shape[0] * V.shape[1], V.shape[2]))
    return out.reshape(samples, out.shape[1] // samples, V.shape[2])


def times_blocks(V: Tensor, d: Tensor) -> Tensor:
    """V d for V of one block a sample, (samples, n, n), and d of shape (samples · n, k)."""
    m, n, _ = V.shape
    return torch.bmm(V, d.reshape(m, n, d.shape[-1])).reshape(m * n, d.shape[-1])
