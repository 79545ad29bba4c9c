"""An optimal-control problem through `linop_hess.lq` alone: no network, no torch model.

A pendulum is to be held upright by a torque u. Linearized about the upright position, with the state (angle, rate),

    d/dt (θ, ω) = (ω, (g/ℓ) θ + u),      cost ∫ ½ (q θ² + r u²) dt,

and the torque constant over each step. Exact discretization gives δ_l = F δ_{l−1} + G u_l and a stage cost with a cross
term, ½ A u² + u B δ + ½ δᵀ C δ. The terminal cost is the infinite-horizon one, so the first torque must be that of the
stationary regulator, however short the horizon: an independent truth next to the dense KKT solve.

Run it with ``python examples/optimal_control.py``.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch

from linop_hess.lq import Problem, Solver

Blocks = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def pendulum(dt: float, stiffness: float = 9.81, q: float = 10.0, r: float = 0.1) -> Blocks:
    """Return A, B, C, F, G of one step, by Van Loan's matrix exponential."""
    dynamics = np.array([[0.0, 1.0, 0.0], [stiffness, 0.0, 1.0], [0.0, 0.0, 0.0]])  # of (θ, ω, u)
    weight = np.diag([q, 0.0, r])
    big = scipy.linalg.expm(dt * np.block([[-dynamics.T, weight], [np.zeros((3, 3)), dynamics]]))
    step = big[3:, 3:]
    cost = step.T @ big[:3, 3:]
    cost = (cost + cost.T) / 2
    return cost[2:, 2:], cost[2:, :2], cost[:2, :2], step[:2, :2], step[:2, 2:]


def slope_without_control(blocks: Blocks, terminal: np.ndarray, steps: int, starts: np.ndarray) -> np.ndarray:
    """Return −g: the derivative of the cost by every control, on the trajectories without control."""
    _, B, C, F, G = blocks
    states = [starts]
    for _ in range(steps):
        states.append(F @ states[-1])
    costate = terminal @ states[-1]
    slopes = []
    for state in reversed(states[:-1]):
        slopes.append(B @ state + G.T @ costate)
        costate = C @ state + F.T @ costate
    return np.concatenate(slopes[::-1])


def dense_kkt(blocks: Blocks, terminal: np.ndarray, steps: int, starts: np.ndarray) -> np.ndarray:
    """Return the optimal controls from one dense solve for all controls, states and multipliers."""
    A, B, C, F, G = blocks
    n, m = G.shape
    eye = np.eye(steps)
    before = np.eye(steps, k=-1)  # state l−1 of the states 1..L
    states = np.kron(np.eye(steps) - np.diag(eye[-1]), C) + np.kron(np.diag(eye[-1]), terminal)
    cross = np.kron(before, B)
    hessian = np.block([[np.kron(eye, A), cross], [cross.T, states]])
    dynamics = np.block([np.kron(eye, G), np.kron(before, F) - np.eye(steps * n)])
    matrix = np.block([[hessian, dynamics.T], [dynamics, np.zeros((steps * n, steps * n))]])
    rhs = np.zeros((matrix.shape[0], starts.shape[1]))
    rhs[:m] = -B @ starts
    rhs[steps * (m + n) : steps * (m + n) + n] = -F @ starts
    return np.linalg.solve(matrix, rhs)[: steps * m]


def main(steps: int = 60, horizon: float = 2.0) -> dict[str, float]:
    blocks = pendulum(horizon / steps)
    A, B, C, F, G = blocks
    terminal = scipy.linalg.solve_discrete_are(F, G, C, A, s=B.T)

    # One block of each letter a stage. The first stage has no state before it that matters (δ_0 = 0); the last one has no
    # controls and no state after it, only the terminal cost.
    problem = Problem.from_blocks(
        A=[A] * steps + [np.zeros((0, 0))],
        B=[B] * steps + [np.zeros((0, 2))],
        C=[C] * steps + [terminal],
        F=[F] * steps + [np.zeros((0, 2))],
        G=[G] * steps + [np.zeros((0, 0))],
    )

    # Two starting states at once, a tilt and a push. δ is the deviation from the trajectory without control.
    starts = np.array([[0.1, 0.0], [0.0, 0.3]])
    g = -slope_without_control(blocks, terminal, steps, starts)

    truth = dense_kkt(blocks, terminal, steps, starts)
    gain = np.linalg.solve(A + G.T @ terminal @ G, B + G.T @ terminal @ F)
    found: dict[str, float] = {}
    print(f"{steps} steps, {problem.size} controls, no damping")
    for method in ("banded", "riccati", "dense"):
        solution = Solver(problem, damping=0.0, method=method).solve(torch.from_numpy(g))
        controls = solution.x.numpy()
        found[f"{method} backward error"] = solution.backward_error
        found[f"{method} against KKT"] = float(abs(controls - truth).max() / abs(truth).max())
        found[f"{method} against regulator"] = float(abs(controls[:1] + gain @ starts).max() / abs(gain).max())
        print(
            f"{method:>8}: backward error {solution.backward_error:.1e}, "
            f"against the dense KKT solve {found[f'{method} against KKT']:.1e}, "
            f"first torque against the regulator's {found[f'{method} against regulator']:.1e}"
        )

    state = starts
    for torque in controls:
        state = F @ state + G @ torque[None]
    fallen = np.linalg.matrix_power(F, steps) @ starts
    found["largest angle without control"] = float(abs(fallen[0]).max())
    found["largest angle with control"] = float(abs(state[0]).max())
    print(
        f"largest angle after {horizon:g} s: {found['largest angle without control']:.3g} rad without control "
        f"(the linear model), {found['largest angle with control']:.1e} rad with it"
    )
    return found


if __name__ == "__main__":
    main()
