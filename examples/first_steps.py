"""First steps: a network's Hessian from its pieces, its exact inverse, and what proves both right.

Run it with ``python examples/first_steps.py``.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

import linop_hess as lh


def network(depth: int, width: int, features: int, classes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in in [features] + [width] * (depth - 1):
        layers += [nn.Linear(fan_in, width), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Linear(width, classes)).double()
    for layer in model:
        if isinstance(layer, nn.Linear):
            # Orthogonal weights with a gain above one keep derivatives alive through many tanh layers.
            nn.init.orthogonal_(layer.weight, gain=1.2)
    return model


def relative(error: np.ndarray, truth: np.ndarray) -> float:
    return float(np.linalg.norm(error) / np.linalg.norm(truth))


def main(depth: int = 12, width: int = 6, batch: int = 8, damping: float = 1e-3) -> dict[str, float]:
    torch.manual_seed(0)
    features, classes = 10, 4
    model = network(depth, width, features, classes)
    inputs = torch.randn(batch, features, dtype=torch.float64)
    targets = torch.randint(classes, (batch,))
    loss_fn = nn.CrossEntropyLoss()
    found: dict[str, float] = {}

    lin = lh.linearize(model, loss_fn, inputs, targets)
    print(f"{lin.H.shape[0]} parameters in {lin.problem.length} stages, loss {lin.loss:.4f}")

    # The Hessian is a quadratic polynomial in M^-1. Each letter is a SciPy LinearOperator, and so is the whole.
    sensitivity = lin.P @ lin.M_inv @ lin.D_x
    composed = lin.DD_xx + lin.DD_zx @ sensitivity + sensitivity.T @ lin.DM_xz + sensitivity.T @ lin.DM_zz @ sensitivity
    rng = np.random.default_rng(0)
    v = rng.standard_normal(composed.shape[1])
    autograd = lh.Hessian(model, loss_fn, (inputs, targets))
    found["composed"] = relative(composed @ v - autograd @ v, autograd @ v)
    found["built in"] = relative(lin.H @ v - autograd @ v, autograd @ v)
    print(f"four terms against double backward: relative difference {found['composed']:.1e}")
    print(f"lin.H      against double backward: relative difference {found['built in']:.1e}")

    # Invert. Every solve is refined and measured by a product that does not use the factors.
    print(f"\nwhat a factorization would cost:\n{lin.plan(damping)}\n")
    inverse = lin.inverse(damping)
    solution = inverse.solve(lin.gradient)
    found["backward error"] = solution.backward_error
    judge = autograd.damped(damping)
    found["residual"] = relative(judge @ solution.x - lin.gradient, lin.gradient)
    print(f"(H + {damping:g} I) x = gradient by {solution.method!r}: backward error {solution.backward_error:.1e},")
    print(f"true relative residual by double backward {found['residual']:.1e}")

    # Several right-hand sides at once, and another damping without another differentiation.
    block = rng.standard_normal((inverse.shape[0], 5))
    found["block"] = relative(judge @ (inverse @ block) - block, block)
    print(f"five right-hand sides at once: relative residual {found['block']:.1e}")
    stiffer = inverse.with_damping(100 * damping)
    found["other damping"] = stiffer.solve(lin.gradient).backward_error
    print(f"damping {stiffer.damping:g} from the same derivatives: backward error {found['other damping']:.1e}")

    # The paper's route to the same x: lift to K (x, y, z) = (g, 0, 0), whose permuted form is block tridiagonal.
    lifted = np.concatenate([lin.gradient, np.zeros(lin.augmented(damping).shape[0] - lin.gradient.size)])
    y = lin.M_inv @ lin.D_x @ solution.x
    z = lin.M_inv.T @ lin.P.T @ (lin.DM_xz @ solution.x + lin.DM_zz @ lin.P @ y)
    xyz = np.concatenate([solution.x, y, z])
    regrouped = lin.permutation @ xyz
    found["augmented"] = relative(lin.augmented(damping) @ xyz - lifted, lifted)
    found["tridiagonal"] = relative(lin.block_tridiagonal(damping) @ regrouped - lin.permutation @ lifted, lifted)
    print(f"the same x solves the lifted system: {found['augmented']:.1e}, regrouped: {found['tridiagonal']:.1e}")
    return found


if __name__ == "__main__":
    main()
