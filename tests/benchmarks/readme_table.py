"""Run `linop-hess compare` with its defaults and put its table and picture into README.md.

Run it on a quiet machine: ``python tests/benchmarks/readme_table.py``. With ``--results FILE`` the table is made from the
results.json of an earlier run, and the picture beside that file is taken.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from linop_hess._memory import format_bytes
from linop_hess.cli.main import main as linop_hess

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- compare: begin -->", "<!-- compare: end -->"


def table(results: dict[str, Any]) -> str:
    titles = ("method", "set-up, s", "iterations", "products with H", "solve, s", "true residual", "memory")
    lines = ["| " + " | ".join(titles) + " |", "|---" + "|---:" * (len(titles) - 1) + "|"]
    for row in results["rows"]:
        iterative = row["solver"] != "direct"
        cells = (
            row["name"],
            f"{row['setup_seconds']:.2g}" if row["setup_seconds"] else "",
            str(row["iterations"]) if iterative else "",
            f"{row['products_A']:,}" if row["products_A"] else "",
            f"{row['seconds']:.2g}",
            f"{row['residual']:.0e}",
            format_bytes(row["memory"]),
        )
        lines.append("| " + " | ".join(cells) + " |")
    options, machine = results["options"], results["machine"]
    lines += [
        "",
        f"`linop-hess compare`: {options['depth']} hidden layers of {options['width']}, {options['activation']}, "
        f"{options['batch']} images, {results['parameters']:,} parameters, ε = {options['damping']:g}, Krylov solvers "
        f"stopped at {options['maxiter']} iterations. Set-up includes the derivatives; direct solves include their refinement "
        f"and certificate. {machine['threads']} thread, torch {machine['torch']}, SciPy {machine['scipy']}.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path)
    results = parser.parse_args().results
    with tempfile.TemporaryDirectory() as folder:
        if results is None:
            if linop_hess(["compare", "--out", folder]):
                raise SystemExit(1)
            results = Path(folder) / "results.json"
        shutil.copy(results.parent / "convergence.png", ROOT / "docs" / "images" / "convergence.png")
        fresh = table(json.loads(results.read_text(encoding="utf-8")))
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{BEGIN}\n{fresh}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
