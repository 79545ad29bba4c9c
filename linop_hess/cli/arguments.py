"""What the subcommands share: arguments and their ranges, folders, progress bars, facts about the machine."""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import scipy
import torch
from torch import distributed as dist

from linop_hess import __version__

INTERRUPTED = 130
"""Exit status after Ctrl-C, as of a shell: 128 and the number of SIGINT."""


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults where there are any, and lines as they are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else argparse.HelpFormatter._fill_text(self, text, width, indent)


def add_shared(parser: argparse.ArgumentParser) -> None:
    """Add what all subcommands take."""
    add = parser.add_argument
    add("--seed", type=integer(0, 2**63 - 1), default=0, metavar="N", help="from 0 to 2^63 - 1")
    add("--threads", type=integer(1), default=1, metavar="N", help="torch's; narrow layers gain nothing")
    add("--out", type=folder, default=Path("."), metavar="DIR", help="where the files go, made if missing")
    add("--no-progress", action="store_true", help="no progress bars")


def make_folder(arguments: argparse.Namespace) -> None:
    """Make the folder that is to be written to, or end with a usage message."""
    try:
        if is_first():
            arguments.out.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=arguments.out):  # permissions do not tell: a disk may be mounted read-only
                pass
    except OSError as error:
        arguments.parser.error(
            f"argument --out: expected a folder that can be made and written to, got {str(arguments.out)!r}: "
            f"{error.strerror}: pass another"
        )


def missing(command: str) -> str:
    """Say which package of the extra ``demo`` is not installed, if an ImportError shows it, or nothing."""
    try:
        import matplotlib  # noqa: F401
        import sklearn  # noqa: F401
        import tqdm  # noqa: F401
    except ImportError as error:
        return f"linop-hess {command} needs {error.name}: pip install 'linop-hess[demo]'"
    return ""


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch use so many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return os.environ.get("RANK", "0") == "0"


def progress_bar(label: str, total: int | None, **how: Any) -> Any:
    """Return a bar on stderr where that is a terminal.

    Raises
    ------
    ImportError
        Without tqdm.
    """
    from tqdm import tqdm

    return tqdm(desc=label, total=total, leave=False, delay=0.5, file=sys.stderr, disable=None, **how)


def machine() -> dict[str, Any]:
    """Return what ran it."""
    return {
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "processes": dist.get_world_size() if dist.is_initialized() else 1,
        "python": platform.python_version(),
        "linop_hess": __version__,
        "torch": torch.__version__,
        "scipy": scipy.__version__,
        "numpy": numpy.__version__,
    }


def options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what was chosen, for a results file."""
    return {k: v for k, v in vars(arguments).items() if k not in ("command", "parser", "out", "no_progress")}


def integer(low: int, high: int | None = None) -> Callable[[str], int]:
    """Return a parser of integers of a range."""
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


def real(text: str) -> float:
    """Parse a finite number."""
    value = _number(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text!r}")
    return value


def positive(text: str) -> float:
    """Parse a positive finite number."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return value


def fraction(text: str) -> float:
    """Parse a number between 0 and 1."""
    value = _number(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, exclusive, got {text!r}")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def folder(text: str) -> Path:
    """Parse the name of a folder, which may be a new one."""
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a folder, or a name for a new one, got the file {text!r}")
    return path
