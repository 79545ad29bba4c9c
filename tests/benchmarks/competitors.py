"""Full batches: dense and sketched against what else one would take, each at the best of some settings, in one run.

Run: python tests/benchmarks/competitors.py [--case 6x10 ...] [--most 300] [--save FILE.json]. Digits, all 1,797 samples, tanh, cross
entropy; the right-hand side is the gradient, and every way is GMRES on the same operator, to a relative residual of 1e-6. Processor time
of one thread, in Hessian-vector products of the same run. K-FAC is that of curvlinops, where it is installed, with exact damping.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from common import machine, print_table
from sketched import RTOL, Case
from torch import Tensor, nn

import linop_hess as lh
from linop_hess.lq.iterative.core import weighted_core
from linop_hess.lq.iterative.lanczos import krylov_basis
from linop_hess.lq.iterative.options import SketchOptions
from linop_hess.lq.matrix.hessian import assembled
from linop_hess.lq.methods.mixed import MixedFactorization
from linop_hess.lq.methods.sketched import SketchedFactorization
from linop_hess.lq.pivots.bunch_kaufman import SymmetricFactor

# Depth, width, Adam steps, damping.
CASES = {
    "6x10": (6, 10, 0, 1e-2),
    "20x10": (20, 10, 0, 1e-1),
    "10x16 trained": (10, 16, 200, 1e-2),
    "20x16 trained": (20, 16, 200, 1e-2),
}

M = Callable[[Tensor], Tensor]


class Outcome(NamedTuple):
    """One way with one setting; times in products."""

    way: str
    setting: str
    set_up: float
    iterations: int
    residual: float
    total: float

    @property
    def is_reached(self) -> bool:
        return self.residual <= 1.01 * RTOL


def deflated(case: Case, rank: int) -> M:
    """The spectral preconditioner of H on a Lanczos basis: (QᵀHQ + εI)⁻¹ there, 1/ε elsewhere."""
    Q = krylov_basis(case.problem.hessian_product, case.g[:, 0], rank, None).directions
    T = Q.mT @ case.problem.hessian_product(Q)
    T = (T + T.mT) / 2 + case.damping * torch.eye(rank, dtype=T.dtype)

    def apply(X: Tensor) -> Tensor:
        inside = Q.mT @ X
        return Q @ torch.linalg.solve(T, inside) + (X - Q @ inside) / case.damping

    return apply


def sub_batch(case: Case, samples: int) -> M:
    """The inverse of a weighted sub-batch, dense."""
    core = weighted_core(case.problem, case.analysis.samples, samples)
    assert core is not None
    H = assembled(lh.lq.Analysis(core)).float()
    H.diagonal().add_(case.damping)
    factors = SymmetricFactor.of(H)
    return lambda X: factors.solve(X.float())


def kfac(case: Case, multiple: float) -> M:
    """Kronecker factors of the exact Gauss-Newton blocks, damped by so many times the damping."""
    from curvlinops import KFACInverseLinearOperator, KFACLinearOperator

    parameters = list(case.model.parameters())
    factors = KFACLinearOperator(
        case.model, nn.CrossEntropyLoss(), parameters, [case.data], fisher_type="type-2", check_deterministic=False,
        separate_weight_and_bias=False,
    )  # fmt: skip
    inverse = KFACInverseLinearOperator(factors, damping=multiple * case.damping, use_exact_damping=True)
    operator = (
        inverse.to_scipy() if hasattr(inverse, "to_scipy") else inverse
    )  # a SciPy operator itself in older versions

    def apply(X: Tensor) -> Tensor:
        return torch.from_numpy(operator @ X.float().numpy())

    with torch.enable_grad():
        apply(case.g)  # what it is made of
    return apply


def ways() -> Iterator[tuple[str, str, Callable[[Case], M]]]:
    """Every way with every setting."""
    yield "plain GMRES", "", lambda case: lambda X: X
    for rank in (64, 128, 256):
        yield "Lanczos deflation", f"rank {rank}", lambda case, rank=rank: deflated(case, rank)
    for samples in (200, 400, 800):
        yield "sub-batch inverse", f"{samples} samples", lambda case, n=samples: sub_batch(case, n)
    if importlib.util.find_spec("curvlinops"):
        for multiple in (1.0, 10.0, 100.0):
            yield "K-FAC", f"{multiple:g} times the damping", lambda case, c=multiple: kfac(case, c)
    for rank, core in ((256, 600), (384, 600), (256, None)):
        options = SketchOptions(rank=rank, core=core)
        yield (
            "sketched",
            f"rank {rank}, {core or 'all'} samples",
            lambda case, o=options: SketchedFactorization(case.fresh, case.damping, o).solve,
        )
    yield "dense in float32", "", lambda case: MixedFactorization(case.fresh, case.damping)._approximate


def measured(case: Case, way: str, setting: str, make: Callable[[Case], M], most: int) -> Outcome:
    """Set up and solve once."""
    begin = time.process_time()
    apply = make(case)
    set_up = (time.process_time() - begin) / case.unit
    iterations, residual, spent = case.iterate(apply, most)
    return Outcome(way, setting, set_up, iterations, residual, set_up + spent)


def compared(name: str, most: int) -> list[Outcome]:
    """Of each way the setting with the least total, or where none reaches it with the least residual."""
    depth, width, steps, damping = CASES[name]
    case = Case(depth, width, damping, steps, 1e-3)
    print(f"\n{name}, N = {case.problem.size:,}, damping {damping:g}: a product takes {1e3 * case.unit:.1f} ms\n")
    best: dict[str, Outcome] = {}
    for way in ways():
        found = measured(case, *way, most if way[0] != "plain GMRES" else 2 * most)
        print("  " + " ".join(map(str, found)), flush=True)
        have = best.get(found.way)
        if have is None or _rank(found) < _rank(have):
            best[found.way] = found
    return list(best.values())


def _rank(found: Outcome) -> tuple[bool, float]:
    return not found.is_reached, found.total if found.is_reached else found.residual


def rows(outcomes: list[Outcome]) -> list[list[str]]:
    """Of a table."""
    return [
        [
            found.way,
            found.setting,
            f"{found.set_up:.0f}",
            f"{found.iterations}",
            f"{found.total:.0f}" if found.is_reached else f"{found.residual:.0e} after {found.total:.0f}",
        ]
        for found in outcomes
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--save", metavar="FILE.json", help="add the outcomes to it")
    parser.add_argument("--most", type=int, default=300, help="iterations; plain GMRES has twice as many")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    for name in arguments.case:
        outcomes = compared(name, arguments.most)
        print()
        print_table(["way", "best setting", "set-up", "iterations", "total"], rows(outcomes))
        if arguments.save:
            with open(arguments.save, "a") as file:
                file.write(json.dumps({"case": name, "outcomes": outcomes}) + "\n")


if __name__ == "__main__":
    main()
