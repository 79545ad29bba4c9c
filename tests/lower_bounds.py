"""Run the tests with the oldest releases that pyproject.toml allows, in a virtual environment of their own.

    python tests/lower_bounds.py [arguments of pytest]

Every ``name>=version`` of the dependencies and of the extra ``test`` becomes ``name==version``. Needs a Python that has wheels of them
all (3.11 or 3.12 for torch 2.3), and an index or a directory of wheels that pip knows; where they cannot be installed the exit code is 2.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]


def lower_bounds(pyproject: Path = ROOT / "pyproject.toml") -> list[str]:
    """Return the requirements of the package and its tests, each pinned to its lower bound."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    pinned = []
    for requirement in project["dependencies"] + project["optional-dependencies"]["test"]:
        match = re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement)
        if match is None:
            raise ValueError(f"expected a requirement like name>=1.2, got {requirement!r}: give it a lower bound")
        pinned.append(f"{match[1]}=={match[2]}")
    return pinned


def main(arguments: list[str]) -> int:
    """Install and run; return the exit code of pytest, or 2."""
    with tempfile.TemporaryDirectory() as scratch:
        venv.create(scratch, with_pip=True)
        python = str(Path(scratch) / ("Scripts" if os.name == "nt" else "bin") / "python")
        pinned = lower_bounds()
        print("installing", *pinned, flush=True)
        if subprocess.run([python, "-m", "pip", "install", "--quiet", *pinned]).returncode:
            print("could not be installed: nothing was run", file=sys.stderr)
            return 2
        environment = dict(os.environ, PYTHONPATH=str(ROOT))
        return subprocess.run([python, "-m", "pytest", *arguments], cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
