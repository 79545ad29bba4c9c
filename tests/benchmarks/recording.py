"""From a model to a certified solution, in this tree and in another: processor time in units of the strongest Hessian-vector product.

Each tree has a process of its own, and the two take turns, so that what else runs on the machine meets both; medians of `--repeats`.
The unit is a product with the graph of the gradient retained, the median over both.

Run: python tests/benchmarks/recording.py [--against PATH_OF_ANOTHER_WORKTREE] [--repeats 9] [name …]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import print_table
from models import CASES, Wrapped, data, drawn, sequential
from torch import Tensor, nn
from torch.nn import functional

import linop_hess as lh

PLAIN = "plain chain, depth 2000, width 4"
NAMES = [name for name in CASES if "5000" not in name and "MLP" in name or "pre-LN" in name] + [
    f"{PLAIN}, {kind}" for kind in ("class", "nn.Sequential")
]
PARTS = ("linearize", "inverse", "solve", "total", "again")


def case(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A model and its batch."""
    if name in CASES:
        make, size, shape = CASES[name]
        torch.manual_seed(0)  # for what torch draws while a model is made
        return make(), *data(size, *shape)
    chain = drawn(Wrapped(4, *[4] * 1999, 3))
    assert isinstance(chain, Wrapped)
    return sequential(chain) if "Sequential" in name else chain, *data(1, 4)


def serve(name: str) -> None:
    """Measure once for each line that comes in, and answer in JSON."""
    torch.set_num_threads(1)
    model, x, y = case(name)
    parameters = list(model.parameters())
    gradient = torch.autograd.grad(functional.cross_entropy(model(x), y), parameters, create_graph=True)
    v = [torch.randn_like(p) for p in parameters]

    def seconds(run: Callable[[], object]) -> tuple[float, object]:
        start = time.process_time()
        result = run()
        return time.process_time() - start, result

    def once() -> dict[str, float]:
        unit, _ = seconds(lambda: torch.autograd.grad(gradient, parameters, v, retain_graph=True))
        linearize, lin = seconds(lambda: lh.linearize(model, functional.cross_entropy, x, y, verify=False))
        assert isinstance(lin, lh.Linearization)
        inverse, inv = seconds(lambda: lin.inverse(1e-2))
        solve, _ = seconds(lambda: inv.solve(lin.gradient))  # type: ignore[attr-defined]
        again, _ = seconds(lin.again)
        total = linearize + inverse + solve
        return dict(zip(("unit", *PARTS), (unit, linearize, inverse, solve, total, again), strict=True))

    once(), once()
    print(lh.__file__, flush=True)
    for _ in sys.stdin:
        print(json.dumps(once()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of names")
    parser.add_argument("--against", type=Path)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve)
        return
    trees = [Path(__file__).resolve().parents[2], *([args.against.resolve()] if args.against else [])]
    for name in [n for n in NAMES if not args.names or any(part in n for part in args.names)]:
        servers = [
            subprocess.Popen(
                [sys.executable, __file__, "--serve", name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"},
            )
            for tree in trees
        ]
        found: list[list[dict[str, float]]] = [[] for _ in trees]
        for server, tree in zip(servers, trees, strict=True):
            assert server.stdout is not None
            where = server.stdout.readline()
            assert where.startswith(str(tree)), f"expected the package of {tree}, got {where}"
        for _ in range(args.repeats):
            for server, runs in zip(servers, found, strict=True):
                assert server.stdin is not None and server.stdout is not None
                server.stdin.write("\n")
                server.stdin.flush()
                runs.append(json.loads(server.stdout.readline()))
        for server in servers:
            server.communicate()
        unit = statistics.median(run["unit"] for runs in found for run in runs)
        rows = []
        for label, runs in zip(("this tree", "the other"), found, strict=False):
            parts = [f"{statistics.median(run[part] for run in runs) / unit:.2f}" for part in PARTS]
            rows.append([name, label, f"{1e3 * unit:.0f} ms", *parts])
        print_table(["model", "", "one HVP", *PARTS], rows)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
