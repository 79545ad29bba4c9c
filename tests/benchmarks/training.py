"""The comparisons of docs/training.md, each by `linop-hess bench-train`, and the accuracy of |H| by quadrature.

Run: python tests/benchmarks/training.py [--cases 16x8,8x24,...,quadrature] [--out DIR] [what else bench-train takes]
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
from common import print_table

from linop_hess.cli.main import main as linop_hess
from linop_hess.optim import quadrature

CASES = {
    "16x8": "--depth 16 --width 8 --batch 32 --seconds 10",
    "24x8": "--depth 24 --width 8 --batch 32 --seconds 14",
    "32x6": "--depth 32 --width 6 --batch 32 --seconds 14",
    "8x24": "--depth 8 --width 24 --batch 64 --seconds 5",
    "default": "--depth 16 --width 8 --batch 32 --init default --seconds 6",
    "relu": "--depth 16 --width 8 --batch 32 --activation relu --seconds 6 --optimizers "
    "sgd,adam,lbfgs,hessian-free,kfac,saddle-free,saddle-free-smooth,gauss-newton,saddle-free-uphill,gauss-newton-uphill",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join([*CASES, "quadrature"]))
    parser.add_argument("--out", default="training")
    args, rest = parser.parse_known_args()
    for name in args.cases.split(","):
        if name == "quadrature":
            poles_table()
            continue
        code = linop_hess(["bench-train", *CASES[name].split(), "--out", f"{args.out}/{name}", *rest])
        if code:
            sys.exit(code)


def poles_table() -> None:
    print("\n(λ² + δ²)^(−1/2) by quadrature: largest relative error for |λ| ≤ ‖H‖")
    poles = (4, 8, 12, 16, 20, 24)
    print_table(
        ["‖H‖/δ", *map(str, poles)],
        [[f"{r:.0e}", *(f"{quadrature_error(r, n):.0e}" for n in poles)] for r in (1e1, 1e2, 1e3, 1e4, 1e6)],
    )


def quadrature_error(ratio: float, poles: int) -> float:
    sigma, weights = quadrature(ratio, poles)
    values = np.concatenate([[0.0], np.geomspace(1e-3, ratio, 20_000)])
    return float(abs((weights / (values[:, None] ** 2 + sigma**2)).sum(1) * np.sqrt(values**2 + 1) - 1).max())


if __name__ == "__main__":
    main()
