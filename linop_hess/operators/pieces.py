"""The pieces a Hessian is made of, each an operator over one LQ problem.

State vectors run over the layers: "outputs" (z_1..z_L), of size Σ n_1..L, and "inputs" (z_0..z_{L−1}), of
size Σ n_0..L−1; parameter vectors have size N. No piece stores a matrix: a stage multiplies in whatever
structure it has.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from torch import Tensor

from linop_hess._validate import finite_real
from linop_hess.lq.problem import Problem
from linop_hess.operators.operator import Operator
from linop_hess.operators.permutation import Permutation


class Piece(Operator):
    """An operator over the stages of `problem`, of shape (rows, columns)."""

    def __init__(self, problem: Problem, rows: int, columns: int) -> None:
        super().__init__((rows, columns), problem.dtype, problem.device)
        self.problem = problem


class Transition(Piece):
    """M, unit lower block bidiagonal: (M v)_l = v_l − F_l v_{l−1}. Shape (Σ n_1..L, Σ n_1..L); cost O(L)."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem, problem.layout.size_out, problem.layout.size_out)

    def _apply(self, X: Tensor) -> Tensor:
        return self.problem.transition.apply(X)

    def _apply_adjoint(self, Y: Tensor) -> Tensor:
        return self.problem.transition.apply_adjoint(Y)


class InverseTransition(Piece):
    """M⁻¹ by forward substitution, its adjoint by backward substitution. Shape (Σ n_1..L, Σ n_1..L); cost O(L)."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem, problem.layout.size_out, problem.layout.size_out)

    def _apply(self, X: Tensor) -> Tensor:
        return self.problem.transition.substitute(X)

    def _apply_adjoint(self, Y: Tensor) -> Tensor:
        return self.problem.transition.substitute_adjoint(Y)


class Shift(Piece):
    """P, the block down-shift (z_1..z_L) to (0, z_1..z_{L−1}). Shape (Σ n_0..L−1, Σ n_1..L)."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem, problem.layout.size_in, problem.layout.size_out)

    def _apply(self, X: Tensor) -> Tensor:
        return self.problem.layout.shift(X)

    def _apply_adjoint(self, Y: Tensor) -> Tensor:
        return self.problem.layout.shift_adjoint(Y)


class ParameterJacobian(Piece):
    """D_x, block diagonal with G_l = ∇_x f_l. Shape (Σ n_1..L, N)."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem, problem.layout.size_out, problem.size)

    def _apply(self, X: Tensor) -> Tensor:
        return self.problem.apply_G(X)

    def _apply_adjoint(self, Y: Tensor) -> Tensor:
        return self.problem.apply_Gt(Y)


class ParameterCurvature(Piece):
    """DD_xx = D_D D_xx, block diagonal with A_l = Σ_i b_i ∇²_xx f_i. Shape (N, N)."""

    symmetric = True

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem, problem.size, problem.size)

    def _apply(self, X: Tensor) -> Tensor:
        return self.problem.apply_A(X)


class MixedCurvature(Piece):
    """DD_zx = D_D D_zx, block diagonal with B_l = Σ_i b_i ∇²_xz f_i; its adjoint is DM_xz. Shape (N, Σ n_0..L−1)."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem, problem.size, problem.layout.size_in)

    def _apply(self, X: Tensor) -> Tensor:
        return self.problem.apply_B(X)

    def _apply_adjoint(self, Y: Tensor) -> Tensor:
        return self.problem.apply_Bt(Y)


class StateCurvature(Piece):
    """DM_zz = D_M D_zz, block diagonal with C_l = Σ_i b_i ∇²_zz f_i. Shape (Σ n_0..L−1, Σ n_0..L−1)."""

    symmetric = True

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem, problem.layout.size_in, problem.layout.size_in)

    def _apply(self, X: Tensor) -> Tensor:
        return self.problem.apply_C(X)


class ChainHessian(Piece):
    """The Hessian of a chain, of shape (N, N), applied by one forward and one backward substitution.

    H = DD_xx + DD_zx P M⁻¹ D_x + D_xᵀ M⁻ᵀ Pᵀ DM_xz + D_xᵀ M⁻ᵀ Pᵀ DM_zz P M⁻¹ D_x

    Source: arXiv 2601.06096. The four terms share δ = P M⁻¹ D_x v and the substitution with M⁻ᵀ.
    """

    symmetric = True

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem, problem.size, problem.size)

    def _apply(self, X: Tensor) -> Tensor:
        return self.problem.hessian_product(X)


