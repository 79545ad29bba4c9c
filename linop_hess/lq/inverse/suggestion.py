"""A damping to suggest where one failed."""

from __future__ import annotations

import numpy as np
import torch

from linop_hess.lq.methods.base import Factor
from linop_hess.lq.methods.singular import SingularPivotError
from linop_hess.lq.problem import Problem


def damping_that_works(problem: Problem, damping: float, factor: Factor, tolerance: float) -> float | None:
    """Try dampings growing by decades from one that failed, each with a random right-hand side; None if none works."""
    norm = problem.norm
    unit = np.finfo(problem.numpy_dtype).eps * (norm if norm > 0 else 1.0)
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(problem.size, 1, generator=generator, dtype=torch.float64).to(problem.dtype).to(problem.device)
    for power in range(2, 17, 2):
        trial = float(f"{max(abs(damping), unit) * 10.0**power:.0e}")
        try:
            factors = factor(problem, trial)
        except SingularPivotError:
            continue
        x = factors.solve(g)
        for _ in range(2):
            x = x + factors.solve(g - problem.hessian_product(x, trial))
        r = g - problem.hessian_product(x, trial)
        if float(r.norm()) <= tolerance * (norm * float(x.norm()) + float(g.norm())):
            return trial
    return None
