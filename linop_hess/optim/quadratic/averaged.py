"""The mean of curvatures over steps as one dense matrix, and its inverse."""

from __future__ import annotations

import torch
from torch import Tensor

from linop_hess._memory import available_on, require
from linop_hess.errors import FactorizationError
from linop_hess.linearization import Linearization
from linop_hess.lq.matrix.hessian import fresh

DENSE_UP_TO = 4096
"""Parameters up to which a dense mean is kept by default: 128 MiB in float64, and a factorization in about a second."""

_COPIES = 4


class AveragedCurvature:
    """M ← βM + (1 − β)H of the curvatures of one batch after another, and (M + λI)⁻¹g, or (M² + λ²I)^(−½)g.

    Gradients of small batches are noise in the directions of little curvature, and so is the curvature of one batch; its mean over the
    last 1/(1 − β) of them is that of a batch as much larger, at the cost of one. As the mean of samples has few right digits, its
    factors are in float32, and in float64 where M + λI is too ill-conditioned for that.

    Parameters
    ----------
    decay : float
        β, in (0, 1).
    absolute : bool
        Whether H is the Hessian, of which (M² + λ²I)^(−½) is taken by its eigenvalues; else Gauss-Newton's matrix.
    """

    def __init__(self, decay: float, absolute: bool) -> None:
        self.decay, self.absolute = decay, absolute
        self._mean: Tensor | None = None
        self._factors: tuple[Tensor, ...] | None = None

    def add(self, lin: Linearization, damping: float) -> None:
        """Take the curvature of one more batch into the mean, and invert it at damping λ; where that fails, nothing changes.

        Raises
        ------
        FactorizationError
            If M + λI is not positive definite to rounding, or not finite.
        MemoryError
            If matrices of N² numbers do not fit.
        UnsupportedModelError
            If no output tells model and loss apart, so that there is no Gauss-Newton matrix.
        """
        size, dtype = lin.problem.size, lin.problem.dtype
        require(
            float(_COPIES * size**2 * dtype.itemsize),
            f"the mean of dense curvatures of {size} parameters (decay=0.0 needs none)",
            available_on(lin.problem.device),
        )
        analysis = lin.analysis if self.absolute else lin.gauss_newton().analysis
        mean = fresh(analysis, dtype)
        if self._mean is not None:
            mean.lerp_(self._mean, self.decay)
        self._factors = self._inverted(mean, damping)
        self._mean = mean

    def _inverted(self, mean: Tensor, damping: float) -> tuple[Tensor, ...]:
        if not bool(torch.isfinite(mean).all()):
            raise FactorizationError("the mean curvature holds NaN or Inf", damping=damping)
        if self.absolute:
            values, vectors = torch.linalg.eigh(mean.float())
            return (values.square() + damping**2).rsqrt_(), vectors
        for dtype in (torch.float32, torch.float64):
            damped = mean.to(dtype, copy=True)
            damped.diagonal().add_(damping)
            half, info = torch.linalg.cholesky_ex(damped)
            if not int(info):
                return (half,)
        raise FactorizationError("the mean curvature is not positive definite to rounding", damping=damping)

    def __call__(self, g: Tensor) -> Tensor:
        """The inverse times g, shape (N,).

        Raises
        ------
        RuntimeError
            Before the first curvature.
        """
        if self._factors is None:
            raise RuntimeError("expected a curvature before a product with its inverse, got none: add one")
        if self.absolute:
            scale, vectors = self._factors
            return (vectors @ (scale * (vectors.mT @ g.to(scale.dtype)))).to(g.dtype)
        half = self._factors[0]
        return torch.cholesky_solve(g[:, None].to(half.dtype), half)[:, 0].to(g.dtype)
