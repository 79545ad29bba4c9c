"""Second derivatives by differences of first ones, where an operation has no second derivative in torch.

With D(h) = (g(θ + hv) − g(θ − hv))/2h, (4D(h) − D(2h))/3 is Hv to fourth order. Rounding adds about eps/h of the gradient and
truncation h⁴ of its fifth derivative, so h is of the size of eps^(1/5): the error is of the order of eps^(4/5), 3e-13 in float64
and 3e-6 in float32, times what the function makes of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def step_size(origin: Tensor, direction: Tensor) -> float:
    """Return h along a direction v from a point θ: 0.3 eps^(1/5) (1 + ‖θ‖)/‖v‖.

    Shorter where few entries would take the whole step: none moves by more than three times what all move by where v is even.
    """
    length, largest = torch.linalg.vector_norm(direction), direction.abs().max()
    size = torch.linalg.vector_norm(origin)
    even = (1.0 + size) / length
    single = 3.0 * (1.0 + size / max(1, origin.numel()) ** 0.5) / largest
    return 0.3 * torch.finfo(origin.dtype).eps ** 0.2 * float(torch.minimum(even, single))


class Differenced:
    """The products of a symmetric Jacobian, by fourth-order differences.

    Parameters
    ----------
    gradient : callable
        Takes a point (n,) and returns the gradient there, (n,).
    origin : Tensor, shape (n,)
        The point to differentiate at.
    shrink : float
        What the step is to be shorter by than `step_size` says.
    """

    def __init__(self, gradient: Callable[[Tensor], Tensor], origin: Tensor, shrink: float = 1.0) -> None:
        self.gradient, self.origin, self.shrink = gradient, origin, shrink

    def __call__(self, X: Tensor) -> Tensor:
        """Return the product with a block, both of shape (n, k), four gradients a column."""
        return torch.stack([self._product(x) for x in X.unbind(1)], 1)

    def _product(self, v: Tensor) -> Tensor:
        largest = v.abs().max()
        if not bool(largest):
            return torch.zeros_like(v)
        scaled = v / largest  # its norm neither overflows nor vanishes
        length = torch.linalg.vector_norm(scaled)
        direction = scaled / length
        step = self.shrink * step_size(self.origin, direction)
        near, far = (self._slope(direction, step * factor) for factor in (1.0, 2.0))
        return (near + (near - far) / 3) * length * largest

    def _slope(self, direction: Tensor, step: float) -> Tensor:
        above, below = self.origin + step * direction, self.origin - step * direction
        return (self.gradient(above) - self.gradient(below)) / (2 * step)


def finite_difference_hessian(vjp: Callable[[Tensor], Tensor], point: Tensor) -> Tensor:
    """Return Σ_i b_i ∇²f_i of an operation f at a point, by differences of z ↦ ∇f(z)ᵀb.

    Fourth order in each entry, with steps 0.3 eps^(1/5) max(1, |z_j|), 4n products. Measured in float64: 2e-12 of the
    largest entry for attention.

    Parameters
    ----------
    vjp : callable
        Takes a point of the shape of `point` and returns ∇f(z)ᵀb, of the same shape.
    point : Tensor, shape (..., n)
        Where; leading dimensions are those of independent operations, computed at once.

    Returns
    -------
    Tensor, shape (..., n, n)
        Exactly symmetric.

    Raises
    ------
    ArithmeticError
        If the differences are asymmetric by more than their error: `vjp` is no gradient, or has kinks within a step.

    Examples
    --------
    >>> import torch
    >>> finite_difference_hessian(lambda z: 3 * z**2, torch.tensor([1.0, 2.0], dtype=torch.float64)).round(decimals=6)
    tensor([[ 6.,  0.],
            [ 0., 12.]], dtype=torch.float64)
    """
    n, eps = point.shape[-1], torch.finfo(point.dtype).eps
    columns, truncations, largest = [], [], point.new_zeros(())
    for j in range(n):
        step = 0.3 * eps**0.2 * point[..., j].abs().clamp(min=1.0)
        slopes = []
        for factor in (1.0, 2.0):
            above, below = point.clone(), point.clone()
            above[..., j] += factor * step
            below[..., j] -= factor * step
            up, down = vjp(above), vjp(below)
            slopes.append((up - down) / (above[..., j] - below[..., j])[..., None])  # the step as rounded
            largest = torch.maximum(largest, up.abs().max())
        columns.append(slopes[0] + (slopes[0] - slopes[1]) / 3)
        truncations.append((slopes[0] - slopes[1]).abs().max())
    if not columns:
        return point.new_zeros(*point.shape, 0)
    Q = torch.stack(columns, -1)
    gap = float((Q - Q.mT).abs().max())
    # Rounding of the products over the step, and of what fourth order takes off a part that stays.
    expected = 1e3 * eps**0.8 * float(largest) + 1e-2 * float(torch.stack(truncations).max())
    expected += eps**0.6 * float(Q.abs().max())
    if not gap <= expected:
        raise ArithmeticError(
            f"expected differences of products with a Jacobian to be symmetric to {expected:.1e}, got a gap of {gap:.1e}: the "
            "backward pass of the operation is not its derivative, or has a kink here; write it in primitive operations"
        )
    return (Q + Q.mT) / 2
