"""Plots: how solvers converge, and spectra."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from linop_hess.krylov.record import Record
from linop_hess.spectrum.density import Density

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours without the yellow, which is lost on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#7F7F7F")
_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)))
_MARKERS = "oDs^vPX<>*"


def convergence(
    records: Iterable[Record],
    ax: Axes | None = None,
    *,
    x: str = "iterations",
    title: str | None = None,
) -> Figure:
    """Plot the true relative residual of each record against iterations or time.

    Both axes are logarithmic, with 0 on the axis of iterations, so that a solver of one iteration and one of
    a thousand are both legible. Each curve carries its label at the right; direct solves are single markers.

    Parameters
    ----------
    records : iterable of Record
        What `linop_hess.krylov.run`, `direct` or `compare` return.
    ax : matplotlib Axes, optional
        Where to draw; a new figure by default.
    x : {"iterations", "seconds"}
        The horizontal axis. Seconds start after the set-up and are spread evenly over the iterations, since
        only their total is measured; a set-up shifts its curve to the right.
    title : str, optional
        Set above the axes, at the left.

    Returns
    -------
    matplotlib.figure.Figure
        The figure `ax` belongs to; call its ``savefig``.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    ValueError
        If there are no records, or `x` is neither axis.
    """
    if x not in ("iterations", "seconds"):
        raise ValueError(f"expected x='iterations' or x='seconds', got {x!r}")
    rows = list(records)
    if not rows:
        raise ValueError("expected at least one record to plot, got none")
    ax = _axes(ax)
    ends = []
    for i, record in enumerate(rows):
        colour = COLOURS[i % len(COLOURS)]
        across, up = _curve(record, x)
        if record.solver == "direct":
            style: dict[str, Any] = {
                "linestyle": "none",
                "marker": _MARKERS[i % len(_MARKERS)],
                "markersize": 8,
                "zorder": 4,
            }
        else:
            # A jagged curve is thin and lies under the smooth ones, which it would hide.
            width, depth = (0.8, 2) if _jagged(up) else (2, 3)
            style = {
                "linestyle": _DASHES[i // len(COLOURS) % len(_DASHES)],
                "linewidth": width,
                "zorder": depth,
            }
            if len(across) <= 30:
                style |= {"marker": "o", "markersize": 4.5}
        ax.plot(across, up, color=colour, label=record.name, clip_on=False, **style)
        drawn = np.flatnonzero(np.isfinite(up))
        if len(drawn):
            ends.append((float(across[drawn[-1]]), float(up[drawn[-1]]), record.name, colour))
    _scales(ax, x, ends)
    _labels(ax, ends)
    if title:
        ax.set_title(title, loc="left", fontsize=13, pad=12)
    return cast("Figure", ax.figure)


def spectrum(density: Density, ax: Axes | None = None, *, title: str | None = None) -> Figure:
    """Plot the histogram of a spectrum, negative eigenvalues in one colour and positive ones in another.

    Counts are on a logarithmic axis. The null space has a bar of its own at zero, hatched, if zero is within the edges.

    Parameters
    ----------
    density : Density
        What `linop_hess.spectrum.density` returns.
    ax : matplotlib Axes, optional
        Where to draw; a new figure by default.
    title : str, optional
        Set above the axes, at the left.

    Returns
    -------
    matplotlib.figure.Figure
        The figure `ax` belongs to; call its ``savefig``.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    TypeError
        If `density` is no Density.
    """
    if not isinstance(density, Density):
        raise TypeError(f"expected what linop_hess.spectrum.density returns, got {type(density).__name__}")
    from matplotlib.ticker import NullLocator

    ax = _axes(ax)
    edges, counts = density.edges, density.counts
    farthest = float(np.abs(edges).max())
    near = float(np.abs(edges[edges != 0]).min()) if (edges != 0).any() else 1.0
    decades = np.log10(farthest / near) if farthest > near else 0.0
    symlog = density.scale == "symlog" and decades > 1.5
    if symlog:
        ax.set_xscale("symlog", linthresh=near, linscale=max(0.1 * decades, 0.2))
    signs = (("negative", COLOURS[1], edges[1:] <= 0), ("positive", COLOURS[0], edges[:-1] >= 0))
    for side, colour, chosen in (*signs, ("either sign", "0.6", (edges[:-1] < 0) & (edges[1:] > 0))):
        shown = chosen & (counts > 0)
        if shown.any():
            label = f"{side}: {int(counts[chosen].sum()):,}"
            left, width = edges[:-1][shown], np.diff(edges)[shown]
            ax.bar(left, counts[shown], width, align="edge", color=colour, linewidth=0, label=label)
    limits = edges[[0, -1]]
    if density.nullity and edges[0] <= 0.0 <= edges[-1]:
        half = 0.4 * near if symlog else 0.2 * float(np.diff(edges).min())
        ax.bar(
            0.0, density.nullity, 2 * half, facecolor="none", edgecolor="0.35", hatch="////", linewidth=0.8,
            label=f"null space (|λ| ≤ {density.null:.0e}): {density.nullity:,}",
        )  # fmt: skip
        limits = np.array([min(limits[0], -half), max(limits[1], half)])
    elif density.nullity:
        ax.plot([], [], " ", label=f"null space, not in range: {density.nullity:,}")
    ax.set_yscale("log")
    ax.set_ylim(0.7, 2.0 * max(int(counts.max(initial=1)), density.nullity, 1))
    ax.yaxis.set_minor_locator(NullLocator())
    drawn = ax.xaxis.get_transform()
    low, high = drawn.transform(limits)
    margin = 0.02 * (high - low)
    ax.set_xlim(*drawn.inverted().transform([low - margin, high + margin]))
    if symlog:
        ax.set_xticks(_signed_decades(near, decades, float(edges[0]), float(edges[-1])))
        ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("eigenvalue")
    ax.set_ylabel("number of eigenvalues")
    ax.grid(axis="y", color="0.9", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=4)
    if title:
        ax.set_title(title, loc="left", fontsize=13, pad=34)
    return cast("Figure", ax.figure)


def _signed_decades(near: float, decades: float, low: float, high: float) -> list[float]:
    """Ticks at powers of ten on either side of zero, four at most, and zero."""
    first, step = int(np.ceil(np.log10(near))), max(1, int(np.ceil(decades / 4)))
    powers = [10.0**k for k in range(first, first + int(decades) + 2, step)]
    return (
        [-p for p in powers if -p >= low][::-1] + [0.0] * (low <= 0.0 <= high) + [p for p in powers if low <= p <= high]
    )


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "linop_hess.plot needs matplotlib, which is not installed: pip install 'linop-hess[demo]'"
        ) from error
    # Not pyplot's: a figure made here is not kept alive nor shown by a notebook twice.
    figure = Figure(figsize=(9.6, 5.4), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    return figure.add_subplot()


def _curve(record: Record, x: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the abscissas and the residuals; a residual of exactly zero is drawn at 1e-18."""
    up = np.maximum(record.residuals, 1e-18)
    if record.solver == "direct":
        up = up[-1:]
        return np.array([1.0 if x == "iterations" else record.setup_seconds + record.seconds]), up
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


