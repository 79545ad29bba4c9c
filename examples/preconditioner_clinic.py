"""Which ``M`` is legal in SciPy's cg, minres and gmres, and what happens where it is not.

``M`` stands for the inverse of A. What the methods assume is

    cg       A and M symmetric positive definite,
    minres   A symmetric, M symmetric positive definite,
    gmres    nothing.

SciPy's cg checks none of it. Its minres raises once it meets rᵀMr < 0, with the words "indefinite preconditioner" at the
start and the misleading "non-symmetric matrix" later. Here A is a Hessian, damped to be indefinite or just definite, of
products by autograd: nothing of the factorizations is in it. The verdict on M is by inertia, before anything is run;
what comes of it is counted over several right-hand sides, by true residuals ‖b − Ax‖/‖b‖:

    solved         at or below rtol,
    false success  info == 0, and it is not: minres stops by ‖r‖ ≤ rtol ‖A‖‖x‖,
    gave up        info > 0, at ``maxiter``,
    raised         by minres.

Iterations and residual are the largest; rᵀMr < 0 counts the products with M that give it away, of all. A stale inverse
is one from before a small step of the parameters; near_inverses.py measures how many steps, and which damping.

Run it with ``python examples/preconditioner_clinic.py``.
"""

from __future__ import annotations

import argparse
import copy
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.linalg import block_diag, eigvalsh
from scipy.sparse.linalg import LinearOperator, aslinearoperator
from torch import nn

import linop_hess as lh

RTOL = 1e-8


class Case(NamedTuple):
    """One solver with one A and one M, and a record for each right-hand side."""

    kind: str
    A: LinearOperator
    name: str
    M: LinearOperator | None
    solver: str
    verdict: str
    records: list[lh.krylov.Record]

    @property
    def outcomes(self) -> Counter[str]:
        return Counter(outcome(record) for record in self.records)


def outcome(record: lh.krylov.Record) -> str:
    if record.info is None:
        return "raised"
    if record.converged:
        return "solved"
    return "gave up" if record.info else "false success"


def network(depth: int, width: int, features: int, classes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in in [features] + [width] * (depth - 1):
        layers += [nn.Linear(fan_in, width), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Linear(width, classes)).double()
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight, gain=1.2)
    return model


def preconditioners(
    lin: lh.Linearization, stale: lh.Linearization, single: lh.Linearization, damping: float
) -> dict[str, tuple[LinearOperator | None, int]]:
    """Return each M with the number of its negative eigenvalues."""
    inverses = {
        "exact inverse": lin.inverse(damping),
        "Gauss-Newton inverse": lin.gauss_newton().inverse(damping),
        "inverse at half the damping": lin.inverse(damping / 2),
        "stale inverse": stale.inverse(damping),
        "float32 inverse": single.inverse(damping),
    }
    exact, blocks = inverses["exact inverse"], inverses["exact inverse"].block_diagonal()
    found: dict[str, tuple[LinearOperator | None, int]] = {"none": (None, 0)}
    found |= {name: (inverse, inverse.inertia().negative) for name, inverse in inverses.items()}
    found["layers' blocks of inverse"] = (
        aslinearoperator(block_diag(*blocks.values())),
        sum(int((eigvalsh(b) < 0).sum()) for b in blocks.values()),
    )
    found["A itself, by mistake"] = lin.damped(damping), exact.inertia().negative
    # L⁻ᵀ|D|⁻¹L⁻¹ where L D Lᵀ is what was factored: positive definite, whatever that is.
    for name in ("exact", "stale", "float32"):
        found[f"{name} inverse, positive()"] = inverses[f"{name} inverse"].positive(), 0
    return found


def verdict(solver: str, negative_A: int, negative_M: int) -> str:
    if solver == "gmres" or not (negative_M or (solver == "cg" and negative_A)):
        return "legal"
    return "illegal: " + " and ".join(["A"] * (solver == "cg" and negative_A > 0) + ["M"] * (negative_M > 0))


def main(
    depth: int = 6, width: int = 5, batch: int = 6, damping: float = 1e-2, maxiter: int = 200, step: float = 1e-3
) -> tuple[list[Case], list[np.ndarray]]:
    torch.manual_seed(0)
    model, loss_fn = network(depth, width, 10, 4), nn.CrossEntropyLoss()
    inputs, targets = torch.randn(batch, 10, dtype=torch.float64), torch.randint(4, (batch,))
    stale = lh.linearize(model, loss_fn, inputs, targets)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(step * torch.randn_like(parameter))
    lin = lh.linearize(model, loss_fn, inputs, targets)
    single = lh.linearize(copy.deepcopy(model).float(), loss_fn, inputs.float(), targets)
    hessian = lh.Hessian(model, loss_fn, (inputs, targets))
    sides = [lin.gradient, *np.random.default_rng(0).standard_normal((2, hessian.shape[0]))]
    cases: list[Case] = []
    for kind, epsilon in {"indefinite": damping, "definite": lin.smallest_convex_damping(margin=1e-3)}.items():
        A, negative = hessian.damped(epsilon), lin.inertia(epsilon).negative
        print(f"\nA = H + {epsilon:.5g} I, {negative} of {A.shape[0]} eigenvalues negative; rtol = {RTOL:g}\n")
        print(f"{'M':30}{'solver':8}{'verdict':18}{'iterations':>10}{'residual':>10}{'rᵀMr < 0':>12}   outcomes")
        for name, (M, negative_M) in preconditioners(lin, stale, single, epsilon).items():
            for solver in ("cg", "minres", "gmres"):
                options: dict[str, Any] = {"restart": maxiter} if solver == "gmres" else {}
                records = [lh.krylov.run(solver, A, b, M=M, rtol=RTOL, maxiter=maxiter, **options) for b in sides]
                cases.append(Case(kind, A, name, M, solver, verdict(solver, negative, negative_M), records))
                show(cases[-1])
    summarize(cases)
    return cases, sides


def show(case: Case) -> None:
    worst, longest = (max(getattr(r, key) for r in case.records) for key in ("residual", "iterations"))
    seen, products = (sum(getattr(r, key) for r in case.records) for key in ("negative_curvature_M", "products_M"))
    words = ", ".join(f"{count} {word}" for word, count in case.outcomes.items())
    print(
        f"{case.name:30}{case.solver:8}{case.verdict:18}{longest:10}{worst:10.0e}{f'{seen}/{products}':>12}   {words}"
    )


def summarize(cases: list[Case]) -> None:
    print()
    for solver in ("cg", "minres", "gmres"):
        for legal in (True, False):
            chosen = [case for case in cases if case.solver == solver and (case.verdict == "legal") == legal]
            if chosen:
                total = sum((case.outcomes for case in chosen), Counter())
                words = ", ".join(f"{count} {word}" for word, count in total.most_common())
                print(f"{solver:7}{'legal:' if legal else 'illegal:':9}{words}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Legal and illegal preconditioners of SciPy's Krylov solvers.")
    parser.add_argument("--damping", type=float, default=1e-2, help="of the indefinite matrix")
    parser.add_argument("--maxiter", type=int, default=200)
    main(**vars(parser.parse_args()))