class Augmented(Piece):
    """𝒦, the lifted system in the unknowns (x, y, z), of shape (N + 2 Σ n_1..L, N + 2 Σ n_1..L).

        ⎡ DD_xx + εI    DD_zx P       D_xᵀ ⎤
        ⎢   −D_x           M           0   ⎥
        ⎣ −Pᵀ DM_xz   −Pᵀ DM_zz P     Mᵀ   ⎦

    Eliminating y and z from 𝒦 (x, y, z) = (g, 0, 0) leaves (H + εI) x = g.

    Parameters
    ----------
    problem : Problem
    damping : float
        ε.
    """

    def __init__(self, problem: Problem, damping: float) -> None:
        n = problem.size + 2 * problem.layout.size_out
        super().__init__(problem, n, n)
        self.damping = damping

    def _cut(self, X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        N, n = self.problem.size, self.problem.layout.size_out
        return X[:N], X[N : N + n], X[N + n :]

    def _apply(self, X: Tensor) -> Tensor:
        q = self.problem
        x, y, z = self._cut(X)
        d = q.layout.shift(y)
        return _rows(
            q.apply_A(x) + self.damping * x + q.apply_B(d) + q.apply_Gt(z),
            q.transition.apply(y) - q.apply_G(x),
            q.transition.apply_adjoint(z) - q.layout.shift_adjoint(q.apply_Bt(x) + q.apply_C(d)),
        )

    def _apply_adjoint(self, Y: Tensor) -> Tensor:
        q = self.problem
        x, y, z = self._cut(Y)
        d = q.layout.shift(z)
        return _rows(
            q.apply_A(x) + self.damping * x - q.apply_Gt(y) - q.apply_B(d),
            q.layout.shift_adjoint(q.apply_Bt(x) - q.apply_C(d)) + q.transition.apply_adjoint(y),
            q.apply_G(x) + q.transition.apply(z),
        )


def _rows(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    out = x.new_empty(x.shape[0] + y.shape[0] + z.shape[0], x.shape[1])
    out[: x.shape[0]], out[x.shape[0] : -z.shape[0]], out[-z.shape[0] :] = x, y, z
    return out


def layerwise_permutation(problem: Problem) -> Permutation:
    """Π: regroups (x, y, z) layer by layer, (x_1, y_1, z_1, x_2, …); ΠᵀΠ = I."""
    layout = problem.layout
    N, n, ends = problem.size, layout.size_out, layout.out_offsets
    parts = []
    for l in range(problem.length):
        after = np.arange(ends[l], ends[l + 1])
        parts += [layout.controls(l), N + after, N + n + after]
    return Permutation(np.concatenate(parts), problem.dtype, problem.device)


class HasPieces:
    """What has an LQ problem, and every piece of its Hessian as an operator."""

    problem: Problem

    @cached_property
    def M(self) -> Operator:
        """M, unit lower block bidiagonal with −F_l."""
        return Transition(self.problem)

    @cached_property
    def M_inv(self) -> Operator:
        """M⁻¹, by substitution."""
        return InverseTransition(self.problem)

    @cached_property
    def P(self) -> Operator:
        """P, the block down-shift (z_1..z_L) to (z_0..z_{L−1})."""
        return Shift(self.problem)

    @cached_property
    def D_x(self) -> Operator:
        """D_x, block diagonal with G_l."""
        return ParameterJacobian(self.problem)

    @cached_property
    def DD_xx(self) -> Operator:
        """D_D D_xx, block diagonal with A_l."""
        return ParameterCurvature(self.problem)

    @cached_property
    def DD_zx(self) -> Operator:
        """D_D D_zx, block diagonal with B_l."""
        return MixedCurvature(self.problem)

    @property
    def DM_xz(self) -> Operator:
        """D_M D_xz, the adjoint of `DD_zx`."""
        return self.DD_zx.H

    @cached_property
    def DM_zz(self) -> Operator:
        """D_M D_zz, block diagonal with C_l."""
        return StateCurvature(self.problem)

    def augmented(self, damping: float) -> Operator:
        """𝒦 at `damping`, in the unknowns (x, y, z).

        Raises
        ------
        ValueError, TypeError
            If damping is not a finite real number.
        """
        return Augmented(self.problem, finite_real(damping, "damping"))

    @cached_property
    def permutation(self) -> Permutation:
        """Π, which regroups (x, y, z) layer by layer."""
        return layerwise_permutation(self.problem)

    def block_tridiagonal(self, damping: float) -> Operator:
        """𝒦' = Π 𝒦 Πᵀ, block tridiagonal with the blocks of `block_sizes`.

        Raises
        ------
        ValueError, TypeError
            If damping is not a finite real number.
        """
        return self.permutation @ self.augmented(damping) @ self.permutation.T

    @property
    def block_sizes(self) -> np.ndarray:
        """Sizes p_l + 2 n_l of the blocks of 𝒦', shape (L,)."""
        return self.problem.layout.p + 2 * self.problem.layout.n_out
