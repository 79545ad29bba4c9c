"""A stage from plain arrays, checked."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from linop_hess.lq.stages.dense import DenseStages


def stage_of_arrays(l: int, *blocks: np.ndarray | Tensor) -> DenseStages:
    """Make stage l (0-based, for messages) of its blocks A, B, C, F and G, which are copied.

    Raises
    ------
    ValueError, TypeError
        If shapes or dtypes disagree, a block holds NaN or Inf, or A or C is not symmetric.
    """
    A, B, C, F, G = (
        block.detach().clone() if isinstance(block, Tensor) else torch.from_numpy(np.array(block)) for block in blocks
    )
    p, n = B.shape if B.ndim == 2 else (-1, -1)
    expected = {"A": (p, p), "B": (p, n), "C": (n, n), "F": (F.shape[0], n), "G": (F.shape[0], p)}
    for name, block in (("A", A), ("B", B), ("C", C), ("F", F), ("G", G)):
        if tuple(block.shape) != expected[name]:
            raise ValueError(
                f"stage {l + 1}: {name} has shape {tuple(block.shape)}, expected {expected[name]} "
                f"to go with B of shape {tuple(B.shape)} and F of shape {tuple(F.shape)}"
            )
        if not block.dtype.is_floating_point or block.dtype.itemsize < 4:
            raise TypeError(f"stage {l + 1}: {name} has dtype {block.dtype}, expected float32 or float64")
        if not bool(torch.isfinite(block).all()):
            raise ValueError(f"stage {l + 1}: {name} holds NaN or Inf")
    dtypes = {block.dtype for block in (A, B, C, F, G)}
    if len(dtypes) > 1:
        raise TypeError(f"stage {l + 1}: all blocks need one dtype, got {sorted(map(str, dtypes))}")
    for name, block in (("A", A), ("C", C)):
        if block.numel() and not torch.allclose(block, block.T, rtol=0, atol=1e-5 * float(block.abs().max())):
            raise ValueError(f"stage {l + 1}: {name} is not symmetric; pass its symmetric part")
    a = (A + A.T)[None] / 2 if p and bool(A.any()) else None
    return DenseStages.plain(F[None], G[None], a, B[None] if p else None, (C + C.T)[None] / 2)
