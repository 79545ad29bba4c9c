"""Linearizing again at new parameters: `Linearization.again` against `linearize`, and what it is of a step.

Both in a warm process, one after the other, at new parameters each time; the median of `--repeats`. Products and gradients of both are
equal to the last bit, which is checked. With `--shares`, what of `again` is spent where: on what is computed with the numbers of the new
parameters, and on all the rest, in seconds of the processor.

Run: python tests/benchmarks/again.py [--repeats 15] [--shares]
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import batch, machine, network, print_table
from torch import Tensor, nn

import linop_hess as lh
from linop_hess.graph import build, layers, recorded
from linop_hess.graph.rules.base import Kind
from linop_hess.graph.rules.operation import Rule
from linop_hess.lq.problem import Problem
from linop_hess.lq.transition import Transition

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import transformer  # noqa: E402


class Recorded(nn.Module):
    """A model that is recorded, as any is but a plain `nn.Sequential`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


Case = tuple[nn.Module, Callable[..., Tensor], Any, Any]


def digits_like(depth: int, width: int, size: int, recorded: bool) -> Case:
    model = network(depth, width, inputs=64, outputs=10)
    x, y = batch(size, inputs=64, outputs=10)
    return Recorded(model) if recorded else model, nn.CrossEntropyLoss(), x, y


def decoder() -> Case:
    torch.manual_seed(0)
    inputs, targets = transformer.windows(6)
    return transformer.Decoder(2, 4, 6).double(), transformer.loss_fn, inputs[:6], targets[:6]


CASES: dict[str, Callable[[], Case]] = {
    "16 x 8, batch 32, plain chain": lambda: digits_like(16, 8, 32, False),
    "8 x 24, batch 64, plain chain": lambda: digits_like(8, 24, 64, False),
    "16 x 8, batch 32, recorded": lambda: digits_like(16, 8, 32, True),
    "8 x 24, batch 64, recorded": lambda: digits_like(8, 24, 64, True),
    "transformer of the examples": decoder,
}


def measured(case: Case, repeats: int) -> tuple[float, float, float]:
    """Milliseconds of `linearize` without and with its verification, and of `again`."""
    model, loss_fn, x, y = case
    lin = lh.linearize(model, loss_fn, x, y)
    times: list[tuple[float, float, float]] = []
    for seed in range(repeats):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.02 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
        start = time.perf_counter()
        lh.linearize(model, loss_fn, x, y, verify=False)
        unverified = time.perf_counter()
        anew = lh.linearize(model, loss_fn, x, y)
        middle = time.perf_counter()
        lin = lin.again()
        times.append((unverified - start, middle - unverified, time.perf_counter() - middle))
        v = np.random.default_rng(seed).standard_normal(lin.problem.size)
        assert np.array_equal(lin.gradient, anew.gradient) and np.array_equal(lin.H @ v, anew.H @ v)
    first, verified, again = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
    return first, verified, again


def kinds(of: type) -> list[type]:
    """A class and all that derive from it."""
    return [of, *(kind for derived in of.__subclasses__() for kind in kinds(derived))]


SHARES: dict[str, list[tuple[Any, str]]] = {
    "run of the model": [(layers, "_forward"), (build, "capture")],
    "the loss, twice differentiated": [(layers, "linearize_loss"), (build, "linearize_loss")],
    "adjoints, gradient": [(Transition, "substitute_adjoint"), (Problem, "apply_Gt")],
    "derivatives of layers": [
        (kind, name) for kind in kinds(Kind) for name in ("linearize", "curve") if name in vars(kind)
    ],
    "of recorded operations": [
        (kind, name) for kind in kinds(Rule) for name in ("linearize", "curve") if name in vars(kind)
    ],
    "finite, equal to autograd's": [
        (layers, "_check_finite"),
        (recorded, "_require_finite"),
        (build, "_compare_gradients"),
    ],
}
"""What is computed with numbers, by the functions that do it, none of which calls another."""


def shares(case: Case, repeats: int) -> list[float]:
    """Parts of the time of `again` by SHARES, and the rest."""
    spent, active = dict.fromkeys(SHARES, 0.0), list[str]()

    def timed(label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **named: Any) -> Any:
            if active:  # of one part, called by another
                return function(*args, **named)
            active.append(label)
            start = time.process_time()
            try:
                return function(*args, **named)
            finally:
                spent[active.pop()] += time.process_time() - start

        return run

    lin = lh.linearize(*case)
    lin = lin.again()
    before = [(place, name, vars(place)[name]) for places in SHARES.values() for place, name in places]
    for label, places in SHARES.items():
        for place, name in places:
            setattr(place, name, timed(label, getattr(place, name)))
    gc.collect()
    gc.disable()  # a pass over all objects takes as long as ten of these
    start = time.process_time()
    for _ in range(repeats):
        lin = lin.again()
    whole = time.process_time() - start
    gc.enable()
    for place, name, function in before:
        setattr(place, name, function)
    parts = [seconds / whole for seconds in spent.values()]
    return [*parts, 1.0 - sum(parts)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--shares", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    if args.shares:
        found = [[name, *(f"{share:.0%}" for share in shares(make(), args.repeats))] for name, make in CASES.items()]
        print_table(["", *SHARES, "the rest"], found)
        return
    rows = []
    for name, make in CASES.items():
        first, verified, again = measured(make(), args.repeats)
        rows.append([name, f"{first:.1f}", f"{verified:.1f}", f"{again:.1f}", f"{again / verified:.2f}"])
    print_table(["", "linearize, verify=False, ms", "linearize, ms", "again, ms", "again / linearize"], rows)


if __name__ == "__main__":
    main()
