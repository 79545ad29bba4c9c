"""The quadratic model whose curvature is known by products alone."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from linop_hess.lq.pivots.inertia import Inertia
from linop_hess.optim.record import Tally

# Power iterations for the norm.
_POWER = 20


class ProductModel:
    """loss + gᵀs + ½ sᵀHs, with H known by products.

    Parameters
    ----------
    loss : float
    gradient : Tensor, shape (N,)
    product : callable
        H times the columns of (N, k).
    tally : Tally
        Where products are counted.
    """

    def __init__(self, loss: float, gradient: Tensor, product: Callable[[Tensor], Tensor], tally: Tally) -> None:
        self.loss, self.gradient, self.tally = loss, gradient.double(), tally
        self._product = product

    def product(self, V: Tensor) -> Tensor:
        """H times the columns of (N, k)."""
        self.tally.products += V.shape[1]
        return self._product(V)

    def change(self, step: Tensor) -> float:
        """Return gᵀs + ½ sᵀHs."""
        return float(self.gradient @ step + 0.5 * step @ self.product(step[:, None])[:, 0])

    @property
    def curvature(self) -> ProductModel:
        """Itself, for damping strategies."""
        return self

    def norm(self) -> float:
        """‖H‖ from below, by power iteration from the gradient."""
        v, norm = self.gradient, 0.0
        for _ in range(_POWER):
            if not (size := float(v.norm())) > 0.0:
                break
            v = self.product(v[:, None] / size)[:, 0]
            norm = float(v.norm())
        return norm

    def smallest_convex_damping(self) -> float:
        """Zero, as of a Gauss-Newton matrix of a loss that is convex in the output."""
        return 0.0

    def inertia(self, damping: float) -> Inertia:
        """Not known from products.

        Raises
        ------
        TypeError
        """
        raise TypeError(
            "expected a damping that needs no inertia, got JustConvex: products do not tell it; use GaussNewton, or SaddleFree with a "
            "closure that returns (output, target), or another damping"
        )