def _scales(ax: Axes, x: str, ends: list[tuple[float, float, str, str]]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(numticks=9))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_ylabel(r"true relative residual  $\|b-Ax\|\,/\,\|b\|$")
    if x == "iterations":
        last = max([end[0] for end in ends], default=1.0)
        ax.set_xscale("symlog", linthresh=1, linscale=0.4)
        ticks = [0.0] + [10.0**k for k in range(int(np.ceil(np.log10(max(last, 1)))) + 1)]
        ax.set_xticks(ticks)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:,.0f}"))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xlim(0, max(1.15 * last, 2))
        ax.set_xlabel("iterations (a direct solve is drawn at 1)" if _any_direct(ax) else "iterations")
    else:
        ax.set_xscale("log")
        ax.set_xlabel("seconds, set-up included")
    ax.grid(axis="y", color="0.9", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.margins(y=0.06)


def _any_direct(ax: Axes) -> bool:
    return any(line.get_linestyle() == "None" for line in ax.lines)


def _labels(ax: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Write each name right of the axes at the height of its curve's end, moved apart where they collide."""
    if not ends:
        return
    ends = sorted(ends, key=lambda end: end[1])
    ax.get_xlim(), ax.get_ylim()  # settle the limits, which transData alone does not
    wanted = [float(ax.transAxes.inverted().transform(ax.transData.transform(end[:2]))[1]) for end in ends]
    gap = min(0.062, 1.0 / len(ends))
    heights = _spread(wanted, gap)
    for (across, up, name, colour), height in zip(ends, heights, strict=True):
        ax.annotate(
            name,
            xy=(across, up),
            xycoords="data",
            xytext=(1.04, height),
            textcoords="axes fraction",
            color=colour,
            fontsize=10,
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.7,
                "alpha": 0.55,
                "shrinkA": 2,
                "shrinkB": 3,
                "relpos": (0.0, 0.5),
            },
        )


def _spread(wanted: list[float], gap: float) -> list[float]:
    """Return heights in [0, 1] at least `gap` apart, closest to the ascending `wanted` by least squares."""
    pools: list[tuple[float, int]] = []  # (height of its lowest member, members)
    for height in wanted:
        pool = (min(max(height, 0.0), 1.0), 1)
        while pools and pools[-1][0] + gap * pools[-1][1] > pool[0]:
            low, count = pools.pop()
            total = count + pool[1]
            pool = ((low * count + (pool[0] - gap * count) * pool[1]) / total, total)
        pools.append(pool)
    heights = [low + gap * k for low, count in pools for k in range(count)]
    # Push what left the axes back in, from either end.
    for k, height in enumerate(heights):
        heights[k] = max(height, gap * k)
    for k in range(len(heights) - 1, -1, -1):
        heights[k] = min(heights[k], 1 - gap * (len(heights) - 1 - k))
    return heights
