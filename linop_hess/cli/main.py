"""The command ``linop-hess``."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import scipy
import torch
from torch import distributed as dist

from linop_hess import __version__, plot
from linop_hess.cli.compare import Outcome, compare_solvers
from linop_hess.cli.models import ACTIVATIONS, FAMILIES
from linop_hess.cli.networks import DIGITS, digits_problem

INTERRUPTED = 130
"""Exit status after Ctrl-C, as of a shell: 128 and the number of SIGINT."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments after the program's name; ``sys.argv[1:]`` by default.

    Returns
    -------
    int
        The exit status: 0, or 1 where something is missing, or 130 after an interrupt. Wrong arguments end in ``SystemExit(2)`` with a
        usage message.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    family = FAMILIES[arguments.model]
    if arguments.activation and not family.activation:
        parser.error(
            f"argument --activation: expected none with --model {arguments.model}, which has its own: leave it out"
        )
    for size in ("depth", "width", "batch", "activation"):
        if getattr(arguments, size) is None:
            setattr(arguments, size, getattr(family, size) or None)
    try:
        if _is_first():
            arguments.out.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=arguments.out):  # permissions do not tell: a disk may be mounted read-only
                pass
    except OSError as error:
        parser.error(
            f"argument --out: expected a folder that can be made and written to, got {str(arguments.out)!r}: "
            f"{error.strerror}: pass another"
        )
    try:
        return int(arguments.command(arguments))
    except KeyboardInterrupt:
        if _is_first():
            print("\ninterrupted; nothing was written", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="linop-hess", description="The exact inverse Hessian of a deep network, as SciPy operators."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    compare = commands.add_parser(
        "compare",
        help="compare Krylov and direct solvers of one Newton system",
        description="Solve (H + damping I) x = gradient for a small classifier of scikit-learn's digits (8 x 8 pixels) by "
        "Krylov solvers, preconditioned ones, and the exact inverse. Prints a table, writes convergence.png and results.json. "
        "Under torchrun (torchrun --nproc-per-node 2 -m linop_hess compare ...) each process takes a part of the images.",
        epilog=_families(),
        formatter_class=_Help,
    )
    compare.set_defaults(command=_compare)
    add = compare.add_argument
    add("--model", choices=tuple(FAMILIES), default="mlp", help="the network; what sizes mean there is said below")
    add("--depth", type=_integer(1), metavar="N", help="layers or blocks, at least 1")
    add("--width", type=_integer(1), metavar="N", help="neurons, channels or entries of a layer, at least 1")
    add("--batch", type=_integer(1, DIGITS), metavar="N", help=f"images in the loss, 1 to {DIGITS}")
    add("--damping", type=_real, default=1e-3, metavar="X", help="added to the diagonal, of either sign, or 0")
    add("--activation", choices=tuple(ACTIVATIONS), help="between the layers")
    add("--train-steps", type=_integer(0), default=0, metavar="N", help="Adam steps first, at least 0")
    add("--seed", type=_integer(0, 2**63 - 1), default=0, metavar="N", help="from 0 to 2^63 - 1")
    add("--rtol", type=_fraction, default=1e-10, metavar="X", help="for Krylov, between 0 and 1")
    add("--maxiter", type=_integer(1), default=300, metavar="N", help="for Krylov, at least 1")
    add("--threads", type=_integer(1), default=1, metavar="N", help="torch's; narrow layers gain nothing")
    add("--out", type=_folder, default=Path("."), metavar="DIR", help="where the files go, made if missing")
    add("--no-progress", action="store_true", help="no progress bars")
    return parser


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults where there are any, and lines as they are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else argparse.HelpFormatter._fill_text(self, text, width, indent)


def _families() -> str:
    """What depth and width count in each model, and the sizes where none are given."""
    lines = ["models, with their sizes where none are given:"]
    for name, f in FAMILIES.items():
        own = f.activation or "its own activations"
        lines.append(f"  {name:12}--depth {f.depth} {f.layers}, --width {f.width} {f.units}, --batch {f.batch}, {own}")
    return "\n".join(lines)


def _integer(low: int, high: int | None = None) -> Callable[[str], int]:
    expected = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parse


def _real(text: str) -> float:
    value = _number(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text!r}")
    return value


def _fraction(text: str) -> float:
    value = _number(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, exclusive, got {text!r}")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _folder(text: str) -> Path:
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a folder, or a name for a new one, got the file {text!r}")
    return path


def _compare(arguments: argparse.Namespace) -> int:
    try:
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401
        import tqdm  # noqa: F401
    except ImportError as error:
        print(f"linop-hess compare needs {error.name}: pip install 'linop-hess[demo]'", file=sys.stderr)
        return 1
    threads = torch.get_num_threads()
    torch.set_num_threads(arguments.threads)
    try:
        with _joined() as group:
            return _run(arguments, group)
    finally:
        torch.set_num_threads(threads)


def _is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return os.environ.get("RANK", "0") == "0"


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
        progress=None if arguments.no_progress or not _is_first() else _bar,
        group=group,
    )
    if not _is_first():
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


def _bar(label: str, total: int) -> Any:
    from tqdm import tqdm

    return tqdm(desc=label, total=total, leave=False, delay=0.5, file=sys.stderr, disable=None)


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
    options = {k: v for k, v in vars(arguments).items() if k not in ("command", "out", "no_progress")}
    return {
        "options": options,
        "parameters": outcome.parameters,
        "loss": outcome.loss,
        "gradient_norm": outcome.gradient_norm,
        "damped_hessian_norm": outcome.hessian_norm,
        "seconds": seconds,
        "machine": {
            "processor": platform.machine(),
            "threads": torch.get_num_threads(),
            "processes": dist.get_world_size() if dist.is_initialized() else 1,
            "python": platform.python_version(),
            "linop_hess": __version__,
            "torch": torch.__version__,
            "scipy": scipy.__version__,
            "numpy": numpy.__version__,
        },
        "rows": [record.as_dict() for record in outcome.comparison],
        "skipped": outcome.skipped,
    }


if __name__ == "__main__":
    sys.exit(main())
