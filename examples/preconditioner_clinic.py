"""Which ``M`` is legal in SciPy's cg, minres and gmres, and what happens when it is not.

``M`` stands for the inverse of A. What the methods assume is

    cg       A and M symmetric positive definite,
    minres   A symmetric, M symmetric positive definite,
    gmres    nothing,

and SciPy does not check it, but for one sign in minres. A is a Hessian of a deep network, damped to be indefinite or
just positive definite, multiplied by autograd: nothing of the factorizations is in it. Each row is the worst of several
right-hand sides. A verdict is by inertia, before anything is run; outcomes are by true residuals ‖b − Ax‖/‖b‖:

    solved         the true residual is below the tolerance, luck included,
    false success  info == 0, and it is not,
    gave up        info > 0, at ``maxiter``,
    raised         by minres (SciPy's words are "indefinite preconditioner", or, misleadingly, "non-symmetric matrix").

rᵀMr < 0 counts products that prove M indefinite: what a solver could have noticed.

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
    """One solver with one A and one M, over all right-hand sides."""

    A: str
    M: str
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
) -> dict[str, tuple[LinearOperator, int]]:
    """Return each M with the number of its negative eigenvalues."""
    inverse, before = lin.inverse(damping), stale.inverse(damping)
    others = {
        "exact inverse": inverse,
        "Gauss-Newton inverse": lin.gauss_newton().inverse(damping),
        "inverse at half the damping": lin.inverse(damping / 2),
        "inverse from a step before": before,
        "inverse in float32": single.inverse(damping),
    }
    blocks = inverse.block_diagonal()
    return {
        **{name: (other, other.inertia().negative) for name, other in others.items()},
        "layers' blocks of inverse": (
            aslinearoperator(block_diag(*blocks)),
            sum(int((eigvalsh(block) < 0).sum()) for block in blocks),
        ),
        "H + damping I, by mistake": (lin.damped(damping), inverse.inertia().negative),
        # L⁻ᵀ|D|⁻¹L⁻¹ where L D Lᵀ is factored: no negative eigenvalue, whatever H is.
        "exact inverse .positive()": (inverse.positive(), 0),
        "step before .positive()": (before.positive(), 0),
    }


def verdict(solver: str, negative_A: int, negative_M: int) -> str:
    if solver == "gmres" or not (negative_M or (solver == "cg" and negative_A)):
        return "legal"
    return "illegal: " + " and ".join(["A"] * (solver == "cg" and negative_A > 0) + ["M"] * (negative_M > 0))


def main(
    depth: int = 6,
    width: int = 5,
    batch: int = 6,
    damping: float = 1e-2,
    maxiter: int = 200,
    step: float = 1e-3,
    sides: int = 3,
) -> list[Case]:
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
    random = np.random.default_rng(0).standard_normal((sides - 1, hessian.shape[0]))
    cases: list[Case] = []
    for kind, epsilon in {"indefinite": damping, "definite": lin.smallest_convex_damping(margin=1e-3)}.items():
        A, negative = hessian.damped(epsilon), lin.inertia(epsilon).negative
        print(f"\nA = H + {epsilon:.5g} I, {negative} of {A.shape[0]} eigenvalues negative; rtol = {RTOL:g}\n")
        print(f"{'M':28}{'solver':8}{'verdict':20}{'iterations':>10}{'residual':>10}{'rᵀMr < 0':>12}   outcomes")
        for name, (M, negative_M) in {"none": (None, 0), **preconditioners(lin, stale, single, epsilon)}.items():
            for solver in ("cg", "minres", "gmres"):
                options: dict[str, Any] = {"restart": maxiter} if solver == "gmres" else {}
                run = [
                    lh.krylov.run(solver, A, b, M=M, rtol=RTOL, maxiter=maxiter, **options)
                    for b in (lin.gradient, *random)
                ]
                case = Case(kind, name, solver, verdict(solver, negative, negative_M), run)
                cases.append(case)
                show(case)
    summarize(cases)
    return cases


def show(case: Case) -> None:
    worst, longest = (max(getattr(r, key) for r in case.records) for key in ("residual", "iterations"))
    seen, products = (sum(getattr(r, key) for r in case.records) for key in ("negative_curvature_M", "products_M"))
    words = ", ".join(f"{count} {word}" for word, count in case.outcomes.items())
    print(f"{case.M:28}{case.solver:8}{case.verdict:20}{longest:10}{worst:10.0e}{f'{seen}/{products}':>12}   {words}")


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
