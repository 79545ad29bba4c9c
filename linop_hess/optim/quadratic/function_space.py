"""The quadratic model of the rows of the output's Jacobian."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from linop_hess._memory import require
from linop_hess._validate import checked_loss
from linop_hess.autograd.differentiate import twice_differentiable
from linop_hess.autograd.output_jacobian import output_jacobian
from linop_hess.errors import FactorizationError, NotFiniteError, UnsupportedModelError
from linop_hess.graph.recording.movement import draws
from linop_hess.lq.accuracy import BACKWARD_ERROR, CONCAVE, ROUNDED
from linop_hess.lq.pivots.inertia import Inertia
from linop_hess.optim.objective import Objective, slope_by_output
from linop_hess.optim.record import Tally

FUNCTION_SPACE = "function-space"
"""By rows of the output's Jacobian, as a method."""

Solve = Callable[[Tensor], Tensor]
"""The product of the inverse of the damped curvature with (N,)."""


class FunctionSpace:
    """loss + gᵀs + ½ sᵀGs with G = KᵀK, the rows of K those of the output's Jacobian times a root of the loss's curvature.

    A damping costs a Cholesky factorization of KKᵀ or KᵀK, whichever is smaller, and no derivative.

    Parameters
    ----------
    loss : float
    output : Tensor, shape (samples, …)
    slope : Tensor, shape (samples, outputs)
        First derivatives of the loss by the outputs.
    curvature : Tensor, shape (samples, outputs, outputs)
        Second ones, of which the positive part is taken; those by outputs of two samples are zero.
    jacobian : Tensor, shape (samples, outputs, N)
    tally : Tally
        Where products and factorizations are counted.

    Attributes
    ----------
    is_convex : bool
        Whether the loss is convex in the output here, up to rounding.
    """

    def __init__(
        self, loss: float, output: Tensor, slope: Tensor, curvature: Tensor, jacobian: Tensor, tally: Tally
    ) -> None:
        self.loss, self.output, self.tally = loss, output, tally
        slope, jacobian = slope.double(), jacobian.double()
        values, self._vectors = _eigh(curvature.double())
        self.is_convex = not bool(values.min() < -CONCAVE * values.max().clamp_min(0.0))
        self._root = values.clamp_min(0.0).sqrt()
        self._K = self._weighted(jacobian).flatten(0, 1)
        self._is_wide = self._K.shape[0] < self._K.shape[1]
        self._gram = _gram(self._K.T if self._is_wide else self._K)
        self.gradient = jacobian.flatten(0, 1).T @ slope.flatten()
        # The gradient as Kᵀy + ρ: where ρ is zero, as for least squares, a step in function space divides nothing by the damping.
        turned = (self._vectors.mT @ slope[:, :, None])[:, :, 0]
        floor = ROUNDED * _EPS * self._root.max().clamp_min(_TINY)
        self._y = torch.where(self._root > floor, turned / self._root.clamp_min(floor), 0.0).flatten()
        self._rest = self.gradient - self._K.T @ self._y
        if not bool(self._rest.norm() > _EPS**0.75 * self.gradient.norm()):
            self._rest = torch.zeros_like(self._rest)

    def _weighted(self, outputs: Tensor) -> Tensor:
        """Cᵀ times (samples, outputs, …), CCᵀ the curvature of the loss."""
        if self._root.shape[1] == 1:  # no directions to turn to, and rows may be most of the memory there is
            return self._root[:, :, None] * outputs
        return (self._vectors.mT @ outputs).mul_(self._root[:, :, None])

    def product(self, V: Tensor) -> Tensor:
        """G times the columns of (N, k)."""
        self.tally.products += V.shape[1]
        return self._K.T @ (self._K @ V)

    def change(self, step: Tensor) -> float:
        """Return gᵀs + ½ sᵀGs."""
        return float(self.gradient @ step + 0.5 * (self._K @ step).square().sum())

    @property
    def curvature(self) -> FunctionSpace:
        """Itself, for damping strategies."""
        return self

    @cached_property
    def _norm(self) -> float:
        v = self._gram.sum(1)
        for _ in range(_POWER):
            if not bool((size := v.norm()) > 0.0):
                return 0.0
            v = self._gram @ (v / size)
        return float(v.norm())

    def norm(self) -> float:
        """‖G‖ from below, by power iteration."""
        return self._norm

    def smallest_convex_damping(self) -> float:
        """Zero: G is semidefinite."""
        return 0.0

    def inertia(self, damping: float) -> Inertia:
        """Signs of the eigenvalues of G + λI, λ > 0."""
        return Inertia(0, 0, self._K.shape[1])

    def factored(self, damping: float) -> Solve:
        """Return the product of (G + λI)⁻¹ with (N,), refined; that with the gradient is the most accurate.

        Raises
        ------
        FactorizationError
            If G + λI is singular to working precision.
        """
        with self.tally.factoring(FUNCTION_SPACE):
            shifted = self._gram.clone()
            shifted.diagonal().add_(damping)
            factor, info = torch.linalg.cholesky_ex(shifted)
        if int(info) or not bool(torch.isfinite(factor.diagonal()).all()):
            raise FactorizationError("the damped Gauss-Newton matrix is singular to working precision", damping=damping)

        def inside(v: Tensor) -> Tensor:
            return torch.cholesky_solve(v[:, None], factor)[:, 0]

        def once(v: Tensor) -> Tensor:
            return (v - self._K.T @ inside(self._K @ v)) / damping if self._is_wide else inside(v)

        def measured(v: Tensor, x: Tensor) -> tuple[Tensor, float]:
            residual = v - damping * x - self._K.T @ (self._K @ x)
            self.tally.products += 1
            size = (self._norm + damping) * x.norm() + v.norm()
            return residual, float(residual.norm() / size) if size > 0.0 else 0.0

        def solve(v: Tensor) -> Tensor:
            if self._is_wide and v is self.gradient:
                x = self._K.T @ inside(self._y) + once(self._rest)
            else:
                x = once(v)
            residual, error = measured(v, x)
            for _ in range(_REFINEMENTS):
                if error <= BACKWARD_ERROR[torch.float64]:
                    break
                finer = x + once(residual)
                rest, after = measured(v, finer)
                if not after < error:
                    break
                x, residual, error = finer, rest, after
            self.tally.backward_error = error
            return x

        return solve

    def pulled(self, outputs: Tensor) -> Tensor:
        """Jᵀ(∇²ℓ) times (samples, …)."""
        return self._K.T @ self._weighted(outputs.double().reshape(*self._root.shape, 1)).flatten()


