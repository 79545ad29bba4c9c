"""How optimizers train: losses against steps and against seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from linop_hess.plot.figure import axes_or_new, colours, plain
from linop_hess.plot.labels import End, write_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# A loss of zero is drawn here; the first time on the axis of seconds, in terms of the longest.
_ZERO, _FIRST = 1e-18, 1e-3


class History(NamedTuple):
    """Losses of one run, from the initial point on, and the seconds of each."""

    losses: Sequence[float]
    seconds: Sequence[float]


def losses(
    runs: Mapping[str, Sequence[History]], *, title: str = "", name: str = "loss", clock: str = "seconds"
) -> Figure:
    """Plot the lowest loss so far against steps, at the left, and against seconds, at the right.

    Each optimizer has one colour in both, and its name at the right: the median over its runs as a line and, of several, the worst
    as a thin one.

    Parameters
    ----------
    runs : mapping of str to sequence of History
        Of each optimizer, a run a seed.
    title : str
        Above both, at the left.
    name : str
        Of what falls.
    clock : str
        Of the axis at the right.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    ValueError
        If there is no run of an optimizer, or nothing finite to draw.
    """
    if not runs or not all(runs.values()):
        raise ValueError("expected a run of each optimizer at least, got none: pass one or several")
    figure = cast("Figure", axes_or_new(None).figure)
    figure.clear()
    figure.set_size_inches(12.8, 5.6)
    left, right = figure.subplots(1, 2, sharey=True)
    last = max(run.seconds[-1] for several in runs.values() for run in several) or 1.0
    steps = max(len(run.losses) for several in runs.values() for run in several) - 1
    ends, heights = [], list[float]()
    for (label, several), colour in zip(runs.items(), colours(len(runs)), strict=True):
        for ax, by_seconds in ((left, False), (right, True)):
            across = _across(several, by_seconds, last)
            up = _lowest(several, by_seconds, across)
            median = np.median(up, axis=0)
            if len(several) > 1:
                ax.plot(across, up.max(0), color=colour, linewidth=0.9, alpha=0.75, linestyle=(0, (4, 2)), zorder=2)
            ax.plot(across, median, color=colour, linewidth=2.2, zorder=3)
            heights += [*median[np.isfinite(median)], *up[np.isfinite(up)]]
        if np.isfinite(median[-1]):
            ends.append(End(float(across[-1]), float(median[-1]), label, colour))
    if not heights:
        raise ValueError("expected losses that are finite somewhere, got none: there is nothing to draw")
    _scales(left, right, steps, last, heights)
    right.set_xlabel(clock)
    left.set_ylabel(f"lowest {name} so far")
    for ax in (left, right):
        plain(ax, "")
    write_labels(right, ends)
    count = len(next(iter(runs.values())))
    how = f"median of {count} seeds; dashed: the worst seed" if count > 1 else ""
    figure.set_layout_engine("constrained", rect=(0.0, 0.0, 0.985, 1.0))  # names at the right end within the picture
    figure.suptitle(title, x=0.01, ha="left", fontsize=14)
    left.set_title(how, loc="left", fontsize=10.5, color="0.35")
    return figure


def _across(several: Sequence[History], by_seconds: bool, last: float) -> np.ndarray:
    """Places to draw at, until the last run ends."""
    if not by_seconds:
        most = max(len(run.losses) for run in several) - 1
        return np.unique(
            np.concatenate([np.arange(min(most, 200) + 1), np.geomspace(1, max(most, 1), 300).astype(int)])
        )
    end = max(run.seconds[-1] for run in several)
    return np.geomspace(_FIRST * last, max(end, 2 * _FIRST * last), 400)


def _lowest(several: Sequence[History], by_seconds: bool, across: np.ndarray) -> np.ndarray:
    """The lowest loss so far of each run at each place; runs that have ended keep theirs."""
    rows = []
    for run in several:
        found = np.asarray(run.losses, dtype=float)
        low = np.fmin.accumulate(np.where(np.isfinite(found), np.maximum(found, _ZERO), np.inf))
        at = np.asarray(run.seconds) if by_seconds else np.arange(len(found))
        index = np.searchsorted(at, across, side="right") - 1
        rows.append(low[np.clip(index, 0, len(low) - 1)])
    return np.array(rows)


def _scales(left: Axes, right: Axes, steps: int, last: float, heights: Sequence[float]) -> None:
    from matplotlib.ticker import FixedFormatter, FixedLocator, LogLocator, NullLocator

    left.set_yscale("log")
    low, high = np.log10(min(heights)), np.log10(max(heights))
    room = max(0.06 * (high - low), 0.2)
    left.set_ylim(10.0 ** (low - room), 10.0 ** (high + room))
    left.yaxis.set_major_locator(LogLocator(numticks=9))
    left.set_xscale("symlog", linthresh=1, linscale=0.4)
    ticks: list[Any] = [0, *(10**k for k in range(int(np.log10(max(steps, 1))) + 1))]
    left.xaxis.set_major_locator(FixedLocator(ticks))
    left.xaxis.set_major_formatter(FixedFormatter([f"{tick:,}" for tick in ticks]))
    left.set_xlim(0, max(1.1 * steps, 2))
    left.set_xlabel("steps")
    right.set_xscale("log")
    right.set_xlim(_FIRST * last, 1.05 * last)
    for ax in (left, right):
        ax.yaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_minor_locator(NullLocator())
