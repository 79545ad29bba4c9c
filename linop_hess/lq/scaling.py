"""Units of the states: how far each moves when the controls move by one.

The size of a cost-to-go or of a multiplier means nothing by itself, since states may be measured in any unit: with δ = D δ̃ a problem is
the same one in δ̃. In units in which every entry of every state moves by about one, a change of the cost-to-go by η changes H by about η
too; so there it can be compared with ‖H‖, and the blocks of one linear system are of like sizes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from linop_hess.lq.problem import Problem
from linop_hess.lq.stages.row_space import RowSpace

_PROBES = 8
# Squares of units must neither under- nor overflow: exponents of two, by dtype.
_REACH = {torch.float64: 400.0, torch.float32: 50.0}


def state_scales(problem: Problem, row_spaces: Sequence[RowSpace | None]) -> Tensor:
    """D, shape (Σ n_0..n_{L−1},): the norms of the rows of P M⁻¹ D_x, rounded to powers of two, from random probes.

    Scaling by powers of two makes no rounding errors. What does not move gets the largest unit of the same state, and a state of which
    nothing moves the smallest of all.
    """
    layout = problem.layout
    generator = torch.Generator().manual_seed(0)
    pushed = torch.zeros(layout.size_out, _PROBES, dtype=problem.dtype, device=problem.device)
    for space, slots in zip(row_spaces, layout.out_slots, strict=True):
        if space is not None and slots.size:
            # G x = R Qᵀx with Q orthonormal, so visible controls are all that need be drawn.
            s = torch.randn(space.count, space.r, _PROBES, generator=generator, dtype=torch.float64, device="cpu")
            slots.put(pushed, space.R(s.to(problem.dtype).to(problem.device)))
    moved = layout.shift(problem.transition.substitute(pushed))
    largest = moved.abs().amax(1)
    moves = (largest > 0.0) & torch.isfinite(largest)
    if not bool(moves.any()):
        return torch.ones_like(largest)
    safe = torch.where(moves, largest, 1.0)
    scale = torch.where(moves, safe * (moved / safe[:, None]).square().mean(1).sqrt(), 0.0)
    state = torch.from_numpy(np.repeat(np.arange(problem.length), layout.n_in)).to(scale.device)
    of_state = scale.new_zeros(problem.length).scatter_reduce(0, state, scale, "amax")
    scale = torch.where(moves, scale, of_state[state])
    scale = torch.where(scale > 0.0, scale, scale[moves].min())
    reach = _REACH[problem.dtype]
    return torch.exp2(scale.log2().round().clamp(-reach, reach))


def times_two_to(x: Tensor, exponents: Tensor) -> Tensor:
    """Return x · 2^e, rounded once, for whole e that broadcast: |e| up to 1022, in float32 up to 126.

    `torch.ldexp` of torch 2.3 takes 2^e in float32, which ends at 1e±38. Here the bits of 2^e are written down.
    """
    dtype = x.dtype
    bits, bias, mantissa = (torch.int64, 1023, 52) if dtype == torch.float64 else (torch.int32, 127, 23)
    return x * ((exponents.to(bits) + bias) << mantissa).view(dtype)
