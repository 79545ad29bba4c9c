"""What a solve leaves behind: a `Record`, and a table of several, a `Comparison`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from linop_hess._display import Shown
from linop_hess._memory import format_bytes
from linop_hess._validate import true_or_false


@dataclass(frozen=True, eq=False, repr=False)
class Record(Shown):
    """How one solve of ``A x = b`` went, judged by the true residual ``b - A x``.

    Attributes
    ----------
    name : str
        The label used in tables and plots.
    solver : str
        ``"cg"``, ``"minres"``, ``"gmres"``, ``"lgmres"``, ``"bicgstab"`` or ``"direct"``.
    x : ndarray, shape (N,)
        The solution, or the last iterate.
    iterations : int
        Iterations, in the solver's own unit (see `linop_hess.krylov.run`); 0 for a direct solve.
    products_A, products_M : int
        Products the solver took with A and with M. Products that only measure the residual are not in it.
    seconds : float
        Wall time of the solver without the measuring.
    info : int or None
        SciPy's exit code; None where SciPy raised or was not used.
    residuals : ndarray, shape (iterations + 1,)
        The true relative residual ``||b - A x|| / ||b||`` (``||A x||`` if b = 0) at the start and after each
        iteration. The last entry belongs to `x`.
    converged : bool
        Whether the last true residual meets the tolerance.
    status : str
        One line in words.
    negative_curvature, negative_curvature_M : int
        Products with ``vᵀAv < 0`` and ``rᵀMr < 0``: any at all proves the operator is not positive definite.
    setup_seconds : float
        Time spent before the solve, such as a factorization.
    backward_error : float
        ``||b - A x|| / (||A|| ||x|| + ||b||)`` where it was measured, else NaN.
    memory : int or None
        Bytes held by the method (factors, or Krylov vectors) where known.
    """

    name: str
    solver: str
    x: np.ndarray
    iterations: int
    products_A: int
    products_M: int
    seconds: float
    info: int | None
    residuals: np.ndarray
    converged: bool
    status: str
    negative_curvature: int = 0
    negative_curvature_M: int = 0
    setup_seconds: float = 0.0
    backward_error: float = math.nan
    memory: int | None = None

    @property
    def residual(self) -> float:
        """The true relative residual of `x`."""
        return float(self.residuals[-1])

    def replace(self, **changes: Any) -> Record:
        """Return a copy with some fields changed, as `dataclasses.replace`."""
        return dataclasses.replace(self, **changes)

    def as_dict(self, *, solution: bool = False) -> dict[str, Any]:
        """Return the record as plain Python values that ``json.dumps`` takes.

        Parameters
        ----------
        solution : bool
            Include `x`, N numbers. NaN and Inf become None throughout, since JSON has neither.

        Returns
        -------
        dict

        Raises
        ------
        TypeError
            If `solution` is no bool.
        """
        solution = true_or_false(solution, "solution")
        out: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            if field.name == "x" and not solution:
                continue
            out[field.name] = _plain(getattr(self, field.name))
        out["residual"] = _plain(self.residual)
        return out

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.status}; {self.iterations} iterations, {self.products_A} products with A, "
            f"{self.products_M} with M, {self.seconds:.3g} s, true residual {self.residual:.1e}"
        )


class Comparison(Shown):
    """Several records of the same system as one table.

    Parameters
    ----------
    records : iterable of Record
        One a row, in the order of the table.

    Attributes
    ----------
    records : tuple of Record
        The rows.
    """

    def __init__(self, records: Any) -> None:
        self.records: tuple[Record, ...] = tuple(records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, name: str) -> Record:
        for record in self.records:
            if record.name == name:
                return record
        raise KeyError(f"no row {name!r}; there are {', '.join(repr(r.name) for r in self.records)}")

    def rows(self) -> list[dict[str, Any]]:
        """Return each record's `Record.as_dict` without the residual history."""
        rows = []
        for record in self.records:
            row = record.as_dict()
            del row["residuals"]
            rows.append(row)
        return rows

    def to_markdown(self) -> str:
        """Return the table in GitHub's Markdown."""
        header, *body = self._cells()
        rule = ["---"] + ["---:"] * (len(header) - 2) + ["---"]
        escaped = [[cell.replace("|", r"\|") for cell in row] for row in [header, rule, *body]]
        return "\n".join("| " + " | ".join(row) + " |" for row in escaped)

    def __str__(self) -> str:
        cells = self._cells()
        widths = [max(len(row[j]) for row in cells) for j in range(len(cells[0]))]
        last = len(widths) - 1
        lines = []
        for row in cells:
            padded = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
            padded[0], padded[last] = row[0].ljust(widths[0]), row[last]
            lines.append("  ".join(padded))
        lines.insert(1, "-" * (sum(widths) + 2 * last))
        return "\n".join(line.rstrip() for line in lines)

    def _cells(self) -> list[list[str]]:
        columns: list[tuple[str, Callable[[Record], str]]] = [
            ("method", lambda r: r.name),
            ("set-up s", lambda r: f"{r.setup_seconds:.3g}"),
            ("iterations", lambda r: str(r.iterations)),
            ("products A", lambda r: str(r.products_A)),
            ("products M", lambda r: str(r.products_M)),
            ("solve s", lambda r: f"{r.seconds:.3g}"),
            ("true residual", lambda r: f"{r.residual:.1e}"),
        ]
        if any(not math.isnan(r.backward_error) for r in self.records):
            columns.append(("backward error", lambda r: _or_dash(r.backward_error, "{:.1e}")))
        if any(r.memory is not None for r in self.records):
            columns.append(("memory", lambda r: "-" if r.memory is None else format_bytes(r.memory)))
        columns.append(("status", lambda r: r.status))
        return [[title for title, _ in columns]] + [[cell(r) for _, cell in columns] for r in self.records]


def compare(runs: Mapping[str, Record | Callable[[], Record]]) -> Comparison:
    """Run and tabulate several solves.

    Parameters
    ----------
    runs : mapping from label to Record or callable
        A callable takes no arguments, is called in order, and returns a `Record`. The label becomes its name.

    Returns
    -------
    Comparison
        Print it, or take ``.rows()``, ``.to_markdown()``, ``.records``.

    Raises
    ------
    TypeError
        If a value is neither, or a callable returns something else.
    ValueError
        If there is nothing to compare.
    """
    if not runs:
        raise ValueError("expected at least one labelled run, got an empty mapping: pass {label: record}")
    records = []
    for label, entry in runs.items():
        record = entry if isinstance(entry, Record) else entry() if callable(entry) else entry
        if not isinstance(record, Record):
            raise TypeError(
                f"expected a Record or a callable that returns one in row {label!r}, got "
                f"{type(record).__name__}: wrap the solve as `lambda: krylov.run(...)`"
            )
        records.append(record.replace(name=str(label)))
    return Comparison(records)


def _or_dash(value: float, form: str) -> str:
    return "-" if math.isnan(value) else form.format(value)


def _plain(value: Any) -> Any:
    """Return NumPy values as Python's, with NaN and Inf as None."""
    if isinstance(value, np.ndarray):
        return [_plain(v) for v in value.tolist()]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
