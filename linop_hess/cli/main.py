"""The command ``linop-hess``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from linop_hess import __version__
from linop_hess.cli.arguments import INTERRUPTED, is_first
from linop_hess.cli.bench_train import add_bench_train
from linop_hess.cli.compare_command import add_compare
from linop_hess.cli.train import add_train


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
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.command(arguments))
    except KeyboardInterrupt:
        if is_first():
            print("\ninterrupted; nothing was written", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="linop-hess", description="The exact inverse Hessian of a deep network, as SciPy operators."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (add_compare, add_train, add_bench_train):
        add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