def function_space(objective: Objective, tally: Tally, samples: int | None = None) -> FunctionSpace | None:
    """Make the model of the rows of the output's Jacobian; None where samples interact, or the loss sees parameters past the output.

    Parameters
    ----------
    objective : Objective
        With an output.
    tally : Tally
    samples : int, optional
        How many there are, if it is known.

    Raises
    ------
    MemoryError
        If the Jacobian does not fit.
    NotFiniteError
        If a derivative is NaN or infinite.
    UnsupportedModelError
        If the model or the loss draws random numbers.
    """
    pieces: list[Callable[[Any], Any]] = []

    def run() -> Any:
        with _Drawn():
            output, loss_of = objective.parts()
        pieces.append(loss_of)
        return output

    found = output_jacobian(run, objective.leaves, samples)
    if found is None:
        return None
    output, jacobian = found
    # In float64: itself where it is in float32, times the root of the curvature, and that product before it is turned.
    copies = 2 + (jacobian.dtype != torch.float64)
    require(8 * copies * jacobian.numel(), "the rows of the Gauss-Newton matrix")
    curved = _loss_by_samples(pieces[-1], output, objective.leaves)
    if curved is None:
        return None
    loss, slope, curvature = curved
    for what, x in (
        ("the Jacobian of the output", jacobian),
        ("the loss's second derivatives", curvature),
        ("the loss's gradient", slope),
    ):
        if x.numel() and not all(bool(torch.isfinite(end)) for end in x.aminmax()):
            raise NotFiniteError(
                f"expected finite derivatives, got NaN or Inf in {what}: scale the problem, or check the data"
            )
    return FunctionSpace(loss, output, slope, curvature, jacobian, tally)


class _Drawn(TorchDispatchMode):
    """Refuses random numbers: rows and curvature are of one run of a model, trial points of others."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags and draws(func, args, kwargs or {}):
            raise UnsupportedModelError(
                f"expected a model and a loss that give the same value each time, got the random operation {func}: call model.eval(), or "
                "remove it"
            )
        return func(*args, **(kwargs or {}))


def _loss_by_samples(
    loss_of: Callable[[Any], Any], output: Tensor, leaves: Sequence[Tensor]
) -> tuple[float, Tensor, Tensor] | None:
    """Loss, first and second derivatives by the outputs of each sample; None where samples interact, or it is no function of them alone."""
    state = output.clone().requires_grad_()
    outputs = output.flatten(1).shape[1] if output.ndim > 1 else 1
    with twice_differentiable("the loss", output.device), torch.enable_grad():
        with _Drawn():
            loss = checked_loss(loss_of(state))
        slope = slope_by_output(loss, state, leaves)
        if slope is None:
            return None

        def product(v: Tensor) -> Tensor:
            if not slope.requires_grad:  # linear
                return torch.zeros_like(v)
            (found,) = torch.autograd.grad(slope, state, v.view_as(state), retain_graph=True, materialize_grads=True)
            return found.view_as(v)

        unit = torch.eye(outputs, dtype=output.dtype, device=output.device).expand(len(output), -1, -1)
        curvature = torch.stack([product(unit[:, k]) for k in range(outputs)], 2)
        generator = torch.Generator(device="cpu").manual_seed(0)
        v = torch.randn(len(output), outputs, generator=generator, dtype=output.dtype, device="cpu").to(output.device)
        # Each pair of samples differs in some bit of its numbers; where they do not interact, a product with one half is zero on the other.
        number = torch.arange(len(output), device=output.device)
        for bit in range((len(output) - 1).bit_length()):
            half = (number >> bit) % 2 == 1
            if bool(product(v * half[:, None])[~half].any()):
                return None
    return float(loss.detach()), slope.detach().reshape(len(output), outputs), curvature.detach()


def _gram(K: Tensor) -> Tensor:
    """KᵀK. NumPy sees that it is symmetric and makes half of it; torch does not."""
    if K.device.type != "cpu":
        return K.T @ K
    rows = K.numpy()
    return torch.from_numpy(rows.T @ rows)


def _eigh(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and vectors of each; of numbers without LAPACK, whose calls take longer than all else."""
    if blocks.shape[-1] > 1:
        values, vectors = torch.linalg.eigh(blocks)
        return values, vectors
    return blocks[:, 0], torch.ones_like(blocks)


# Power iterations for ‖G‖; steps of refinement, each of which takes off some digits at dampings near rounding of ‖G‖; rounding in
# float64, and the least number that is not zero.
_POWER, _REFINEMENTS = 20, 4
_EPS, _TINY = torch.finfo(torch.float64).eps, torch.finfo(torch.float64).tiny
