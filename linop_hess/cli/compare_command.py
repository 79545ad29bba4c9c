"""The command ``linop-hess compare``: its arguments, and what it prints and writes."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import distributed as dist

from linop_hess import plot
from linop_hess.cli.arguments import (
    Help,
    add_shared,
    fraction,
    integer,
    is_first,
    machine,
    make_folder,
    missing,
    options,
    progress_bar,
    real,
    torch_threads,
)
from linop_hess.cli.compare import Outcome, compare_solvers
from linop_hess.cli.models import ACTIVATIONS, FAMILIES
from linop_hess.cli.networks import DIGITS, digits_problem


def add_compare(commands: Any) -> None:
    """Add the subcommand to argparse's subparsers."""
    compare = commands.add_parser(
        "compare",
        help="compare Krylov and direct solvers of one Newton system",
        description="Solve (H + damping I) x = gradient for a small classifier of scikit-learn's digits (8 x 8 pixels) by "
        "Krylov solvers, preconditioned ones, and the exact inverse. Prints a table, writes convergence.png and results.json. "
        "Under torchrun (torchrun --nproc-per-node 2 -m linop_hess compare ...) each process takes a part of the images.",
        epilog=_families(),
        formatter_class=Help,
    )
    compare.set_defaults(command=_compare, parser=compare)
    add = compare.add_argument
    add("--model", choices=tuple(FAMILIES), default="mlp", help="the network; what sizes mean there is said below")
    add("--depth", type=integer(1), metavar="N", help="layers or blocks, at least 1")
    add("--width", type=integer(1), metavar="N", help="neurons, channels or entries of a layer, at least 1")
    add("--batch", type=integer(1, DIGITS), metavar="N", help=f"images in the loss, 1 to {DIGITS}")
    add("--damping", type=real, default=1e-3, metavar="X", help="added to the diagonal, of either sign, or 0")
    add("--activation", choices=tuple(ACTIVATIONS), help="between the layers")
    add("--train-steps", type=integer(0), default=0, metavar="N", help="Adam steps first, at least 0")
    add("--rtol", type=fraction, default=1e-10, metavar="X", help="for Krylov, between 0 and 1")
    add("--maxiter", type=integer(1), default=300, metavar="N", help="for Krylov, at least 1")
    add_shared(compare)


def _families() -> str:
    """What depth and width count in each model, and the sizes where none are given."""
    lines = ["models, with their sizes where none are given:"]
    for name, f in FAMILIES.items():
        own = f.activation or "its own activations"
        lines.append(f"  {name:12}--depth {f.depth} {f.layers}, --width {f.width} {f.units}, --batch {f.batch}, {own}")
    return "\n".join(lines)


def _compare(arguments: argparse.Namespace) -> int:
    family = FAMILIES[arguments.model]
    if arguments.activation and not family.activation:
        arguments.parser.error(
            f"argument --activation: expected none with --model {arguments.model}, which has its own: leave it out"
        )
    for size in ("depth", "width", "batch", "activation"):
        if getattr(arguments, size) is None:
            setattr(arguments, size, getattr(family, size) or None)
    make_folder(arguments)
    if why := missing("compare"):
        print(why, file=sys.stderr)
        return 1
    with torch_threads(arguments.threads), _joined() as group:
        return _run(arguments, group)


@contextmanager
def _joined() -> Iterator[str | None]:
    """Yield the group of the processes that torchrun started; None where this one is alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
        yield None
        return
    dist.init_process_group("gloo")
    try:
        yield "world"
    finally:
        dist.destroy_process_group()


def _run(arguments: argparse.Namespace, group: str | None) -> int:
    begin = time.perf_counter()
    problem = digits_problem(
        arguments.depth, arguments.width, arguments.batch,
        arguments.activation, arguments.train_steps, arguments.seed, arguments.model,
    )  # fmt: skip
    outcome = compare_solvers(
        problem,
        arguments.damping,
        rtol=arguments.rtol,
        maxiter=arguments.maxiter,
        progress=None if arguments.no_progress or not is_first() else progress_bar,
        group=group,
    )
    if not is_first():
        return 0
    print(_headline(arguments, outcome))
    print()
    print(outcome.comparison)
    for label, why in outcome.skipped.items():
        print(f"left out: {label}: {why}")
    picture, results = arguments.out / "convergence.png", arguments.out / "results.json"
    _draw(arguments, outcome, picture)
    seconds = time.perf_counter() - begin
    results.write_text(json.dumps(_results(arguments, outcome, seconds), indent=1, allow_nan=False) + "\n")
    print(f"\nwrote {picture} and {results}; {seconds:.0f} s in all")
    return 0


def _headline(arguments: argparse.Namespace, outcome: Outcome) -> str:
    family, activation = FAMILIES[arguments.model], f"{arguments.activation}, " if arguments.activation else ""
    return (
        f"digits, {arguments.model}, depth {arguments.depth} ({family.layers}), width {arguments.width} ({family.units}), {activation}"
        f"{arguments.batch} images, {arguments.train_steps} training steps, seed {arguments.seed}{_together()}\n"
        f"{outcome.parameters:,} parameters, loss {outcome.loss:.4g}, "
        f"|gradient| {outcome.gradient_norm:.3g}\n"
        f"solving (H + {arguments.damping:g} I) x = gradient, |H + {arguments.damping:g} I| about "
        f"{outcome.hessian_norm:.3g}\n"
        f"A = that matrix by Pearlmutter products, which also measure every row's true residual"
    )


def _together() -> str:
    return f", in {dist.get_world_size()} processes" if dist.is_initialized() else ""


def _draw(arguments: argparse.Namespace, outcome: Outcome, path: Path) -> None:
    title = (
        f"Newton step, {arguments.model} of depth {arguments.depth} and width {arguments.width}, on digits "
        f"({outcome.parameters:,} parameters, damping {arguments.damping:g})"
    )
    plot.convergence(outcome.comparison, title=title).savefig(path)


def _results(arguments: argparse.Namespace, outcome: Outcome, seconds: float) -> dict[str, Any]:
    return {
        "options": options(arguments),
        "parameters": outcome.parameters,
        "loss": outcome.loss,
        "gradient_norm": outcome.gradient_norm,
        "damped_hessian_norm": outcome.hessian_norm,
        "seconds": seconds,
        "machine": machine(),
        "rows": [record.as_dict() for record in outcome.comparison],
        "skipped": outcome.skipped,
    }
