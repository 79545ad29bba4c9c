"""Units of the states: how far each moves when the controls move by one.

The size of a cost-to-go or of a multiplier means nothing by itself, since states may be measured in any unit: with δ = D δ̃ a problem is
the same one in δ̃. In units in which every entry of every state moves by about one, a change of the cost-to-go by η changes H by about η
too; so there it can be compared with ‖H‖, and the blocks of one linear system are of like sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from linop_hess.lq.problem import Problem
from linop_hess.lq.stages.row_space import RowSpace

_PROBES = 8
# Squares of units must neither under- nor overflow: exponents of two, by dtype.
_REACH = {torch.float64: 400.0, torch.float32: 50.0}


class Units:
    """The units of all states of a chain, made when one is first asked for: a plan, which counts, asks for none.

    Parameters
    ----------
    problem : Problem
    row_spaces : sequence of RowSpace
        One for each stack that has controls.
    """

    def __init__(self, problem: Problem, row_spaces: Sequence[RowSpace | None]) -> None:
        self._problem, self._row_spaces = problem, row_spaces

    @cached_property
    def before(self) -> Tensor:
        """Of the states that stages begin from, shape (Σ n_0..n_{L−1},)."""
        return state_scales(self._problem, self._row_spaces)

    @cached_property
    def after(self) -> Tensor:
        """Of the states that they end in; 1 after the last, shape (Σ n_1..n_L,)."""
        layout = self._problem.layout
        after = self.before.new_ones(layout.size_out)
        after[: layout.size_out - int(layout.n_out[-1])] = self.before[int(layout.n_in[0]) :]
        return after


def state_scales(problem: Problem, row_spaces: Sequence[RowSpace | None]) -> Tensor:
    """D, shape (Σ n_0..n_{L−1},): the norms of the rows of P M⁻¹ D_x, rounded to powers of two, from random probes.

    Scaling by powers of two makes no rounding errors. What does not move gets the largest unit of the same state, and a state of which
    nothing moves the smallest of all.
    """
    layout = problem.layout
    generator = torch.Generator().manual_seed(0)
    # Probe after probe in memory, as LAPACK substitutes them, and all in the memory of the first: new memory takes longest here.
    pushed = torch.zeros(_PROBES, layout.size_out, dtype=problem.dtype, device=problem.device).T
    for space, slots in zip(row_spaces, layout.out_slots, strict=True):
        if space is not None and slots.size:
            # G x = R Qᵀx with Q orthonormal, so visible controls are all that need be drawn.
            s = torch.randn(space.count, space.r, _PROBES, generator=generator, dtype=torch.float64, device="cpu")
            slots.put(pushed, space.R(s.to(problem.dtype).to(problem.device)))
    moved = problem.transition.substitute(pushed)
    largest = torch.maximum(moved.amax(1), -moved.amin(1))
    moves = (largest > 0.0) & torch.isfinite(largest)
    safe = torch.where(moves, largest, 1.0)
    means = moved.div_(safe[:, None]).square_().mean(1).sqrt()
    scale = layout.shift(torch.where(moves, safe * means, 0.0)[:, None])[:, 0]
    moves = scale > 0.0
    if not bool(moves.any()):
        return torch.ones_like(scale)
    state = torch.from_numpy(np.repeat(np.arange(problem.length), layout.n_in)).to(scale.device)
    of_state = scale.new_zeros(problem.length).scatter_reduce(0, state, scale, "amax")
    scale = torch.where(moves, scale, of_state[state])
    scale = torch.where(scale > 0.0, scale, scale[moves].min())
    reach = _REACH[problem.dtype]
    return torch.exp2(scale.log2().round().clamp(-reach, reach))
