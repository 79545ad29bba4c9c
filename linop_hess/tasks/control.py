"""Optimal control by single shooting as an LQ problem: rollouts, adjoints, and the stages of the exact Hessian.

    min over u of  Σ_l ℓ(x_l, u_l) + φ(x_L),    x_{l+1} = f(x_l, u_l),    x_0 given.

A trajectory may be closed by feedback, u_l = ū_l + v_l + K_l(x_l − x̄_l), and v be the controls: the same minima, and second
derivatives of a system that does not fall over (J. Hauser, A projection operator approach to the optimization of trajectory
functionals, IFAC 2002).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from linop_hess._validate import true_or_false
from linop_hess.lq import DenseStage, Problem


@dataclass(frozen=True)
class Trajectory:
    """A rollout.

    Attributes
    ----------
    u : ndarray, shape (L,)
        Controls.
    x : ndarray, shape (L + 1, n)
        States; the first is the start.
    cost : float
        Infinite where the rollout left the range of floats.
    """

    u: np.ndarray
    x: np.ndarray
    cost: float


@dataclass(frozen=True)
class Expansion:
    """Derivatives of a task at a trajectory, of the controls v of the loop closed by K.

    Attributes
    ----------
    gradient : ndarray, shape (L,)
    problem : Problem
        H of all controls, stage by stage.
    F : ndarray, shape (L, n, n)
        ∂f/∂x without feedback.
    G : ndarray, shape (L, n)
        ∂f/∂u.
    """

    gradient: np.ndarray
    problem: Problem
    F: np.ndarray
    G: np.ndarray


@dataclass(frozen=True)
class _FirstOrder:
    """Columns of states and controls, what autograd recorded of them, Jacobians, and adjoints p after each stage."""

    z: list[Tensor]
    end: list[Tensor]
    step: tuple[Tensor, ...]
    cost: Tensor
    last: Tensor
    F: np.ndarray
    G: np.ndarray
    loop: np.ndarray
    p: np.ndarray
    gradient: np.ndarray


class ControlTask(ABC):
    """A task of L stages with n states and one control each.

    Parameters
    ----------
    length : int
        L.
    start : sequence of float, length n
        x_0.
    horizon : float
        Seconds; each stage takes horizon/L.

    Attributes
    ----------
    h : float
        Seconds of a stage.
    weight : tuple of float, length n
        Of each state, beside the task's costs, in the regulator that closes the loop; a second.

    Raises
    ------
    ValueError
        If there is no stage, or the horizon is not positive and finite.
    """

    weight: tuple[float, ...]

    def __init__(self, length: int, start: Sequence[float], horizon: float) -> None:
        if length < 1 or not (math.isfinite(horizon) and horizon > 0.0):
            raise ValueError(f"expected at least one stage and a positive horizon, got {length} and {horizon}")
        self.length, self.start, self.h = int(length), tuple(map(float, start)), horizon / length

    @abstractmethod
    def step(self, x: Sequence[Any], u: Any, m: Any) -> tuple[Any, ...]:
        """Return f(x, u), entry by entry; m is `math`, or `torch` for all stages at once."""

    @abstractmethod
    def running(self, x: Sequence[Any], u: Any, m: Any) -> Any:
        """Return ℓ(x, u)."""

    @abstractmethod
    def terminal(self, x: Sequence[Any], m: Any) -> Any:
        """Return φ(x)."""

    def rollout(self, u: np.ndarray, around: Trajectory | None = None, K: np.ndarray | None = None) -> Trajectory:
        """Roll out controls u, or u + K(x − x̄) about a trajectory, K of shape (L, n).

        Raises
        ------
        ValueError
            If u has not L entries.
        """
        if np.shape(u) != (self.length,):
            raise ValueError(f"expected controls of shape ({self.length},), got {np.shape(u)}: one number a stage")
        x: tuple[float, ...] = self.start
        states, controls, cost = [x], [], 0.0
        gains = None if K is None or around is None else (K.tolist(), around.x.tolist())
        try:
            for l, control in enumerate(u.tolist()):
                if gains is not None:
                    control += sum(k * (a - b) for k, a, b in zip(gains[0][l], x, gains[1][l], strict=True))
                cost += self.running(x, control, math)
                x = self.step(x, control, math)
                states.append(x)
                controls.append(control)
            cost += self.terminal(x, math)
        except (OverflowError, ValueError):  # math.sin(inf), 1e200²
            return Trajectory(np.array(u), np.array(self.start)[None], math.inf)
        return Trajectory(np.array(controls), np.array(states), cost if math.isfinite(cost) else math.inf)

    def expand(self, at: Trajectory, K: np.ndarray | None = None, *, gauss_newton: bool = False) -> Expansion:
        """Return gradient and Hessian at a trajectory.

        Parameters
        ----------
        at : Trajectory
        K : ndarray, shape (L, n), optional
            Gains that close the loop; by default none.
        gauss_newton : bool
            Leave out the curvature of the dynamics, and of costs what is negative: iLQR's matrix.

        Returns
        -------
        Expansion

        Raises
        ------
        TypeError
            If `gauss_newton` is no bool.
        """
        gauss_newton, n = true_or_false(gauss_newton, "gauss_newton"), len(self.start)
        first = self._first_order(at, K)
        with torch.enable_grad():
            value, adjoint = first.cost, torch.from_numpy(first.p)
            if not gauss_newton:
                value = value + sum(adjoint[:, i] * entry for i, entry in enumerate(first.step))
            W = _curvature(value, first.z)
            C_last = _curvature(first.last, first.end)
        if gauss_newton:
            W, C_last = _without_negative(W), _without_negative(C_last)
        if K is not None:  # (x, v) to (x, u)
            T = torch.eye(n + 1, dtype=torch.float64, device="cpu").repeat(self.length, 1, 1)
            T[:, n, :n] = torch.from_numpy(K)
            W = T.mT @ W @ T
        stages = DenseStage.plain(
            torch.from_numpy(first.loop.copy()),
            torch.from_numpy(first.G[:, :, None].copy()),
            W[:, n:, n:].contiguous(),
            W[:, n:, :n].contiguous(),
            W[:, :n, :n].contiguous(),
        )
        closing = DenseStage.plain(torch.zeros(1, 0, n, dtype=torch.float64, device="cpu"), None, None, None, C_last)
        order = np.array([(0, l) for l in range(self.length)] + [(1, 0)])
        return Expansion(first.gradient, Problem([stages, closing], order), first.F, first.G)

    def gradient(self, at: Trajectory) -> np.ndarray:
        """Return the derivatives of the cost by the controls, shape (L,)."""
        return self._first_order(at, None).gradient

    def _first_order(self, at: Trajectory, K: np.ndarray | None) -> _FirstOrder:
        n = len(self.start)
        z = [*torch.from_numpy(at.x[:-1].T.copy()), torch.from_numpy(at.u.copy())]
        z = [column.requires_grad_() for column in z]
        end = [column.requires_grad_() for column in torch.from_numpy(at.x[-1:].T.copy())]
        with torch.enable_grad():
            step = self.step(z[:-1], z[-1], torch)
            cost = self.running(z[:-1], z[-1], torch)
            last = self.terminal(end, torch)
        jacobian = torch.stack([_slopes(entry, z) for entry in step], 1).numpy()  # (L, n, n + 1)
        slope = _slopes(cost, z).numpy()
        F, G = jacobian[:, :, :n], jacobian[:, :, n]
        loop = F if K is None else F + G[:, :, None] * K[:, None, :]
        pull = slope[:, :n] if K is None else slope[:, :n] + slope[:, n:] * K
        p = _adjoints(loop, pull, _slopes(last, end).numpy()[0])
        gradient = slope[:, n] + np.einsum("li,li->l", G, p)
        return _FirstOrder(z, end, step, cost, last, F, G, loop, p, gradient)


def regulator(gauss_newton: Expansion, weight: np.ndarray | None = None) -> np.ndarray:
    """Gains (L, n) of the optimal feedback of a Gauss-Newton expansion, from Riccati's recursion.

    The costs are the task's own, those of its end among them, so that the loop holds to what the task wants: with gains of other costs the
    end is free to move under small changes of early controls, and steps of Newton's method are short.

    Parameters
    ----------
    gauss_newton : Expansion
        Without feedback, of `ControlTask.expand` with ``gauss_newton=True``.
    weight : ndarray, shape (n,), optional
        Of the states, in addition: where the task's costs are not convex, as where a pendulum hangs, they are none.
    """
    F, G = gauss_newton.F, gauss_newton.G
    stages, closing = gauss_newton.problem.blocks
    A, B, C = (block.numpy() for block in (stages.dense_A()[:, 0, 0], stages.dense_B()[:, 0], stages.dense_C()))
    extra = np.diag(np.zeros(G.shape[1]) if weight is None else weight)
    V = closing.dense_C()[0].numpy() + extra
    K = np.empty_like(G)
    for l in range(len(F) - 1, -1, -1):
        VF, VG = V @ F[l], V @ G[l]
        E = B[l] + G[l] @ VF
        K[l] = -E / (A[l] + G[l] @ VG)
        V = C[l] + extra + F[l].T @ VF + np.outer(E, K[l])
        V = (V + V.T) / 2
    return K


def _slopes(value: Tensor, z: Sequence[Tensor]) -> Tensor:
    """Derivatives by each column, shape (L, columns), differentiable."""
    if not value.requires_grad:
        return torch.zeros(len(z[0]), len(z), dtype=torch.float64, device="cpu")
    found = torch.autograd.grad(value.sum(), z, retain_graph=True, allow_unused=True)
    return torch.stack([torch.zeros_like(c) if g is None else g for c, g in zip(z, found, strict=True)], 1)


def _curvature(value: Tensor, z: Sequence[Tensor]) -> Tensor:
    """Second derivatives (L, columns, columns), by double backward."""
    first = torch.autograd.grad(value.sum(), z, create_graph=True, allow_unused=True)
    rows = [
        torch.zeros(len(z[0]), len(z), dtype=torch.float64, device="cpu") if g is None else _slopes(g, z) for g in first
    ]
    found = torch.stack(rows, 1).detach()
    return (found + found.mT) / 2


def _adjoints(F: np.ndarray, slope: np.ndarray, last: np.ndarray) -> np.ndarray:
    p = np.empty_like(slope)
    for l in range(len(F) - 1, -1, -1):
        p[l] = last
        last = slope[l] + last @ F[l]
    return p


def _without_negative(W: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(W)
    return (vectors * values.clamp_min(0.0)[:, None, :]) @ vectors.mT
