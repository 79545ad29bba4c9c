"""Second derivatives by differences of first ones, where an operation has no second derivative in torch.

With D(h) = (g(θ + hv) − g(θ − hv))/2h, (4D(h) − D(2h))/3 is Hv to fourth order. Rounding adds about eps/h of the gradient and
truncation h⁴ of its fifth derivative, so h is of the size of eps^(1/5): the error is of the order of eps^(4/5), 3e-13 in float64
and 3e-6 in float32, times what the function makes of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def checked_differentiation(differentiation: str, nonsmooth: str) -> bool:
    """Return whether second derivatives may come from differences of first ones.

    Parameters
    ----------
    differentiation : str
    nonsmooth : str
        As in `linop_hess.Hessian`.

    Raises
    ------
    ValueError
        If `differentiation` is unknown, or differences are asked for together with surrogates.
    """
    if differentiation not in ("autograd", "finite"):
        raise ValueError(
            f'expected differentiation to be "autograd" or "finite", got {differentiation!r}: pass one of the two'
        )
    if differentiation == "finite" and nonsmooth == "smooth":
        raise ValueError(
            'expected nonsmooth="generalized" or "error" with differentiation="finite", got "smooth": differences of the '
            "model's gradient know no surrogate"
        )
    return differentiation == "finite"


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

    Fourth order in each entry, 4n products, with steps 0.3 eps^(1/5) max(1, |z_j|), or shorter where these are too long.
    Measured in float64: 2e-12 of the largest entry for attention.

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
        If the differences do not converge, or are asymmetric by more than their error: `vjp` is no gradient, or has kinks
        here.

    Examples
    --------
    >>> import torch
    >>> finite_difference_hessian(lambda z: 3 * z**2, torch.tensor([1.0, 2.0], dtype=torch.float64)).round(decimals=6)
    tensor([[ 6.,  0.],
            [ 0., 12.]], dtype=torch.float64)
    """
    if not point.numel():
        return point.new_zeros(*point.shape, point.shape[-1])
    eps = torch.finfo(point.dtype).eps
    for shrink in (1.0, 2.0**-4, 2.0**-8):
        Q, gap, rounding = _differences(vjp, point, 0.3 * eps**0.2 * shrink)
        size = Q.abs().amax((-2, -1))
        if bool((gap <= eps ** (1 / 3) * size + rounding).all()):  # whose square is about the error of fourth order
            break
    else:
        raise ArithmeticError(
            "expected differences of products with a Jacobian to converge, got steps that disagree by "
            f"{float(gap.max()):.1e}: the operation has a kink or a singularity here; write it in primitive operations"
        )
    asymmetry = (Q - Q.mT).abs().amax((-2, -1))
    if not bool((asymmetry <= eps**0.6 * size + 1e-2 * gap + rounding).all()):
        raise ArithmeticError(
            f"expected differences of products with a Jacobian to be symmetric, got a gap of {float(asymmetry.max()):.1e}: the "
            "backward pass of the operation is not its derivative, or has a kink here; write it in primitive operations"
        )
    return (Q + Q.mT) / 2


def _differences(vjp: Callable[[Tensor], Tensor], point: Tensor, relative: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the Jacobian of `vjp` (..., n, n), by how much two steps disagree (...), and what rounding explains (...)."""
    columns, gap, largest = [], point.new_zeros(point.shape[:-1]), point.new_zeros(point.shape[:-1])
    for j in range(point.shape[-1]):
        step = relative * point[..., j].abs().clamp(min=1.0)
        slopes = []
        for factor in (1.0, 2.0):
            above, below = point.clone(), point.clone()
            above[..., j] += factor * step
            below[..., j] -= factor * step
            up, down = vjp(above), vjp(below)
            slopes.append((up - down) / (above[..., j] - below[..., j])[..., None])  # the step as rounded
            largest = torch.maximum(largest, up.abs().amax(-1))
        near, far = slopes
        columns.append(near + (near - far) / 3)
        gap = torch.maximum(gap, (near - far).abs().amax(-1))
    return torch.stack(columns, -1), gap, 1e2 * torch.finfo(point.dtype).eps / relative * largest
