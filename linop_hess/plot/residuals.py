"""How solvers converge: true residuals against iterations or seconds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from linop_hess.krylov.record import Record
from linop_hess.plot.figure import axes_or_new, colours, plain
from linop_hess.plot.labels import End, write_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = "oDs^vPX<>*"


def convergence(
    records: Record | Iterable[Record],
    ax: Axes | None = None,
    *,
    x: Literal["iterations", "seconds"] = "iterations",
    title: str | None = None,
) -> Figure:
    """Plot the true relative residual of each record against iterations or time.

    Both axes are logarithmic, with 0 on the axis of iterations, so that a solver of one iteration and one of a thousand are both legible.
    Each curve has its name at its end. Direct solves, which have no iterations, are marks in a column of their own, one kind of mark a
    family: "inverse, banded" and "inverse, dense" are the family "inverse".

    Parameters
    ----------
    records : Record or iterable of Record
        What `linop_hess.krylov.run`, `direct` or `compare` return.
    ax : matplotlib Axes, optional
        Where to draw; a new figure by default.
    x : {"iterations", "seconds"}
        The horizontal axis. Seconds start after the set-up and are spread evenly over the iterations, since
        only their total is measured; a set-up shifts its curve to the right.
    title : str, optional
        Set above the axes, at the left; without, one that says what is drawn, and "" for none.

    Returns
    -------
    matplotlib.figure.Figure
        The figure `ax` belongs to; call its ``savefig``. A notebook shows it.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    ValueError
        If there are no records, or `x` is neither axis.
    TypeError
        If there is something else among them.
    """
    if x not in ("iterations", "seconds"):
        raise ValueError(f"expected x='iterations' or x='seconds', got {x!r}")
    rows = [records] if isinstance(records, Record) else list(records)
    if not rows:
        raise ValueError("expected at least one record to plot, got none")
    for row in rows:
        if not isinstance(row, Record):
            raise TypeError(f"expected records, as krylov.run returns, got {type(row).__name__}: pass one or several")
    ax = axes_or_new(ax)
    families = _families(rows)
    iterative = [row for row in rows if row.solver != "direct"]
    slots = iter(_scales(ax, x, iterative, len(families) - len(iterative)))
    marks = iter(_MARKERS * len(families))
    ends = []
    for family, colour in zip(families, colours(len(families)), strict=True):
        direct = family[0].solver == "direct"
        across, up = _points(family, next(slots)) if direct else _curve(family[0], x)
        drawn = np.flatnonzero(np.isfinite(up))
        name = _name(family)
        style = _mark(next(marks)) if direct else _line(across, up)
        ax.plot(across, up, color=colour, label=name, clip_on=False, **style)
        if len(drawn):
            last = drawn[np.argmin(up[drawn])] if direct else drawn[-1]
            ends.append(End(float(across[last]), float(up[last]), name, colour))
    _limits(ax, x)
    plain(ax, _title(rows) if title is None else title)
    write_labels(ax, ends)
    return cast("Figure", ax.figure)


def _title(rows: list[Record]) -> str:
    sizes = {row.x.size for row in rows}
    return "True residual of " + (f"{len(rows)} solves" if len(rows) > 1 else rows[0].name) + (
        f", {sizes.pop():,} unknowns" if len(sizes) == 1 else ""
    )  # fmt: skip


def _families(rows: list[Record]) -> list[list[Record]]:
    """Each iterative solve by itself, direct ones by the part of their names before a comma; in the order of the records."""
    found: dict[Any, list[Record]] = {}
    for k, row in enumerate(rows):
        key = row.name.split(", ")[0] if row.solver == "direct" else k
        found.setdefault(key, []).append(row)
    return list(found.values())


def _name(family: list[Record]) -> str:
    """The name of a record; of several, what they have in common and then what they have not, the best first."""
    if len(family) == 1:
        return family[0].name
    first, _, _ = family[0].name.partition(", ")
    others = [row.name.partition(", ")[2] or row.name for row in sorted(family, key=lambda row: row.residual)]
    lines = [", ".join(others[k : k + 3]) for k in range(0, len(others), 3)]
    return f"{first}:\n" + ",\n".join(lines)


def _mark(marker: str) -> dict[str, Any]:
    return {"linestyle": "none", "marker": marker, "markersize": 8, "markeredgecolor": "white", "zorder": 4}


def _line(across: np.ndarray, up: np.ndarray) -> dict[str, Any]:
    # A jagged curve is thin and lies under the smooth ones, which it would hide.
    style: dict[str, Any] = (
        {"linewidth": 0.7, "zorder": 2, "alpha": 0.7} if _jagged(up) else {"linewidth": 2, "zorder": 3}
    )
    return style | ({"marker": "o", "markersize": 4.5} if len(across) <= 30 else {})


def _points(family: list[Record], slot: float | None) -> tuple[np.ndarray, np.ndarray]:
    up = np.array([_floored(row.residuals)[-1] for row in family])
    return np.array([row.setup_seconds + row.seconds if slot is None else slot for row in family]), up


def _floored(residuals: np.ndarray) -> np.ndarray:
    """A residual of exactly zero is drawn at 1e-18."""
    return np.maximum(residuals, 1e-18)


def _curve(record: Record, x: str) -> tuple[np.ndarray, np.ndarray]:
    up = _floored(record.residuals)
    steps = np.arange(len(up), dtype=float)
    if x == "iterations":
        return steps, up
    seconds = record.setup_seconds + record.seconds * steps / max(record.iterations, 1)
    shown = seconds > 0  # a logarithmic axis has no place for a start at 0 s
    return seconds[shown], up[shown]


def _jagged(up: np.ndarray) -> bool:
    """Whether a history of more than 30 steps rises by a fifth in every tenth of them."""
    with np.errstate(invalid="ignore"):
        return len(up) > 30 and float(np.mean(up[1:] > 1.2 * up[:-1])) > 0.1


def _scales(ax: Axes, x: str, iterative: list[Record], direct: int) -> list[float] | list[None]:
    """Set the scales; return where each family of direct solves goes on the axis of iterations."""
    from matplotlib.ticker import FixedFormatter, FixedLocator, LogLocator, NullLocator

    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(numticks=9))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_ylabel(r"true relative residual  $\|b-Ax\|\,/\,\|b\|$")
    if x == "seconds":
        ax.set_xscale("log")
        ax.set_xlabel("seconds, set-up included")
        return [None] * direct
    last = max([row.iterations for row in iterative], default=0)
    ax.set_xscale("symlog", linthresh=1, linscale=0.4)
    scale = ax.xaxis.get_transform()
    width = float(scale.transform([max(1.15 * last, 2.0)])[0])
    half = 0.05 + 0.0125 * max(direct - 3, 0)  # of the column, in terms of the width of the axis of iterations
    middle = 1.02 + half
    spots = middle + 0.025 * (np.arange(direct) - (direct - 1) / 2)
    *slots, at, centre, end = (
        scale.inverted().transform(np.array([*spots, 1.02, middle, middle + half]) * width).tolist()
    )
    ticks = [0.0] + [10.0**k for k in range(int(np.ceil(np.log10(max(last, 1)))) + 1) if 10.0**k <= max(last, 1)]
    names = [f"{tick:,.0f}" for tick in ticks]
    if direct:
        ax.axvspan(at, end, color="0.95", linewidth=0, zorder=0)
        ticks, names = [*ticks, centre], [*names, "direct"]
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_major_formatter(FixedFormatter(names))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlim(0, end if direct else at)
    ax.set_xlabel("iterations")
    return slots


def _limits(ax: Axes, x: str) -> None:
    """Room below the lowest and above the highest residual, so that no name sits on an axis."""
    heights = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in ax.lines])
    heights = heights[np.isfinite(heights) & (heights > 0)]
    if heights.size:
        low, high = np.log10(heights.min()), np.log10(heights.max())
        room = max(0.08 * (high - low), 0.3)
        ax.set_ylim(10.0 ** (low - room), 10.0 ** (high + room))
    if x == "seconds":
        ax.margins(x=0.04)
