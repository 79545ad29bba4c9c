"""SciPy's Krylov solvers on a Newton system, with and without an inverse as ``M``, judged by true residuals.

Run it with ``python examples/preconditioning.py``.
"""

from __future__ import annotations

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
            nn.init.orthogonal_(layer.weight, gain=1.2)
    return model


def main(
    depth: int = 8, width: int = 5, batch: int = 6, damping: float = 1e-2, maxiter: int = 300, step: float = 1e-3
) -> lh.krylov.Comparison:
    torch.manual_seed(0)
    features, classes = 10, 4
    model = network(depth, width, features, classes)
    inputs = torch.randn(batch, features, dtype=torch.float64)
    targets = torch.randint(classes, (batch,))
    loss_fn = nn.CrossEntropyLoss()

    # An inverse of the Hessian as it was, before the parameters take a small step.
    stale = lh.linearize(model, loss_fn, inputs, targets).inverse(damping)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(step * torch.randn_like(parameter))

    lin = lh.linearize(model, loss_fn, inputs, targets)
    exact = lin.inverse(damping)
    gauss_newton = lin.gauss_newton().inverse(damping)

    # A is H + damping I by Pearlmutter products: nothing of the factorizations is in it.
    A = lh.Hessian(model, loss_fn, (inputs, targets)).damped(damping)
    b = lin.gradient

    def run(solver: str, **options: object) -> lh.krylov.Record:
        restart = {"restart": maxiter} if solver == "gmres" else {}
        return lh.krylov.run(solver, A, b, rtol=1e-8, maxiter=maxiter, **restart, **options)

    comparison = lh.krylov.compare(
        {
            "CG": lambda: run("cg"),
            "MINRES": lambda: run("minres"),
            "GMRES": lambda: run("gmres"),
            # Positive definite for a loss convex in the output, hence legal in cg and minres ...
            "CG, M = Gauss-Newton inverse": lambda: run("cg", M=gauss_newton),
            "MINRES, M = Gauss-Newton inverse": lambda: run("minres", M=gauss_newton),
            # ... but the exact inverse of an indefinite matrix is indefinite: gmres alone takes it.
            "GMRES, M = exact inverse": lambda: run("gmres", M=exact),
            "GMRES, M = inverse before the step": lambda: run("gmres", M=stale),
            "exact inverse": lambda: lh.krylov.direct(exact.matvec, A, b),
        }
    )
    print(f"{b.size} parameters, damping {damping:g}; residuals are ||b - A x|| / ||b||, computed afresh\n")
    print(comparison)
    print(f"\nbackward error of the direct solve: {exact.solve(b).backward_error:.1e}")
    return comparison


if __name__ == "__main__":
    main()
